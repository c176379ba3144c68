"""Local training: the vectorised cohort, DP-SGD against Opacus' own optimiser, batches, and each client's ledger."""

import copy
import logging
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from hypothesis import strategies as st
from opacus.grad_sample import GradSampleHooks
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from fedveil.base.refusal import Refusal
from fedveil.client.app import SETTINGS_KEY, make_client_app
from fedveil.client.dp_sgd import rounds as dp_sgd_rounds
from fedveil.client.dp_sgd import train as dp_sgd
from fedveil.client.training import cohort_training
from fedveil.client.training.cohort_training import can_vectorise, sum_cohort
from fedveil.client.training.in_place import begin
from fedveil.client.training.sgd import train
from fedveil.client.workbench import Workbench
from fedveil.messages.client_settings import TRAIN_LOSS, CanaryClients, ClientSettings, training_settings
from fedveil.messages.flower_adapter import claim_identity, client_context
from fedveil.messages.local_training import LocalTraining, Optimizer
from fedveil.messages.record_settings import RecordPrivacy
from fedveil.messages.training_order import RecordTerms
from fedveil.messages.wire import BUDGET_SPENT, FAILED, WEIGHT, add_reply, instruct, memory_arrays
from fedveil.privacy.budget import Adjacency, Unit
from fedveil.privacy.ledger.ledger import BudgetExhausted, read_entries
from fedveil.privacy.mechanisms import discrete_gaussian
from fedveil.privacy.mechanisms.compression import Compression
from fedveil.privacy.mechanisms.private_sum import CohortSum
from fedveil.privacy.mechanisms.randomness import Randomness
from fedveil.privacy.mechanisms.sum_spec import Segment, SumSpec, compressed_spec
from fedveil.privacy.plan import Plan
from fedveil.strategies.record_plan import PoissonBatches, record_plan
from fedveil.tasks.arrays import load_arrays, read_arrays
from fedveil.tasks.classification import cross_entropies
from fedveil.tasks.data import Examples, LazyExamples
from fedveil.tasks.fingerprint import fingerprint
from fedveil.tasks.protocol import check_trainable

FEATURES, CLASSES = 6, 3
SIZES = (4, 7, 7, 12, 4, 1)
SETTINGS = ClientSettings("made", LocalTraining(0.3, local_epochs=2, batch_size=5), seed=3)


@pytest.fixture(autouse=True)
def identity() -> None:
    claim_identity(run_id=1)


def perceptron() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, CLASSES))


@dataclass
class Made:
    """Random examples, as many for each client as `sizes` says; clients in `broken` have unreadable data."""

    sizes: tuple[int, ...] = SIZES
    simulated: bool = True
    build: Any = perceptron
    broken: tuple[int, ...] = ()
    _data: dict[int, Any] = field(default_factory=dict)

    @property
    def num_clients(self) -> int:
        return len(self.sizes)

    def model(self) -> nn.Module:
        return self.build()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        return {}

    def client_data(self, client: int) -> Examples:
        if client in self.broken:
            raise OSError("the disk is gone")
        if client not in self._data:
            generator = torch.Generator().manual_seed(client)
            inputs = torch.randn(self.sizes[client], FEATURES, generator=generator)
            targets = torch.randint(CLASSES, (self.sizes[client],), generator=generator)
            self._data[client] = Examples(inputs, targets)
        return self._data[client]

    def held_out(self) -> Examples:
        return self.client_data(0)


def bench_of(task: Made, settings: ClientSettings = SETTINGS) -> Workbench:
    bench = Workbench(settings)
    bench.__dict__["task"] = task
    return bench


def instruction(spec: SumSpec, number: int = 1, run: str = "run", **config: float) -> RecordDict:
    arrays = memory_arrays(read_arrays(perceptron()))
    content = RecordDict({"arrays": arrays, "config": ConfigRecord(dict(config))})
    return instruct(content, spec, run, number)


def size_for(spec: SumSpec) -> int:
    whole = sum(p.numel() for p in perceptron().parameters())
    return (spec.compression.kept if spec.compression else whole) + len(spec.segments)


# --- the vectorised cohort ---------------------------------------------------------------------------------------


