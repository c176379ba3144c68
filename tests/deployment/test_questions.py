"""A device and a question: for what its owner lets it be asked, what that costs, and what the owner reads of it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import runpy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from safetensors.numpy import save

from fedveil.base.refusal import Refusal
from fedveil.cli.ask import format_answer
from fedveil.deployment.device.commands import status
from fedveil.deployment.device.device_ledger import questions_of
from fedveil.deployment.questions import ask_clients
from fedveil.messages.flower_adapter import name_message
from fedveil.messages.training_order import ORDER_KEY, ModeName
from fedveil.messages.wire import BUDGET_SPENT, FAILED, OWNERS_POLICY, add_reply, instruct
from fedveil.privacy.accounting.gaussian import gaussian_epsilon
from fedveil.privacy.budget import Adversary
from fedveil.privacy.ledger.ledger import read_entries
from fedveil.privacy.ledger.ledger_state import RESERVE
from fedveil.privacy.mechanisms.private_sum import CohortSum
from fedveil.privacy.mechanisms.sum_spec import Segment, SumSpec
from fedveil.privacy.statistics.inquiry import Inquiry, read_inquiry
from fedveil.questions.question_plan import Spend
from fedveil.questions.wire import question_content
from fedveil.server.masking import Masking
from fedveil.server.round_terms import Sum
from fedveil.server.secure_sum import SecureSums
from fedveil.tasks import load_task
from fedveil.tasks.arrays import agreement_of, read_arrays

FAULTS = Path(__file__).parents[1] / "faults"
MADE, SERVED = (runpy.run_path(str(FAULTS / name)) for name in ("devices.py", "served.py"))
CENTRAL, ORDER, Devices, code_of, device_of = (
    MADE[name] for name in ("CENTRAL", "ORDER", "Devices", "code_of", "device_of")
)
RECORDS = 40
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def clients(made: Path) -> Path:
    return made / "clients"


def inquiry(purpose: str = "statistics", name: str = "labels") -> Inquiry:
    ask = [{"kind": "histogram", "name": "classes", "of": "label", "categories": ["0", "1", "2"]}]
    why = "How many of each class are there?"
    return read_inquiry({"name": name, "purpose": purpose, "why": why, "records": RECORDS, "ask": ask})


def content(asked: Inquiry, order: Any = CENTRAL):
    return question_content(asked, {ORDER_KEY: replace(order, run=asked.name).to_json()})


def in_the_clear(asked: Inquiry, spec: SumSpec | None = None) -> Message:
    spec = spec or SumSpec(1.0, asked.segments)
    message = Message(instruct(content(asked), spec, asked.name, 1), 2, "train")
    name_message(message, f"m {asked.name}")
    return message


def payloads(device: Any) -> list[dict[str, Any]]:
    path = device.ledger.path
    return (
        [json.loads(each.payload) for each in read_entries(path) if each.kind == RESERVE]
        if path.exists()
        else []
    )


def test_question_for_an_allowed_purpose_is_charged_as_one(clients: Path) -> None:
    device, asked = device_of(clients / "c0", purposes=("statistics",)), inquiry()
    reply = device.answer(in_the_clear(asked))
    (classes, bit), spec = asked.segments, SumSpec(1.0, asked.segments)
    told = CohortSum(np.zeros(spec.segment_size))
    add_reply(told, reply, spec)
    vector = told.total
    labels = np.load(clients / "c0" / "device.npz")["targets"]
    np.testing.assert_allclose(vector[:3] * spec.scale(classes), np.bincount(labels, minlength=3), atol=1e-2)
    assert told.replies == 1 and bit.purpose == "statistics"
    (payload,) = payloads(device)
    assert payload["kind"] == "question" and payload["purpose"] == asked.why
    assert payload["segments"] == {"classes": "statistics", "classes: clipped": "statistics"}
    (entry,) = questions_of(device.ledger.path)
    assert entry.epsilon == pytest.approx(gaussian_epsilon(1 / 3, 1e-5), rel=1e-2)


@pytest.mark.parametrize("allowed", [(), ("evaluation",)])
def test_a_purpose_that_the_owner_does_not_allow_is_refused_by_name(
    clients: Path, allowed: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    device = device_of(clients / "c0", purposes=allowed)
    assert code_of(device, in_the_clear(inquiry("marketing"))) == OWNERS_POLICY
    assert "purpose='marketing'" in caplog.text and not payloads(device)


@pytest.mark.parametrize("purpose", ["evaluation", "training"])
def test_allowance_of_models_allows_no_count_of_rows(clients: Path, purpose: str) -> None:
    with pytest.raises(Refusal, match=f"purpose='{purpose}'"):
        inquiry(purpose)
    asked = inquiry()
    told = replace(
        asked, purpose=purpose, text=asked.text.replace("statistics", purpose)
    )  # of a server that lies
    device = device_of(clients / "c0", purposes=("evaluation",))
    assert code_of(device, in_the_clear(told)) == OWNERS_POLICY and not payloads(device)


def test_a_spec_that_is_not_the_questions_is_refused(clients: Path) -> None:
    device, asked = device_of(clients / "c0", purposes=("statistics",)), inquiry()
    wider = replace(asked.segments[0], bound=4000.0)
    assert code_of(device, in_the_clear(asked, SumSpec(1.0, (wider, asked.segments[1])))) == OWNERS_POLICY
    assert not payloads(device)


def test_extra_segment_of_another_purpose_is_refused(clients: Path) -> None:
    device = device_of(clients / "c0")
    beside = Segment("accuracies", 1.0, 0.1, (20,), "evaluation")
    message = MADE["in_the_clear"](spec=SumSpec(1.0, (*MADE["SCALARS"], beside), 0.05))
    assert code_of(device, message) == OWNERS_POLICY
    assert code_of(device_of(clients / "c1", purposes=("evaluation",)), message) == 0


def test_questions_spend_no_more_than_the_owner_lets_them(
    clients: Path, caplog: pytest.LogCaptureFixture
) -> None:
    once = gaussian_epsilon(2 / 3, 1e-5)  # of a record: another one may exchange the client's vector
    device = device_of(clients / "c0", purposes=("statistics",), questions_epsilon=1.2 * once)
    assert code_of(device, in_the_clear(inquiry(name="one"))) == 0
    assert code_of(device, in_the_clear(inquiry(name="two"))) == BUDGET_SPENT
    assert "questions may spend" in caplog.text
    assert code_of(device, MADE["in_the_clear"]()) == 0  # training goes on
    assert len(payloads(device)) == 2


def test_repeated_question_is_charged_once_and_not_answered_anew(clients: Path) -> None:
    device = device_of(clients / "c0", purposes=("statistics",))
    assert code_of(device, in_the_clear(inquiry())) == 0
    assert code_of(device, in_the_clear(inquiry())) != 0
    assert len(payloads(device)) == 1


def test_a_masked_question_is_charged_against_everybody(clients: Path) -> None:
    devices = {2 + n: device_of(clients / f"c{n}", purposes=("statistics",)) for n in range(5)}
    grid, asked = Devices(devices), inquiry()
    roster = devices[2].bundle.identity.roster
    spec = SumSpec(1.0, asked.segments)
    wanted = Sum(asked.name, 1, content(asked, ORDER), "train", spec, {}, 3.0)
    opened = SecureSums(grid, Masking(roster, dropout=0.4, collusion=0.1)).sum(
        grid.get_node_ids(), wanted, None
    )
    assert opened.survivors == 5, opened
    for device in devices.values():
        (payload,) = payloads(device)
        assert payload["kind"] == "question" and set(payload["events"]) == {str(each) for each in Adversary}


def test_owner_reads_question_purpose_and_cost(clients: Path, capsys: pytest.CaptureFixture[str]) -> None:
    device = device_of(clients / "c0", purposes=("statistics",))
    assert code_of(device, in_the_clear(inquiry())) == 0
    status(clients / "c0", as_json=False)
    said = capsys.readouterr().out
    assert (
        "question labels, for statistics: classes (How many of each class are there?); cost epsilon" in said
    )
    status(clients / "c0", as_json=True)
    (told,) = json.loads(capsys.readouterr().out)["questions"]
    keys = {"name", "purposes", "why", "asked", "epsilon", "when", "state"}
    assert told.keys() == keys  # programs read them
    assert told["name"] == "labels" and told["purposes"] == ["statistics"] and told["epsilon"] > 0


def test_device_without_a_model_is_silent_about_one_and_not_charged(clients: Path) -> None:
    device, file = device_of(clients / "c0", purposes=("statistics",)), b"a model"
    plain = {**json.loads(inquiry().text), "model": hashlib.sha256(file).hexdigest()}
    asked = read_inquiry(plain)
    sent = about_model(asked, file)
    assert code_of(device, sent) == FAILED and not payloads(device)


def about_model(asked: Inquiry, file: bytes, order: Any = CENTRAL) -> Message:
    told = question_content(asked, {ORDER_KEY: replace(order, run=asked.name).to_json()}, released=file)
    message = Message(instruct(told, SumSpec(1.0, asked.segments), asked.name, 1), 2, "train")
    name_message(message, f"m {asked.name}")
    return message


# --- a served federation ----------------------------------------------------------------------------------------


COMMON = ("task=digits", "privacy.allow_large_delta=true", "privacy.target_epsilon=10", "link.wait=5")


@pytest.fixture
def hearts(tmp_path: Path) -> Path:
    return SERVED["make_federation"](tmp_path)


def forbid(hearts: Path, *names: str) -> None:
    """Let these owners allow no question."""
    for name in names:
        policy = hearts / "clients" / name / "policy.toml"
        told, count = re.subn(r"purposes = \[[^]]*\]", "purposes = []", policy.read_text())
        assert count == 1
        policy.write_text(told)


def test_a_device_tells_of_a_model_of_its_task_and_pays_for_no_other(hearts: Path) -> None:
    device = SERVED["Devices"](hearts / "clients").devices[2]
    device.bundle = replace(device.bundle, policy=replace(device.bundle.policy, require_log=False))
    ask = [{"kind": "histogram", "of": "predicted", "categories": ["0", "1"]}]
    model = save(read_arrays(load_task("digits", {}).model()))
    for file, code in ((save({"w": np.zeros(2)}), FAILED), (b"none", FAILED), (model, 0)):
        known = hashlib.sha256(file).hexdigest()
        asked = read_inquiry({"name": "said", "model": known, "records": RECORDS, "ask": ask})
        assert code_of(device, about_model(asked, file, agreed(CENTRAL))) == code
        assert len(payloads(device)) == (code == 0)


def agreed(order: Any) -> Any:
    return replace(order, agreement=agreement_of(load_task("digits", {})))


@pytest.mark.parametrize("privacy", ["client_central", "client_distributed"])
def test_a_servers_folder_asks_its_clients(hearts: Path, privacy: str) -> None:
    grid = SERVED["Devices"](hearts / "clients")
    given = (*COMMON, f"privacy={privacy}", "cohort=all")
    reach = SERVED["reaching"](grid)
    record = ask_clients(hearts / "server", inquiry(), Spend(noise_multiplier=1.0), given, reach=reach)
    assert record["released"] and record["rng"] == "system" and record["clients"] == 5
    assert len(record["answers"][0]["figures"]) == 3
    again = ask_clients(hearts / "server", inquiry(), Spend(noise_multiplier=1.0), given, reach=reach)
    assert again == {**record, "from_record": True}
    for device in grid.devices.values():
        assert len(questions_of(device.ledger.path)) == 1


def test_answer_beyond_a_full_disk_is_sent_nevertheless(
    hearts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("fedveil.questions.ask.replace_file", full)
    given, grid = (*COMMON, "privacy=client_central", "cohort=all"), SERVED["Devices"](hearts / "clients")
    asked = inquiry(), Spend(noise_multiplier=1.0), given
    record = ask_clients(hearts / "server", *asked, reach=SERVED["reaching"](grid))
    assert len(record["answers"][0]["figures"]) == 3
    said = capsys.readouterr().err
    assert "No space left on device; the answer is charged" in said and "keep what is printed" in said


def test_clients_without_leave_for_questions_are_zeros(hearts: Path) -> None:
    forbid(hearts, "cleveland", "hungary", "switzerland", "longbeach")
    grid = SERVED["Devices"](hearts / "clients")
    given = (*COMMON, "privacy=client_central", "cohort=all", "link.quorum=0.5")
    reach = SERVED["reaching"](grid)
    record = ask_clients(hearts / "server", inquiry(), Spend(noise_multiplier=1.0), given, reach=reach)
    assert not record["released"] and record["answers"] == []
    with pytest.raises(Refusal, match="take a new key"):  # it was charged
        ask_clients(hearts / "server", inquiry(), Spend(noise_multiplier=1.0), given, reach=reach)


@pytest.mark.parametrize("mode", ["client_distributed", "client_central"])
def test_an_operator_reads_why_devices_did_not_answer(hearts: Path, mode: str) -> None:
    for policy in (hearts / "clients").glob("*/policy.toml"):
        policy.write_text(re.sub("target_epsilon = .*", "target_epsilon = 0.01", policy.read_text()))
    grid = SERVED["Devices"](hearts / "clients")
    more = ("link.quorum=0.5",) if mode == "client_central" else ()  # encrypted sums have their own
    given = (*COMMON, f"privacy={mode}", "cohort=all", *more)
    spend, reach = Spend(noise_multiplier=1.0), SERVED["reaching"](grid)
    record = ask_clients(hearts / "server", inquiry(), spend, given, reach=reach)
    said = format_answer(record)
    assert not record["released"] and "the reservation stays spent" in said
    if mode == "client_distributed":
        assert "each of the others sent its reason (budget spent 5)" in said and "unknown" not in said
        return
    # A trusted server keeps counts of who answers to its operator.
    assert "too few clients answered; operator.jsonl has the clients' reasons" in said
    told = (hearts / "server" / "questions" / "operator.jsonl").read_text()
    assert json.loads(told)["dropped"] == {"budget spent": 5}


@pytest.mark.parametrize("answered", [True, False])
def test_a_servers_ledger_that_lacks_a_question_is_refused(hearts: Path, answered: bool) -> None:
    given = (*COMMON, "privacy=client_central", "cohort=all", "link.quorum=0.5")
    reach = SERVED["reaching"](SERVED["Devices"](hearts / "clients"))
    first, second, third = (inquiry(name=name) for name in ("first", "second", "third"))
    spend = Spend(noise_multiplier=1.0)
    ask_clients(hearts / "server", first, spend, given, reach=reach)
    (ledger,) = (hearts / "server" / "ledgers").glob("*.ledger")
    earlier = ledger.read_bytes()
    if not answered:
        forbid(hearts, "cleveland", "hungary", "switzerland", "longbeach")
        reach = SERVED["reaching"](SERVED["Devices"](hearts / "clients"))
    record = ask_clients(hearts / "server", second, spend, given, reach=reach)
    assert record["released"] == answered
    newest = ledger.read_bytes()
    ledger.write_bytes(earlier)
    with pytest.raises(Refusal, match="which question second left"):
        ask_clients(hearts / "server", third, spend, given, reach=reach)
    assert ledger.read_bytes() == earlier
    ledger.write_bytes(newest)
    assert ask_clients(hearts / "server", third, spend, given, reach=reach)["rounds"] == 1
    (hearts / "server" / "questions" / "ledger.heads").write_text("[1]")
    with pytest.raises(Refusal, match="restore it"):
        ask_clients(hearts / "server", third, spend, given, reach=reach)


def test_question_on_a_restored_server_is_refused_before_a_charge(hearts: Path) -> None:
    """The devices report the later head only after the server has waited for it."""
    given = (*COMMON, "privacy=client_central", "cohort=all")
    later, calls = "a device holds a later head", list[bool]()
    inner = SERVED["reaching"](SERVED["Devices"](hearts / "clients"))

    @contextmanager
    def reach(settings: Any, bundle: Any, nodes: Any) -> Iterator[Any]:
        def presence() -> Any:
            calls.append(len(calls) > 3)
            return replace(link.presence(), reported=calls[-1])

        with inner(settings, bundle, nodes) as link:
            yield replace(link, presence=presence)

    def logged(link: Any, *_: Any) -> Any:
        return replace(link, log_loss=lambda: later if calls[-1] else None)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Refusal, match=later) as refused:
        patch.setattr("fedveil.deployment.questions.with_log", logged)
        ask_clients(hearts / "server", inquiry(), Spend(noise_multiplier=1.0), given, reach=reach)
    assert refused.value.field == "file" and str(refused.value.value).endswith("log.jsonl")
    (ledger,) = (hearts / "server" / "ledgers").glob("*.ledger")
    assert not [each for each in read_entries(ledger) if each.kind == RESERVE]


def test_too_few_connected_clients_are_refused_before_a_charge(hearts: Path) -> None:
    grid = SERVED["Devices"](hearts / "clients")
    given = (*COMMON, "privacy=client_central", "cohort=all", "link.wait=0.1")
    reach = SERVED["reaching"](grid, here=2)
    with pytest.raises(Refusal, match="were connected"):
        ask_clients(hearts / "server", inquiry(), Spend(noise_multiplier=1.0), given, reach=reach)
    (ledger,) = (hearts / "server" / "ledgers").glob("*.ledger")
    assert not [each for each in read_entries(ledger) if each.kind == RESERVE]


def test_a_question_while_a_server_runs_is_refused(hearts: Path) -> None:
    from fedveil.deployment.probe import SERVER_LOCK
    from fedveil.privacy.ledger.hash_chain import exclusive_lock

    with exclusive_lock(hearts / "server" / SERVER_LOCK, "server"), pytest.raises(Refusal) as refused:
        ask_clients(hearts / "server", inquiry(), Spend(epsilon=1.0), COMMON)
    assert refused.value.field == "server"


def test_the_mode_of_a_question_hides_whole_clients(clients: Path) -> None:
    device, asked = device_of(clients / "c0", purposes=("statistics",)), inquiry()
    order = replace(CENTRAL, privacy=ModeName.CLIENT_DISTRIBUTED)
    message = Message(
        instruct(content(asked, order), SumSpec(1.0, asked.segments), asked.name, 1), 2, "train"
    )
    name_message(message, "m")
    assert code_of(device, message) == OWNERS_POLICY  # shares of noise are for encrypted sums
