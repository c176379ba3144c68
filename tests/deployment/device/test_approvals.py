"""Approvals of a device's owner: what is not approved is not answered or charged, and each decision is on the ledger."""

import errno
import json
import runpy
import shutil
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from fedveil.base.refusal import Refusal
from fedveil.deployment.device import device_ledger, owner_requests
from fedveil.deployment.device.client_bundle import renew_roster
from fedveil.deployment.device.commands import forget, roster, status
from fedveil.deployment.device.order_policy import Instruction
from fedveil.deployment.device.owner_decisions import FILE as DECISIONS
from fedveil.deployment.device.owner_decisions import OFFICER, OwnerVerdict
from fedveil.deployment.device.owner_desk import decide, read_desk
from fedveil.deployment.device.owner_requests import (
    OwnerRequest,
    read_requests,
    request_name,
    request_of,
)
from fedveil.deployment.provision import revoke
from fedveil.messages.flower_adapter import name_message
from fedveil.messages.local_training import LocalTraining
from fedveil.messages.secure_wire import read_position
from fedveil.messages.training_order import ORDER_KEY, ClientClaim
from fedveil.messages.wire import NOT_READY, OWNERS_POLICY, WAITING, Exchange, instruct
from fedveil.privacy.budget import Adjacency
from fedveil.privacy.ledger.ledger import read_entries, verify
from fedveil.privacy.ledger.ledger_state import RESERVE
from fedveil.privacy.mechanisms.sum_spec import SumSpec
from fedveil.privacy.statistics.inquiry import read_inquiry
from fedveil.questions.wire import question_content

MADE = runpy.run_path(str(Path(__file__).parents[2] / "faults" / "devices.py"))
CENTRAL, Devices, code_of, device_of, in_the_clear, masked_sum = (
    MADE[name] for name in ("CENTRAL", "Devices", "code_of", "device_of", "in_the_clear", "masked_sum")
)
RUNS, QUESTIONS = {"approve_runs": True}, {"approve_questions": True, "purposes": ("statistics",)}
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def folder(made: Path) -> Path:
    """Bundle of c0, whose policy.toml demands approval."""
    bundle = made / "clients" / "c0"
    policy = bundle / "policy.toml"
    text = policy.read_text()
    kept = [line for line in text.splitlines() if not line.startswith("purposes")]
    demands = ["approve_runs = true", "approve_questions = true", 'purposes = ["statistics"]']
    policy.write_text("\n".join([*demands, *kept]) + "\n")
    return bundle


def charges(device: Any) -> int:
    paths = [each for each in (device.ledger.path, device.ledger.records) if each.exists()]
    return sum(entry.kind == RESERVE for path in paths for entry in read_entries(path))


def question(name: str = "labels", why: str = "How many of each?", **order: Any) -> Message:
    labels = {"kind": "histogram", "name": "classes", "of": "label", "categories": ["0", "1", "2"]}
    asked = read_inquiry({"name": name, "purpose": "statistics", "why": why, "records": 40, "ask": [labels]})
    content = question_content(asked, {ORDER_KEY: replace(CENTRAL, run=asked.name, **order).to_json()})
    message = Message(instruct(content, SumSpec(1.0, asked.segments), asked.name, 1), 2, "train")
    name_message(message, f"m {name}")
    return message


def only_waiting(folder: Path) -> str:
    (request,) = read_desk(folder).waiting
    return request.id


def acts(device: Any) -> list[dict[str, Any]]:
    return [
        json.loads(each.payload)
        for each in read_entries(device.ledger.path)
        if each.kind == "owner's decision"
    ]


# --- runs and questions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["run", "question"])
def test_nothing_is_answered_before_its_owner_approves_it(folder: Path, kind: str) -> None:
    device, message = device_of(folder), in_the_clear() if kind == "run" else question()
    for _ in range(2):
        assert code_of(device, message) == WAITING and not charges(device)
    (request,) = read_desk(folder).waiting
    assert (request.kind, request.name) == (kind, "spring" if kind == "run" else "labels")
    decide(folder, OwnerVerdict.APPROVED, request.id, "vote 17")
    assert code_of(device, message) == 0 and charges(device) == 1
    assert not read_desk(folder).waiting


