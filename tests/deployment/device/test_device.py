"""A deployed device: what its owner's policy lets pass, what its own ledger is charged, and when it does not train."""

import hashlib
import json
import math
import os
import runpy
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from safetensors import safe_open
from safetensors.numpy import load_file

from fedveil.base.refusal import Refusal
from fedveil.client.private_update import NotTrained
from fedveil.deployment.device import agent, commands, ledger_heads
from fedveil.deployment.device.client_bundle import Eligibility
from fedveil.deployment.device.commands import forget, status
from fedveil.deployment.device.device_ledger import DeviceLedger, epsilon_of, spent_on
from fedveil.deployment.device.order_policy import accept_order
from fedveil.deployment.device.receipts import receipt_for
from fedveil.deployment.device.run_end import read_ended
from fedveil.links.device_answers import PAID, UNPAID, Journal, loss_line
from fedveil.messages.local_training import LocalTraining
from fedveil.messages.message_codec import pack, pack_body, question_id, unpack
from fedveil.messages.notices import RunOver, message_to, read_receipt
from fedveil.messages.secure_wire import read_position
from fedveil.messages.training_order import ModeName, RecordTerms, TrainingOrder
from fedveil.messages.wire import (
    BUDGET_SPENT,
    FAILED,
    NOT_ELIGIBLE,
    NOT_READY,
    OWNERS_POLICY,
    RESTORED,
    SPEC_RECORD,
    VECTOR,
    VECTOR_RECORD,
    WEIGHT,
    Exchange,
    add_reply,
    memory_arrays,
    view,
)
from fedveil.privacy.accounting.events import Gaussian
from fedveil.privacy.accounting.gaussian import gaussian_epsilon
from fedveil.privacy.budget import Adjacency, Adversary, Budget, Release, Unit
from fedveil.privacy.ledger.acts import acting_user
from fedveil.privacy.ledger.caps import Cap, set_cap
from fedveil.privacy.ledger.ledger import Ledger, ReleaseState, read_entries, verify
from fedveil.privacy.ledger.ledger_state import RESERVE
from fedveil.privacy.mechanisms import packing
from fedveil.privacy.mechanisms.private_sum import CohortSum
from fedveil.privacy.mechanisms.sum_spec import SumSpec
from fedveil.privacy.secagg.transcript import PROTOCOL_VERSION, AttemptTerms, Profile, run_number
from fedveil.run.manifest import Manifest
from fedveil.server.query_rows import FIRST_ROW

SCRIPT = Path(__file__).parents[2] / "faults" / "devices.py"
MADE = runpy.run_path(str(SCRIPT))
CENTRAL, CLAIM, ORDER, SPEC, Devices, code_of, content, device_of, in_the_clear, masked_sum = (
    MADE[name]
    for name in (
        "CENTRAL",
        "CLAIM",
        "ORDER",
        "SPEC",
        "Devices",
        "code_of",
        "content",
        "device_of",
        "in_the_clear",
        "masked_sum",
    )
)
KILLS = 200
LISTED = Manifest("spring@5f", "completed", {}).text
OVER = RunOver(
    "spring", "completed", 2, {}, manifest=hashlib.sha256(LISTED.encode()).hexdigest(), listed=LISTED
)
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def clients(made: Path) -> Path:
    return made / "clients"


def reservations(path: Path) -> list[list]:
    return [json.loads(entry.key) for entry in read_entries(path) if entry.kind == RESERVE]


# --- what is charged ---------------------------------------------------------------------------------------------


def test_masked_sum_is_charged_by_the_signed_terms(clients):
    devices = {2 + n: device_of(clients / f"c{n}") for n in range(5)}
    opened = masked_sum(Devices(devices))
    assert opened.survivors == 5, opened
    for device in devices.values():
        path = device.ledger.path
        assert reservations(path) == [["spring", 1, "private_sum 0"]]
        payload = json.loads(next(e for e in read_entries(path) if e.kind == RESERVE).payload)
        assert payload["rng"] == "system" and set(payload["events"]) == {str(each) for each in Adversary}
        assert {event["noise_multiplier"] for event in payload["events"].values()} == {3.0}
        assert verify(path).ok
        assert epsilon_of(path) == (gaussian_epsilon(1 / 3, 1e-5), 1e-5)


def diverged(message: Message, settings: object) -> Message:
    """Return a model of which no value is a number."""
    del settings
    shapes = {name: view(array).shape for name, array in message.content["arrays"].items()}
    arrays = memory_arrays({name: np.full(shape, np.nan, np.float32) for name, shape in shapes.items()})
    return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord({WEIGHT: 40})}), reply_to=message)


