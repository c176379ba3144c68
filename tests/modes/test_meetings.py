"""Table of meetings: what each feature does in each mode of privacy, on each population of clients.

A cell runs or is refused. What runs has two rounds whose epsilon dp_accounting composes from the entries of the ledgers, and
a simulation repeats its model and its ledgers by its seed. What is refused names the reason, and has written nothing.
`python tests/modes/test_meetings.py` writes the table into docs/features.md.
"""

from __future__ import annotations

import json
import re
import runpy
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml
from dp_accounting.dp_event import DpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.privacy_accountant import NeighboringRelation
from dp_accounting.rdp import RdpAccountant

from fedveil.base.refusal import Refusal
from fedveil.configs.settings import settings_from_overrides
from fedveil.deployment.provision import provision
from fedveil.deployment.questions import ask_clients
from fedveil.deployment.serve import serve
from fedveil.modes.mode import Mode
from fedveil.privacy.accounting.events import event_from_json
from fedveil.privacy.ledger import store
from fedveil.privacy.ledger.ledger import read_entries
from fedveil.privacy.statistics.inquiry import Inquiry, read_inquiry
from fedveil.questions.question_plan import Spend
from fedveil.questions.simulated import ask_here
from fedveil.run.build import build
from fedveil.simulations.simulate import simulate

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm", "fast_runs")

SERVED = runpy.run_path(str(Path(__file__).parents[1] / "faults" / "served.py"))


@dataclass(frozen=True)
class Runs:
    """A cell that runs, with keys of its own."""

    keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class Refused:
    """A cell that is refused by a sentence with these words."""

    words: str


@dataclass(frozen=True)
class Declined:
    """A cell in which every device declines the server's order, by its owner's policy, and nothing is charged."""

    words: str = "every owner's policy refuses the server's order"


Cell = Runs | Refused | Declined
Row = Mapping[str, Cell]

MODES: Mapping[str, tuple[str, ...]] = {
    "none": (),
    "record": ("privacy.target_epsilon=8",),
    "client_central": ("privacy.target_epsilon=40",),
    "client_distributed": ("privacy.target_epsilon=40",),
    "record_and_client": ("privacy.record.target_epsilon=8", "privacy.client.target_epsilon=40"),
    "record_distributed": ("privacy.target_epsilon=8",),
}
UNITS: Mapping[str, set[str]] = {
    "none": set(),
    "record": {"record"},
    "client_central": {"client"},
    "client_distributed": {"client"},
    "record_and_client": {"record", "client"},
    "record_distributed": {"record"},
}
RUNS = Runs()
ENOUGH = Runs(("task.scaling_epsilon=12",))  # so few clients tell little by less
ENOUGH_OF_RECORDS = Runs(("task.scaling_epsilon=4",))
PERSONS = Runs(("privacy.per_person=1",))
NO_MASKS = Refused("a server that adds the noise sees the exact sum and must be trusted")
NO_EVALUATION = Refused("clients are hidden as a whole when they evaluate")
NO_SCALING = Refused("no single private sum can answer")
NO_QUESTION = Refused("hides no unit, or two at once, and a question is charged to one")
NO_LAYERS = Refused("the layers that stay have seen a record before its noise")
NO_PERSONS = Refused("there is no such key")


def row(default: Cell = RUNS, **others: Cell) -> Row:
    """Return a row of cells, one for each mode."""
    return {mode: others.get(mode, default) for mode in MODES}


