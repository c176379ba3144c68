"""Every demand of a policy.toml at every door of a device: what is against it is refused, or the table says why not.

`python tests/deployment/device/test_owner_policy.py` writes the table of docs/reference/policy.md.
"""

import runpy
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message

from fedveil.base.refusal import Refusal
from fedveil.deployment.device.agent import Agent
from fedveil.deployment.device.client_bundle import read_client_bundle, renew_roster, take_shipped
from fedveil.deployment.device.enrol import MAKING, _complete
from fedveil.deployment.device.enrolment import PRIVATE
from fedveil.deployment.device.owner_policy import OwnerPolicy
from fedveil.deployment.provision import revoke, rotate
from fedveil.deployment.rollover import roll_over
from fedveil.links.enrolment.token import Token
from fedveil.messages.flower_adapter import name_message
from fedveil.messages.local_training import LocalTraining
from fedveil.messages.notices import RunOver, message_to, renewal_to
from fedveil.messages.secure_wire import messages_of, read_position
from fedveil.messages.training_order import ORDER_KEY, ModeName, OwnLayers, RecordTerms
from fedveil.messages.wire import SECURE_RECORD, Exchange, instruct, memory_arrays
from fedveil.privacy.budget import Adjacency
from fedveil.privacy.ledger.ledger import read_entries
from fedveil.privacy.ledger.ledger_state import RESERVE
from fedveil.privacy.mechanisms.sum_spec import Segment, SumSpec
from fedveil.privacy.secagg import messages as wire
from fedveil.privacy.secagg.refusal import Refused
from fedveil.privacy.secagg.transcript import Profile
from fedveil.privacy.statistics.evaluation import Evaluation
from fedveil.privacy.statistics.inquiry import read_inquiry
from fedveil.questions.wire import evaluation_content, question_content
from fedveil.server.masking import Masking
from fedveil.server.round_terms import Sum
from fedveil.server.secure_sum import SecureSums

MADE = runpy.run_path(str(Path(__file__).parents[2] / "faults" / "devices.py"))
PAGE = Path(__file__).parents[3] / "docs" / "reference" / "policy.md"
BEGIN, END = "<!-- table: tests/deployment/device/test_owner_policy.py -->\n", "<!-- end of the table -->\n"
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

DOORS = {
    "enrol": "enrolment of a device without a bundle",
    "again": "enrolment of a device that has one",
    "copy": "a roster that is copied into the bundle",
    "roster": "a roster that the server sends",
    "rollover": "new keys of the authority, which the old one signed",
    "cohort": "a proposed cohort",
    "masks": "an order to send a masked vector, and each message about who is left",
    "confirm": "the list of survivors to confirm",
    "train": "an order to train, in the clear",
    "ask": "a question, in the clear",
    "rows": "a question about single records, in the clear",
    "evaluate": "an evaluation, in the clear",
    "scale": "the question for the scaling of inputs, in the clear",
    "end": "the end of a run",
}
REASONS = {
    "a": "the device has no policy before its first bundle brings one; a token names the authority",
    "b": "no vector is asked for here, and nothing is charged",
    "c": "no roster is changed here; a step under another roster than its proposal ends the attempt",
    "d": "the cohort's terms were held against it at the proposal, and bind every later step",
    "e": "a sum in the clear has no cohort that a device could check; only a trusted server may have a vector of a client",
    "f": "masks show the server no single vector",
    "g": "not a refusal: members that are not peers count as colluders, in the noise and in the charge",
    "h": "the vector was charged, and left",
    "i": "a limit for questions, and this is none",
    "j": "the records' own noise hides them, and the norm of a part is fixed at 1",
    "k": "the proposal brings only fresh keys",
    "l": "binds a semi-honest server alone, in the sparse graph of a large cohort, whose shape is held against it there",
    "m": "no authority is replaced here: a device that does not follow the rollover takes the old one's word alone",
    "n": "names keys of witnesses; the next row demands them",
    "o": "an order that protects records names no such layers",
    "p": "without it a device that has a query does not start, so no message reaches it; a bundle that brings one is refused",
    "q": "a demand on runs, and this is a question",
    "r": "the time for the demands of approval",
}
ORDERS = ("train", "ask", "rows", "evaluate", "scale")
QUESTIONS = ORDERS[1:]


@dataclass(frozen=True)
class Against:
    """Demand that a message violates.

    Attributes:
      policy: with which the device refuses.
      lenient: with which it does not.
      how: what the message is made with.
      wrong: what it is made with beside, where it is to be refused; then `policy` may say nothing.
    """

    policy: Mapping[str, Any] = field(default_factory=dict[str, Any])
    lenient: Mapping[str, Any] = field(default_factory=dict[str, Any])
    how: Mapping[str, Any] = field(default_factory=dict[str, Any])
    wrong: Mapping[str, Any] = field(default_factory=dict[str, Any])


