"""Record-level privacy at a deployed client: planned on the device, charged on the device, whatever the task declares."""

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from torch import nn

from fedveil.base.refusal import Refusal
from fedveil.client.private_update import NotTrained, update_of
from fedveil.deployment.device.client_bundle import TaskChoice, read_client_bundle
from fedveil.deployment.device.device import Device, read_device
from fedveil.deployment.device.device_ledger import epsilon_of
from fedveil.deployment.device.order_policy import Cost
from fedveil.messages.flower_adapter import claim_identity, name_message
from fedveil.messages.local_training import LocalTraining, Optimizer
from fedveil.messages.training_order import ORDER_KEY, ClientClaim, ModeName, RecordTerms, TrainingOrder
from fedveil.messages.wire import (
    BUDGET_SPENT,
    FAILED,
    NO_EXAMPLES,
    NOT_READY,
    OWNERS_POLICY,
    instruct,
    memory_arrays,
    only_arrays,
    sum_spec_of,
)
from fedveil.privacy.accounting.events import Gaussian
from fedveil.privacy.budget import Adjacency, Adversary
from fedveil.privacy.ledger.ledger import read_entries, verify
from fedveil.privacy.ledger.ledger_state import RESERVE
from fedveil.privacy.mechanisms.sum_spec import SumSpec
from fedveil.privacy.secagg.transcript import PROTOCOL_VERSION, AttemptTerms, Profile, run_number
from fedveil.strategies.record_plan import calibrated_noise
from fedveil.tasks.arrays import read_arrays
from fedveil.tasks.classification import softmax_regression
from fedveil.tasks.shipped.heart import FEATURES, NUM_CLASSES

MADE = runpy.run_path(str(Path(__file__).parents[2] / "faults" / "devices.py"))
RECORD = RecordTerms(4.0, 1e-3, 1.0, Adjacency.ZERO_OUT, participations=3)
ORDER = TrainingOrder("spring", ModeName.RECORD, LocalTraining(0.1, 1, 50), record=RECORD)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MADE["make_federation"](tmp_path_factory.mktemp("desk")) / "clients" / "c0"


@pytest.fixture
def device(bundle: Path, tmp_path: Path) -> Device:
    """A hospital of the shipped task, whose data a simulation calls public; its owner's cap is epsilon 2."""
    claim_identity(1)
    read = read_client_bundle(bundle)
    task = TaskChoice(name="heart", client=2)
    settings = replace(read.settings, task=task, state=str(tmp_path / "state"))
    return read_device(replace(read, settings=settings, policy=replace(read.policy, target_epsilon=2.0)))


def asked(
    device: Device,
    order: TrainingOrder,
    number: int = 1,
    spec: SumSpec | None = None,
    model: nn.Module | None = None,
) -> Message:
    arrays = memory_arrays(read_arrays(model or softmax_regression(FEATURES, NUM_CLASSES)))
    content = RecordDict({"arrays": arrays, "config": ConfigRecord({ORDER_KEY: order.to_json()})})
    message = Message(instruct(content, spec or SumSpec(None), order.run, number), 2, "train")
    name_message(message, f"m{number}")
    return message


def only_ledger(device: Device, pattern: str) -> Path:
    (path,) = device.ledgers.glob(pattern)
    return path


def test_noise_is_planned_from_own_records_and_the_smaller_budget(device):
    merged = device.merged(ORDER)
    record = merged.record
    assert record is not None
    budget = record.terms.budget
    assert (budget.target_epsilon, budget.target_delta) == (2.0, 1e-5)  # of the owner, not of the order
    assert merged.device == device.settings.device and merged.seed is None
    noise = record.noise_multiplier(device.task.count(None))
    assert noise == calibrated_noise(record, device.task.count(None), merged, 3)
    less = device.merged(replace(ORDER, record=replace(RECORD, target_epsilon=1.0))).record
    assert less is not None and less.terms.target_epsilon == 1.0 and less.noise_multiplier(1000) > noise


def test_an_owner_has_at_least_the_noise_that_the_policy_names(device):
    """Whatever the budget would allow; a record that is exchanged moves a step by two norms."""
    generous = replace(ORDER, record=replace(RECORD, participations=1))
    for adjacency, least in ((Adjacency.ZERO_OUT, 40.0), (Adjacency.REPLACE_ONE, 20.0)):
        order = replace(generous, record=replace(generous.record, adjacency=adjacency))
        assert device.merged(order).record.noise_multiplier(100) < least
        policy = replace(device.bundle.policy, minimum_noise_multiplier=40.0)
        strict = replace(device, bundle=replace(device.bundle, policy=policy))
        assert strict.merged(order).record.noise_multiplier(100) == least


