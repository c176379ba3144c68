"""The engines of DP-SGD: one noise, one model; what is not finite; which engine a model gets."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from opacus.layers import DPLSTM
from scipy import stats
from torch import Tensor, nn

from fedveil.benchmarks.dp_sgd import EmbeddingClassifier, Transformer, adapted
from fedveil.benchmarks.made_task import Made
from fedveil.benchmarks.workload import CLASSES, build
from fedveil.client.dp_sgd import train as dp_sgd
from fedveil.client.dp_sgd.train import (
    ENGINES,
    NOISE_BLOCK,
    PrivateSteps,
    StreamNoiseOptimizer,
    chosen_engine,
    train_privately,
)
from fedveil.client.training.sgd import with_fast_kernels
from fedveil.configs.local_training import LocalTraining
from fedveil.privacy.budget import Adjacency, Unit
from fedveil.privacy.mechanisms.randomness import Randomness
from fedveil.privacy.plan import Plan
from fedveil.privacy.refusal import Refusal
from fedveil.strategies.record_plan import PoissonBatches
from fedveil.strategies.training_order import GRADIENTS
from fedveil.tasks.data import Examples

NAMES = tuple(ENGINES)
RECORDS = 12


def cnn() -> nn.Module:
    return with_fast_kernels(build("cnn-100k"))


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, CLASSES))


def transformer() -> nn.Module:
    return Transformer(vocabulary=50, width=16, blocks=1)


def embedding() -> nn.Module:
    return EmbeddingClassifier(vocabulary=50, width=8)


INPUTS: dict[Callable[[], nn.Module], tuple[int, ...]] = {
    cnn: (1, 28, 28),
    perceptron: (6,),
    transformer: (7,),
    embedding: (7,),
}


def examples_for(build_model: Callable[[], nn.Module]) -> Examples:
    generator, shape = torch.Generator().manual_seed(1), (RECORDS, *INPUTS[build_model])
    words = build_model in (transformer, embedding)
    inputs = (
        torch.randint(50, shape, generator=generator) if words else torch.randn(shape, generator=generator)
    )
    return Examples(inputs, torch.arange(RECORDS) % CLASSES)


def trained(
    build_model: Callable[[], nn.Module],
    engine: str,
    examples: Examples,
    sampling: PoissonBatches = PoissonBatches(0.4, 4),  # noqa: B008 (frozen)
    noise: float = 0.5,
) -> Tensor:
    """How one round moved the model's parameters, in one vector."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = build_model()
    before = [p.detach().clone() for p in model.parameters()]
    plan = Plan(Unit.RECORD, Adjacency.ZERO_OUT, sampling, 0.3, 1, noise)
    streams = Randomness(4).stream("batches"), Randomness(4).stream("noise")
    train_privately(
        model, Made("tiny", 1), examples, LocalTraining(0.5, 1, 5), PrivateSteps(plan, *streams), engine
    )
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())
    return torch.cat([(p.detach() - b).flatten() for p, b in zip(model.parameters(), before, strict=True)])