def test_an_approval_of_a_run_holds_for_its_rounds_and_resumptions(folder: Path) -> None:
    device = device_of(folder)
    code_of(device, in_the_clear())
    decide(folder, OwnerVerdict.APPROVED, only_waiting(folder), "vote 17")
    assert [code_of(device, in_the_clear(number=number)) for number in (1, 2)] == [0, 0]
    slower = replace(CENTRAL, training=replace(CENTRAL.training, learning_rate=0.01))
    assert code_of(device, in_the_clear(slower, 3)) == 0  # as an arm of tuning may
    assert request_name("spring@5f evaluation") == "spring evaluation"


@pytest.mark.parametrize("hold", [OwnerVerdict.REFUSED, OwnerVerdict.STOPPED])
def test_no_detour_takes_back_what_the_officer_decided(folder: Path, hold: OwnerVerdict) -> None:
    device = device_of(folder)
    code_of(device, in_the_clear())
    request = only_waiting(folder)
    decide(folder, hold, request, "no vote", OFFICER)
    decide(folder, hold, request, "neither do I")
    with pytest.raises(Refusal, match="alone takes it back"):
        decide(folder, OwnerVerdict.APPROVED, request, "after all")
    assert code_of(device, in_the_clear()) == OWNERS_POLICY and not charges(device)
    decide(folder, OwnerVerdict.APPROVED, request, "vote 17", OFFICER)
    decide(folder, OwnerVerdict.REFUSED, request, "not now")
    decide(folder, OwnerVerdict.APPROVED, request, "now")
    assert code_of(device, in_the_clear()) == 0


def test_other_terms_under_a_refused_name_wait_for_its_owner(folder: Path) -> None:
    device = device_of(folder)
    code_of(device, question())
    decide(folder, OwnerVerdict.REFUSED, only_waiting(folder), "say who reads it")
    assert code_of(device, question(why="The board reads it.")) == WAITING
    decide(folder, OwnerVerdict.APPROVED, only_waiting(folder), "vote 18")
    assert code_of(device, question(why="The board reads it.")) == 0


def test_question_of_a_resumed_run_is_the_same_request(folder: Path) -> None:
    device = device_of(folder)
    code_of(device, question("labels"))
    decide(folder, OwnerVerdict.APPROVED, only_waiting(folder), "vote 17")
    assert code_of(device, question("labels@5f")) == 0


def test_decisions_after_a_lost_file_are_on_the_ledger_too(folder: Path) -> None:
    device = device_of(folder)
    code_of(device, in_the_clear())
    request = only_waiting(folder)
    decide(folder, OwnerVerdict.APPROVED, request, "vote 17")
    device.ledger.record_decisions(read_desk(folder).decisions)
    path = device.ledgers / DECISIONS
    stored = json.loads(path.read_text())
    stored["decisions"][0]["at"] = "2026-01-01T00:00:00+00:00"
    path.unlink()
    decide(folder, OwnerVerdict.APPROVED, request, "vote 18")
    device.ledger.record_decisions(
        [replace(each, at="2027-01-01T00:00:00+00:00") for each in read_desk(folder).decisions]
    )
    assert {each["reason"] for each in acts(device)} == {"vote 17", "vote 18"}