Cell = Against | str  # of REASONS
NOBODY = {"nobody": "0" * 64}
TOO_FEW_PEERS = Against({"peers": NOBODY, "peers_at_least": 1})
NO_LAYERS = Against({"own_layers": False}, wrong={"layers": OwnLayers(("head.*",), 1)})
WITNESSED = {"witnesses": NOBODY, "witnessed_by_at_least": 1}
YESTERDAY = datetime.now(UTC).date() - timedelta(days=1)
COMMON: dict[str, Any] = {"purposes": ("statistics", "evaluation", "scaling")}


def row(default: str, **cells: Cell) -> dict[str, Cell]:
    """Return a demand's cells: those that are named, "a" at the first enrolment, and the default at all other doors."""
    return {door: cells.get(door, "a" if door == "enrol" else default) for door in DOORS}


def at(doors: tuple[str, ...], cell: Cell) -> dict[str, Cell]:
    return dict.fromkeys(doors, cell)


def spent(against: Against, questions: str | None = None) -> dict[str, Cell]:
    """Return the cells of a limit on what may be spent."""
    asked = at(QUESTIONS, against)
    if questions is not None:
        return row("b", masks="i", confirm="h", train="i", **asked)
    return row("b", masks=against, confirm="h", train=against, **asked)


def of_cohort(against: Against, **cells: Cell) -> dict[str, Cell]:
    """Return the cells of a demand on the terms of a cohort."""
    return row("b", **{"cohort": against, "masks": "d", "confirm": "d", **at(ORDERS, "e"), **cells})


def of_roster(again: Cell, **cells: Cell) -> dict[str, Cell]:
    return row("c", **{"again": again, "copy": again, "roster": again, **cells})


TABLE: dict[str, dict[str, Cell]] = {
    "target_epsilon": spent(Against({"target_epsilon": 1e-6})),
    "target_delta": spent(Against({"target_delta": 1e-300})),
    "until": spent(Against({"until": YESTERDAY})),
    "questions_epsilon": spent(Against({"questions_epsilon": 1e-6}), "only"),
    "purposes": row(
        "b",
        masks=Against({"purposes": ()}, how={"purpose": "evaluation"}),
        confirm="h",
        train=Against({"purposes": ()}, how={"purpose": "evaluation"}),
        **at(QUESTIONS, Against({"purposes": ()})),
    ),
    "queries": row("p", enrol="p"),
    "runs": spent(Against({"runs": ("autumn",)})),
    "maximum_local_epochs": spent(Against({"maximum_local_epochs": 1})),
    "own_layers": row(
        "b",
        masks=NO_LAYERS,
        confirm="h",
        rows="o",
        **at(("train", "ask", "evaluate", "scale"), NO_LAYERS),
    ),
    "trust_server": row(
        "b",
        cohort="f",
        masks="f",
        confirm="f",
        rows="j",
        **at(("train", "ask", "evaluate", "scale"), Against({"trust_server": False})),
    ),
    "maximum_clipping_norm": of_cohort(
        Against({"maximum_clipping_norm": 0.5}),
        masks=Against({"maximum_clipping_norm": 0.5}),
        rows="j",
        **at(("train", "ask", "evaluate", "scale"), Against({"maximum_clipping_norm": 0.5})),
    ),
    "minimum_noise_multiplier": of_cohort(
        Against({"minimum_noise_multiplier": 3.1}), **at(ORDERS, Against({"minimum_noise_multiplier": 3.1}))
    ),
    "minimum_cohort": of_cohort(
        Against({"minimum_cohort": 5}),
        masks=Against(wrong={"left": (2, 3)}),
        confirm=Against(wrong={"left": (2, 3)}),
    ),
    "collusion": of_cohort(Against({"collusion": 0.5})),
    "dropout": of_cohort("l"),
    "profile": of_cohort(
        Against({"profile": "malicious"}, {"profile": "semi_honest"}, {"profile": Profile.SEMI_HONEST})
    ),
    "suites": of_cohort(Against({"suites": (2,)})),
    "peers": row("g", again="c", copy="c", roster="c", rollover="c", end="b", **at(ORDERS, "e")),
    "peers_at_least": of_cohort(
        TOO_FEW_PEERS,
        again=TOO_FEW_PEERS,
        copy=TOO_FEW_PEERS,
        roster=TOO_FEW_PEERS,
        masks=TOO_FEW_PEERS,
        confirm=TOO_FEW_PEERS,
    ),
    "approve_runs": row(
        "b",
        cohort="k",
        confirm="h",
        **at(("masks", "train"), Against({"approve_runs": True})),
        **at(QUESTIONS, "q"),
    ),
    "approve_questions": row(
        "b",
        cohort="k",
        confirm="h",
        **at(("masks", "train"), "i"),
        **at(QUESTIONS, Against({"approve_questions": True})),
    ),
    "approve_within": row("r"),
    "approve_rosters": of_roster(Against({"approve_rosters": True})),
    "cosigned_by_at_least": of_roster(Against({"cosigned_by_at_least": 1})),
    "approve_authority": row("m", rollover=Against({"approve_authority": True})),
    "authority": of_roster(Against({"authority": "ab" * 32}), rollover=Against({"authority": "ab" * 32})),
    "minimum_roster_version": of_roster(
        Against({"minimum_roster_version": 9}), cohort=Against({"minimum_roster_version": 9}), masks="d"
    ),
    "attest": row(
        "b",
        cohort="k",
        masks=Against({"attest": ("false",)}),
        confirm=Against({"attest": ("false",)}),
        **at(ORDERS, Against({"attest": ("false",)})),
    ),
    "require_log": row(
        "b", **at(("cohort", "masks", "confirm", *ORDERS, "end"), Against({"require_log": True}))
    ),
    "witnesses": row("n"),
    "witnessed_by_at_least": row(
        "b", **at(("cohort", "masks", "confirm", *ORDERS, "end"), Against(WITNESSED))
    ),
}


