"""Rounds of DP-SGD at many clients at once: the same models, charges and refusals as one by one."""

import runpy
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, RecordDict
from torch import Tensor, nn

from fedveil.client.dp_sgd import stacked, train
from fedveil.client.dp_sgd.stacked import can_stack, sum_cohort
from fedveil.client.workbench import Workbench
from fedveil.messages.client_settings import TRAIN_LOSS, CanaryClients, ClientSettings, RecordPrivacy
from fedveil.messages.local_training import LocalTraining
from fedveil.messages.training_order import RecordTerms
from fedveil.messages.wire import instruct, memory_arrays
from fedveil.privacy.budget import Adjacency, Adversary
from fedveil.privacy.ledger.hash_chain import EntryFile
from fedveil.privacy.ledger.ledger import read_entries
from fedveil.privacy.ledger.ledger_state import OPEN, RESERVE, read_events
from fedveil.privacy.ledger.store import Store, ledgers_in
from fedveil.privacy.mechanisms.private_sum import CohortSum
from fedveil.privacy.mechanisms.sum_spec import WEIGHT, Segment, SumSpec
from fedveil.strategies.record_plan import record_plan
from fedveil.tasks.arrays import read_arrays
from fedveil.tasks.data import Examples

MADE = runpy.run_path(str(Path(__file__).parents[1] / "training" / "test_cohort_training.py"))
Made, instruction, one_by_one, perceptron = (
    MADE[name] for name in ("Made", "instruction", "one_by_one", "perceptron")
)
identity, SETTINGS, FEATURES, CLASSES = (
    MADE[name] for name in ("identity", "SETTINGS", "FEATURES", "CLASSES")
)
# Unequal, of which some take equally many steps, and one is empty.
SIZES = (4, 7, 7, 12, 0, 4, 1, 9)
PLAIN, PRIVATE = SumSpec(None), SumSpec(1.0, (Segment(TRAIN_LOSS, 5.0), Segment(WEIGHT, 50.0)), 0.1, 1 << 24)
RECORDS = SumSpec(None, (Segment(WEIGHT, 1e9),))


def settings_in(
    folder: Path,
    *,
    epsilon: float = 1e9,
    noise: float = 2.0,
    adjacency: Adjacency = Adjacency.ZERO_OUT,
    **more: Any,
) -> ClientSettings:
    terms = RecordTerms(epsilon, 1e-5, 1.0, adjacency, **more)
    record = RecordPrivacy(terms, ((0, noise), (8, noise / 2)), str(folder))
    return replace(SETTINGS, record=record, training=LocalTraining(0.3, 2, 5))


def bench_of(task: Any, settings: ClientSettings) -> Workbench:
    bench = Workbench(settings)
    bench.__dict__["task"] = task
    return bench


def flattened() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(FEATURES, 4, bias=False), nn.ReLU(), nn.Linear(4, CLASSES)
        )


def both(
    task: Callable[[], Any],
    folder: Path,
    spec: SumSpec,
    monkeypatch: pytest.MonkeyPatch,
    number: int = 1,
    **keys: Any,
) -> tuple[CohortSum, CohortSum]:
    """Return the sums of a cohort, stacked and one by one, each with ledgers of its own."""
    sums: list[CohortSum] = []
    clients = list(range(len(SIZES)))
    for name in ("stacked", "alone"):
        made = task()
        bench = bench_of(made, settings_in(folder / name, **keys))
        arrays = RecordDict({"arrays": memory_arrays(read_arrays(made.model())), "config": ConfigRecord({})})
        content = instruct(arrays, spec, "run", number)
        size = sum(p.numel() for p in made.model().parameters()) + len(spec.segments)
        if name == "stacked":
            assert can_stack(bench)
            sums.append(sum_cohort(bench, content, clients, spec, size))
        else:
            sums.append(one_by_one(bench, content, clients, spec, monkeypatch, size))
        bench.close()
    return sums[0], sums[1]


def assert_equal(one: CohortSum, other: CohortSum, spec: SumSpec) -> None:
    scale = spec.step if spec.private else 1.0
    np.testing.assert_allclose(one.total * scale, other.total * scale, rtol=1e-5, atol=2e-5)
    assert (one.replies, dict(one.dropped)) == (other.replies, dict(other.dropped))


def charges(folder: Path) -> dict[str, list[tuple[str, str]]]:
    return {path.name: [(each.kind, each.key) for each in read_entries(path)] for path in ledgers_in(folder)}


# --- the same as one by one


@pytest.mark.parametrize("spec", [RECORDS, PRIVATE], ids=["record", "record and client"])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"adjacency": Adjacency.REPLACE_ONE},
        {"noise": 0.01},
    ],
    ids=["zero-out", "replace-one", "little noise"],
)
@pytest.mark.parametrize("build", [perceptron, flattened])
def test_stack_equals_single_clients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: SumSpec, more: dict[str, Any], build: Any
) -> None:
    one, other = both(lambda: Made(SIZES, build=build), tmp_path, spec, monkeypatch, **more)
    assert one.replies == 7 + spec.private
    assert_equal(one, other, spec)
    assert charges(tmp_path / "stacked") == charges(tmp_path / "alone")
    for path in ledgers_in(tmp_path / "stacked"):
        assert read_events(path, Adversary.MODEL) == read_events(
            tmp_path / "alone" / path.name, Adversary.MODEL
        )