def test_order_beyond_the_task_is_refused_before_a_charge(device):
    for optimizer, code in (
        (Optimizer("muon"), FAILED),  # which trains matrices, and the model has a bias
        (Optimizer("adam", (("maximize", True),)), FAILED),
        (Optimizer("adam", (("betas", (0.9,) * 99),)), FAILED),
        (Optimizer("adam", (("betas", (1.0, 0.9)),)), FAILED),
        (Optimizer("sgd", (("closure", 0.0),)), FAILED),
        (Optimizer("adam", (("betas", (0.8, 0.9)),)), 0),
    ):
        order = replace(ORDER, training=replace(ORDER.training, optimizer=optimizer))
        reply = device.answer(asked(device, order))
        assert (reply.error.code if reply.has_error() else 0) == code
        assert bool(list(device.ledgers.glob("*.ledger"))) == (code == 0)


def test_no_server_counts_the_records_on_one_side_of_a_public_hash(device):
    """Two shares, one below a record's hash and one above it, would tell by the count whether the record is there."""
    for number, share in enumerate((None, 0.2), 1):
        told = {**json.loads(ORDER.to_json()), "held_out": share}
        message = asked(device, ORDER, number)
        message.content["config"] = ConfigRecord({ORDER_KEY: json.dumps(told)})
        reply = device.answer(message)
        assert (reply.error.code if reply.has_error() else 0) == (0 if share is None else OWNERS_POLICY)
    assert len([e for e in read_entries(only_ledger(device, "*.ledger")) if e.kind == RESERVE]) == 1


def test_a_device_that_is_not_there_is_refused_when_the_client_starts(bundle, monkeypatch):
    monkeypatch.setenv("FEDVEIL_DEVICE", "cuda:99")
    read = read_client_bundle(bundle)
    task = TaskChoice(name="heart", client=2)
    with pytest.raises(Refusal, match="FEDVEIL_DEVICE='cuda:99'"):
        read_device(replace(read, settings=replace(read.settings, task=task)))


def test_device_takes_its_owners_number_of_examples_at_once(bundle, monkeypatch):
    read = read_client_bundle(bundle)
    read = replace(read, settings=replace(read.settings, task=TaskChoice(name="heart", client=2)))
    monkeypatch.setenv("FEDVEIL_EXAMPLES_AT_ONCE", "0")
    with pytest.raises(Refusal, match="FEDVEIL_EXAMPLES_AT_ONCE='0': give auto, or a whole number"):
        read_device(read)
    monkeypatch.setenv("FEDVEIL_EXAMPLES_AT_ONCE", "12")
    assert read_device(read).settings.examples_at_once == "12"


def test_person_is_trained_on_by_clients_of_the_attempts_roster(device):
    together = replace(RECORD, sample_rate=0.1, per_person=3, clients_per_person=2)
    step = device.merged(replace(ORDER, privacy=ModeName.RECORD_DISTRIBUTED, record=together)).step
    roster = device.bundle.identity.roster
    assert step is not None and step.nodes == tuple(member.node for member in roster.members)
    assert step.node == device.bundle.identity.node and len(step.nodes) > 2


def test_person_is_trained_on_under_the_cohorts_roster_alone(device):
    """A roster that came between the terms and the vector names other clients here than at the others."""
    together = replace(RECORD, sample_rate=0.1, per_person=3, clients_per_person=2)
    order = replace(ORDER, privacy=ModeName.RECORD_DISTRIBUTED, record=together)
    device.ledgers.mkdir(parents=True)
    device.task.check_order = lambda order, released: None  # the task does not say whose its examples are
    message = asked(device, order, spec=SumSpec(10.0, unit_norm=0.5))
    content = message.content
    roster = device.bundle.identity.roster
    for version, digest, codes in ((roster.version, roster.hash, []), (7, bytes(32), [FAILED])):
        place = (PROTOCOL_VERSION, 1, run_number("spring"), 1, 0, version, digest)
        terms = AttemptTerms(*place, 5, 3, 4, 32, 1e-3, 10.0, 3.0, 3, Profile.MALICIOUS, bytes(32))
        found = []
        try:
            with device._charged(content, terms):
                pass
        except NotTrained as said:
            found.append(said.code)
        assert found == codes
    assert len([e for e in read_entries(only_ledger(device, "*.ledger")) if e.kind == RESERVE]) == 1
    device.task.train = None  # what fails, fails unseen where a sum alone is seen
    moved = update_of(
        device._trained(message, None), dict(only_arrays(content).items()), content, sum_spec_of(content)
    )
    assert moved and not any(part.any() for part in moved.values())


