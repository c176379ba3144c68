"""The engines of DP-SGD: one noise, one model; what is not finite; which engine a model gets."""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from opacus.layers import DPLSTM
from safetensors.torch import load_file
from scipy import stats
from shared.tasks import Classes
from torch import Tensor, nn

import fedveil as fv
from fedveil.base.refusal import Refusal
from fedveil.benchmarks.dp_sgd import EmbeddingClassifier, Transformer, adapted
from fedveil.benchmarks.made_task import Made
from fedveil.benchmarks.workload import CLASSES, build
from fedveil.client.dp_sgd import train as dp_sgd
from fedveil.client.dp_sgd.clipped import ClippedParameters
from fedveil.client.dp_sgd.rounds import GradientClip, step
from fedveil.client.dp_sgd.train import (
    ENGINES,
    NOISE_BLOCK,
    NoisedParameters,
    PrivateSteps,
    chosen_engine,
    train_privately,
)
from fedveil.client.training.sgd import with_fast_kernels
from fedveil.evidence.content import report_of
from fedveil.messages.local_training import LocalTraining
from fedveil.messages.training_order import GRADIENTS
from fedveil.privacy.budget import Adjacency, Unit
from fedveil.privacy.mechanisms.discrete_gaussian import MAX_SIGMA, sample
from fedveil.privacy.mechanisms.randomness import Randomness
from fedveil.privacy.plan import Plan
from fedveil.run.promise import REFUTED
from fedveil.run.run_files import MIXED, read_run
from fedveil.strategies.record_plan import PoissonBatches
from fedveil.tasks import batch_memory
from fedveil.tasks.data import Examples
from fedveil.tasks.independence import Mixing, check_independence
from fedveil.tasks.protocol import check_trainable

pytestmark = pytest.mark.usefixtures("fast_runs")

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


class Sized(nn.Module):
    """A model that notes the size of each batch."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.sizes = inner, list[int]()

    def forward(self, inputs: Tensor) -> Tensor:
        self.sizes.append(len(inputs))
        return self.inner(inputs)


def clipped_sum(
    build_model: Callable[[], nn.Module], engine: str, examples: Examples, limit: str
) -> tuple[list[Tensor], list[int]]:
    """The clipped sum of all examples, and the sizes of the batches that the model got."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = Sized(build_model())
    clipped = ClippedParameters([p for p in model.parameters() if p.requires_grad], 0.3)
    with dp_sgd.clipping(model, Made("tiny", 1), examples, clipped, engine, limit) as clip:
        model.sizes.clear()
        clip(np.arange(len(examples)))
        return [p.summed_grad.double() for p in clipped.params], model.sizes


def repeated(examples: Examples, times: int) -> Examples:
    return Examples(torch.cat([examples.inputs] * times), torch.cat([examples.targets] * times))