CHANGES = {
    "epochs": {"training": LocalTraining(0.1, 2, 10)},
    "less noise": {"client": ClientClaim(2.9, Adjacency.ZERO_OUT)},
    "adjacency": {"client": ClientClaim(9.0, Adjacency.REPLACE_ONE)},
    "held out": {"held_out": 0.2},
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_run_needs_a_new_approval(folder: Path, change: str) -> None:
    device = device_of(folder)
    code_of(device, in_the_clear())
    decide(folder, OwnerVerdict.APPROVED, only_waiting(folder), "vote 17")
    changed = in_the_clear(replace(CENTRAL, **CHANGES[change]), 2)
    assert code_of(device, changed) == WAITING and not charges(device)
    decide(folder, OwnerVerdict.APPROVED, only_waiting(folder), "vote 18")
    assert code_of(device, changed) == 0


def test_more_noise_needs_no_new_approval(folder: Path) -> None:
    device = device_of(folder)
    code_of(device, in_the_clear())
    decide(folder, OwnerVerdict.APPROVED, only_waiting(folder), "vote 17")
    noisier = replace(CENTRAL, client=ClientClaim(3.5, Adjacency.ZERO_OUT))
    assert code_of(device, in_the_clear(noisier, 2)) == 0


def test_another_question_under_an_approved_name_waits(folder: Path) -> None:
    device = device_of(folder)
    code_of(device, question())
    decide(folder, OwnerVerdict.APPROVED, only_waiting(folder), "vote 17")
    assert code_of(device, question(why="Who is ill?")) == WAITING and not charges(device)


def test_owner_does_not_see_what_the_policy_forbids(folder: Path) -> None:
    device = device_of(folder, runs=("autumn",))
    assert code_of(device, in_the_clear()) == OWNERS_POLICY
    assert not read_desk(folder).requests


def test_refused_question_may_be_approved_later(folder: Path) -> None:
    device = device_of(folder)
    code_of(device, question())
    refused = only_waiting(folder)
    decide(folder, OwnerVerdict.REFUSED, refused, "no purpose given")
    assert code_of(device, question()) == OWNERS_POLICY and not charges(device)
    decide(folder, OwnerVerdict.APPROVED, refused, "the purpose was given")
    assert code_of(device, question()) == 0
    assert [act["verdict"] for act in acts(device)] == ["refused", "approved"]


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """See requests a day and a minute before now."""
    before = (datetime.now(UTC) - timedelta(hours=24, minutes=1)).isoformat(timespec="seconds")
    monkeypatch.setattr(owner_requests, "_now", lambda: before)
    return iter(())


@pytest.mark.usefixtures("later")
def test_request_that_nobody_decided_in_time_counts_as_refused(folder: Path) -> None:
    device = device_of(folder)
    assert code_of(device, question()) == OWNERS_POLICY and not charges(device)
    assert code_of(device_of(folder, approve_within="2d"), question()) == WAITING
    (pair,) = read_desk(folder).requests
    assert pair[1] == "expired"
    decide(folder, OwnerVerdict.APPROVED, pair[0].id, "late, but yes")
    assert code_of(device, question()) == 0


# --- pauses and stops ----------------------------------------------------------------------------------------------


def test_pause_holds_all_that_is_new_until_its_end(made: Path) -> None:
    folder = made / "clients" / "c1"
    device = device_of(folder)
    decide(folder, OwnerVerdict.PAUSED, "", "audit")
    assert code_of(device, in_the_clear()) == WAITING and not charges(device)
    with pytest.raises(Refusal, match="paused already"):
        decide(folder, OwnerVerdict.PAUSED, "", "audit")
    decide(folder, OwnerVerdict.RESUMED, "", "audit is over")
    assert code_of(device, in_the_clear()) == 0


def test_stop_ends_a_run_whatever_its_terms(made: Path) -> None:
    folder = made / "clients" / "c1"
    device = device_of(folder)
    assert code_of(device, in_the_clear()) == 0
    decide(folder, OwnerVerdict.STOPPED, "spring", "consent withdrawn")
    other = replace(CENTRAL, training=LocalTraining(0.1, 3, 10))
    assert [code_of(device, in_the_clear(each, 2)) for each in (CENTRAL, other)] == [OWNERS_POLICY] * 2
    assert charges(device) == 1
    assert forget(folder, ledgers=False) == 0
    assert code_of(device_of(folder), in_the_clear(number=3)) == OWNERS_POLICY


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"decisions": [{"verdict": "maybe", "kind": "run"}]}'])
def test_everything_waits_while_decisions_cannot_be_read(made: Path, damage: bytes) -> None:
    folder = made / "clients" / "c1"
    device = device_of(folder)
    assert code_of(device, in_the_clear()) == 0
    (device.ledgers / DECISIONS).write_bytes(damage)
    assert code_of(device, in_the_clear(number=2)) == WAITING
    with pytest.raises(Refusal, match=r"decisions=.*everything waits"):
        decide(folder, OwnerVerdict.PAUSED, "", "audit")
    assert status(folder, as_json=False) == 1