def one_by_one(
    bench: Workbench,
    content: RecordDict,
    clients: list[int],
    spec: SumSpec,
    monkeypatch: pytest.MonkeyPatch,
    size: int | None = None,
) -> CohortSum:
    monkeypatch.setattr("fedveil.client.app.workbench", lambda text: bench)
    app = make_client_app(lambda context: "")
    total = CohortSum(np.zeros(size or size_for(spec)))
    for client in clients:
        message = Message(content, client + 2, "train")
        message.metadata.__dict__["_message_id"] = "1"
        add_reply(total, app(message, client_context(1, client, 6, {SETTINGS_KEY: ""})), spec)
    return total


PRIVATE = SumSpec(1.0, (Segment(TRAIN_LOSS, 5.0), Segment(WEIGHT, 50.0)), 0.1, 1 << 24)
PLAIN = SumSpec(None, (Segment(TRAIN_LOSS, 5.0), Segment(WEIGHT, 1e9)))


def compressing(kind: str, build: Any = perceptron, spec: SumSpec = PRIVATE) -> SumSpec:
    """Return the spec of a sum of a quarter of the coordinates of a model."""
    size = sum(v.size for v in read_arrays(build()).values() if v.dtype.kind == "f")
    return compressed_spec(spec, Compression(kind, size, size // 4))


@pytest.mark.parametrize("kind", ["mask", "project"])
@pytest.mark.parametrize("spec", [PRIVATE, PLAIN], ids=["private", "plain"])
def test_the_vectorised_cohort_compresses_as_single_clients_do(
    monkeypatch: pytest.MonkeyPatch, kind: str, spec: SumSpec
) -> None:
    spec = compressing(kind, spec=spec)
    said = {TRAIN_LOSS: 2.5, WEIGHT: 25.0}
    dummies = CanaryClients(4, 2, "07" * 32, support=40, norm=10.0, replaced=True, metrics=said)
    settings = replace(SETTINGS, canaries=dummies)
    content = instruction(spec, 3)
    together = sum_cohort(bench_of(Made(), settings), content, range(6), spec, size_for(spec))
    single = one_by_one(bench_of(Made(), settings), content, list(range(6)), spec, monkeypatch)
    assert together.replies == single.replies == 6
    np.testing.assert_allclose(together.total * spec.step, single.total * spec.step, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", [PRIVATE, PLAIN], ids=["private", "plain"])
@pytest.mark.parametrize(
    ("epochs", "batch_size", "mu"),
    [(1, 100, 0.0), (3, 100, 0.0), (2, 5, 0.0), (2, 5, 0.7), (1, 1, 0.1)],
)
def test_the_vectorised_cohort_equals_single_clients(
    monkeypatch: pytest.MonkeyPatch, spec: SumSpec, epochs: int, batch_size: int, mu: float
) -> None:
    bench = bench_of(Made(), replace(SETTINGS, training=LocalTraining(0.3, epochs, batch_size)))
    content = instruction(spec, **({"proximal-mu": mu} if mu else {}))
    together = sum_cohort(bench, content, range(6), spec, size_for(spec))
    single = one_by_one(bench, content, list(range(6)), spec, monkeypatch)
    assert together.replies == single.replies == 6
    assert float(np.abs(single.total * spec.step).max()) > 0.1
    np.testing.assert_allclose(together.total * spec.step, single.total * spec.step, rtol=1e-5, atol=1e-5)


class Own(nn.Module):
    """A model that only `torch.func.vmap` can stack: its forward is its own, and one layer serves twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, CLASSES)
        self.heat = nn.Parameter(torch.tensor(1.5))  # of no dimension

    def forward(self, inputs: Tensor) -> Tensor:
        return self.heat * self.outer(torch.tanh(self.inner(torch.tanh(self.inner(inputs)))))


with torch.random.fork_rng():
    torch.manual_seed(4)
    _OWN = Own()


def twice() -> nn.Module:
    bend = nn.Tanh()
    return nn.Sequential(nn.Linear(FEATURES, 5), bend, nn.Linear(5, 5), bend, nn.Linear(5, CLASSES))


class Stacked(Made):
    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropies(outputs, targets)


@pytest.mark.parametrize("kind", [Made, Stacked])
@pytest.mark.parametrize(
    ("build", "by_layers"),
    [
        (lambda: nn.Linear(FEATURES, CLASSES), True),
        (
            lambda: nn.Sequential(
                nn.Flatten(), nn.Linear(FEATURES, 4, bias=False), nn.GELU(), nn.Linear(4, 3)
            ),
            True,
        ),
        (lambda: nn.Sequential(nn.Linear(FEATURES, 5), nn.LayerNorm(5), nn.Linear(5, CLASSES)), False),
        (twice, False),
        (Own, False),
    ],
    ids=["linear", "flattened first", "normalised", "one layer twice", "own forward"],
)
def test_models_of_every_shape_are_stacked_as_single_clients_train(
    kind: type[Made], build: Any, by_layers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(4)
    start = build()
    task = kind(build=lambda: copy.deepcopy(start))
    bench, stacked_by_layers = bench_of(task), spied(monkeypatch)
    content = instruct(RecordDict({"arrays": memory_arrays(read_arrays(start))}), PLAIN, "run", 1)
    size = sum(p.numel() for p in start.parameters()) + len(PLAIN.segments)
    together = sum_cohort(bench, content, range(6), PLAIN, size)
    assert bool(stacked_by_layers) is by_layers
    monkeypatch.setattr("fedveil.client.app.workbench", lambda text: bench)
    single = one_by_one(bench, content, list(range(6)), PLAIN, monkeypatch, size)
    assert together.replies == single.replies == 6
    np.testing.assert_allclose(together.total, single.total, rtol=1e-5, atol=1e-5)


LOSSES = {
    "cross entropy": nn.functional.cross_entropy,
    "smoothed": lambda outputs, targets: nn.functional.cross_entropy(outputs, targets, label_smoothing=0.2),
    "squared": lambda outputs, targets: (outputs[:, 0] - targets.float()).square().mean(),
    "weights that are normalised": lambda outputs, targets: nn.functional.cross_entropy(
        outputs, targets, weight=torch.tensor([1.0, 2.0, 4.0])
    ),
    "compared with the mean": lambda outputs, targets: nn.functional.cross_entropy(
        outputs - outputs.mean(0), targets
    ),
}
APART = ("cross entropy", "smoothed", "squared")
MODELS = {"by layers": perceptron, "by vmap": lambda: copy.deepcopy(_OWN)}


class Lossy(Made):
    """Trained by one of `LOSSES`."""

    said = "cross entropy"

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return LOSSES[self.said](outputs, targets)


class Grouped:
    """Records the sizes of the stacks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[list[int]] = []
        train_group = cohort_training._train_group

        def spy(bench: Workbench, group: Any, *rest: Any) -> Any:
            self.sizes.append([len(examples) for _, examples in group])
            return train_group(bench, group, *rest)

        monkeypatch.setattr(cohort_training, "_train_group", spy)


def unlike(bench: Workbench, content: RecordDict, clients: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the sums of stacks and of clients that are trained in place."""
    size = sum(p.numel() for p in bench.model.parameters()) + PLAIN.segment_size
    together = sum_cohort(bench, content, range(clients), PLAIN, size)
    single = in_place(bench, content, list(range(clients)), PLAIN, size)
    assert together.replies == single.replies
    return together.total, single.total


@hypothesis.settings(max_examples=25)
@hypothesis.given(
    st.lists(st.integers(0, 23), min_size=2, max_size=9),
    st.sampled_from(list(LOSSES)),
    st.sampled_from(list(MODELS)),
    st.integers(1, 3),
    st.sampled_from([1, 4, 9, 100]),
    st.sampled_from([0.0, 0.6]),
    st.sampled_from(["sgd", "adam", "rprop", "asgd", "momentum"]),
)
def test_uneven_clients_are_stacked_as_single_clients_train(
    sizes: list[int], loss: str, model: str, epochs: int, batch_size: int, mu: float, optimizer: str
) -> None:
    taken = Optimizer("sgd", {"momentum": 0.9}) if optimizer == "momentum" else Optimizer(optimizer)
    task = Lossy(tuple(sizes), build=MODELS[model])
    task.said = loss
    training = LocalTraining(0.02, epochs, batch_size, proximal_mu=mu, optimizer=taken)
    bench = bench_of(task, replace(SETTINGS, training=training))
    arrays = memory_arrays(read_arrays(task.model()))
    content = instruct(RecordDict({"arrays": arrays, "config": ConfigRecord({})}), PLAIN, "run", 1)
    together, single = unlike(bench, content, len(sizes))
    np.testing.assert_allclose(together, single, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_only_a_loss_of_examples_one_by_one_is_filled_up(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task, stacks = Lossy((7, 4, 7, 9)), Grouped(monkeypatch)
    task.said = loss
    unlike(bench_of(task), instruction(PLAIN), 4)
    assert stacks.sizes == ([[9, 7, 7, 4]] if loss in APART else [[9], [7, 7], [4]])


@pytest.mark.parametrize("measured", [True, False])
def test_clients_with_ignored_labels_are_trained_as_single_ones(measured: bool) -> None:
    task = Made((7, 4, 9, 6))
    task.client_data(1).targets[2] = -100
    task.client_data(3).targets[:] = -100  # no batch of it has a loss
    bench = bench_of(task)
    bench.measured = bench.independent = measured  # on data without such labels
    np.testing.assert_allclose(*unlike(bench, instruction(PLAIN), 4), rtol=1e-4, atol=1e-4)
    assert sum_cohort(bench, instruction(PLAIN), range(4), PLAIN, size_for(PLAIN)).dropped == {
        "not finite": 1
    }


def test_a_stack_ends_where_most_of_a_step_would_be_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    stacks = Grouped(monkeypatch)
    monkeypatch.setattr(cohort_training, "FREE_ROWS", 8)
    bench = bench_of(
        Made((40, 36, 30, 2, 2, 1)), replace(SETTINGS, training=LocalTraining(0.1, batch_size=100))
    )
    unlike(bench, instruction(PLAIN), 6)
    assert stacks.sizes == [[40, 36, 30, 2, 2], [1]]
    monkeypatch.setattr(cohort_training, "MAX_VISITS", 100)
    stacks.sizes.clear()
    unlike(bench, instruction(PLAIN), 6)
    assert stacks.sizes == [[40, 36], [30, 2], [2, 1]]


def spied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows with every use of the path that goes layer by layer."""
    calls: list[int] = []
    forward = cohort_training.forward

    def spy(*arguments: Any) -> Any:
        calls.append(1)
        return forward(*arguments)

    monkeypatch.setattr(cohort_training, "forward", spy)
    return calls


def test_fedprox_pulls_towards_the_global_model(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[float] = []
    for mu in (0.0, 1.0):
        content = instruction(PLAIN, **({"proximal-mu": mu} if mu else {}))
        assert training_settings(content, SETTINGS).proximal_mu == mu
        total = sum_cohort(bench_of(Made()), content, range(6), PLAIN, size_for(PLAIN)).total
        moved.append(float(np.linalg.norm(total[:-2])))
    assert moved[1] < 0.9 * moved[0]


def test_large_groups_are_stacked_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, content = bench_of(Made((3,) * 6)), instruction(PRIVATE)
    whole = sum_cohort(bench, content, range(6), PRIVATE, size_for(PRIVATE)).total
    monkeypatch.setattr(cohort_training, "MAX_STACK", 4)
    parts = sum_cohort(bench, content, range(6), PRIVATE, size_for(PRIVATE)).total
    np.testing.assert_allclose(parts * PRIVATE.step, whole * PRIVATE.step, atol=1e-5)


def test_clients_of_odd_shapes_train_outside_the_stack() -> None:
    task, content = Made(), instruction(PRIVATE)
    stacked = sum_cohort(bench_of(task), content, range(6), PRIVATE, size_for(PRIVATE))
    inputs, targets = task.client_data(2).batch(torch.arange(SIZES[2]))
    task._data[2] = LazyExamples(list(zip(inputs, targets.tolist(), strict=True)))
    beside = sum_cohort(bench_of(task), content, range(6), PRIVATE, size_for(PRIVATE))
    assert (beside.replies, beside.dropped) == (6, {})
    np.testing.assert_allclose(beside.total * PRIVATE.step, stacked.total * PRIVATE.step, atol=1e-5)


def test_failing_client_alone_is_dropped_from_the_vectorised_cohort(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "fedveil.client")
    task = Made((4, 4, 4, 0, 4), broken=(1,))
    task.client_data(2).inputs[0, 0] = math.nan
    task._data[4] = Examples(torch.zeros(4, FEATURES + 1), torch.zeros(4, dtype=torch.int64))
    bench, content = bench_of(task), instruction(PLAIN)
    total = sum_cohort(bench, content, range(5), PLAIN, size_for(PLAIN))
    assert (total.replies, total.dropped) == (1, {"failed": 2, "not finite": 1, "no examples": 1})
    alone = sum_cohort(bench, content, [0], PLAIN, size_for(PLAIN))
    np.testing.assert_allclose(total.total, alone.total, atol=1e-5)
    content = instruction(
        PRIVATE
    )  # of hidden clients one that diverges, and one without examples, change nothing
    total, alone = (sum_cohort(bench, content, who, PRIVATE, size_for(PRIVATE)) for who in (range(5), [0]))
    assert (total.replies, total.dropped) == (3, {"failed": 2})
    np.testing.assert_allclose(total.total[:-2], alone.total[:-2], atol=1e-5)


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(nn.Linear(FEATURES, 5), nn.Dropout(0.5), nn.Linear(5, CLASSES)),
        lambda: nn.Sequential(nn.Linear(FEATURES, 5), nn.BatchNorm1d(5), nn.Linear(5, CLASSES)),
        lambda: nn.Sequential(nn.Linear(FEATURES, 6000), nn.Linear(6000, CLASSES)),
        lambda: nn.Sequential(nn.Linear(FEATURES, 5).requires_grad_(False), nn.Linear(5, CLASSES)),
    ],
    ids=["it draws", "it keeps statistics", "it is large", "part of it is frozen"],
)
def test_non_vectorisable_model_is_trained_client_by_client(build: Any) -> None:
    assert can_vectorise(bench_of(Made()))
    assert not can_vectorise(bench_of(Made(build=build)))


def in_place(
    bench: Workbench, content: RecordDict, clients: list[int], spec: SumSpec, size: int
) -> CohortSum:
    begun, total = begin(bench, content), CohortSum(np.zeros(size))
    for client in clients:
        scalars = begun.train(client)
        if isinstance(scalars, str):
            total.drop(scalars)
        else:
            begun.add(total, scalars, spec)
    return total


def small_cnn() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Unflatten(1, (1, 2, 3)),
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Dropout(0.2),
            nn.Flatten(),
            nn.Linear(24, CLASSES),
        )


@pytest.mark.parametrize("compress", [None, "mask", "project"])
@pytest.mark.parametrize("spec", [PRIVATE, PLAIN, replace(PRIVATE, cells=1 << 16)], ids=str)
@pytest.mark.parametrize("build", [perceptron, small_cnn])
def test_training_in_place_is_the_message_path_bit_for_bit(
    build: Any,
    spec: SumSpec,
    compress: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.CRITICAL, "fedveil.client")
    spec = spec if compress is None else compressing(compress, build, spec)
    task = Made((4, 7, 0, 12, 4, 3), build=build, broken=(1,))
    task.client_data(5).inputs[0, 0] = math.nan
    start = read_arrays(build())
    config = ConfigRecord({"proximal-mu": 0.3})
    content = instruct(RecordDict({"arrays": memory_arrays(start), "config": config}), spec, "run", 1)
    whole = sum(v.size for v in start.values() if v.dtype.kind == "f")
    size = (spec.compression.kept if spec.compression else whole) + len(spec.segments)
    single = one_by_one(bench_of(task), content, list(range(6)), spec, monkeypatch, size)
    direct = in_place(bench_of(task), content, list(range(6)), spec, size)
    assert (direct.replies, direct.dropped) == (single.replies, single.dropped)
    # Where clients are hidden, one without examples answers that nothing changed, and so does one that diverges.
    hidden = spec.clipping_norm is not None
    assert (single.replies, single.dropped.get("no examples", 0)) == ((5, 0) if hidden else (3, 1))
    assert np.array_equal(direct.total, single.total)


@pytest.mark.parametrize("spec", [PRIVATE, compressing("mask"), compressing("project")], ids=str)
@pytest.mark.parametrize("replaced", [True, False])
def test_a_canary_within_its_window_is_the_message_path_bit_for_bit(
    replaced: bool, spec: SumSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {TRAIN_LOSS: 2.5, WEIGHT: 25.0}
    dummies = CanaryClients(1, 5, "07" * 32, support=5, norm=10.0, replaced=replaced, metrics=said)
    settings, content = replace(SETTINGS, canaries=dummies), instruction(spec)
    single = one_by_one(bench_of(Made(), settings), content, list(range(1, 6)), spec, monkeypatch)
    begun, direct = begin(bench_of(Made(), settings), content), CohortSum(np.zeros(size_for(spec)))
    assert all(begun.add_canary(client, direct, spec) for client in range(1, 6))
    assert not begun.add_canary(0, direct, spec)
    assert np.array_equal(direct.total, single.total) and single.total.any()
    assert (direct.replies, single.replies) == (5, 5)


def test_layers_that_draw_do_so_by_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> nn.Module:
        model = perceptron()
        model[1] = nn.Dropout(0.5)  # type: ignore[operator]
        return model

    content = instruction(PRIVATE)
    totals = [
        one_by_one(
            bench_of(Made(build=build), replace(SETTINGS, seed=seed)), content, [1], PRIVATE, monkeypatch
        )
        for seed in (3, 3, 4)
    ]
    assert np.array_equal(totals[0].total, totals[1].total)
    assert not np.array_equal(totals[0].total, totals[2].total)


def test_loss_is_the_mean_before_each_step() -> None:
    task, model = Made(), perceptron()
    examples = task.client_data(3)
    with torch.no_grad():
        first = float(task.loss(model(examples.inputs), examples.targets))
    loss = train(model, task, examples, LocalTraining(0.3, 1, 100), client=0, key=1)
    assert loss == pytest.approx(first, rel=1e-6)


# --- DP-SGD ------------------------------------------------------------------------------------------------------


def plan_of(sampling: PoissonBatches, noise: float, clip: float, adjacency: str = "zero-out") -> Plan:
    return Plan(Unit.RECORD, Adjacency(adjacency), sampling, clip, 1, noise)


def privately(model: nn.Module, plan: Plan, seed: int = 0, examples: Examples | None = None) -> list[Tensor]:
    """Return how DP-SGD at learning rate 1 moved the parameters."""
    task = Made()
    before = [p.detach().clone() for p in model.parameters()]
    streams = Randomness(seed).stream("batches"), Randomness(seed).stream("noise")
    dp_sgd.train_privately(
        model,
        task,
        examples or task.client_data(3),
        LocalTraining(1.0, 1, 5),
        dp_sgd.PrivateSteps(plan, *streams),
    )
    return [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]


def convolution() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return nn.Sequential(
            nn.Unflatten(1, (1, FEATURES)),
            nn.Conv1d(1, 4, 3),
            nn.GroupNorm(2, 4),
            nn.Flatten(),
            nn.Linear(16, CLASSES),
        )


@pytest.mark.parametrize("build", [perceptron, convolution])
@pytest.mark.parametrize("clip", [0.05, 100.0])
def test_clipped_sums_are_those_of_opacus_own_optimiser(
    monkeypatch: pytest.MonkeyPatch, build: Any, clip: float
) -> None:
    """Draws of zero stand in for the real ones on our side, and little noise makes a fine lattice; theirs has none."""
    monkeypatch.setattr(discrete_gaussian, "sample", lambda sigma, count, stream: np.zeros(count))
    plan = plan_of(PoissonBatches(0.5, 6), 1e-3, clip)
    task = Made()
    examples = task.client_data(3)
    ours = privately(build(), plan)
    theirs = build()
    before = [p.detach().clone() for p in theirs.parameters()]
    hooks = GradSampleHooks(theirs, batch_first=True, loss_reduction="mean")
    optimizer = DPOptimizer(
        torch.optim.SGD(theirs.parameters(), lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=clip,
        expected_batch_size=6,
    )
    for batch in PoissonBatches(0.5, 6).draw(len(examples), Randomness(0).stream("batches")):
        optimizer.zero_grad()
        rows = torch.from_numpy(batch)
        loss = task.loss(theirs(examples.inputs[rows].requires_grad_()), examples.targets[rows])
        loss.backward()
        optimizer.step()
    hooks.cleanup()
    moved = [p.detach() - b for p, b in zip(theirs.parameters(), before, strict=True)]
    assert max(float(m.abs().max()) for m in moved) > 0.005
    for mine, other in zip(ours, moved, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("adjacency", "factor"), [("zero-out", 1), ("replace-one", 2)])
def test_noise_has_the_planned_standard_deviation(adjacency: str, factor: int) -> None:
    """One step on one clipped-away example, 60 000 coordinates: the spread is the noise over the batch size."""
    examples = Examples(torch.randn(10, FEATURES), torch.zeros(10, dtype=torch.int64))
    model = nn.Sequential(nn.Linear(FEATURES, 6000), nn.Linear(6000, CLASSES))
    plan = plan_of(PoissonBatches(1.0, 1), 1.5, 1e-3, adjacency)
    moved = torch.cat([m.flatten() for m in privately(model, plan, examples=examples)])
    assert plan.noise_std == pytest.approx(factor * 1.5e-3)
    expected = plan.noise_std / 10
    assert float(moved.std()) == pytest.approx(expected, rel=0.02)
    assert abs(float(moved.mean())) < 5 * expected / math.sqrt(moved.numel())


def test_an_empty_batch_moves_by_noise_alone() -> None:
    plan = plan_of(PoissonBatches(1e-12, 1), 1.0, 0.5)
    draws = list(plan.sampling.draw(12, Randomness(0).stream("batches")))  # type: ignore[attr-defined]
    assert [len(batch) for batch in draws] == [0]
    moved = torch.cat([m.flatten() for m in privately(perceptron(), plan)])
    assert bool((moved != 0).all())
    again = torch.cat([m.flatten() for m in privately(perceptron(), plan)])
    other = torch.cat([m.flatten() for m in privately(perceptron(), plan, seed=1)])
    assert torch.equal(moved, again)
    assert not torch.equal(moved, other)


def test_hooks_leave_no_trace_on_the_model() -> None:
    model = perceptron()
    names = list(model.state_dict())
    privately(model, plan_of(PoissonBatches(0.5, 2), 1.0, 1.0))
    assert list(model.state_dict()) == names
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())


def frozen_norm() -> nn.Module:
    norm = nn.BatchNorm2d(8)
    norm.requires_grad_(False)
    return nn.Sequential(nn.Conv2d(1, 8, 3), norm)


@pytest.mark.parametrize(
    ("model", "layer"),
    [
        (nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8)), "1: BatchNorm1d"),
        (frozen_norm(), "1: BatchNorm2d"),
        (nn.Sequential(nn.Sequential(nn.Linear(2, 8), nn.SyncBatchNorm(8))), "0.1: SyncBatchNorm"),
    ],
)
def test_batch_normalisation_is_refused_by_layer_with_its_remedy(model: nn.Module, layer: str) -> None:
    with pytest.raises(Refusal, match=r"GroupNorm\(groups, 8\)") as refused:
        check_trainable(model)
    assert refused.value.value == layer


class Remembering(nn.Module):
    """A layer that keeps the mean of what it saw, as running statistics do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(FEATURES))

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen = inputs.mean(0).detach() + 1
        self.get_buffer("seen").add_(1)
        return inputs


def test_buffers_that_follow_the_data_do_not_leave() -> None:
    model = nn.Sequential(Remembering(), nn.Linear(FEATURES, CLASSES))
    privately(model, plan_of(PoissonBatches(1.0, 2), noise=1.0, clip=1.0))
    assert not model.state_dict()["0.seen"].any()


def test_group_normalisation_is_trained() -> None:
    check_trainable(convolution())


# --- a client's own ledger ---------------------------------------------------------------------------------------


def private_settings(folder: Path, epsilon: float = 1e9, seed: int | None = None) -> ClientSettings:
    record = RecordPrivacy(RecordTerms(epsilon, 1e-5, 1.0, Adjacency.ZERO_OUT), ((0, 2.0),), str(folder))
    return replace(SETTINGS, record=record, seed=seed, training=LocalTraining(0.3, 1, 5))


@dataclass
class Client:
    """A federation's clients under record privacy, called one at a time."""

    bench: Workbench
    monkeypatch: pytest.MonkeyPatch

    def __call__(self, client: int, number: int, run: str = "run") -> np.ndarray | int:
        """Return the client's vector of this round, or the code of its error."""
        self.monkeypatch.setattr("fedveil.client.app.workbench", lambda text: self.bench)
        context: Context = client_context(1, client, 6, {SETTINGS_KEY: ""})
        message = Message(instruction(SumSpec(1.0), number, run), client + 2, "train")
        message.metadata.__dict__["_message_id"] = "1"
        reply = make_client_app(lambda context: "")(message, context)
        return reply.error.code if reply.has_error() else reply.content["fedveil.vector"]["vector"].numpy()


def test_a_client_answers_until_its_ledger_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, settings = Made(simulated=False), private_settings(tmp_path)
    assert settings.record is not None
    plan = record_plan(settings.record, 7, settings)
    target = replace(plan, num_rounds=2).epsilon(1e-5) * 1.01
    client = Client(bench_of(task, private_settings(tmp_path, target)), monkeypatch)
    replies = [client(1, number) for number in (1, 2, 3, 4)]
    assert [type(reply) for reply in replies[:2]] == [np.ndarray] * 2
    assert replies[2:] == [BUDGET_SPENT] * 2
    other = client(2, 3)
    assert isinstance(other, np.ndarray), "another client's ledger is another's"
    assert len(list(tmp_path.glob("*.ledger"))) == 2


def test_a_ledger_belongs_to_the_data_and_goes_on_in_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = private_settings(tmp_path)
    for run in ("first", "second"):
        client = Client(bench_of(Made(simulated=False), settings), monkeypatch)
        assert isinstance(client(1, 1, run), np.ndarray)
    (path,) = tmp_path.glob("*.ledger")
    assert path.stem == fingerprint(Made().client_data(1))[:32]
    reservations = [entry for entry in read_entries(path) if entry.kind == "reserve"]
    keys = [entry.key for entry in reservations]
    assert keys == ['["first",1,"dp_sgd 1"]', '["second",1,"dp_sgd 1"]']


def test_a_message_delivered_twice_gets_no_second_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(bench_of(Made(simulated=False), private_settings(tmp_path)), monkeypatch)
    assert isinstance(client(1, 1), np.ndarray)
    assert client(1, 1) == FAILED
    (path,) = tmp_path.glob("*.ledger")
    assert len([entry for entry in read_entries(path) if entry.kind == "reserve"]) == 1


def test_fingerprints_name_the_data_and_nothing_else() -> None:
    examples = Made().client_data(3)
    copied = Examples(examples.inputs.t().contiguous().t(), examples.targets.clone())
    assert fingerprint(copied) == fingerprint(examples)
    assert len(fingerprint(examples)) == 64
    changed = examples.inputs.clone()
    changed[0, 0] += 1e-6
    others = [
        Examples(changed, examples.targets),
        Examples(examples.inputs, examples.targets.flip(0)),
        Examples(examples.inputs.double(), examples.targets),
        Examples(examples.inputs.reshape(6, 12), examples.targets),
    ]
    assert len({fingerprint(each) for each in (examples, *others)}) == 5


def test_noise_differs_between_clients_rounds_and_repetitions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients 1 and 2 get the same data here, so that what differs is batches and noise alone."""
    for seed in (7, None):
        task = Made((12,) * 6, simulated=seed is not None)
        for other in range(1, 6):
            task._data[other] = task.client_data(0)
        folder = tmp_path / str(seed)
        client = Client(bench_of(task, private_settings(folder, seed=seed)), monkeypatch)
        vectors = [client(1, 1, "a"), client(2, 1, "b"), client(1, 2, "a")]
        again = Client(bench_of(task, private_settings(folder / "x", seed=seed)), monkeypatch)(1, 1, "a")
        assert all(isinstance(vector, np.ndarray) for vector in (*vectors, again))
        assert len({vector.tobytes() for vector in vectors}) == 3  # type: ignore[union-attr]
        repeats = np.array_equal(vectors[0], again)
        assert repeats == (seed is not None)


@pytest.mark.parametrize("seed", [7, None])
def test_no_two_clients_or_rounds_draw_the_same_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int | None
) -> None:
    drawn: list[bytes] = []
    monkeypatch.setattr(
        dp_sgd_rounds,
        "train_privately",
        lambda *a: drawn.extend(s.bytes(16) for s in (a[4].draws, a[4].noise)),
    )
    task = Made((12,) * 6, simulated=seed is not None)
    client = Client(bench_of(task, private_settings(tmp_path, seed=seed)), monkeypatch)
    for who, number in ((1, 1), (2, 1), (1, 2), (2, 2)):
        assert isinstance(client(who, number), np.ndarray)
    assert len(set(drawn)) == len(drawn) == 8


def test_nothing_is_trained_that_was_not_reserved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spent(self: Any, release: Any) -> None:
        raise BudgetExhausted(
            settings.record.terms.budget, release.events and next(iter(release.events)), 9.0
        )

    def forbidden(*args: Any) -> None:
        raise AssertionError("trained without a reservation")

    settings: Any = private_settings(tmp_path)
    monkeypatch.setattr("fedveil.privacy.ledger.ledger.Ledger.reserve", spent)
    monkeypatch.setattr(dp_sgd_rounds, "train_privately", forbidden)
    assert Client(bench_of(Made(), settings), monkeypatch)(1, 1) == BUDGET_SPENT


def test_arrays_are_loaded_and_read_by_name() -> None:
    model = perceptron()
    arrays = {name: np.full(value.shape, 2.0, np.float32) for name, value in read_arrays(model).items()}
    load_arrays(model, dict(reversed(arrays.items())))
    assert all(bool((p == 2).all()) for p in model.parameters())
    read_arrays(model)["0.weight"][:] = 5
    assert bool((next(model.parameters()) == 2).all())
