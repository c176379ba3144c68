"""Book-keeping: clipped sums against Opacus' hooks and against one example at a time, and when it stands aside."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.grad_sample import GradSampleHooks
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedveil.benchmarks.dp_sgd import EmbeddingClassifier, Transformer, adapted_by_peft
from fedveil.benchmarks.workload import build
from fedveil.client.dp_sgd import example_gradients
from fedveil.client.dp_sgd.book_keeping import book_keeping, obstacle
from fedveil.client.training.sgd import with_fast_kernels
from fedveil.tasks.data import padded_size

pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
]
CLASSES = 10
Loss = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def losses(model: nn.Module, inputs: Tensor, targets: Tensor) -> Loss:
    def forward(rows: Tensor, count: int = 0) -> tuple[Tensor, Tensor]:
        rows = rows[torch.arange(max(count, len(rows))).clamp(max=len(rows) - 1)]
        outputs = model(inputs[rows])
        return outputs, cross_entropy(outputs, targets[rows])

    return forward


def optimizer_of(model: nn.Module, clip: float) -> DPOptimizer:
    inner = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    return DPOptimizer(inner, noise_multiplier=0.0, max_grad_norm=clip, expected_batch_size=1)


def kept(model: nn.Module, inputs: Tensor, targets: Tensor, clip: float) -> dict[str, Tensor]:
    """The clipped sums by book-keeping."""
    optimizer = optimizer_of(model, clip)
    with book_keeping(model, losses(model, inputs, targets), optimizer) as clipped_sums:
        assert bool(clipped_sums(torch.arange(len(inputs)), padded_size(len(inputs))).all())
    return {name: p.summed_grad for name, p in model.named_parameters() if p.requires_grad}  # type: ignore[attr-defined]


def hooked(model: nn.Module, inputs: Tensor, targets: Tensor, clip: float) -> dict[str, Tensor]:
    """The same by Opacus alone; its unfolding wants contiguous images."""
    for p in model.parameters():
        p.data = p.data.clone(memory_format=torch.contiguous_format)
    attached = GradSampleHooks(model, batch_first=True, loss_reduction="mean")
    optimizer = optimizer_of(model, clip)
    losses(model, inputs, targets)(torch.arange(len(inputs)))[1].backward()
    optimizer.clip_and_accumulate()
    attached.cleanup()
    return {name: p.summed_grad for name, p in model.named_parameters() if p.requires_grad}  # type: ignore[attr-defined]


def singly(model: nn.Module, inputs: Tensor, targets: Tensor, clip: float) -> dict[str, Tensor]:
    """The same by autograd, one example at a time in float64."""
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in wanted.items()}
    for x, y in zip(inputs, targets, strict=True):
        gradients = torch.autograd.grad(cross_entropy(model(x[None]), y[None]), list(wanted.values()))
        norm = float(sum(g.double().square().sum() for g in gradients)) ** 0.5
        for name, gradient in zip(wanted, gradients, strict=True):
            total[name] += gradient.double() * min(1.0, clip / (norm + 1e-6))
    return total


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest relative distance of a parameter's sums, beside the norm of all."""
    assert set(one) == set(other) and one
    whole = float(sum(value.double().square().sum() for value in other.values())) ** 0.5
    assert whole > 0
    own = (
        float((one[n].double() - other[n].double()).norm()) / max(float(other[n].norm()), whole / 100)
        for n in one
    )
    return max(own)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return make()


def images(batch: int) -> Tensor:
    return torch.randn(batch, 1, 28, 28, generator=torch.Generator().manual_seed(1))


def words(vocabulary: int, length: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.randint(
        vocabulary, (batch, length), generator=torch.Generator().manual_seed(1)
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "cnn": (lambda: build("cnn-100k"), images),
    "transformer": (lambda: Transformer(vocabulary=200, width=32, blocks=1), words(200, 12)),
    "embedding": (lambda: EmbeddingClassifier(vocabulary=300, width=16), words(300, 20)),
}


@pytest.mark.parametrize("batch", [32, 256])
@pytest.mark.parametrize("name", MODELS)
def test_clipped_sums_are_those_of_opacus(name: str, batch: int) -> None:
    make, draw = MODELS[name]
    model, inputs = seeded(make), draw(batch)
    targets = torch.arange(batch) % CLASSES
    assert obstacle(model, inputs[:1]) is None
    reference = hooked(model, inputs, targets, 0.8)
    assert distance(kept(model, inputs, targets, 0.8), reference) < 1e-5
    if name == "cnn":  # and in the layout that is fast
        fast = kept(
            with_fast_kernels(model), inputs.contiguous(memory_format=torch.channels_last), targets, 0.8
        )
        assert distance(fast, reference) < 1e-5


def test_adapters_of_peft_are_clipped_example_by_example() -> None:
    pytest.importorskip("peft")
    model, inputs = seeded(lambda: adapted_by_peft(32)).double(), words(1000, 6)(9)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)  # PEFT begins with zeros
    targets = torch.arange(9) % CLASSES
    assert obstacle(model, inputs) is None
    assert distance(kept(model, inputs, targets, 0.8), singly(model, inputs, targets, 0.8)) < 1e-9