def test_the_table_has_every_demand_and_every_door() -> None:
    assert set(TABLE) == {each.name for each in fields(OwnerPolicy)}
    assert {
        letter for cells in TABLE.values() for letter in cells.values() if isinstance(letter, str)
    } == set(REASONS)


# --- the doors: each returns whether the device of c0 refuses ------------------------------------------------------

ORDER = replace(MADE["ORDER"], training=LocalTraining(0.1, 2, 10))
CENTRAL = replace(ORDER, privacy=ModeName.CLIENT_CENTRAL)
SPEC: SumSpec = MADE["SPEC"]
LABELS = {"kind": "histogram", "name": "classes", "of": "label", "categories": ["0", "1", "2"]}
RECORDS = RecordTerms(8.0, 1e-5, 0.5, Adjacency.ZERO_OUT)


def answers(clients: Path, policy: Mapping[str, Any], message: Message) -> bool:
    """Return whether c0 refuses a message, and charges nothing then."""
    device = MADE["device_of"](clients / "c0", **{**COMMON, **policy})
    name_message(message, "m")
    refused = device.answer(message).has_error()
    paths = [each for each in (device.ledger.path, device.ledger.records) if each.exists()]
    assert any(entry.kind == RESERVE for path in paths for entry in read_entries(path)) != refused
    return refused


def spec_with(purpose: str | None) -> SumSpec:
    beside = () if purpose is None else (Segment("accuracies", 1.0, 0.1, (20,), purpose),)
    return SumSpec(1.0, (*MADE["SCALARS"], *beside), 0.05)


def trains(
    clients: Path, policy: Mapping[str, Any], purpose: str | None = None, layers: OwnLayers | None = None
) -> bool:
    order = replace(CENTRAL, own_layers=layers)
    return answers(clients, policy, MADE["in_the_clear"](order, spec=spec_with(purpose)))


def asks(
    clients: Path,
    policy: Mapping[str, Any],
    purpose: str = "statistics",
    unit: str = "client",
    layers: OwnLayers | None = None,
) -> bool:
    keys = {"name": "labels", "purpose": purpose, "unit": unit, "records": 40, "why": "How many of each?"}
    asked = read_inquiry({**keys, "ask": [LABELS]})
    order, spec, noise = (
        replace(CENTRAL, run=asked.name, own_layers=layers),
        SumSpec(1.0, asked.segments),
        None,
    )
    if unit == "record":
        order = replace(order, privacy=ModeName.RECORD, client=None, record=RECORDS)
        spec, noise = SumSpec(None, (Segment("num-examples", 1.0),)), 3.0
    content = question_content(asked, {ORDER_KEY: order.to_json()}, noise)
    return answers(clients, policy, Message(instruct(content, spec, asked.name, 1), 2, "train"))