def test_clients_draw_noise_of_their_own_in_each_round(tmp_path: Path) -> None:
    """Clients 1 and 2 have equal data here, so that batches and noise alone differ."""
    task = Made((7, 7, 7), build=perceptron)
    task._data = dict.fromkeys(range(3), task.client_data(0))
    size, sums = sum(p.numel() for p in perceptron().parameters()), list[bytes]()
    for number in (1, 2):
        bench = bench_of(task, settings_in(tmp_path))
        sums += [
            sum_cohort(bench, instruction(PLAIN, number), [client], PLAIN, size).total.tobytes()
            for client in range(3)
        ]
    assert len(set(sums)) == 6


def test_charge_precedes_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads the file then finds the charges of all, although they are written together."""
    steps, seen = stacked._train, list[list[str]]()
    monkeypatch.setattr(
        stacked,
        "_train",
        lambda *args: (
            seen.extend([kind for kind, _ in each] for each in charges(tmp_path).values()),
            steps(*args),
        )[1],
    )
    bench = bench_of(Made((5, 5)), settings_in(tmp_path))
    sum_cohort(bench, instruction(PLAIN), range(2), PLAIN, sum(p.numel() for p in perceptron().parameters()))
    assert seen == [[OPEN, RESERVE]] * 2


@pytest.mark.parametrize("failing", [1, 2], ids=["charges", "commits"])
def test_clients_whose_entries_are_not_written_train_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    blocks, whole = list[int](), EntryFile.transaction

    @contextmanager
    def transaction(self: Store) -> Iterator[None]:
        with whole(self):
            yield
            blocks.append(1)
            if len(blocks) == failing and self.path.parent.name == "stacked":
                raise sqlite3.OperationalError("disk I/O error")

    bench = bench_of(Made(SIZES), settings_in(tmp_path / "stacked"))
    with bench.writing_at_once():
        pass  # the store is new
    bench.close()
    monkeypatch.setattr(EntryFile, "transaction", transaction)
    one, other = both(lambda: Made(SIZES), tmp_path, RECORDS, monkeypatch)
    assert one.replies == 7
    assert_equal(one, other, RECORDS)
    assert charges(tmp_path / "stacked") == charges(tmp_path / "alone")


# --- what cannot be stacked is trained alone


def test_spent_budget_drops_its_client_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of clients 1 and 2, which share a ledger here, it affords one round."""

    def task() -> Any:
        made = Made(SIZES)
        made._data[2] = made.client_data(1)
        return made

    settings = settings_in(tmp_path)
    assert settings.record is not None
    once = record_plan(settings.record, 7, settings).epsilon(1e-5)
    one, other = both(task, tmp_path, RECORDS, monkeypatch, epsilon=once * 1.01)
    assert dict(one.dropped) == {"budget spent": one.dropped["budget spent"], "no examples": 1}
    assert one.dropped["budget spent"] and one.replies
    assert_equal(one, other, RECORDS)
    assert charges(tmp_path / "stacked") == charges(tmp_path / "alone")


@dataclass
class Flawed(Made):
    """Task with one example whose loss is not finite, or on which the loss fails."""

    flaw: float = float("inf")
    _data: dict[int, Any] = field(default_factory=dict)

    def client_data(self, client: int) -> Examples:
        whole = super().client_data(client)
        if client == 3:
            whole.inputs[5] = self.flaw
        return whole


@pytest.mark.parametrize("flaw", [float("inf"), float("nan"), 1e30])
def test_example_without_a_finite_gradient_adds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flaw: float
) -> None:
    one, other = both(lambda: Flawed(SIZES, flaw=flaw), tmp_path, RECORDS, monkeypatch)
    assert_equal(one, other, RECORDS)
    assert charges(tmp_path / "stacked") == charges(tmp_path / "alone")


def test_unreadable_client_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = both(lambda: Made(SIZES, broken=(1,)), tmp_path, RECORDS, monkeypatch)
    assert one.dropped["failed"] == 1
    assert_equal(one, other, RECORDS)


def test_canary_clients_of_an_audit_train_on_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {TRAIN_LOSS: 2.5, WEIGHT: 25.0}
    canaries = CanaryClients(6, 2, "07" * 32, support=40, norm=10.0, replaced=True, metrics=said)
    size, sums = sum(p.numel() for p in perceptron().parameters()) + 2, list[CohortSum]()
    for name in ("stacked", "alone"):
        bench = bench_of(Made(SIZES), replace(settings_in(tmp_path / name), canaries=canaries))
        content = instruction(PRIVATE)
        if name == "stacked":
            sums.append(sum_cohort(bench, content, range(8), PRIVATE, size))
        else:
            sums.append(one_by_one(bench, content, list(range(8)), PRIVATE, monkeypatch, size))
    assert_equal(*sums, PRIVATE)