class Mean(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.mean(1)


@st.composite
def convolutional(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(draw(st.integers(0, 99)))
    groups, width = draw(st.sampled_from([1, 2])), draw(st.sampled_from([2, 4]))
    channels = draw(st.sampled_from([1, 2, 4])) if groups == 1 else 2
    dimensions = draw(st.sampled_from([1, 2, 2, 3]))
    sizes = [draw(st.integers(5, 8 if dimensions < 3 else 6)) for _ in range(dimensions)]
    padding = draw(st.sampled_from([0, 1, (0, 1, 1)[:dimensions], "same", "valid"]))
    first = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1](
        channels,
        width,
        tuple(draw(st.integers(1, 3)) for _ in range(dimensions)),  # type: ignore[arg-type]
        stride=1 if padding == "same" else draw(st.integers(1, 2)),
        padding=padding,
        dilation=draw(st.integers(1, 2)),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "circular"])),
    )
    inputs = torch.randn(draw(st.integers(1, 5)), channels, *sizes)
    flat = first(inputs).flatten(1).shape[1]
    layers = [first, nn.GroupNorm(width // 2, width), nn.ReLU(inplace=draw(st.booleans())), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(flat, CLASSES)), inputs


@st.composite
def sequential(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(draw(st.integers(0, 99)))
    width, high = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    padding = draw(st.sampled_from([None, 0, 3]))
    layers = [
        nn.Embedding(6, width, padding_idx=padding),
        draw(st.sampled_from([nn.LayerNorm(width, bias=draw(st.booleans())), nn.RMSNorm(width)])),
        nn.Linear(width, high, bias=draw(st.booleans())),
        nn.GELU(),
        nn.Linear(high, width),
        Mean(),
        nn.Linear(width, CLASSES),
    ]
    for number in draw(st.sets(st.integers(0, 5), max_size=4)):
        layers[number].requires_grad_(False)
    batch, length = draw(st.integers(1, 5)), draw(st.integers(0, 9))
    if length == 0:  # one word for each example, and no sequence
        layers.remove(layers[5])
    return nn.Sequential(*layers), torch.randint(6, (batch, length) if length else (batch,))


class Repeating(nn.Module):
    """Embeddings and linear layers, of which some are called twice or have one weight."""

    def __init__(
        self, width: int, high: int, tied: str, bias: bool, padding: int | None, spread: bool
    ) -> None:
        super().__init__()
        self.tied, self.spread = tied, spread
        self.words, self.again = nn.Embedding(high, width, padding_idx=padding), nn.Embedding(high, width)
        self.norm, self.middle = nn.LayerNorm(width), nn.Linear(width, width, bias=bias)
        self.other, self.out = nn.Linear(width, width), nn.Linear(width, high, bias=bias)
        if "words" in tied:
            self.again.weight = self.words.weight
        if "out" in tied:
            self.out.weight = self.words.weight
        if "middle" in tied:
            self.other.weight = self.middle.weight

    def forward(self, words: Tensor) -> Tensor:
        hidden = self.norm(self.words(words)) + self.again(words.flip(-1)).tanh()
        hidden = self.other(self.middle(hidden).tanh())
        if "twice" in self.tied:
            hidden = self.norm(self.middle(hidden))
        if self.spread:  # outputs at each place
            return self.out(hidden).tanh().mean(1)
        return self.out(hidden.mean(1))


@st.composite
def repeating(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(draw(st.integers(0, 99)))
    width, high = draw(st.sampled_from([2, 5, 20])), draw(st.sampled_from([10, 40]))
    tied = draw(st.sampled_from(["out", "words out", "words", "middle", "middle twice", "out twice"]))
    booleans, padding = [draw(st.booleans()) for _ in range(2)], draw(st.sampled_from([None, 0, 3]))
    model = Repeating(width, high, tied, booleans[0], padding, booleans[1])
    for parameter in (model.words.weight, model.middle.weight, model.norm.bias, model.out.weight):
        parameter.requires_grad_(draw(st.sampled_from([True, True, False])))
    return model, torch.randint(high, (draw(st.integers(1, 5)), draw(st.integers(1, 9))))


class Places(nn.Module):
    """The outputs of a recurrent layer, at all places."""

    def __init__(self, cells: nn.Module) -> None:
        super().__init__()
        self.cells = cells

    def forward(self, inputs: Tensor) -> Tensor:
        return self.cells(inputs)[0]


@st.composite
def in_sequence(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(draw(st.integers(0, 99)))
    width = draw(st.sampled_from([2, 4, 20]))
    if draw(st.booleans()):
        kind = draw(st.sampled_from([nn.RNN, nn.LSTM, nn.GRU]))
        middle: nn.Module = Places(kind(width, width, draw(st.integers(1, 2)), batch_first=True))
    else:
        middle = nn.TransformerEncoderLayer(
            width, 2, 6, 0.0, batch_first=True, norm_first=draw(st.booleans())
        )
    layers = [nn.Embedding(6, width), middle, Mean(), nn.Linear(width, CLASSES)]
    layers[0].requires_grad_(draw(st.booleans()))
    for parameter in middle.parameters():
        parameter.requires_grad_(draw(st.sampled_from([True, True, False])))
    return nn.Sequential(*layers), torch.randint(6, (draw(st.integers(1, 5)), draw(st.integers(1, 9))))


@given(
    made=st.one_of(convolutional(), sequential(), in_sequence(), repeating()),
    clip=st.sampled_from([1e-3, 0.5, 1e3]),
    room=st.booleans(),
    deep=st.sampled_from([1, 3]),
)
@settings(max_examples=120)
def test_any_small_model_is_clipped_example_by_example(
    made: tuple[nn.Module, Tensor], clip: float, room: bool, deep: int
) -> None:
    model, inputs = made[0].double(), made[1].double() if made[1].is_floating_point() else made[1]
    targets = torch.arange(len(inputs)) % CLASSES
    assert obstacle(model, inputs[:1]) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example_gradients, "CHUNK", 64)
        patch.setattr(example_gradients, "DEEP", deep)
        # Without the bound by which a gradient that cancels counts more than its norm; other tests are of it.
        patch.setattr(example_gradients, "LOUDEST", math.inf)
        patch.setattr(example_gradients, "BUFFER_RATIO", 2 if room else 0)
        patch.setattr(example_gradients, "CACHED", 0)
        sums = kept(model, inputs, targets, clip)
    assert distance(sums, singly(model, inputs, targets, clip)) < 1e-9


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Conv1d(16, 5, 4, stride=2, padding=1), (11,)),
        (lambda: nn.Conv2d(16, 6, (3, 2), dilation=2, padding="same", bias=False), (6, 7)),
        (lambda: nn.Conv2d(32, 4, 3, groups=2, padding=1, padding_mode="circular"), (6, 6)),
        (lambda: nn.Conv3d(16, 3, 2, stride=(1, 2, 1)), (3, 5, 4)),
    ],
)
def test_convolution_of_many_channels_is_clipped_by_example(
    make: Callable[[], Any], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(3)
    first, inputs = make(), 9 * torch.randn(7, make().in_channels, *shape)
    layers = [nn.Flatten(), nn.Linear(first(inputs).flatten(1).shape[1], CLASSES)]
    for model in (nn.Sequential(first, *layers), with_fast_kernels(nn.Sequential(first, *layers))):
        targets = torch.arange(7) % CLASSES
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(example_gradients, "CHUNK", 2000)  # of some examples at a time
            patch.delattr(example_gradients, "_windows")  # which no such layer takes
            sums = kept(model, inputs, targets, 1e-3)
        assert distance(sums, singly(model, inputs, targets, 1e-3)) < 1e-5


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.out(self.layer(self.layer(inputs)))


class Convolved(nn.Module):
    def __init__(self, times: int = 2) -> None:
        super().__init__()
        self.layer, self.out, self.times = nn.Conv1d(1, 1, 1), nn.Linear(4, CLASSES), times

    def forward(self, inputs: Tensor) -> Tensor:
        for _ in range(self.times):
            inputs = self.layer(inputs)
        return self.out(inputs.flatten(1))


class Functional(Twice):
    def forward(self, inputs: Tensor) -> Tensor:
        return self.out(self.layer(inputs) @ self.layer.weight)


class Unused(Twice):
    def forward(self, inputs: Tensor) -> Tensor:
        return self.out(inputs)


class Merged(Twice):
    """The batch is no longer the first dimension."""

    def forward(self, inputs: Tensor) -> Tensor:
        return self.out(self.layer(inputs.reshape(-1, 4)).view(len(inputs), -1, 4).mean(1))


class Overwritten(Twice):
    def forward(self, inputs: Tensor) -> Tensor:
        inputs = inputs * 1
        hidden = self.layer(inputs)
        inputs.add_(1)
        return self.out(hidden + inputs)


class Shared(nn.Sequential):
    """Convolutions with one weight, or one whose weight a layer of another kind uses."""

    def __init__(self, norm: bool = False) -> None:
        first: Any = nn.LayerNorm((4, 4)) if norm else nn.Conv1d(4, 4, 1)
        second: Any = nn.Linear(4, 4) if norm else nn.Conv1d(4, 4, 1)
        super().__init__(first, second, nn.Flatten(), nn.Linear(16, CLASSES))
        first.weight = second.weight


class Patched(Twice):
    """A layer has a function of its own, as libraries that move layers between devices give them one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.RNN(4, 4, batch_first=True)  # type: ignore[assignment]
        self.layer.forward = lambda inputs: inputs  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize(
    ("make", "inputs", "reason"),
    [
        (lambda: nn.ConvTranspose1d(1, 2, 3), torch.zeros(1, 1, 9), "ConvTranspose1d has no rule"),
        (lambda: nn.Embedding(4, 2, max_norm=1.0), torch.zeros(1, 3, dtype=torch.int64), "option"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 2)), torch.zeros(1, 4), "no rule"),
        (Convolved, torch.zeros(1, 1, 4), "used 2 times"),
        (Functional, torch.zeros(1, 4), "used 2 times"),
        (Shared, torch.zeros(1, 4, 4), "used 2 times"),
        (lambda: Shared(norm=True), torch.zeros(1, 4, 4), "used 2 times"),
        (Unused, torch.zeros(1, 4), "used 0 times"),
        (Patched, torch.zeros(1, 4), "RNN has a forward function of its own"),
        (Merged, torch.zeros(1, 3, 4), "one entry for each example"),
        (Overwritten, torch.zeros(1, 4), "one entry for each example"),
    ],
)
def test_layer_without_a_rule_is_named(make: Callable[[], nn.Module], inputs: Tensor, reason: str) -> None:
    assert reason in str(obstacle(make(), inputs))


class Counting(nn.Dropout):
    """It writes into a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, input: Tensor) -> Tensor:
        self.calls.add_(1)
        return super().forward(input)


def test_the_probe_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Counting(), nn.Linear(4, CLASSES))
    state = torch.get_rng_state()
    assert obstacle(model, torch.zeros(1, 4)) is None
    assert torch.equal(state, torch.get_rng_state())
    assert not any(module._forward_hooks for module in model.modules())
    assert float(model[1].calls) == 0