KEYS: Mapping[str, tuple[str, ...]] = {
    "training": (),
    "evaluation": ("evaluate.clients=final",),
    "scaling": ("task.scaling=asked",),
    "arms": ("tune=learning_rate", "tune.values=[0.1,1]", "tune.rounds=1"),
    "compression": ("compress=mask",),
    "differences": ("compress.down=4",),
    "audit": ("audit=full", "audit.looks=2", "audit.on_alarm=note"),
    "questions": (),
    "persons": ("task.person=patient",),
    "resume": (),
    "masks": ("secagg=masked",),
    "personal": ("personal=after",),
    "layers": ("personal=layers", "personal.layers=[*bias]"),
}
SIMULATED: Mapping[str, Row] = {
    "training": row(),
    "evaluation": row(NO_EVALUATION, client_central=RUNS, client_distributed=RUNS, record_distributed=RUNS),
    "scaling": row(
        ENOUGH,
        none=NO_SCALING,
        record_and_client=NO_SCALING,
        record=ENOUGH_OF_RECORDS,
        record_distributed=ENOUGH_OF_RECORDS,
    ),
    "arms": row(),
    "compression": row(),
    "differences": row(),
    "audit": row(),
    "questions": row(none=NO_QUESTION, record_and_client=NO_QUESTION),
    "persons": row(
        NO_PERSONS,
        record=PERSONS,
        record_distributed=PERSONS,
        record_and_client=Runs(("privacy.record.per_person=1",)),
    ),
    "resume": row(),
    "masks": row(client_central=NO_MASKS, record_and_client=NO_MASKS),
    "personal": row(),
    "layers": row(NO_LAYERS, none=RUNS, client_central=RUNS, client_distributed=RUNS),
}
# Chance deals the clients to arms: of so many none gets an arm too small.
PUBLIC = Runs(("task.folder={home}/many", "task.held_out_file={home}/public.csv"))
SHARED = Runs(("budget.runs=2",))  # with the questions
DEPLOY = Refused("personal models of real clients lie with the clients")
REAL: Mapping[str, Row] = {
    **SIMULATED,
    "arms": row(PUBLIC),
    "audit": row(record_distributed=Refused("canary records are not added to real ones")),
    "questions": row(SHARED, none=NO_QUESTION, record_and_client=NO_QUESTION),
    "personal": row(DEPLOY),
    "layers": row(NO_LAYERS, none=DEPLOY, client_central=DEPLOY, client_distributed=DEPLOY),
}
# A device charges its records for sums of whole clients: its owner allows much, so that they last.
NO_CANARIES = Refused("its canary clients test a client-level claim, and there is none")
DEPLOYED: Mapping[str, Row] = {
    feature: {
        "none": Declined(),
        **{mode: each for mode, each in cells.items() if mode != "none" or each != RUNS},
    }
    for feature, cells in SIMULATED.items()
} | {
    "audit": row(
        none=NO_CANARIES,
        record=NO_CANARIES,
        client_distributed=Refused("a canary client needs keys in the roster"),
        record_distributed=Refused("the server opens the sum in which canary records are scored"),
    ),
    "questions": REAL["questions"],
}
POPULATIONS = {"simulated": SIMULATED, "real": REAL, "deployed": DEPLOYED}
RELATIONS = {
    "zero-out": NeighboringRelation.REPLACE_SPECIAL,
    "add-or-remove-one": NeighboringRelation.ADD_OR_REMOVE_ONE,
}


# --- the tables on which all runs train -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wards")
    number = "{low: 0, high: %d}"
    columns = f"  age: {number % 100}\n  pressure: {number % 240}\n  ill: {{categories: ['no', 'yes']}}\n"
    (folder / "schema.yaml").write_text(f"label: ill\ncolumns:\n{columns}")
    for name, clients in (("few", 6), ("many", 60)):
        (folder / name).mkdir()
        for client in range(clients):
            (folder / name / f"{client:02}.csv").write_text(_table(client))
    (folder / "public.csv").write_text(_table(99))
    return folder


def _table(seed: int) -> str:
    numbers = np.random.default_rng(seed).normal((50, 120), (20, 60), (20, 2))
    rows = [
        f"{seed}-{n // 2},{age:.2f},{pressure:.2f},{'yes' if age > 50 else 'no'}"
        for n, (age, pressure) in enumerate(numbers)
    ]
    return "\n".join(["patient,age,pressure,ill", *rows, ""])