def test_lost_requests_wait_anew(folder: Path) -> None:
    device = device_of(folder)
    code_of(device, in_the_clear())
    (device.bundle.state / owner_requests.FILE).write_bytes(b"damaged")
    assert not read_requests(device.bundle.state)
    assert code_of(device, in_the_clear()) == WAITING and len(read_desk(folder).waiting) == 1


def test_request_that_cannot_be_stored_begins_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: object, **more: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    device = device_of(folder, approve_runs=False)
    monkeypatch.setattr(owner_requests, "replace_file", fail)
    assert code_of(device, in_the_clear()) == NOT_READY and not charges(device)


def test_old_requests_are_dropped_and_files_are_their_owners_alone(folder: Path) -> None:
    device = device_of(folder)
    for number in range(owner_requests.MAX_REQUESTS + 3):
        assert code_of(device, question(f"q{number}")) == WAITING
    requests = read_requests(device.bundle.state)
    assert len(requests) == owner_requests.MAX_REQUESTS and requests[-1].name == f"q{number}"
    decide(folder, OwnerVerdict.REFUSED, requests[-1].id, "too many")
    for path in (device.bundle.state / owner_requests.FILE, device.ledgers / DECISIONS):
        assert path.stat().st_mode & 0o777 == 0o600


def test_decisions_are_acts_on_the_ledger_with_their_reasons(folder: Path) -> None:
    device = device_of(folder)
    code_of(device, in_the_clear())
    decide(folder, OwnerVerdict.APPROVED, only_waiting(folder), "ethics vote 17")
    decide(folder, OwnerVerdict.STOPPED, "spring", "consent withdrawn")
    written = acts(device)
    assert [(act["verdict"], act["name"], act["reason"]) for act in written] == [
        ("approved", "spring", "ethics vote 17"),
        ("stopped", "spring", "consent withdrawn"),
    ]
    assert all(act["who"] and act["at"] and act["role"] == "owner" for act in written)
    assert verify(device.ledger.path).ok