class Remembers(nn.Linear):
    """Layer of another class than the stack knows."""


@pytest.mark.parametrize(
    ("task", "change"),
    [
        (Made(SIZES, simulated=False), {}),
        (Made(SIZES), {"seed": None}),
        (Made(SIZES, build=lambda: nn.Sequential(Remembers(FEATURES, CLASSES))), {}),
        (
            Made(
                SIZES,
                build=lambda: nn.Sequential(nn.Linear(FEATURES, 5), nn.Dropout(), nn.Linear(5, CLASSES)),
            ),
            {},
        ),
        (Made(SIZES), {"training": LocalTraining(0.3, 2, 5, proximal_mu=0.1)}),
        (Made(SIZES), {"loss_traces": "somewhere"}),
        (Made(SIZES), {"record": None}),
    ],
    ids=["real data", "no seed", "other layer", "random layer", "proximal", "traces", "no ledger"],
)
def test_other_rounds_are_not_stacked(tmp_path: Path, task: Any, change: dict[str, Any]) -> None:
    assert not can_stack(bench_of(task, replace(settings_in(tmp_path), **change)))


def test_large_cohorts_are_stacked_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = both(lambda: Made(SIZES), tmp_path / "whole", RECORDS, monkeypatch)
    monkeypatch.setattr(stacked, "MAX_STACK", 3)
    parts, _ = both(lambda: Made(SIZES), tmp_path / "parts", RECORDS, monkeypatch)
    assert_equal(parts, whole, RECORDS)


# --- clipping


def test_clipped_sums_are_those_of_book_keeping(tmp_path: Path) -> None:
    """Without noise the move of one step is minus the rate times the sum of clipped gradients over the batch size."""
    model, examples = perceptron(), Made((40,)).client_data(0)
    norm, inputs = 0.05, examples.inputs.unsqueeze(0)
    weights = {name: p.detach().unsqueeze(0) for name, p in model.named_parameters()}
    layers = stacked.perceptron(model, True)
    outputs, products = stacked.forward(layers, weights, inputs)
    losses = nn.functional.cross_entropy(outputs[0], examples.targets, reduction="none")
    backward = torch.autograd.grad(losses.sum(), [each.outputs for each in products])
    taken = torch.rand(1, 40, generator=torch.Generator().manual_seed(0)) < 0.7
    sums = stacked._clipped_sums(products, backward, taken, norm)
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    clipped = 0
    for row in taken[0].nonzero().flatten().tolist():
        loss = nn.functional.cross_entropy(
            model(examples.inputs[row : row + 1]), examples.targets[row : row + 1]
        )
        gradients: tuple[Tensor, ...] = torch.autograd.grad(loss, list(model.parameters()))
        length = float(torch.cat([each.double().flatten() for each in gradients]).norm())
        clipped += length > norm
        for total, each in zip(expected.values(), gradients, strict=True):
            total += each * min(1.0, norm / (length + 1e-6))
    assert clipped > 10
    for name, total in expected.items():
        torch.testing.assert_close(sums[name][0], total, rtol=1e-5, atol=1e-7)


def test_no_sum_exceeds_the_norms_of_its_examples(tmp_path: Path) -> None:
    model = perceptron()
    weights = {
        name: p.detach().unsqueeze(0).repeat(6, *[1] * p.dim()) for name, p in model.named_parameters()
    }
    inputs = torch.randn(6, 3, FEATURES, generator=torch.Generator().manual_seed(1)) * 1e4
    taken = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0], [1, 1, 0]], dtype=torch.bool)
    outputs, products = stacked.forward(stacked.perceptron(model, True), weights, inputs)
    backward = torch.autograd.grad(outputs.logsumexp(2).sum(), [each.outputs for each in products])
    sums = stacked._clipped_sums(products, backward, taken, 0.5)
    lengths = torch.cat([each.double().flatten(1) for each in sums.values()], 1).norm(dim=1)
    assert bool((lengths <= 0.5 * taken.sum(1) * (1 + 1e-6)).all()) and lengths[4] == 0 and lengths[1] > 0.49


def test_noise_has_the_planned_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[float, float, int]] = []
    lattice = train.lattice_of
    monkeypatch.setattr(stacked, "lattice_of", lambda *a: (asked.append(a), lattice(*a))[1])
    size = sum(p.numel() for p in perceptron().parameters())
    for adjacency, factor in ((Adjacency.ZERO_OUT, 1.0), (Adjacency.REPLACE_ONE, 2.0)):
        bench = bench_of(Made((4, 12)), settings_in(tmp_path / adjacency, adjacency=adjacency))
        sum_cohort(bench, instruction(PLAIN), range(2), PLAIN, size)
        assert sorted(asked) == [(1.0 * factor, 1.0, size), (2.0 * factor, 1.0, size)]
        asked.clear()