def settings_of(home: Path, folder: Path, population: str, mode: str, *keys: str) -> Any:
    """Return the settings of two rounds."""
    task = ["task=csv", f"task.folder={home / 'few'}", f"task.schema={home / 'schema.yaml'}", "cohort=all"]
    real = [f"ledger.dir={folder / 'ledgers'}", "task.data_id=wards"]
    whose = real if population == "real" else ["task.simulated=true", "seed=1"]
    common = ["num_rounds=2", "audit=off", "accept_vacuous=true", f"privacy={mode}", *MODES[mode]]
    return settings_from_overrides([*task, *whose, *common, *(each.format(home=home) for each in keys)])


# --- dp_accounting alone ----------------------------------------------------------------------------------------------


class Release(NamedTuple):
    """A release of a ledger against one adversary: the name of its run, its arm, and its event."""

    name: str
    arm: int | None
    event: DpEvent


@dataclass(frozen=True)
class Kept:
    """What a ledger holds: its unit, its adjacency, and the releases against each adversary."""

    unit: str
    adjacency: str
    releases: Mapping[str, Sequence[Release]]

    def epsilon(self, adversary: str, delta: float, name: str = "") -> float:
        """Return what dp_accounting composes of all releases, or of those of one name; a unit is in one arm."""
        own = [each for each in self.releases[adversary] if name in each.name]
        arms = {each.arm for each in own if each.arm is not None} or {None}
        relation = RELATIONS[self.adjacency]
        events = [tuple(each.event for each in own if each.arm in (None, arm)) for arm in arms]
        return max(_composed(relation, each, delta) for each in events)


@cache
def _composed(relation: NeighboringRelation, events: tuple[DpEvent, ...], delta: float) -> float:
    accountants = PLDAccountant(relation, 1e-4), RdpAccountant(neighboring_relation=relation)
    for each in accountants:
        for event in events:
            each.compose(event)
    return min(float(each.get_epsilon(delta)) for each in accountants)


def ledgers_in(folder: Path) -> list[Kept]:
    """Return the ledgers in a folder that hold releases, in the order of their names."""
    own = {path for path in folder.rglob("*") if path.name == "ledger" or path.suffix == ".ledger"}
    paths = sorted(own.union(*(store.ledgers_in(each.parent) for each in folder.rglob(store.FILE))))
    return [kept for path in paths if not path.is_dir() and (kept := _read(path)).releases]


def _read(path: Path) -> Kept:
    opened: dict[str, Any] = {}
    reserved: dict[str, dict[str, Any]] = {}
    for entry in read_entries(path):
        payload = json.loads(entry.payload)
        if entry.kind == "open":
            opened = payload
        elif entry.kind == "reserve":
            reserved[entry.key] = payload
        elif entry.kind == "commit":
            reserved[entry.key]["events"] |= payload.get("events", {})
    releases: dict[str, list[Release]] = {}
    for key, each in reserved.items():
        for adversary, event in each["events"].items():
            release = Release(json.loads(key)[0], each.get("arm", {}).get("arm"), event_from_json(event))
            releases.setdefault(adversary, []).append(release)
    return Kept(opened["unit"], opened["adjacency"], releases)


def check_composed(
    result: Mapping[str, Any], ledgers: Sequence[Kept], units: set[str], bound: bool = False
) -> None:
    """Compare each epsilon of a result with the largest of those that the ledgers of its unit compose to.

    Args:
      result: of a run.
      ledgers: of all.
      units: whose epsilon is finite.
      bound: whether a server states what a device's own ledger spends at most.
    """
    finite = [each for each in result["privacy"] if each["epsilon"] != "infinity"]
    assert {each["unit"] for each in finite} == units
    for each in finite:
        own = [ledger for ledger in ledgers if ledger.unit == each["unit"]]
        spent = max(ledger.epsilon(each["adversary"], each["delta"]) for ledger in own)
        if bound and each["unit"] != "client":
            assert 0 < spent <= each["epsilon"] == each["target_epsilon"]
        else:
            assert 0 < each["epsilon"] <= each["target_epsilon"]
            assert each["epsilon"] == pytest.approx(spent, rel=1e-3), each["adversary"]