def test_decision_under_a_locked_ledger_is_recorded_later(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = device_of(folder)
    code_of(device, in_the_clear())
    monkeypatch.setattr(device_ledger, "WAIT_SECONDS", 0.05)
    device.ledgers.mkdir(parents=True, exist_ok=True)
    with device.ledger._open(device.ledger.path, device.ledger.budget):
        line = decide(folder, OwnerVerdict.APPROVED, only_waiting(folder), "vote 17")
    assert "before its next answer" in line and not acts(device)
    assert code_of(device, in_the_clear()) == 0
    assert [act["reason"] for act in acts(device)] == ["vote 17"]


# --- in masks ------------------------------------------------------------------------------------------------------


def test_masked_sum_goes_on_with_a_decision_that_comes_in_time(made: Path) -> None:
    clients = made / "clients"
    devices = {2 + n: device_of(clients / f"c{n}", **(RUNS if n == 0 else {})) for n in range(5)}

    def fault(message: Message) -> Message | None:
        """Decide while the link of c0 waits, and send the same again."""
        if message.metadata.dst_node_id != 2:
            return None
        reply = devices[2].answer(message)
        if reply.has_error() and reply.error.code == WAITING:
            (request,) = read_requests(devices[2].bundle.state)
            assert "masked" in request.terms["cohort"] and request.noise == 3.0
            decide(clients / "c0", OwnerVerdict.APPROVED, request.id, "vote 17")
            reply = devices[2].answer(message)
        return reply

    opened = masked_sum(Devices(devices, fault))
    assert opened.survivors == 5 and opened.attempts == 1
    assert all(charges(each) == 1 for each in devices.values())


def test_the_same_run_in_the_clear_is_another_request(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    instructions: list[Instruction] = []

    def seen(instruction: Instruction, delta: float, task: str) -> OwnerRequest:
        instructions.append(instruction)
        return request_of(instruction, delta, task)

    monkeypatch.setattr("fedveil.deployment.device.device.request_of", seen)
    clients = made / "clients"
    masked_sum(Devices({2 + n: device_of(clients / f"c{n}", **RUNS) for n in range(5)}))
    masked = next(each for each in instructions if each.terms is not None)
    one, other = (request_of(each, 1e-5, "digits") for each in (masked, replace(masked, terms=None)))
    assert one.digest != other.digest


def test_masked_sum_goes_on_without_a_device_that_waits(made: Path) -> None:
    clients = made / "clients"
    devices = {2 + n: device_of(clients / f"c{n}", **(RUNS if n == 0 else {})) for n in range(5)}
    grid = Devices(devices)
    for number in (1, 2):
        opened = masked_sum(grid, number)
        assert opened.survivors == 4 and opened.dropped == {"waits for its owner": 1}
    # Once its terms are known, the device does not even propose keys.
    exchanges = [
        read_position(message.content).exchange
        for message, _ in grid.seen
        if message.metadata.dst_node_id == 2 and read_position(message.content).round == 2
    ]
    assert exchanges == [Exchange.PROPOSAL] and not charges(devices[2])


def test_masked_run_with_approved_terms_goes_on_after_other_terms(made: Path) -> None:
    clients = made / "clients"
    devices = {2 + n: device_of(clients / f"c{n}", **(RUNS if n == 0 else {})) for n in range(5)}
    grid = Devices(devices)
    assert masked_sum(grid, 1).survivors == 4
    (request,) = read_requests(devices[2].bundle.state)
    decide(clients / "c0", OwnerVerdict.APPROVED, request.id, "vote 17")
    assert masked_sum(grid, 2, noise=2.9).survivors == 4  # less noise: it waits, and is not answered
    assert masked_sum(grid, 3).survivors == 5
    assert charges(devices[2]) == 1 and len(read_requests(devices[2].bundle.state)) == 2


# --- rosters -------------------------------------------------------------------------------------------------------


def test_roster_takes_effect_by_an_approval_alone(made: Path) -> None:
    folder = Path(
        shutil.copytree(made / "clients" / "c0", made / "device")
    )  # the desk writes its own copy anew
    path = folder / "policy.toml"
    path.write_text(path.read_text().replace("approve_rosters = false", "approve_rosters = true"))
    device = device_of(folder)
    revoke(made, ["c4"])
    signed = (made / "server" / "roster.bin").read_bytes()
    with pytest.raises(Refusal, match="waits for its owner"):
        renew_roster(device.bundle, signed)
    request = only_waiting(folder)
    assert read_desk(folder).request(request).terms["removed"].startswith("c4 ")
    decide(folder, OwnerVerdict.APPROVED, request, "c4 has left")
    decide(folder, OwnerVerdict.REFUSED, request, "ask c4 first")
    with pytest.raises(Refusal, match="waits for its owner"):
        renew_roster(device.bundle, signed)
    decide(folder, OwnerVerdict.APPROVED, request, "c4 said yes")
    assert renew_roster(device.bundle, signed).identity.roster.version == 2
    assert not read_desk(folder).requests
    assert [act["reason"] for act in acts(device)] == ["c4 has left", "ask c4 first", "c4 said yes"]


def test_the_roster_command_keeps_what_the_officer_refused(made: Path) -> None:
    folder = Path(shutil.copytree(made / "clients" / "c0", made / "device"))
    path = folder / "policy.toml"
    path.write_text(path.read_text().replace("approve_rosters = false", "approve_rosters = true"))
    device = device_of(folder)
    revoke(made, ["c4"])
    signed = (made / "server" / "roster.bin").read_bytes()
    with pytest.raises(Refusal, match="waits for its owner"):
        renew_roster(device.bundle, signed)
    decide(folder, OwnerVerdict.REFUSED, only_waiting(folder), "ask c4 first", OFFICER)
    with pytest.raises(Refusal, match="alone takes it back"):
        roster(folder, 2, reason="never mind")
    with pytest.raises(Refusal, match="waits for its owner"):
        renew_roster(device.bundle, signed)