def test_device_with_diverging_training_answers_no_change_and_pays(clients):
    """What a server sends may let training diverge, or fail, by one record alone: a failure would tell it, uncharged."""
    device = device_of(clients / "c0")
    device.task.train = diverged
    told = CohortSum(np.zeros(18 + 3 + SPEC.segment_size))
    add_reply(told, device.answer(in_the_clear()), SPEC)
    assert told.replies == 1 and not told.total[: 18 + 3].any()
    assert epsilon_of(device.ledger.path)[0] > 0
    devices = {2 + n: device_of(clients / f"c{n}") for n in range(1, 5)}
    devices[3].task.train, devices[4].task.train = diverged, broken
    assert masked_sum(Devices(devices)).survivors == 4
    for device in devices.values():
        assert epsilon_of(device.ledger.path)[0] > 0


def broken(message: Message, settings: object) -> Message:
    """Fail, as the code of a task may that meets a value which it does not expect."""
    raise RuntimeError("patient 17 is ill")


def test_decisions_of_the_owner_stand_on_the_devices_ledger(clients):
    device = device_of(clients / "c0")
    set_cap(device.ledgers, Cap("all", 9.0, 1e-5, reason="the ward's board"))
    for number in (1, 2):
        assert not device.answer(in_the_clear(number=number)).has_error()
    (act,) = [each for each in read_entries(device.ledger.path) if each.kind == "cap changed"]
    told = json.loads(act.payload)
    assert (told["target_epsilon"], told["who"], told["reason"]) == (9.0, acting_user(), "the ward's board")
    assert verify(device.ledger.path).ok


def test_a_second_attempt_at_a_round_is_charged_again(clients):
    devices = {2 + n: device_of(clients / f"c{n}") for n in range(5)}

    def fault(message):  # too many vectors are lost of the first attempt, before anything is opened
        place = read_position(message.content)
        lost = message.metadata.dst_node_id > 3 and place.attempt == 0 and place.exchange is Exchange.INBOX
        return devices[2].answer(Message(content(), 2, "query")) if lost else None

    opened = masked_sum(Devices(devices, fault))
    assert opened.attempts == 2 and opened.survivors == 5
    keys = [["spring", 1, "private_sum 0"], ["spring", 1, "private_sum 1"]]
    assert reservations(devices[2].ledger.path) == keys