def test_planned_rounds_are_paid_from_one_ledger_of_real_data(device):
    replies = [device.answer(asked(device, ORDER, number)) for number in (1, 2, 3, 4)]
    codes = [reply.error.code if reply.has_error() else 0 for reply in replies]
    assert codes == [0, 0, 0, BUDGET_SPENT]
    path = only_ledger(device, "*.ledger")
    assert path.name == f"{(device.settings.device or '')[:32]}.ledger"  # of the device, not of today's data
    opened, *rest = list(read_entries(path))
    identity = json.loads(opened.payload)
    assert (identity["unit"], identity["simulated"]) == ("record", False)
    assert {json.loads(e.payload)["rng"] for e in rest if e.kind == RESERVE} == {"system"}
    assert verify(path).ok


@pytest.mark.parametrize(("error", "spent"), [(NotTrained(FAILED), False), (ValueError("row 17"), True)])
def test_a_failure_on_records_that_are_hidden_stays_spent(device, error, spent):
    """It is seen by who answers: one that were given back could be had as often as wanted."""
    device.ledgers.mkdir(parents=True)
    cost = Cost(Gaussian(3.0), tuple(Adversary), RECORD.budget)
    with pytest.raises(type(error)), device.ledger.charged("spring", 1, 0, cost):
        raise error
    assert (epsilon_of(device.ledger.records)[0] > 0) is spent


def test_both_units_are_charged_each_on_its_ledger(device):
    claim = ClientClaim(30.0, Adjacency.ZERO_OUT)
    both = replace(ORDER, privacy=ModeName.RECORD_AND_CLIENT, client=claim)
    reply = device.answer(asked(device, both, spec=MADE["SPEC"]))
    assert not reply.has_error()
    units = [json.loads(read_entries(path)[0].payload)["unit"] for path in device.ledgers.glob("*.ledger")]
    assert sorted(units) == ["client", "record"]


def test_unusable_record_ledger_is_named_and_the_clients_returned(device):
    device.ledgers.mkdir(parents=True)
    (device.ledgers / f"{(device.settings.device or '')[:32]}.ledger").mkdir()
    claim = ClientClaim(30.0, Adjacency.ZERO_OUT)
    both = replace(ORDER, privacy=ModeName.RECORD_AND_CLIENT, client=claim)
    reply = device.answer(asked(device, both, spec=MADE["SPEC"]))
    assert reply.error.code == NOT_READY
    kinds = [entry.kind for entry in read_entries(only_ledger(device, "client-*.ledger"))]
    assert kinds == ["open", "reserve", "void"]


def test_records_are_planned_from_the_rest_after_client_sums(device):
    fresh = device.merged(ORDER).record
    device._records.forget()  # as when another run begins
    claim = ClientClaim(12.0, Adjacency.ZERO_OUT)  # to a trusted server, which is charged nothing
    whole = replace(ORDER, run="winter", privacy=ModeName.CLIENT_CENTRAL, client=claim, record=None)
    answers = [device.answer(asked(device, whole, spec=MADE["SPEC"]))]
    planned = device.merged(ORDER).record
    assert planned.noise_by_records[0][1] > 1.01 * fresh.noise_by_records[0][1]
    answers += [device.answer(asked(device, ORDER, number)) for number in (2, 3, 4)]
    assert not any(reply.has_error() for reply in answers)


def test_second_run_and_restarted_device_plan_from_the_rest(device):
    first = replace(ORDER, record=replace(RECORD, target_epsilon=1.0))
    answers = [device.answer(asked(device, first, number)) for number in (1, 2, 3)]
    second = replace(ORDER, run="summer")
    planned = device.merged(second).record
    fresh = device.merged(ORDER).record
    assert planned.noise_by_records[0][1] > fresh.noise_by_records[0][1]
    answers += [device.answer(asked(device, second, number)) for number in (4, 5)]
    device._records.forget()  # a restart, in the middle of the run
    assert device.merged(second).record == planned
    answers.append(device.answer(asked(device, second, 6)))
    assert not any(reply.has_error() for reply in answers)
    third = device.answer(asked(device, replace(ORDER, run="autumn"), 7))
    assert third.error.code == BUDGET_SPENT