# --- cells ------------------------------------------------------------------------------------------------------------


class Stops:
    """Callback that interrupts a run after its first round."""

    def start(self, run: Any) -> None: ...

    def round(self, row: Any) -> None:
        raise KeyboardInterrupt

    def end(self, end: Any) -> None: ...


def inquiry(name: str, mode: str) -> Inquiry:
    unit = "record" if mode.startswith("record") else "client"
    ask = [{"kind": "mean", "name": "age", "of": "age", "low": 0, "high": 100}]
    return read_inquiry({"name": name, "unit": unit, "records": 20, "ask": ask})


def run(settings: Any, folder: Path, feature: str) -> dict[str, Any]:
    """Run two rounds, and return their result."""
    if feature == "resume":
        with pytest.raises(KeyboardInterrupt):
            simulate(settings, folder, quiet=True, callbacks=[Stops()])
        settings = settings_from_overrides([f"resume={folder}"])
    result = simulate(settings, folder, quiet=True).result
    assert (result["status"], result["rounds_completed"]) == ("completed", settings.steps)
    return result


def ask(settings: Any, folder: Path, mode: str) -> None:
    """Ask two questions on one ledger, and compare what their records state with what it holds."""
    for name in ("first", "second"):
        record = ask_here(build(settings), inquiry(name, mode), Spend(noise_multiplier=3.0), folder)
        for each in ledgers_in(folder):
            for adversary in record["adversaries"]:
                alone = each.epsilon(adversary, record["delta"], name)
                assert record["epsilon"] == pytest.approx(alone, rel=1e-3)
                whole = record["epsilon_after"]  # of single clients, each with a ledger, nothing is said here
                if whole is not None:
                    assert whole == pytest.approx(each.epsilon(adversary, record["delta"]), rel=1e-3)


def meet(home: Path, folder: Path, population: str, feature: str, mode: str) -> None:
    """Try a cell."""
    cell = POPULATIONS[population][feature][mode]
    if isinstance(cell, Refused):
        keys = (*KEYS[feature], *(PERSONS.keys if feature == "persons" else ()))
        with pytest.raises(Refusal, match=re.escape(cell.words)):
            settings = settings_of(home, folder, population, mode, *keys)
            if feature == "questions":
                ask(settings, folder / "run", mode)
            else:
                run(settings, folder / "run", feature)
        assert not list(folder.rglob("*"))
        return
    assert isinstance(cell, Runs)
    # On real data a run and its questions share a ledger; a simulation is repeated.
    settings = settings_of(home, folder, population, mode, *KEYS[feature], *cell.keys)
    units = units_of(feature, mode)
    bits: list[list[Any]] = []
    for name in ("run", "again") if population == "simulated" else ("run",):
        if population == "real" or feature != "questions":
            result = run(settings, folder / name, feature)
            check_composed(result, ledgers_in(folder if population == "real" else folder / name), units)
        if feature == "questions":
            ask(settings, folder / (name if population == "simulated" else "questions"), mode)
        bits.append(bits_of(folder / name))
    assert ledgers_in(folder) or not units
    assert all(each == bits[0] for each in bits)


def units_of(feature: str, mode: str) -> set[str]:
    """Return the units whose loss is finite."""
    return {"person" if feature == "persons" and unit == "record" else unit for unit in UNITS[mode]}


def bits_of(folder: Path) -> list[Any]:
    """Return a run's model, and what its answers and its evaluations say, and the events of its ledgers."""
    files = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    answers = {name: [each.get("answers"), each.get("evaluations")] for name, each in files.items()}
    events = [[each.event for each in of] for kept in ledgers_in(folder) for of in kept.releases.values()]
    model = folder / "model.safetensors"
    return [model.read_bytes() if model.exists() else None, answers, events]