def test_a_batch_that_a_layer_does_not_see_stops_the_step() -> None:
    model = Merged()
    optimizer = optimizer_of(model, 1.0)
    forward = losses(model, torch.randn(3, 2, 4), torch.arange(3))
    with book_keeping(model, forward, optimizer) as clipped_sums, pytest.raises(RuntimeError, match="Linear"):
        clipped_sums(torch.arange(3), padded_size(3))


@pytest.mark.parametrize(
    ("model", "inputs", "reason"),
    [
        (Convolved(2), torch.randn(3, 1, 4), "Conv1d does not use each parameter once"),
        (Convolved(0), torch.randn(3, 1, 4), "1 calls do not use every parameter"),
        (Shared(norm=True), torch.randn(3, 4, 4), "a matrix is used in a layer that has no rule"),
    ],
)
def test_unexpected_uses_stop_the_step(model: nn.Module, inputs: Tensor, reason: str) -> None:
    forward, optimizer = losses(model, inputs, torch.arange(3)), optimizer_of(model, 1.0)
    with book_keeping(model, forward, optimizer) as clipped_sums, pytest.raises(RuntimeError, match=reason):
        clipped_sums(torch.arange(3), padded_size(3))


def test_frozen_layers_are_not_noted() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, CLASSES))
    model[0].requires_grad_(False)
    optimizer = optimizer_of(model, 1.0)
    with book_keeping(model, losses(model, torch.randn(3, 4), torch.arange(3)), optimizer):
        counts = [len(module._forward_hooks) for module in model]
    assert counts == [0, 1]


def test_finiteness_of_every_row_is_returned() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, CLASSES))
    inputs = torch.randn(4, 4)
    inputs[1, 0], inputs[3, 2] = torch.nan, torch.inf
    with book_keeping(
        model, losses(model, inputs, torch.arange(4)), optimizer_of(model, 1.0)
    ) as clipped_sums:
        assert clipped_sums(torch.arange(4), padded_size(4)).tolist() == [True, False, True, False]
    assert all(p.summed_grad is None for p in model.parameters())