def test_order_per_person_is_refused_without_owners_of_examples(device, caplog):
    order = replace(ORDER, record=replace(RECORD, per_person=2))
    assert TrainingOrder.from_json(order.to_json()) == order
    assert device.answer(asked(device, order)).error.code == FAILED
    assert "do not say whose they are" in caplog.text and not list(device.ledgers.glob("*.ledger"))
    with pytest.raises(Refusal, match="several replaced examples"):
        replace(RECORD, per_person=2, adjacency=Adjacency.REPLACE_ONE)


FAULTY = """
import torch
from torch import nn
import fedveil as fv


class Rows(torch.utils.data.Dataset):
    def __init__(self, kind):
        self.kind = kind

    def __len__(self):
        return 8

    def __getitem__(self, row):
        if self.kind == "length" and row > 5:
            raise IndexError(row)
        return torch.ones(3), row % 2


class Wards:
    simulated, num_clients = False, 1

    def __init__(self, kind):
        self.kind = kind

    def model(self):
        return nn.Linear(3, 2)

    def loss(self, outputs, targets):
        return nn.functional.cross_entropy(outputs, targets)

    def metrics(self, outputs, targets):
        return {}

    def client_data(self, client):
        inputs, targets = torch.ones(8, 3), torch.arange(8) % 2
        match self.kind:
            case "nan":
                inputs[3, 1] = float("nan")
            case "label":
                targets[3] = 7
            case "width":
                inputs = inputs[:, :2]
            case "ragged":
                return inputs[:7], targets
            case "length" | "read":
                return Rows(self.kind)
            case "empty":
                return inputs[:0], targets[:0]
        return inputs, targets

    def held_out(self):
        return torch.ones(2, 3), torch.arange(2)
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "faulty.py").write_text(FAULTY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "faulty", raising=False)


def faulty(bundle: Path, kind: str, state: Path) -> Device:
    read = read_client_bundle(bundle)
    task = TaskChoice(target="faulty:Wards", client=0, allow_modules=("faulty",), args={"kind": kind})
    return read_device(replace(read, settings=replace(read.settings, task=task, state=str(state))))


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("nan", "client 0: inputs='1 NaN or infinite'"),
        ("label", "client 0: targets='its labels'"),
        ("width", "client 0: inputs='the first example and the last'"),
        ("ragged", "equally many"),
        ("length", "reading the first and the last failed"),
    ],
)
def test_a_device_does_not_start_with_data_that_cannot_be_trained_on(
    bundle: Path, tmp_path: Path, kind: str, said: str
) -> None:
    with pytest.raises(Refusal) as refused:
        faulty(bundle, kind, tmp_path / "state")
    assert said in str(refused.value) and not (tmp_path / "state").exists()


@pytest.mark.usefixtures("module")
def test_a_hidden_device_without_examples_plans_no_noise_and_answers(bundle: Path, tmp_path: Path) -> None:
    device = faulty(bundle, "empty", tmp_path / "state")
    claim = ClientClaim(30.0, Adjacency.ZERO_OUT)
    both = replace(ORDER, privacy=ModeName.RECORD_AND_CLIENT, client=claim)
    told = device.merged(both)
    assert told.record is None
    reply = device.task.train(asked(device, both, spec=SumSpec(1.0), model=nn.Linear(3, 2)), told)
    assert not reply.has_error()


@pytest.mark.usefixtures("module")
@pytest.mark.parametrize(("kind", "code"), [("empty", NO_EXAMPLES), ("read", 0), ("well", 0)])
def test_a_device_without_examples_pays_nothing(bundle: Path, tmp_path: Path, kind: str, code: int) -> None:
    claim_identity(1)
    device = faulty(bundle, kind, tmp_path / "state")
    reply = device.answer(asked(device, ORDER, model=nn.Linear(3, 2)))
    assert (reply.error.code if reply.has_error() else 0) == code
    assert bool(list(device.ledgers.glob("*.ledger"))) == (code == 0)