@pytest.mark.parametrize("limit", ["1", "3", "8", "11"])
@pytest.mark.parametrize("engine", NAMES)
@pytest.mark.parametrize("build_model", INPUTS)
def test_parts_of_a_step_add_up(build_model: Callable[[], nn.Module], engine: str, limit: str) -> None:
    examples = repeated(examples_for(build_model), 2)
    whole, _ = clipped_sum(build_model, engine, examples, "100")
    parts, sizes = clipped_sum(build_model, engine, examples, limit)
    assert max(sizes) <= int(limit)
    assert max(float(each.abs().max()) for each in whole) > 0.01
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("engine", NAMES)
def test_step_with_wide_outputs_takes_few_examples_at_a_time(
    engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = repeated(examples_for(embedding), 4)
    outputs = CLASSES * 4
    monkeypatch.setattr(batch_memory, "ALLOWED", 9 * 20 * batch_memory.PEAK * outputs)
    whole, sizes = clipped_sum(embedding, engine, examples, "100")
    assert max(sizes) == 48  # one by one in the look at a step's independence
    parts, sizes = clipped_sum(embedding, engine, examples, "auto")
    assert max(sizes) <= 26 and len(sizes) >= 3
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("engine", NAMES)
def test_failing_and_infinite_examples_of_a_part_take_no_other(engine: str) -> None:
    examples = repeated(examples_for(perceptron), 2)
    examples.targets[4] = CLASSES  # on which the loss fails
    examples.inputs[17] = float("inf")
    whole, _ = clipped_sum(perceptron, engine, examples, "100")
    parts, _ = clipped_sum(perceptron, engine, examples, "8")
    others = np.delete(np.arange(24), [4, 17])
    expected, _ = clipped_sum(perceptron, engine, Examples(*examples.batch(torch.from_numpy(others))), "100")
    for a, b, c in zip(parts, whole, expected, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-4, atol=2e-6)
        torch.testing.assert_close(b, c, rtol=1e-4, atol=2e-6)


def test_one_example_changes_no_other_of_its_part() -> None:
    """The sums of two steps differ by the clipped gradient of the example that one of them lacks."""
    examples = examples_for(perceptron)
    full, _ = clipped_sum(perceptron, "hooks", examples, "8")
    fewer, _ = clipped_sum(perceptron, "hooks", Examples(*examples.batch(torch.arange(1, RECORDS))), "8")
    difference = torch.cat([(a - b).flatten() for a, b in zip(full, fewer, strict=True)])
    assert 0 < float(difference.norm()) <= 0.3 + 1e-6


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
    sigma, step = dp_sgd.lattice_of(0.5, 0.3, len(moved))
    drawn = sum(sample(sigma, len(moved), stream).astype(np.float64) for _ in range(2)) * step * -0.5
    np.testing.assert_allclose(moved.double().numpy(), drawn, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("engine", NAMES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30, "a label on which the loss fails"])
def test_infinite_gradient_adds_nothing(engine: str, bad: float | str) -> None:
    """One step on all records: those that break are as if they were not there, whatever they hold."""
    examples, sampling = examples_for(perceptron), PoissonBatches(1.0, 1)
    broken, targets = examples.inputs.clone(), examples.targets.clone()
    if isinstance(bad, str):
        targets[[1, 7]] = CLASSES
    else:
        broken[[1, 7], 0] = bad
    moved = trained(perceptron, engine, Examples(broken, targets), sampling, 1e-9)
    others = [n for n in range(RECORDS) if n not in (1, 7)]
    rest = trained(
        perceptron, engine, Examples(examples.inputs[others], examples.targets[others]), sampling, 1e-9
    )
    assert bool(moved.isfinite().all())
    if bad == 1e30:  # its gradient saturates, and may be finite: then it is clipped as any other
        assert float((moved * RECORDS - rest * len(others)).norm()) <= 2 * 0.3 * 0.5 * 1.0001
    else:
        torch.testing.assert_close(moved * RECORDS, rest * len(others), rtol=1e-4, atol=1e-6)


@dataclass(frozen=True)
class Shaped(Examples):
    """Examples, two of which have a shape of their own: they fit in no batch with others, or are refused."""

    fits: bool = True

    def batch(self, index: Tensor) -> tuple[Any, Tensor]:
        if bool(torch.isin(index, torch.tensor([1, 7])).any()) and not (self.fits and len(index) == 1):
            raise Refusal("collate", "another shape", "must return one row for each example")
        return super().batch(index)


@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("engine", NAMES)
def test_a_record_of_another_shape_takes_no_other_along(engine: str, fits: bool) -> None:
    examples, sampling = examples_for(perceptron), PoissonBatches(1.0, 1)
    shaped = Shaped(examples.inputs, examples.targets, fits=fits)
    moved = trained(perceptron, engine, shaped, sampling, 1e-9)
    kept = [n for n in range(RECORDS) if fits or n not in (1, 7)]
    alike = Examples(examples.inputs[kept], examples.targets[kept])
    rest = trained(perceptron, engine, alike, sampling, 1e-9)
    torch.testing.assert_close(moved * RECORDS, rest * len(kept), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("engine", NAMES)
def test_a_batch_of_broken_records_moves_by_noise_alone(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does one whose loss is constant, as of records without a label."""
    examples, sampling = examples_for(perceptron), PoissonBatches(1.0, 1)
    broken = Examples(torch.full_like(examples.inputs, torch.nan), examples.targets)
    moved = trained(perceptron, engine, broken, sampling)
    assert bool(moved.isfinite().all()) and bool((moved != 0).all())
    monkeypatch.setattr(Made, "loss", lambda *_: torch.zeros(()))
    assert torch.equal(trained(perceptron, engine, examples, sampling), moved)


class Alternating(nn.Module):
    """Layers over places whose parts of a gradient cancel, all but their rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.all = nn.Linear(64, 64), nn.Linear(64, 2, bias=False)
        with torch.no_grad():
            self.each.weight.zero_()
            self.all.weight.copy_(torch.tensor([[1e9], [-1e9]]).expand(2, 64))

    def forward(self, inputs: Tensor) -> Tensor:
        half = inputs.shape[1] // 2
        return self.all((self.each(inputs) * torch.tensor([[1.0]] * half + [[-1.0]] * half)).sum(1))


def tiny_times_huge() -> nn.Module:
    """Return layers whose inputs are huge and whose outputs' gradients have squares that float32 does not hold."""
    layers = [nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 2, bias=False)]
    with torch.no_grad():
        for layer, values in zip(
            layers, (6e18 * torch.eye(8), torch.zeros(8, 8), torch.zeros(2, 8)), strict=True
        ):
            layer.weight.copy_(values)
        layers[2].weight[0] = 4e-23
    return nn.Sequential(*layers)


@pytest.mark.parametrize("engine", NAMES)
@pytest.mark.parametrize("build_model", [tiny_times_huge, Alternating])
def test_no_model_that_a_server_sends_takes_a_record_past_its_clip(
    build_model: Callable[[], nn.Module], engine: str
) -> None:
    """Squares below what float32 holds are no norm of zero, and parts that cancel leave no rounding that is longer."""
    inputs = torch.ones(1, 8)
    if build_model is Alternating:
        generator = torch.Generator().manual_seed(1)
        places = torch.rand(1, 8, 64, generator=generator)
        inputs = torch.cat([places, places[:, torch.randperm(8, generator=generator)]], 1)
    model, clip = build_model(), GradientClip(1e-6, engine)
    layout = {name: tuple(p.shape) for name, p in model.named_parameters()}
    examples = Examples(inputs, torch.tensor([1]))
    update = step(model, Made("tiny", 1), examples, np.arange(1), clip, 1.0, layout)
    moved = np.concatenate([part.ravel() for part in update.values()])
    assert np.linalg.norm(moved) <= 1e-6 * 1.0001


def undecided() -> nn.Module:
    """Return layers whose outputs hang on how one number is rounded, which three rows and four do otherwise."""
    generator = torch.Generator().manual_seed(1)
    first, second, last = nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 2)
    hidden, weight = (torch.randn(64, generator=generator) for _ in range(2))
    with torch.no_grad():
        for each in (first.weight, second.weight, second.bias, last.weight, last.bias):
            each.zero_()
        first.bias.copy_(hidden)
        second.weight[0] = weight - weight @ hidden * hidden / (hidden @ hidden)
        second.bias[0] = -sum(float(second(hidden.repeat(rows, 1))[0, 0]) for rows in (3, 4)) / 2
        last.weight[:, 0] = torch.tensor([1e12, -1e12])
    return nn.Sequential(first, second, last)


@pytest.mark.parametrize("engine", NAMES)
def test_no_record_changes_how_another_one_is_rounded(engine: str) -> None:
    """What a record adds is then its own, and one record more moves a sum by one norm, whatever the model."""
    model, clip = undecided(), GradientClip(1.0, engine)
    layout = {name: tuple(p.shape) for name, p in model.named_parameters()}
    data = Examples(torch.ones(9, 8), torch.zeros(9, dtype=torch.int64))
    updates = [step(model, Made("tiny", 1), data, np.arange(n), clip, 1.0, layout) for n in range(10)]
    sums = np.stack([np.concatenate([part.ravel() for part in each.values()]) for each in updates])
    assert np.linalg.norm(np.diff(sums, axis=0), axis=1).max() <= 1.0001


def test_a_sum_that_is_not_finite_is_never_released() -> None:
    layer: Any = nn.Linear(2, 2)
    noised = NoisedParameters(layer.parameters(), 1.0, Randomness(1).stream("noise"), 1.0, 1)
    for p in layer.parameters():
        p.summed_grad = torch.zeros_like(p)
    layer.weight.summed_grad[0, 0] = torch.inf
    before = layer.weight.detach().clone()
    with pytest.raises(FloatingPointError):
        noised.make_means()
    assert layer.weight.grad is None and torch.equal(layer.weight, before)


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


def test_sum_of_the_last_step_is_never_used_again() -> None:
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
        if engine in ("vmap", "one_by_one"):  # take each gradient from torch, where it is zero
            continue
        with pytest.raises((RuntimeError, TypeError, AttributeError)):
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
    layers = [nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 2, 3), nn.InstanceNorm1d(2, affine=True), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8, CLASSES))