def cells() -> list[tuple[str, str]]:
    return [(feature, mode) for feature in KEYS for mode in MODES]


# --- devices, called in this process ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def desks(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with one provisioned federation for each folder of tables."""
    folder = tmp_path_factory.mktemp("desks")
    shutil.copy(home / "schema.yaml", folder)
    for name in ("few", "many"):
        tables = sorted((home / name).iterdir())
        plain = {
            "federation": "wards",
            "server": {"address": "localhost:8797", "listen": "127.0.0.1:8797"},
            "task": {
                "name": "csv",
                "data": "table.csv",
                "options": {"schema": "schema.yaml", "person": "patient"},
            },
            "policy": {
                "target_epsilon": 1000.0,
                "target_delta": 1e-4,
                "trust_server": True,
                "purposes": ["statistics", "evaluation", "scaling"],
            },
            "clients": [{"name": f"c{table.stem}"} for table in tables],
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(plain))
        provision(folder / f"{name}.yaml", folder / name, None)
        for table in tables:
            shutil.copy(table, folder / name / "clients" / f"c{table.stem}" / "table.csv")
    return folder


def meet_devices(home: Path, desks: Path, folder: Path, feature: str, mode: str) -> None:
    """Try a cell with devices."""
    cell, size = DEPLOYED[feature][mode], "many" if feature == "arms" else "few"
    desk = Path(shutil.copytree(desks / size, folder / "desk"))
    devices, units = SERVED["Devices"](desk / "clients"), units_of(feature, mode)
    reach = SERVED["reaching"](devices, len(devices.devices))
    own = [] if mode != "record_distributed" else [f"privacy.records={20 * len(devices.devices)}"]
    own += ["privacy.most_records=20"] if own else []
    given = ["task=csv", f"task.held_out_file={home / 'public.csv'}", "cohort=all", f"privacy={mode}", *own]
    more = cell.keys if isinstance(cell, Runs) else PERSONS.keys if feature == "persons" else ()
    keys = [each for each in (*KEYS[feature], *more) if not each.startswith("task.person")]
    run = ["run=spring", "num_rounds=2", "link.clients=1", "link.wait=5", "accept_vacuous=true", "audit=off"]
    argv = [*run, *given, *MODES[mode], *keys]

    def ask_twice() -> None:
        for name in ("first", "second"):
            told = [*given, *MODES[mode], "link.wait=5", "accept_vacuous=true"]
            record = ask_clients(
                desk / "server", inquiry(name, mode), Spend(noise_multiplier=3.0), told, reach=reach
            )
            for each in ledgers_in(desk / "server" / "ledgers"):
                assert record["epsilon_after"] == pytest.approx(
                    each.epsilon("model", record["delta"]), rel=1e-3
                )

    if isinstance(cell, Refused):
        with pytest.raises(Refusal, match=re.escape(cell.words)):
            ask_twice() if feature == "questions" else serve(desk / "server", argv, reach=reach)
        assert not ledgers_in(desk) and not (desk / "server" / "runs" / "spring").exists()
        return
    if feature == "resume" and isinstance(cell, Runs):
        with pytest.raises(KeyboardInterrupt):
            serve(desk / "server", argv, reach=reach, callbacks=[Stops()])
    code = serve(desk / "server", argv, reach=reach)
    result = json.loads((desk / "server" / "runs" / "spring" / "result.json").read_text())
    if isinstance(cell, Declined):
        assert (code, result["status"], ledgers_in(desk)) == (1, "failed", []) and cell.words in result[
            "reason"
        ]
        return
    assert (code, result["status"], result["rounds_abandoned"]) == (0, "completed", 0)
    check_composed(result, ledgers_in(desk), units, bound=mode != "record_distributed")
    if feature == "questions":
        ask_twice()