def evaluates(clients: Path, policy: Mapping[str, Any], layers: OwnLayers | None = None) -> bool:
    asked = Evaluation("spring evaluation", 0.3)
    order = replace(CENTRAL, run=asked.name, held_out=asked.share, own_layers=layers)
    arrays = memory_arrays({name: array.numpy() for name, array in MADE["content"]()["arrays"].items()})
    content = evaluation_content(asked, arrays, {ORDER_KEY: order.to_json()})
    return answers(
        clients, policy, Message(instruct(content, SumSpec(1.0, asked.segments), asked.name, 1), 2, "train")
    )


def ends(clients: Path, policy: Mapping[str, Any]) -> bool:
    device = MADE["device_of"](clients / "c0", **policy)
    agent = Agent(device.bundle)
    agent.device = device
    return agent.handle(message_to(2, RunOver("spring", "completed", 1, {}))).has_error()


def left_of(message: bytes, nodes: tuple[int, ...]) -> bytes:
    """Return a message that names only these nodes as those that are left."""
    said = wire.read_any(message)
    if isinstance(said, wire.Survivors):
        dead = tuple(sorted({*said.alive, *said.dead} - set(nodes)))
        return wire.write(replace(said, alive=nodes, dead=dead))
    assert isinstance(said, wire.Inbox)
    return wire.write(replace(said, sharers=nodes))


def masked(
    clients: Path,
    policy: Mapping[str, Any],
    exchange: Exchange,
    *,
    purpose: str | None = None,
    profile: Profile = Profile.MALICIOUS,
    left: tuple[int, ...] = (),
    layers: OwnLayers | None = None,
) -> bool:
    """Return whether c0 refuses in one exchange of an encrypted sum, with a policy that it has from then on."""
    start = policy if exchange is Exchange.PROPOSAL else {}
    devices = {
        2 + n: MADE["device_of"](
            clients / f"c{n}", **{**COMMON, "profile": str(profile), **(start if n == 0 else {})}
        )
        for n in range(5)
    }
    refused: list[bool] = []

    def fault(message: Message) -> Message | None:
        if (
            message.metadata.dst_node_id != 2
            or read_position(message.content).exchange is not exchange
            or refused
        ):
            return None
        if left:
            [said] = messages_of(message.content) or []
            message.content[SECURE_RECORD] = ConfigRecord({"messages": [left_of(said, left)]})
        if exchange is not Exchange.PROPOSAL:
            devices[2] = MADE["device_of"](clients / "c0", **{**COMMON, **policy})
        reply = devices[2].answer(message)
        said = [] if reply.has_error() else messages_of(reply.content) or []
        refused.append(not said or not said[0] or declines(said[0]))
        return reply

    grid = MADE["Devices"](devices, fault)
    masking = Masking(devices[3].bundle.identity.roster, 0.4, 0.1, profile)
    content = MADE["content"](replace(ORDER, own_layers=layers))
    wanted = Sum("spring", 1, content, "train", spec_with(purpose), {"w": (3, 7)}, 3.0)
    SecureSums(grid, masking).sum(grid.get_node_ids(), wanted, None)
    return refused[0]


def declines(reply: bytes) -> bool:
    """Return whether a node's message is a refusal, behind which no tag stands."""
    try:
        return bool(wire.read(reply, wire.Declined))
    except Refused:
        return False


def changed(desk: Path, rotated: bool) -> bytes:
    """Revoke c4 and, to enrol again, give c0 new keys; return the newer roster."""
    revoke(desk, ["c4"])
    if rotated:
        rotate(desk, ["c0"], None)
    return (desk / "server" / "roster.bin").read_bytes()


def write_policy(folder: Path, policy: Mapping[str, Any]) -> None:
    path = folder / "policy.toml"
    peers = policy.get("peers", {})
    values = {key: value for key, value in policy.items() if key != "peers"}
    kept = [line for line in path.read_text().splitlines() if line.partition(" =")[0] not in policy]
    lines = [
        f"{key} = {str(value).lower() if isinstance(value, bool) else repr(value)}"
        for key, value in values.items()
    ]
    pinned = [f'[peers]\n{name} = "{hashed}"' for name, hashed in peers.items()]
    kept = [line for line in kept if not (peers and line == "[peers]")]
    path.write_text("\n".join([*lines, *kept, *pinned]) + "\n")