def test_clear_sum_is_charged_by_the_claim_and_not_against_the_server(clients):
    device = device_of(clients / "c0")
    reply = device.answer(in_the_clear())
    packed, width = reply.content[VECTOR_RECORD][VECTOR].numpy(), packing.width_of(SPEC)
    vector = packing.Packed(packed, packed.size * 8 // width, width).numbers()
    assert 0 < np.linalg.norm(vector.astype(float)) <= SPEC.cells
    (entry,) = [e for e in read_entries(device.ledger.path) if e.kind == RESERVE]
    assert json.loads(entry.payload)["events"] == {
        who: {"kind": "Gaussian", "noise_multiplier": 3.0} for who in ("clients", "model")
    }


def test_replacing_a_client_moves_a_sum_by_two_norms(clients):
    device = device_of(clients / "c0")
    claim = replace(CLAIM, adjacency=Adjacency.REPLACE_ONE)
    assert code_of(device, in_the_clear(replace(CENTRAL, client=claim))) == 0
    (entry,) = [e for e in read_entries(device.ledger.path) if e.kind == RESERVE]
    assert '"noise_multiplier":6.0' in entry.payload


def test_a_round_is_answered_once_and_charged_once(clients):
    device = device_of(clients / "c0")
    assert code_of(device, in_the_clear()) == 0
    assert code_of(device_of(clients / "c0"), in_the_clear()) == FAILED
    assert reservations(device.ledger.path) == [["spring", 1, "private_sum 0"]]


def test_a_budget_is_spent_to_its_end_and_no_further(clients):
    size = gaussian_epsilon(2 * math.sqrt(2 / 9), 1e-5)  # of a record, which two sums move by two norms each
    device = device_of(clients / "c0", target_epsilon=size)
    codes = [code_of(device, in_the_clear(number=number)) for number in (1, 2, 3, 4)]
    assert codes == [0, 0, BUDGET_SPENT, BUDGET_SPENT]
    assert epsilon_of(device.ledger.path)[0] == gaussian_epsilon(math.sqrt(2 / 9), 1e-5)
    assert spent_on(device.ledgers)[device.ledger.records.stem][0][0] == size
    more = device_of(clients / "c0")  # only the owner can raise it
    assert code_of(more, in_the_clear(number=3)) == 0


def test_after_the_owners_last_day_nothing_leaves(clients):
    yesterday = datetime.now(UTC).date() - timedelta(days=1)
    device = device_of(clients / "c0", until=yesterday)
    assert code_of(device, in_the_clear()) == BUDGET_SPENT
    assert not device.ledger.path.exists()
    assert code_of(device_of(clients / "c0", until=date(2100, 1, 1)), in_the_clear()) == 0


def test_reservation_is_void_where_no_vector_exists(clients):
    """The server is trusted here, and keeps to itself who failed; where it is not, nothing may show that."""
    device = device_of(clients / "c0")
    device.task.train = broken
    reply = device.answer(in_the_clear())
    assert (reply.error.code, reply.error.reason) == (FAILED, "the client failed")
    entries = [(e.kind, json.loads(e.key or "null")) for e in read_entries(device.ledger.path)]
    assert [kind for kind, _ in entries] == ["open", "reserve", str(ReleaseState.VOID)]
    assert epsilon_of(device.ledger.path)[0] == 0


def test_unwritable_ledger_holds_everything_back_until_it_can(clients):
    device = device_of(clients / "c0")
    device.ledgers.mkdir(parents=True)
    blocked = device.ledger.path
    blocked.mkdir()
    assert code_of(device, in_the_clear()) == NOT_READY
    blocked.rmdir()
    assert code_of(device, in_the_clear()) == 0


# --- older copies of its ledgers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("harm", ["deleted", "rolled back"])
@pytest.mark.parametrize("known_by", ["its last answer", "a receipt", "another process"])
def test_device_with_an_older_ledger_answers_nothing(clients, caplog, known_by, harm):
    device = device_of(clients / "c0")
    assert code_of(device, in_the_clear(number=1)) == 0
    path, state = device.ledger.path, device.bundle.state
    earlier = path.read_bytes()
    assert code_of(device, in_the_clear(number=2)) == 0
    if known_by == "a receipt":
        assert receipt_for(device.bundle, OVER) is not None
        (state / ledger_heads.FILE).unlink()
    newest = path.read_bytes()
    path.unlink() if harm == "deleted" else path.write_bytes(earlier)
    device = device if known_by == "its last answer" else device_of(clients / "c0")
    assert code_of(device, in_the_clear(number=3)) == RESTORED
    assert "fedveil client forget FOLDER --restored" in caplog.text and path.exists() == (harm != "deleted")
    with pytest.raises(Refusal, match="client forget FOLDER --restored"):
        agent.start(clients / "c0")
    path.write_bytes(newest)
    assert code_of(device, in_the_clear(number=3)) == 0


def test_ledger_replaced_during_an_answer_does_not_count(clients, tmp_path):
    device = device_of(clients / "c0")
    assert code_of(device, in_the_clear(number=1)) == 0
    path, older = device.ledger.path, tmp_path / "older"
    older.write_bytes(path.read_bytes())
    assert code_of(device, in_the_clear(number=2)) == 0
    known, train = (device.bundle.state / ledger_heads.FILE).read_text(), device.task.train

    def replacing(message: Message, settings: object) -> Message:
        os.replace(older, path)
        path.with_name(f"{path.name}-wal").unlink()  # or it completes the copy
        return train(message, settings)

    device.task.train = replacing
    assert code_of(device, in_the_clear(number=3)) == NOT_READY
    assert (device.bundle.state / ledger_heads.FILE).read_text() == known
    device.task.train = train
    assert code_of(device, in_the_clear(number=4)) == RESTORED


def test_device_of_an_earlier_release_keeps_heads_afterwards(clients):
    device = device_of(clients / "c0")
    assert code_of(device, in_the_clear(number=1)) == 0
    (device.bundle.state / ledger_heads.FILE).unlink()
    device = device_of(clients / "c0")
    assert code_of(device, in_the_clear(number=2)) == 0
    assert json.loads((device.bundle.state / ledger_heads.FILE).read_text())["heads"].keys() == {
        device.ledger.path.name
    }


@pytest.mark.parametrize("left", ["nothing", "an older copy"])
def test_a_restored_device_pays_with_its_whole_budget_and_goes_on(clients, capsys, left):
    device = device_of(clients / "c0")
    assert code_of(device, in_the_clear(number=1)) == 0
    path, state = device.ledger.path, device.bundle.state
    earlier = path.read_bytes()
    assert code_of(device, in_the_clear(number=2)) == 0
    assert receipt_for(device.bundle, OVER) is not None
    path.unlink() if left == "nothing" else path.write_bytes(earlier)
    spent = epsilon_of(path)
    with pytest.raises(Refusal, match="keeps its ledgers"):
        forget(clients / "c0", ledgers=True, restored=True)
    assert epsilon_of(path) == spent
    assert forget(clients / "c0", ledgers=False, restored=True) == 0
    assert "all of its budget, epsilon 8" in capsys.readouterr().out
    now, _ = epsilon_of(path)
    assert now > 8 if spent else now == pytest.approx(8, rel=1e-6)
    assert code_of(device_of(clients / "c0"), in_the_clear(number=3)) == BUDGET_SPENT
    assert code_of(device_of(clients / "c0", target_epsilon=40.0), in_the_clear(number=3)) == 0
    journal = Journal(state / agent.JOURNAL)
    assert journal.unknown(["what it missed"], uncharged) == []
    assert journal.unknown(["of another copy"], uncharged) == ["of another copy"]
    journal.close()
    again = Journal(state / agent.JOURNAL)
    assert again.unknown(["what it missed", "of another copy"], uncharged) == ["of another copy"]
    again.close()


def uncharged(name: str) -> bool:
    del name
    return False


@pytest.mark.parametrize("greeting", [["missed"], [], ["known"], ["charged"], None])
def test_one_greeting_or_instruction_uses_up_a_paid_restore(
    tmp_path: Path, greeting: list[str] | None
) -> None:
    """A backup of the device from then on has no line that lets it adopt an answer."""
    path = tmp_path / "journal"
    path.write_text(f"\n{PAID}\nknown")
    journal = Journal(path)
    if greeting is None:
        journal.note("first")
    else:
        assert journal.unknown(greeting, lambda name: name == "charged") == []
    journal.close()
    assert PAID not in path.read_text()
    for restored in (journal, Journal(path)):
        assert restored.unknown(["of a copy"], uncharged) == ["of a copy"]
    path.write_text(f"\n{UNPAID}\nknown")  # an interrupted command goes on, as long as the device does not
    for names, left in ((["missed"], True), (["known"], False)):
        assert Journal(path).unknown(names, uncharged) == (names if left else [])
        assert (UNPAID in path.read_text()) == left


class Kill(BaseException):
    """An end of the process."""


@pytest.mark.parametrize(
    "step", ["before the charge", "after it", "before the heads", "before the end", "never"]
)
def test_restore_is_charged_once_however_often_the_command_ends_early(
    clients, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def kill(*_: object) -> None:
        raise Kill

    device = device_of(clients / "c0")
    assert code_of(device, in_the_clear(number=1)) == 0
    for place, name, when in (
        (DeviceLedger, "charge_restored", "before the charge"),
        (commands, "_empty", "after it"),
        (ledger_heads, "store_heads", "before the heads"),
        (commands, "replace_file", "before the end"),
    ):
        with monkeypatch.context() as patched:
            if when == step:
                patched.setattr(place, name, kill)
                with pytest.raises(Kill):
                    forget(clients / "c0", ledgers=False, restored=True)
    for _ in range(2):
        assert forget(clients / "c0", ledgers=False, restored=True) == 0
        assert [key[0] for key in reservations(device.ledger.path)] == ["spring", "restored"]
    Journal(device.bundle.state / agent.JOURNAL).unknown(
        [], uncharged
    )  # it meets its server, and is restored again
    assert forget(clients / "c0", ledgers=False, restored=True) == 0
    assert [key[0] for key in reservations(device.ledger.path)] == ["spring", "restored", "restored"]


@pytest.mark.parametrize("book", ["records", "client"])
def test_restored_device_pays_with_its_largest_budget_ever(clients, book: str) -> None:
    """Its owner lowered the budget since, or the policy came back with the backup."""
    device = device_of(clients / "c0", target_epsilon=2.0)
    own = device.ledger
    own.folder.mkdir(parents=True)
    unit, path = (Unit.RECORD, own.records) if book == "records" else (Unit.CLIENT, own.path)
    for epsilon in (8.0, 2.0):
        budget = Budget(unit, epsilon, 1e-5)
        with Ledger.open(path, budget, owner=own.device, simulated=False) as ledger:
            ledger.reserve(
                Release(unit, f"at {epsilon}", 1, "sum", dict.fromkeys(Adversary, Gaussian(20.0)), "system")
            )
    assert own.charge_restored(False).target_epsilon == 8.0
    assert epsilon_of(own.path)[0] >= 8 * (1 - 1e-6)


def test_a_restored_device_gives_no_receipt(clients, caplog) -> None:
    device = device_of(clients / "c0")
    for number in (1, 2):
        assert code_of(device, in_the_clear(number=number)) == 0
    agents = agent.Agent(device.bundle)
    agents.device = device
    path = device.ledger.path
    newest = path.read_bytes()
    path.unlink()
    assert read_receipt(agents.handle(message_to(2, OVER))) is None and "no receipt is given" in caplog.text
    path.write_bytes(newest)
    assert read_receipt(agents.handle(message_to(2, OVER))) is not None


def test_link_asks_the_ledgers_beyond_the_journal(clients, monkeypatch) -> None:
    device = device_of(clients / "c0")
    message = in_the_clear(number=7)
    assert code_of(device, message) == 0
    name, asked = question_id(message, pack_body(message), 2), []

    def follow(endpoint, handle, journal, stop, *rest, is_charged) -> None:
        asked.extend([is_charged(name), is_charged(name.replace("/7/", "/8/", 1))])
        stop.set()

    monkeypatch.setattr("fedveil.links.grpc.device_end.follow", follow)
    assert agent.start(clients / "c0") == 0
    assert asked == [True, False]


def test_charge_of_an_instruction_outlives_the_journal(clients):
    device = device_of(clients / "c0")
    message = in_the_clear(number=7)
    assert code_of(device, message) == 0
    name = question_id(message, pack_body(message), 2)
    assert ledger_heads.is_charged(device.bundle.state, name)
    assert not ledger_heads.is_charged(device.bundle.state, name.replace("/7/", "/8/", 1))
    assert not ledger_heads.is_charged(device.bundle.state, "no id")


def test_forgetting_device_keeps_its_evidence_of_older_copies(clients):
    device = device_of(clients / "c0")
    assert code_of(device, in_the_clear(number=1)) == 0
    forget(clients / "c0", ledgers=False)
    device.ledger.path.unlink()
    assert code_of(device_of(clients / "c0"), in_the_clear(number=2)) == RESTORED
    forget(clients / "c0", ledgers=True)
    assert code_of(device_of(clients / "c0"), in_the_clear(number=2)) == 0


# --- what the owner's policy lets pass ---------------------------------------------------------------------------


RECORD = RecordTerms(8.0, 1e-3, 1.0, Adjacency.ZERO_OUT, 3)


@pytest.mark.parametrize(
    ("order", "policy", "spec"),
    [
        (None, {}, SPEC),
        (replace(CENTRAL, run="autumn"), {}, SPEC),
        (CENTRAL, {"runs": ("autumn",)}, SPEC),
        (CENTRAL, {"trust_server": False}, SPEC),
        (replace(CENTRAL, training=LocalTraining(local_epochs=11)), {}, SPEC),
        (CENTRAL, {"minimum_noise_multiplier": 3.1}, SPEC),
        (CENTRAL, {}, replace(SPEC, clipping_norm=2.5)),
        (CENTRAL, {}, SumSpec(None)),
        (ORDER, {}, SPEC),  # its noise is only in masks
        (TrainingOrder("spring", ModeName.NONE, LocalTraining(0.1, 1, 10)), {}, SumSpec(None)),
        (
            TrainingOrder("spring", ModeName.RECORD, LocalTraining(0.1, 1, 10), record=RECORD),
            {},
            SumSpec(None),
        ),  # not in NumPy
    ],
)
def test_order_against_the_policy_is_refused_and_costs_nothing(clients, order, policy, spec):
    device = device_of(clients / "c0", **policy)
    trained = []
    device.task.train = lambda *asked: trained.append(asked)
    reply = device.answer(in_the_clear(order, spec=spec))
    assert (reply.error.code, reply.error.reason) == (OWNERS_POLICY, "the client did not train")
    assert not trained and not device.ledger.path.exists()


def test_of_a_sum_of_records_the_policy_bounds_the_norm_of_one(clients):
    """What all that a client's coins draw may add up to is the range of its vector, and grows with its records."""
    policy = device_of(clients / "c0").bundle.policy
    record = replace(RECORD, sample_rate=0.1)
    order = replace(ORDER, privacy=ModeName.RECORD_DISTRIBUTED, client=None, record=record)
    place = (PROTOCOL_VERSION, 1, run_number("spring"), 1, 0, 1, bytes(32))
    terms = AttemptTerms(*place, 5, 3, 4, 32, 1e-3, 1000.0, 3.0, 3, Profile.MALICIOUS, bytes(32))
    for unit, fits in ((2.0, True), (2.5, False)):
        spec = SumSpec(1000.0, unit_norm=unit)
        asked = in_the_clear(order, spec=spec).content
        if fits:
            assert accept_order(asked, terms, policy, True)[0] == order
        else:
            with pytest.raises(NotTrained):
                accept_order(asked, terms, policy, True)


def test_public_number_of_records_cannot_be_hidden(clients):
    policy = device_of(clients / "c0").bundle.policy
    order = TrainingOrder("spring", ModeName.RECORD, LocalTraining(0.1, 1, 10), record=RECORD)
    allowed, _ = accept_order(in_the_clear(order, spec=SumSpec(None)).content, None, policy, True)
    assert allowed == order
    order = replace(order, record=replace(RECORD, adjacency=Adjacency.ADD_OR_REMOVE_ONE))
    with pytest.raises(NotTrained):
        accept_order(in_the_clear(order, spec=SumSpec(None)).content, None, policy, True)


def test_policy_allows_the_orders_it_names(clients):
    device = device_of(clients / "c0", runs=("autumn", "spring"), minimum_noise_multiplier=3.0)
    assert code_of(device, in_the_clear(spec=replace(SPEC, clipping_norm=2.0))) == 0


@pytest.mark.parametrize("mode", [ModeName.CLIENT_CENTRAL, ModeName.NONE])
def test_masks_hide_shares_of_noise_and_nothing_else(clients, mode):
    devices = {2 + n: device_of(clients / f"c{n}") for n in range(5)}
    order = replace(ORDER, privacy=mode, client=None if mode is ModeName.NONE else CLAIM)
    opened = masked_sum(Devices(devices), order=order)
    assert opened.total is None and opened.dropped == {"owner's policy": 5}
    assert not any(device.ledger.path.exists() for device in devices.values())


def test_terms_of_another_run_than_the_order_are_refused(clients):
    devices = {2 + n: device_of(clients / f"c{n}") for n in range(5)}

    def elsewhere(message):
        if message.metadata.dst_node_id == 3 and message.content.array_records:
            message.content[SPEC_RECORD]["round"] = 7

    opened = masked_sum(Devices(devices, elsewhere))
    assert opened.survivors == 4 and opened.dropped == {"owner's policy": 1}
    assert not devices[3].ledger.path.exists()


def test_other_messages_than_those_of_a_sum_are_refused(clients):
    device = device_of(clients / "c0")
    for kind in ("evaluate", "query", "train.other"):
        assert code_of(device, Message(in_the_clear().content, 2, kind)) == FAILED
    assert not device.ledger.path.exists()


# --- what a node remembers ---------------------------------------------------------------------------------------


def test_a_node_that_starts_again_goes_on_in_the_middle_of_a_round(clients):
    devices = {2 + n: device_of(clients / f"c{n}") for n in range(5)}

    def restart(message):
        node = message.metadata.dst_node_id
        devices[node] = device_of(clients / f"c{node - 2}")

    assert masked_sum(Devices(devices, restart)).survivors == 5


POINTS = ("after the reservation", "while training", "before the memory is kept", "before the reply leaves")


@pytest.mark.parametrize("point", POINTS)
def test_device_killed_at_any_point_neither_under_counts_nor_repeats(clients, tmp_path, caplog, point):
    """The round's vector is lost; what it cost is on the ledger, once, and no second vector of it is ever made."""
    bundle = clients / "c0"
    message, reply = tmp_path / "message", tmp_path / "reply"
    (message).write_bytes(pack(in_the_clear()))
    if point == "before the memory is kept":  # only a masked sum has a memory
        grid = Devices({2 + n: device_of(clients / f"c{n}") for n in range(5)}, lambda m: inboxes.append(m))
        inboxes: list[Message] = []
        grid.fault = lambda m: m.content.array_records and stop(m)

        def stop(asked):
            (tmp_path / f"{asked.metadata.dst_node_id}").write_bytes(pack(asked))
            return grid.devices[2].answer(Message(content(), 2, "query"))

        masked_sum(grid)
        message = tmp_path / "2"
    command = [sys.executable, str(SCRIPT), str(bundle), str(message), str(reply)]
    killed = subprocess.run([*command, point], capture_output=True, text=True, check=False)
    assert killed.returncode == -9, killed.stderr
    ledger = device_of(bundle).ledger.path
    reserved = reservations(ledger)
    assert len(reserved) == 1 and epsilon_of(ledger)[0] > 0 and verify(ledger).ok
    again = device_of(bundle).answer(unpack(bytearray(message.read_bytes())))
    assert again.has_error() and again.error.code == FAILED and "charged before" in caplog.text
    assert reservations(ledger) == reserved


@pytest.mark.campaign
def test_random_kills_of_a_device(clients, tmp_path):
    """Every vector that left was reserved before, no round was answered twice, and the ledger is whole."""
    draw, answered, lost = np.random.default_rng(1), 0, 0
    ledger, number = device_of(clients / "c0").ledger.path, 1
    for _ in range(KILLS):
        command = [sys.executable, str(SCRIPT), str(clients / "c0"), str(tmp_path), str(number), "rounds"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            time.sleep(draw.uniform(0, 0.1))
            process.kill()
        keys = [tuple(key) for key in reservations(ledger)] if ledger.exists() else []
        assert len(set(keys)) == len(keys)
        replies = {int(path.name): path.read_bytes() for path in tmp_path.iterdir() if path.name.isdigit()}
        left = {row for row, reply in replies.items() if VECTOR_RECORD.encode() in reply}
        assert left <= {row for _, row, _ in keys}
        answered, lost = len(left), len(keys) - len(left)
        number = max([row for _, row, _ in keys] + [0])  # the last round is asked for once more
        number = max(number, 1)
    assert verify(ledger).ok
    print(json.dumps({"kills": KILLS, "vectors": answered, "paid for and lost": lost, "wrong": 0}))


# --- when it trains ----------------------------------------------------------------------------------------------


def test_barred_device_says_so_at_once_and_keeps_its_promise(clients, tmp_path):
    hot, cool = tmp_path / "hot", tmp_path / "cool"
    for root, temperature in ((hot, "90000"), (cool, "40000")):
        zone = root / "sys/class/thermal/thermal_zone0"
        zone.mkdir(parents=True)
        (zone / "temp").write_text(temperature)
    devices = {2 + n: device_of(clients / f"c{n}") for n in range(5)}
    for device in devices.values():
        gates = Eligibility(max_temperature_celsius=75.0)
        settings = replace(device.bundle.settings, eligibility=gates)
        device.bundle, device.root = replace(device.bundle, settings=settings), cool
    devices[3].root = hot

    def heats_up(message):
        if (
            message.metadata.dst_node_id == 4
            and read_position(message.content).exchange is Exchange.SURVIVORS
        ):
            devices[4].root = hot

    opened = masked_sum(Devices(devices, heats_up))
    assert opened.survivors == 4 and opened.dropped == {"not eligible": 1}
    assert code_of(devices[3], in_the_clear()) == NOT_ELIGIBLE
    assert not devices[3].ledger.path.exists()


def test_health_is_whole_whenever_it_is_read_and_flushes_nothing(clients, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(descriptor) or fsync(descriptor))
    keeper = agent.Agent(device_of(clients / "c0").bundle)
    before = len(synced)
    keeper.say("idle")
    with open(clients / "c0" / "state" / agent.HEALTH) as file:
        keeper.say("training")
        assert json.load(file)["state"] == "idle"
    assert agent.read_health(clients / "c0" / "state").state == "training" and len(synced) == before


@pytest.mark.parametrize(
    ("row", "said"),
    [(20, "round 20 of"), (FIRST_ROW + 20, "evaluation after round 20 of"), (FIRST_ROW, "scaling of")],
)
def test_the_status_of_a_device_names_a_round_by_its_number(clients, capsys, row: int, said: str):
    state = clients / "c0" / "state"
    agent.Agent(device_of(clients / "c0").bundle).say("idle")
    health = json.loads((state / agent.HEALTH).read_text())
    told = {"round": row, "run": "spring", "outcome": "answered", "at": "2026-01-01T00:00:00+00:00"}
    (state / agent.HEALTH).write_text(json.dumps({**health, **told}))
    status(clients / "c0", as_json=False)
    assert f"\n  {said} spring answered" in capsys.readouterr().out


def test_a_device_keeps_a_run_that_is_over_until_another_begins(clients):
    device, over = device_of(clients / "c0"), threading.Event()
    state, model = device.bundle.state, {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}
    keeper = agent.Agent(device.bundle, over)
    keeper.device = device
    assert keeper.longest_wait() == agent.usual_wait() < agent.REST_SECONDS
    reply = keeper.handle(message_to(2, RunOver("spring", "completed", 20, model, "5f")))
    assert not reply.has_error() and over.is_set() and keeper.longest_wait() == agent.REST_SECONDS
    with safe_open(state / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"run": "spring", "agreement": "5f"}
    assert str(read_ended(state)) == "run spring is over (completed after 20 rounds)"
    assert (load_file(state / "model.safetensors")["w"] == model["w"]).all()
    again = agent.Agent(device.bundle)
    again.device = device
    assert again.longest_wait() == agent.REST_SECONDS
    again.handle(in_the_clear())
    assert (
        again.longest_wait() == agent.usual_wait()
        and read_ended(state) is None
        and (state / "model.safetensors").exists()
    )


def test_device_says_once_that_it_looks_for_another_run(clients, caplog):
    device = device_of(clients / "c0")
    keeper = agent.Agent(device.bundle)
    keeper.device = device
    keeper.handle(message_to(2, RunOver("spring", "completed", 20, {})))
    with caplog.at_level("INFO", "fedveil.client"):
        for number in range(50):
            keeper.say(loss_line(600.0 + number, "unavailable: connection refused"))
        assert [record.message for record in caplog.records] == [agent.RESTING]
        keeper.handle(in_the_clear())
        keeper.say(loss_line(1.0, "unavailable"))
        assert "trying again in 1 s" in caplog.records[-1].message


def test_link_failing_for_an_unknown_reason_is_tried_again(clients, monkeypatch):
    """RecursionError, for one, from a message of a server that is not what it should be."""
    bundle, stop, calls = device_of(clients / "c0").bundle, threading.Event(), []
    monkeypatch.setattr(agent, "WAIT_SECONDS", 0.0)

    def follow(*_):
        calls.append(1)
        if len(calls) == 3:
            stop.set()
        raise [RecursionError(), AttributeError("no such thing"), OSError(28, "No space left")][
            len(calls) - 1
        ]

    monkeypatch.setattr(agent, "_link", lambda _: follow)
    agent._follow(bundle, agent.Agent(bundle), stop)
    assert len(calls) == 3


def test_a_full_disk_keeps_no_half_of_a_run_that_is_over(clients, monkeypatch):
    device, over = device_of(clients / "c0"), threading.Event()
    keeper = agent.Agent(device.bundle, over)
    monkeypatch.setattr("fedveil.deployment.device.run_end.replace_file", no_room)
    reply = keeper.handle(message_to(2, RunOver("spring", "completed", 20, {"w": np.zeros(2)})))
    assert reply.error.code == NOT_READY and not over.is_set() and read_ended(device.bundle.state) is None


def no_room(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "said",
    [
        {"run": "", "rounds": 2},
        {"run": "a\nb", "rounds": 2},
        {"run": "spring", "rounds": True},
        {"run": "spring", "rounds": 2, "agreement": 5},
    ],
)
def test_unreadable_end_of_a_run_is_stored_nowhere(clients, said):
    device = device_of(clients / "c0")
    keeper = agent.Agent(device.bundle)
    keeper.device = device
    content = RecordDict({"run over": ConfigRecord({"status": "completed", **said}), "model": ArrayRecord()})
    reply = keeper.handle(Message(content, 2, "query"))
    assert reply.error.code == FAILED and read_ended(device.bundle.state) is None


def test_device_before_its_certificate_knows_its_wrong_clock(clients, monkeypatch):
    device = device_of(clients / "c0")
    monkeypatch.setattr("fedveil.deployment.device.device.time.time", lambda: 0.0)
    assert "the clock says" in device.ineligibility()
    assert code_of(device, in_the_clear()) == NOT_READY


def test_a_device_that_wakes_up_in_1970_waits_until_its_clock_is_set(clients, monkeypatch):
    bundle = device_of(clients / "c0").bundle
    now, said, keeper = [0.0], [], agent.Agent(bundle)
    monkeypatch.setattr("fedveil.deployment.device.device.time.time", lambda: now[0])

    class Stop(threading.Event):
        def wait(self, timeout=None):
            said.append(agent.read_health(bundle.state).state)
            if len(said) == 2:
                now[0] = datetime.now(UTC).timestamp()
            return False

    assert agent._wait_for_clock(bundle, keeper, Stop())
    assert len(said) == 2 and all(each.startswith("waiting: the clock says") for each in said)