@pytest.mark.campaign
@pytest.mark.parametrize(("feature", "mode"), cells())
def test_a_feature_meets_a_mode_on_devices(
    feature: str, mode: str, home: Path, desks: Path, tmp_path: Path
) -> None:
    meet_devices(home, desks, tmp_path, feature, mode)


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_charges_somebody_if_and_only_if_it_promises_something(mode: str) -> None:
    asked = ["task=digits", f"privacy={mode}", "audit=off", *MODES[mode]]
    federation = build(settings_from_overrides(asked))
    assert federation.mode.spends == bool(federation.mode.promises)
    assert Mode.spends  # by default: a mode that says nothing is charged for, and takes no seed on real data


@pytest.mark.parametrize(("feature", "mode"), [("masks", "record_distributed"), ("audit", "record")])
def test_devices_meet_the_cases_of_a_campaign(
    feature: str, mode: str, home: Path, desks: Path, tmp_path: Path
) -> None:
    meet_devices(home, desks, tmp_path, feature, mode)


# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("feature", "mode"), cells())
def test_a_feature_meets_a_mode_in_a_simulation(feature: str, mode: str, home: Path, tmp_path: Path) -> None:
    meet(home, tmp_path, "simulated", feature, mode)


@pytest.mark.campaign
@pytest.mark.parametrize(("feature", "mode"), cells())
def test_a_feature_meets_a_mode_on_real_data(feature: str, mode: str, home: Path, tmp_path: Path) -> None:
    meet(home, tmp_path, "real", feature, mode)


@pytest.mark.parametrize(
    ("feature", "mode"), [("resume", "record_and_client"), ("audit", "record_distributed")]
)
def test_real_data_meet_the_cases_of_a_campaign(feature: str, mode: str, home: Path, tmp_path: Path) -> None:
    meet(home, tmp_path, "real", feature, mode)


# --- the table in the documentation -------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[2] / "docs" / "features.md"
BEGIN, END = "<!-- made by tests/modes/test_meetings.py -->\n", "<!-- end of what is made -->\n"


def table() -> str:
    """Return the table of a simulation, its sentences, and what differs on other populations, in Markdown."""
    same = _cells_of(SIMULATED)
    sentences = list(dict.fromkeys(each.words for each in same.values() if isinstance(each, Refused)))
    lines = [f"| | {' | '.join(f'`{mode}`' for mode in MODES)} |", f"|---|{'---|' * len(MODES)}"]
    for feature, cells_of in SIMULATED.items():
        said = [
            f"no ({sentences.index(each.words) + 1})" if isinstance(each, Refused) else "runs"
            for each in cells_of.values()
        ]
        lines.append(f"| {feature} | {' | '.join(said)} |")
    lines += ["", *(f'{number}. "{words}"' for number, words in enumerate(sentences, 1)), ""]
    for population, name in NAMES.items():
        others: dict[str, dict[str, list[str]]] = {}
        for (feature, mode), cell in _cells_of(POPULATIONS[population]).items():
            if not isinstance(cell, Runs) and cell != same[feature, mode]:
                others.setdefault(cell.words, {}).setdefault(feature, []).append(f"`{mode}`")
        lines += [f"{name} the same runs and is refused, but for:", ""]
        for words, modes_of in others.items():
            alike: dict[str, list[str]] = {}  # features by their modes
            for feature, modes in modes_of.items():
                alike.setdefault(", ".join(modes), []).append(feature)
            cases = [f"{', '.join(features)} with {modes}" for modes, features in alike.items()]
            lines.append(f'- {"; ".join(cases)}: "{words}"')
        lines.append("")
    return "\n".join(lines)


NAMES = {"real": "On real data of one machine", "deployed": "With devices"}


def _cells_of(rows: Mapping[str, Row]) -> dict[tuple[str, str], Cell]:
    return {(feature, mode): cell for feature, row_of in rows.items() for mode, cell in row_of.items()}


def page_with_table() -> str:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


def test_the_architecture_has_this_table() -> None:
    assert PAGE.read_text() == page_with_table(), "run: python tests/modes/test_meetings.py"


if __name__ == "__main__":
    PAGE.write_text(page_with_table())