@pytest.mark.parametrize("build_model", INPUTS)
def test_engines_take_the_same_noise_to_the_same_model(build_model: Callable[[], nn.Module]) -> None:
    examples = examples_for(build_model)
    moved = {engine: trained(build_model, engine, examples) for engine in NAMES}
    assert float(moved["hooks"].abs().max()) > 0.01
    for engine in NAMES:
        torch.testing.assert_close(moved[engine], moved["hooks"], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("engine", NAMES)
def test_an_empty_batch_takes_the_noise_and_no_more(engine: str) -> None:
    """Its noise is that of any batch: the stream is read as far, so that the next step's is the same."""
    examples, sampling = examples_for(perceptron), PoissonBatches(1e-12, 2)
    moved = trained(perceptron, engine, examples, sampling)
    stream = Randomness(4).stream("noise")
    drawn = sum(dp_sgd.standard_normal(len(moved), stream) for _ in range(2)) * 0.5 * 0.3 * -0.5
    torch.testing.assert_close(moved.double(), drawn, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("engine", NAMES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
def test_what_is_not_finite_adds_nothing(engine: str, bad: float) -> None:
    """One step on all records: those that break are as if they were not there, whatever they hold."""
    examples, sampling = examples_for(perceptron), PoissonBatches(1.0, 1)
    broken = examples.inputs.clone()
    broken[[1, 7], 0] = bad
    moved = trained(perceptron, engine, Examples(broken, examples.targets), sampling, 1e-9)
    others = [n for n in range(RECORDS) if n not in (1, 7)]
    rest = trained(
        perceptron, engine, Examples(examples.inputs[others], examples.targets[others]), sampling, 1e-9
    )
    assert bool(moved.isfinite().all())
    if bad == 1e30:  # its gradient saturates, and may be finite: then it is clipped as any other
        assert float((moved * RECORDS - rest * len(others)).norm()) <= 2 * 0.3 * 0.5 * 1.0001
    else:
        torch.testing.assert_close(moved * RECORDS, rest * len(others), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("engine", NAMES)
def test_a_batch_of_broken_records_moves_by_noise_alone(engine: str) -> None:
    examples, sampling = examples_for(perceptron), PoissonBatches(1.0, 1)
    broken = Examples(torch.full_like(examples.inputs, torch.nan), examples.targets)
    moved = trained(perceptron, engine, broken, sampling)
    assert bool(moved.isfinite().all()) and bool((moved != 0).all())


def test_a_sum_that_is_not_finite_is_never_released() -> None:
    layer: Any = nn.Linear(2, 2)
    inner = torch.optim.SGD(layer.parameters(), lr=1.0)
    options = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": 1}
    optimizer = StreamNoiseOptimizer(inner, Randomness(1).stream("noise"), **options)
    for p in layer.parameters():
        p.summed_grad = torch.zeros_like(p)
    layer.weight.summed_grad[0, 0] = torch.inf
    before = layer.weight.detach().clone()
    with pytest.raises(FloatingPointError):
        optimizer.step()
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("engine", ["hooks", "ghost"])
def test_a_layer_that_does_not_see_the_batch_is_refused(engine: str) -> None:
    class Merged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.out = nn.Linear(2, 4), nn.Linear(4, CLASSES)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.out(self.first(inputs.reshape(-1, 2)).view(len(inputs), -1, 4).mean(1))

    with pytest.raises(Refusal, match="first dimension"):
        trained(Merged, engine, examples_for(perceptron))


def test_the_sum_of_the_step_before_is_never_taken_again() -> None:
    """A layer that the second step leaves out has no sum: the step stops, and releases nothing."""

    class Tiring(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.calls = nn.Linear(6, CLASSES), nn.Linear(6, CLASSES), 0

        def forward(self, inputs: Tensor) -> Tensor:
            self.calls += 1
            return self.first(inputs) + (self.second(inputs) if self.calls < 2 else 0)

    INPUTS[Tiring] = (6,)
    for engine in NAMES:
        if engine == "one_by_one":  # takes each gradient from torch, where it is zero
            continue
        with pytest.raises((RuntimeError, ValueError, AttributeError)):
            trained(Tiring, engine, examples_for(Tiring), PoissonBatches(1.0, 2))
    del INPUTS[Tiring]


# --- which engine -------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.cells = nn.Embedding(50, 4), DPLSTM(4, 5, batch_first=True)
        self.out = nn.Linear(5, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        return self.out(self.cells(self.embedding(words))[0][:, -1])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(50, 4), nn.Linear(4, 50, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.out(self.embedding(words).mean(1))


def waves() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(8, CLASSES))


class Positions(nn.Module):
    """As a text model's: one batch of places for all examples, a layer called by keyword, one that nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, 4), nn.Embedding(7, 4)
        self.unused, self.out = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        hidden = self.words(words) + self.places(torch.arange(words.shape[1])[None])
        return self.out(input=hidden.mean(1))


WORDS = Examples(torch.randint(50, (4, 7)), torch.zeros(4, dtype=torch.int64))
NUMBERS = Examples(torch.randn(4, 6), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("build_model", "examples", "engine"),
    [
        (perceptron, NUMBERS, "book_keeping"),
        (transformer, WORDS, "book_keeping"),
        (adapted, WORDS, "book_keeping"),
        (waves, NUMBERS, "hooks"),
        (Recurrent, WORDS, "ghost"),
        (Tied, WORDS, "hooks"),
        (Positions, WORDS, "one_by_one"),
    ],
)
def test_the_model_chooses_its_engine(
    build_model: Callable[[], nn.Module], examples: Examples, engine: str
) -> None:
    assert chosen_engine("auto", build_model(), examples) == engine
    assert [chosen_engine(name, build_model(), examples) for name in ("hooks", "ghost")] == ["hooks", "ghost"]
    if engine != "book_keeping":
        with pytest.raises(Refusal, match="in this model; use auto or hooks"):
            chosen_engine("book_keeping", build_model(), examples)


def test_ghost_clipping_beside_recurrent_cells_is_that_of_hooks() -> None:
    words = Examples(
        torch.randint(50, (RECORDS, 7), generator=torch.Generator().manual_seed(1)),
        torch.arange(RECORDS) % CLASSES,
    )
    ghost, hooks = (trained(Recurrent, engine, words) for engine in ("ghost", "hooks"))
    torch.testing.assert_close(ghost, hooks, rtol=1e-4, atol=2e-6)


def test_one_by_one_trains_what_no_hook_sees() -> None:
    """The sum of one step is that of the examples' own gradients, each clipped."""
    torch.manual_seed(3)
    model = Positions()
    start = copy.deepcopy(model)
    plan = Plan(Unit.RECORD, Adjacency.ZERO_OUT, PoissonBatches(1.0, 1), 0.3, 1, 1e-9)
    streams = Randomness(4).stream("batches"), Randomness(4).stream("noise")
    engine = chosen_engine("auto", model, WORDS)
    train_privately(
        model, Made("tiny", 1), WORDS, LocalTraining(0.5, 1, 5), PrivateSteps(plan, *streams), engine
    )
    total = [torch.zeros_like(p) for p in start.parameters()]
    for row in range(4):
        loss = nn.functional.cross_entropy(start(WORDS.inputs[row : row + 1]), WORDS.targets[row : row + 1])
        own = torch.autograd.grad(loss, list(start.parameters()), materialize_grads=True, allow_unused=True)
        norm = torch.cat([each.flatten() for each in own]).norm()
        total = [sum_ + each * min(1.0, 0.3 / float(norm)) for sum_, each in zip(total, own, strict=True)]
    for now, before, sum_ in zip(model.parameters(), start.parameters(), total, strict=True):
        torch.testing.assert_close(now, before - 0.5 * sum_ / 4, rtol=1e-4, atol=1e-6)


def test_ghost_clipping_of_tied_weights_is_refused() -> None:
    with pytest.raises(Refusal, match="ghost"):
        trained(Tied, "ghost", WORDS)


def test_the_configuration_knows_the_engines() -> None:
    assert ("auto", *ENGINES) == GRADIENTS


# --- noise --------------------------------------------------------------------------------------------------------


def test_normal_numbers_are_box_and_mullers() -> None:
    count = 40_001
    words = Randomness(3).stream("n").uint64(count + 1) >> np.uint64(11)
    uniform = (words.astype(np.float64) + 0.5) * 2.0**-53
    radius, angle = np.sqrt(-2 * np.log(uniform[: count // 2 + 1])), 2 * np.pi * uniform[count // 2 + 1 :]
    twin = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
    drawn = dp_sgd.standard_normal(count, Randomness(3).stream("n")).numpy()
    np.testing.assert_allclose(drawn, twin, rtol=1e-9, atol=1e-12)
    assert stats.kstest(drawn, "norm").pvalue > 1e-3


def test_no_block_repeats_anothers_noise() -> None:
    layer: Any = nn.Linear(NOISE_BLOCK, 2)
    optimizer = StreamNoiseOptimizer(
        torch.optim.SGD(layer.parameters(), lr=1.0),
        Randomness(1).stream("noise"),
        noise_multiplier=2.0,
        max_grad_norm=3.0,
        expected_batch_size=1,
    )
    for p in layer.parameters():
        p.summed_grad = torch.zeros_like(p, requires_grad=False)
    optimizer.add_noise()
    noise = layer.weight.grad
    assert float(noise.std()) == pytest.approx(6.0, rel=0.02)
    assert abs(float(torch.corrcoef(noise)[0, 1])) < 5 / NOISE_BLOCK**0.5