class Scaled(nn.Module):
    """A buffer that the backward pass reads."""

    def __init__(self) -> None:
        super().__init__()
        self.waves = waves()
        self.register_buffer("scale", torch.ones(CLASSES))

    def forward(self, numbers: Tensor) -> Tensor:
        return self.waves(numbers) * self.scale


class Positions(nn.Module):
    """As a text model's: one batch of places for all examples, a layer called by keyword, one that nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(50, 4), nn.Embedding(7, 4)
        self.unused, self.out = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        hidden = self.words(words) + self.places(torch.arange(words.shape[1])[None])
        return self.out(input=hidden.mean(1))


class Cells(nn.Module):
    """Torch's own recurrent cells, read at the last place or in their last state."""

    def __init__(self, kind: Callable[..., nn.Module], state: bool = False) -> None:
        super().__init__()
        self.cells, self.out, self.state = kind(4, 5, batch_first=True), nn.Linear(5, CLASSES), state

    def forward(self, inputs: Tensor) -> Tensor:
        outputs, last = self.cells(inputs)
        last = last[0] if isinstance(last, tuple) else last
        return self.out(last[-1] if self.state else outputs[:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.out = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.out(self.heads(inputs, inputs, inputs)[0].mean(1))


class Doubled(torch.autograd.Function):
    """A function of somebody's own that knows nothing of vmap."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        return torch.from_numpy(2 * inputs.detach().numpy())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return torch.from_numpy(2 * gradients[0].numpy())


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.out = nn.Parameter(torch.ones(4)), nn.Linear(4, CLASSES)
        self.heat = nn.Parameter(torch.tensor(1.5))  # of no dimension

    def forward(self, inputs: Tensor) -> Tensor:
        return self.heat * self.out(Doubled.apply(inputs * self.scale).mean(1))  # pyright: ignore[reportUnknownMemberType, reportAttributeAccessIssue]


class PlacesFirst(nn.Module):
    """Calls its layer with the places as first dimension, which may be as many as the examples."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.out(inputs.transpose(0, 1)).mean(0)


class UsedApart(nn.Module):
    """Uses a layer's weight outside the layer too, where no hook sees it, and far more there."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.out(self.layer(inputs).tanh() / 100 + inputs @ self.layer.weight).mean(1)


SEQUENCES = Examples(torch.randn(4, 3, 4), torch.arange(4) % CLASSES)
WORDS = Examples(torch.randint(50, (4, 7)), torch.zeros(4, dtype=torch.int64))
NUMBERS = Examples(torch.randn(4, 6), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize(
    ("build_model", "examples", "engine", "others"),
    [
        (perceptron, NUMBERS, "book_keeping", ("vmap", "hooks", "ghost")),
        (transformer, WORDS, "book_keeping", ("vmap", "hooks", "ghost")),
        (adapted, WORDS, "book_keeping", ("vmap", "hooks", "ghost")),
        (waves, NUMBERS, "vmap", ("hooks", "ghost")),
        (Scaled, NUMBERS, "vmap", ("hooks", "ghost")),
        (Recurrent, WORDS, "ghost", ("vmap", "hooks")),
        (Tied, WORDS, "book_keeping", ("vmap", "hooks")),
        (Positions, WORDS, "vmap", ()),
        (UsedApart, SEQUENCES, "vmap", ()),
        (PlacesFirst, SEQUENCES, "vmap", ()),
        (Custom, SEQUENCES, "one_by_one", ()),
    ],
)
def test_the_model_chooses_its_engine(
    build_model: Callable[[], nn.Module], examples: Examples, engine: str, others: tuple[str, ...]
) -> None:
    assert chosen_engine("auto", build_model(), examples) == engine
    for name in ENGINES:
        if name in (engine, *others, "one_by_one"):
            assert chosen_engine(name, build_model(), examples) == name
            continue
        remedy = (
            "tied weights; use auto"
            if build_model is Tied
            else "in this model; use auto or (vmap|one_by_one)"
        )
        with pytest.raises(Refusal, match=rf"privacy\.gradients='{name}'.*{remedy}"):
            chosen_engine(name, build_model(), examples)


RECORDED: list[Callable[[], nn.Module]] = [
    lambda: Cells(nn.LSTM),
    lambda: Cells(nn.LSTM, state=True),
    lambda: Cells(nn.GRU),
    lambda: Cells(nn.RNN, state=True),
    Attention,
    lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True), nn.Flatten()),
]


@pytest.mark.parametrize("build_model", RECORDED)
@pytest.mark.parametrize("places", [2, 3])  # as many as a batch of the choice has
def test_layers_that_no_hook_sees_train_by_their_records(
    build_model: Callable[[], nn.Module], places: int
) -> None:
    torch.manual_seed(3)
    model, examples = build_model(), Examples(SEQUENCES.inputs[:, :places], SEQUENCES.targets)
    check_independence(model, Made("tiny", 1), examples)
    for name in ("hooks", "ghost"):
        with pytest.raises(Refusal, match=rf"privacy\.gradients='{name}'.*use auto or (vmap|one_by_one)"):
            chosen_engine(name, build_model(), examples)
    assert chosen_engine("auto", model, examples) == "book_keeping"
    whole = "one_by_one" if isinstance(model, Cells) else "vmap"  # torch repeats cells in a loop at best
    assert chosen_engine("auto", model, examples, compressed=True) == whole
    check_one_step(model, examples)


@pytest.mark.parametrize("build_model", [Custom, UsedApart])
@pytest.mark.parametrize("places", [2, 3])  # as many as a batch of the choice has
def test_layers_that_no_hook_sees_train_by_own_passes(
    build_model: Callable[[], nn.Module], places: int
) -> None:
    torch.manual_seed(3)
    model, examples = build_model(), Examples(SEQUENCES.inputs[:, :places], SEQUENCES.targets)
    check_trainable(model)
    check_independence(model, Made("tiny", 1), examples)
    check_one_step(model, examples)
    sums = clipped_by_hand(model, examples)
    layout = {name: tuple(p.shape) for name, p in model.named_parameters()}
    update = step(model, Made("tiny", 1), examples, np.arange(4), GradientClip(0.3), 0.5, layout)
    for name, sum_ in zip(layout, sums, strict=True):
        np.testing.assert_allclose(update[name], -0.5 * sum_.numpy(), rtol=1e-4, atol=1e-6)


class Spoken(Classes):
    held_out_client = 99

    def model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Cells(nn.LSTM)

    def client_data(self, client: int) -> Examples:
        inputs = torch.randn(30, 6, 4, generator=torch.Generator().manual_seed(client))
        return Examples(inputs, (inputs.sum((1, 2)) > 0).long())


@pytest.mark.parametrize("level", [fv.Record, fv.RecordDistributed])
def test_a_run_trains_cells_and_refuses_an_engine_that_cannot(level: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"cohort": "all", "num_rounds": 2, "quiet": True}
    with pytest.raises(Refusal, match=r"privacy\.gradients='hooks'"):
        fv.simulate(
            Spoken(), privacy=level(target_delta=1e-2, gradients="hooks"), folder=tmp_path / "no", **options
        )
    assert not (tmp_path / "no").exists()
    run = fv.simulate(Spoken(), privacy=level(target_delta=1e-2), folder=tmp_path / "yes", **options)
    assert run.status == "completed"
    start = Spoken().model().state_dict()
    trained_to = load_file(tmp_path / "yes" / "model.safetensors")
    assert any(not torch.equal(trained_to[name], value) for name, value in start.items())


class Plain(Spoken):
    """A task without random layers, whose draws would follow the parts."""

    def model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Sequential(nn.Flatten(), nn.Linear(24, 8), nn.Tanh(), nn.Linear(8, 2))


@pytest.mark.parametrize("level", ["record", "record_distributed"])
def test_run_in_parts_has_the_ledger_and_metrics_of_a_whole_one(level: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"privacy.target_epsilon": 8, "cohort": "all", "num_rounds": 3, "seed": 0}
    runs = {
        limit: fv.simulate(
            Plain(),
            privacy=level,
            quiet=True,
            folder=tmp_path / str(limit),
            **{**options, "engine.examples_at_once": limit},
        )
        for limit in ("auto", 3, 8)
    }
    whole, *others = (run.result for run in runs.values())
    assert whole["status"] == "completed"
    for result in others:
        assert result["privacy"] == whole["privacy"]
        assert result["metrics"] == pytest.approx(whole["metrics"], rel=1e-3)
    models = [load_file(tmp_path / str(limit) / "model.safetensors") for limit in runs]
    for name, value in models[0].items():
        for other in models[1:]:
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-5)


class Later(nn.Module):
    """Centres its batch where the probe of a run's beginning does not look."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.scale = where, nn.Linear(4, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        h, moved = self.scale(inputs), float(self.scale.weight.detach().abs().max())
        mixes = {"large": len(h) > 24, "coin": random.random() < 0.02, "weights": moved > 0.7}
        return h - h.mean(0) if mixes.get(self.where) else h


class Late(Spoken):
    def __init__(self, where: str) -> None:
        self.where = where

    def model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Sequential(Later(self.where), nn.Dropout(0.3), nn.Linear(4, 2))

    def client_data(self, client: int) -> Examples:
        inputs = torch.randn(80, 4, generator=torch.Generator().manual_seed(client))
        return Examples(inputs, (inputs.sum(1) > 0).long())


@pytest.mark.parametrize(("level", "where"), [("record", "weights"), ("record_distributed", "large")])
def test_mixing_that_begins_in_the_run_ends_it(
    level: str, where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A step's own batch is looked at, at the weights of that step."""
    task = Late(where)
    check_independence(task.model(), task, task.client_data(0))
    monkeypatch.setattr(dp_sgd, "LOOKED_AT", 4)
    options: dict[str, Any] = {"privacy.target_epsilon": 50, "cohort": "all", "learning_rate": 3.0, "seed": 0}
    run = fv.simulate(task, privacy=level, num_rounds=20, quiet=True, folder=tmp_path / "run", **options)
    assert run.status == "failed" and len(run.history) < 20
    assert run.result["reason"].startswith(MIXED)
    report = report_of(read_run(tmp_path / "run"))
    assert (report["promise"][-1] == REFUTED) is bool(run.history)
    with pytest.raises(Refusal, match="no epsilon holds; mend the task and start a new run"):
        fv.simulate(task, resume=tmp_path / "run", quiet=True)


def test_look_at_a_step_changes_nothing_and_a_failed_one_is_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a rare coin one look in many shows something; nobody trains on after it."""

    def steps(where: str) -> tuple[nn.Module, Callable[[], None]]:
        torch.manual_seed(1)
        random.seed(1)
        task = Late(where)
        model, data, plan = (
            task.model(),
            task.client_data(0),
            Plan(Unit.RECORD, Adjacency.ZERO_OUT, PoissonBatches(0.5, 6), 0.3, 1, 0.5),
        )
        streams = PrivateSteps(plan, *(Randomness(4).stream(name) for name in ("batches", "noise")))
        return model, lambda: train_privately(model, task, data, LocalTraining(0.5, 1, 40), streams)

    found: list[Tensor] = []
    for often in (1, 10**9):
        monkeypatch.setattr(dp_sgd, "LOOKED_AT", often)
        model, train = steps("nowhere")
        train()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*found)
    monkeypatch.setattr(dp_sgd, "LOOKED_AT", 1)
    model, train = steps("coin")
    with pytest.raises(Mixing):
        for _ in range(100):
            train()
    monkeypatch.setattr(dp_sgd, "LOOKED_AT", 1)
    for _ in range(3):
        with pytest.raises(Mixing, match=r"model or loss='Sequential'.*another example"):
            train()


def test_dimension_as_long_as_the_batch_is_not_confused_with_it() -> None:
    examples = Examples(SEQUENCES.inputs[:, :2], SEQUENCES.targets)
    assert chosen_engine("auto", PlacesFirst(), examples) == "vmap"
    with pytest.raises(Refusal, match="do not hold one entry for each example"):
        chosen_engine("book_keeping", PlacesFirst(), examples)


def test_cells_that_take_places_for_examples_are_refused() -> None:
    class Mixed(Cells):
        def forward(self, inputs: Tensor) -> Tensor:
            return self.out(self.cells(inputs)[0][:, -1])

    model = Mixed(lambda *sizes, batch_first: nn.LSTM(*sizes))  # the batch where places are awaited
    with pytest.raises(Refusal, match="cells: LSTM"):
        check_independence(model, Made("tiny", 1), SEQUENCES)


def test_ghost_clipping_with_recurrent_cells_is_that_of_hooks() -> None:
    words = Examples(
        torch.randint(50, (RECORDS, 7), generator=torch.Generator().manual_seed(1)),
        torch.arange(RECORDS) % CLASSES,
    )
    ghost, hooks = (trained(Recurrent, engine, words) for engine in ("ghost", "hooks"))
    torch.testing.assert_close(ghost, hooks, rtol=1e-4, atol=2e-6)


def test_places_that_all_examples_share_train() -> None:
    torch.manual_seed(3)
    check_one_step(Positions(), WORDS)


def check_one_step(model: nn.Module, examples: Examples) -> None:
    """Hold one step against the sum of the examples' own gradients, each clipped."""
    total, start = clipped_by_hand(model, examples), copy.deepcopy(model)
    plan = Plan(Unit.RECORD, Adjacency.ZERO_OUT, PoissonBatches(1.0, 1), 0.3, 1, 1e-9)
    streams = Randomness(4).stream("batches"), Randomness(4).stream("noise")
    engine, training = chosen_engine("auto", model, examples), LocalTraining(0.5, 1, 5)
    train_privately(model, Made("tiny", 1), examples, training, PrivateSteps(plan, *streams), engine)
    for now, before, sum_ in zip(model.parameters(), start.parameters(), total, strict=True):
        torch.testing.assert_close(now, before - 0.5 * sum_ / 4, rtol=1e-4, atol=1e-6)


def clipped_by_hand(model: nn.Module, examples: Examples) -> list[Tensor]:
    parameters = list(model.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    for row in range(len(examples)):
        outputs = model(examples.inputs[row : row + 1])
        loss = nn.functional.cross_entropy(outputs, examples.targets[row : row + 1])
        own = torch.autograd.grad(loss, parameters, materialize_grads=True, allow_unused=True)
        norm = torch.cat([each.flatten() for each in own]).norm()
        total = [sum_ + each * min(1.0, 0.3 / float(norm)) for sum_, each in zip(total, own, strict=True)]
    return total


def test_ghost_clipping_of_tied_weights_is_refused() -> None:
    with pytest.raises(Refusal, match="ghost"):
        trained(Tied, "ghost", WORDS)


def test_the_configuration_knows_the_engines() -> None:
    assert ("auto", *ENGINES) == GRADIENTS


# --- noise --------------------------------------------------------------------------------------------------------


def test_noise_is_whole_numbers_on_a_lattice_and_normal_from_afar() -> None:
    """In double precision nothing is rounded after the draw, so that the lattice can be seen."""
    layer: Any = nn.Linear(200, 200, dtype=torch.float64)
    noised = NoisedParameters(layer.parameters(), 3.0, Randomness(3).stream("n"), 2.0, 1)
    for p in layer.parameters():
        p.summed_grad = torch.full_like(p, 0.7, requires_grad=False)
    noised.make_means()
    steps = layer.weight.grad.numpy() / noised.step_size
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-6)
    assert np.unique(np.rint(steps) % 64).size == 64  # every whole number is drawn
    assert stats.kstest((layer.weight.grad.numpy().ravel() - 0.7) / 6.0, "norm").pvalue > 1e-3


@given(st.integers(0, 2**32 - 1), st.integers(1, 3000), st.floats(0.05, 50), st.floats(1e-3, 1e3))
def test_noise_covers_the_rounding_of_the_sensitivity(
    seed: int, coordinates: int, noise: float, norm: float
) -> None:
    """Two sums that differ by a whole norm, each rounded: the noise is so many times the distance, and hardly more."""
    rng = np.random.default_rng(seed)
    sigma, step = dp_sgd.lattice_of(noise, norm, coordinates)
    one, away = rng.normal(size=(2, coordinates)) * norm
    other = one + norm * away / np.linalg.norm(away)
    distance = step * float(np.linalg.norm(np.rint(one / step) - np.rint(other / step)))
    farthest = norm + step * coordinates**0.5
    assert distance <= farthest * (1 + 1e-9)
    assert noise * farthest <= sigma * step * (1 + 1e-9) <= 1.004 * noise * norm


@pytest.mark.parametrize("noise", [1e6, 1e9])
def test_a_lattice_is_never_finer_than_noise_can_be_drawn_on(noise: float) -> None:
    """Noise that needs more steps than the sampler has gets more of it, and never less than is accounted for."""
    coordinates = 100_000_000 if noise == 1e6 else 650
    sigma, step = dp_sgd.lattice_of(noise, 1.0, coordinates)
    assert sigma == MAX_SIGMA
    assert noise * (1 + step * coordinates**0.5) <= sigma * step * (1 + 1e-9) <= 1.03 * noise
    with pytest.raises(Refusal, match="no lattice has room for this noise"):
        dp_sgd.lattice_of(1e13, 1.0, 650)


def test_no_block_repeats_anothers_noise() -> None:
    layer: Any = nn.Linear(NOISE_BLOCK, 2)
    noised = NoisedParameters(layer.parameters(), 3.0, Randomness(1).stream("noise"), 2.0, 1)
    for p in layer.parameters():
        p.summed_grad = torch.zeros_like(p, requires_grad=False)
    noised.make_means()
    noise = layer.weight.grad
    assert float(noise.std()) == pytest.approx(6.0, rel=0.02)
    assert abs(float(torch.corrcoef(noise)[0, 1])) < 5 / NOISE_BLOCK**0.5