def with_roster(clients: Path, policy: Mapping[str, Any], door: str) -> bool:
    """Return whether c0 stays with its roster, and with all files of its bundle, where a newer one comes by a door."""
    folder = Path(shutil.copytree(clients / "c0", clients.parent / "device"))
    take_shipped(read_client_bundle(folder))
    signed = changed(clients.parent, rotated=door == "again")
    write_policy(folder, policy)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    try:
        if door == "roster":
            renewed = renew_roster(MADE["device_of"](folder).bundle, signed).identity.roster
        elif door == "copy":
            (folder / "roster.bin").write_bytes(signed)
            renewed = read_client_bundle(folder).identity.roster
        else:
            (folder / MAKING).mkdir(mode=0o700)
            for name in PRIVATE:
                shutil.copy(clients / "c0" / name, folder / MAKING)
            names = ("ca.pem", "tls.pem", "client.toml", "policy.toml")
            files = {name: (clients / "c0" / name).read_bytes() for name in names}
            _complete(Token("h:1", "c0", 1, bytes(32), bytes(32)), folder, files, signed)
            renewed = read_client_bundle(folder).identity.roster
    except Refusal:
        after = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        assert door == "copy" or after == before
        return True
    return renewed.version == 1


def rolled_over(clients: Path, policy: Mapping[str, Any]) -> bool:
    """Return whether c0 stays with its authority, where a rollover comes from the server and into its bundle."""
    folder = Path(shutil.copytree(clients / "c0", clients.parent / "device"))
    roll_over(clients.parent, 30)
    text = (clients.parent / "server" / "rollovers.json").read_text()
    bundle = MADE["device_of"](folder, **policy).bundle
    agent, before = Agent(bundle), bundle.authority
    agent.handle(renewal_to(2, "", text))
    stays = bundle.authority == before
    write_policy(folder, policy)
    shutil.copy(clients.parent / "server" / "rollovers.json", folder)
    try:
        assert (read_client_bundle(folder).authority == before) == stays
    except Refusal:  # the roster is not that of the authority in the policy
        assert stays
    return stays


Door = Callable[..., bool]
CALLS: dict[str, Door] = {
    **{door: (lambda *given, door=door: with_roster(*given, door)) for door in ("again", "copy", "roster")},
    "rollover": rolled_over,
    "cohort": lambda *given, **how: masked(*given, Exchange.PROPOSAL, **how),
    "masks": lambda *given, **how: masked(*given, Exchange.INBOX, **how),
    "confirm": lambda *given, **how: masked(*given, Exchange.SURVIVORS, **how),
    "train": trains,
    "ask": asks,
    "rows": lambda *given: asks(*given, unit="record"),
    "evaluate": evaluates,
    "scale": lambda *given, **how: asks(*given, purpose="scaling", **how),
    "end": ends,
}
CELLS = [
    (demand, door)
    for demand, cells in TABLE.items()
    for door, cell in cells.items()
    if isinstance(cell, Against)
]


@pytest.mark.parametrize(("demand", "door"), CELLS, ids=lambda each: each)
def test_violation_of_a_demand_is_refused_at_each_door(made: Path, demand: str, door: str) -> None:
    cell = TABLE[demand][door]
    assert isinstance(cell, Against)
    assert CALLS[door](made / "clients", cell.policy, **cell.how, **cell.wrong)


@pytest.mark.parametrize("door", [door for door in DOORS if door != "enrol"])
def test_door_passes_messages_against_no_demand(made: Path, door: str) -> None:
    """Otherwise a door that refuses everything would pass for one that holds every demand."""
    assert not CALLS[door](made / "clients", {})


@pytest.mark.parametrize(
    ("demand", "door"),
    [each for each in CELLS if (cell := TABLE[each[0]][each[1]]) and isinstance(cell, Against) and cell.how],
    ids=lambda each: each,
)
def test_door_passes_messages_within_the_allowance(made: Path, demand: str, door: str) -> None:
    cell = TABLE[demand][door]
    assert isinstance(cell, Against)
    assert not CALLS[door](made / "clients", cell.lenient, **cell.how)


# --- the page ------------------------------------------------------------------------------------------------------


def page() -> str:
    """Return the table as docs/reference/policy.md has it."""
    doors = list(DOORS)
    lines = ["| | " + " | ".join(doors) + " |", "|---" * (len(doors) + 1) + "|"]
    for demand, cells in TABLE.items():
        shown = [cell if isinstance(cell, str) else "**no**" for cell in (cells[door] for door in doors)]
        lines.append(f"| `{demand}` | " + " | ".join(shown) + " |")
    told = [f"- {name}: {what}" for name, what in DOORS.items()]
    why = [f"- {letter}: {what}" for letter, what in REASONS.items()]
    return "\n".join([*lines, "", *told, "", *why, ""])


def test_the_page_of_owners_has_this_table() -> None:
    text = PAGE.read_text()
    assert text.partition(BEGIN)[2].partition(END)[0] == page()


if __name__ == "__main__":
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}{page()}{END}{rest.partition(END)[2]}")
