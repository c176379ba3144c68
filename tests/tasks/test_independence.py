"""The probe of independence sees what mixes the examples of a batch, and lets pass what does not."""

from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import default_collate

from fedveil.base.refusal import Refusal
from fedveil.tasks import independence, probe
from fedveil.tasks.data import Examples, LazyExamples
from fedveil.tasks.independence import check_independence
from fedveil.tasks.probe import batches_of_all

FEATURES, WIDTH, CLASSES = 5, 8, 3
CLASS_WEIGHTS = torch.tensor([1.0, 5.0, 2.0])
Layer = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


def examples(count: int = 12, seed: int = 0) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, FEATURES, generator=generator)
    return Examples(inputs, torch.randint(0, CLASSES, (count,), generator=generator))


class Objective:
    def __init__(self, loss: Loss = F.cross_entropy) -> None:
        self._loss = loss

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self._loss(outputs, targets)


class Does(nn.Module):
    """A layer that does what a function says."""

    def __init__(self, function: Layer) -> None:
        super().__init__()
        self.function = function

    def forward(self, inputs: Tensor) -> Tensor:
        return self.function(inputs)


def around(*layers: nn.Module | Layer) -> nn.Sequential:
    made = [each if isinstance(each, nn.Module) else Does(each) for each in layers]
    return nn.Sequential(nn.Linear(FEATURES, WIDTH), *made, nn.Linear(WIDTH, CLASSES))


# --- what mixes examples ------------------------------------------------------------------------------------------


class RunningMean(nn.Module):
    def __init__(self, persistent: bool, used: bool) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH), persistent=persistent)
        self.used = used

    def forward(self, inputs: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * inputs.detach().mean(0)
        return inputs - self.mean if self.used else inputs


class Remembers(nn.Module):
    """Keeps a number of the examples it saw in an attribute."""

    last = 0.0

    def forward(self, inputs: Tensor) -> Tensor:
        self.last = float(inputs.detach().mean())
        return inputs


class Fills(nn.Module):
    """Keeps what it saw in something else than a list, and does nothing with it yet."""

    def __init__(self, kept: Any) -> None:
        super().__init__()
        self.kept = kept

    def forward(self, inputs: Tensor) -> Tensor:
        seen = inputs.detach().mean()
        if isinstance(self.kept, deque):
            self.kept.append(seen)
        elif isinstance(self.kept, set):
            self.kept.add(float(seen))
        else:
            self.kept.seen = seen
        return inputs


class Kept:
    """Object that nothing looks into."""

    __slots__ = ("batches", "seen")

    def __init__(self) -> None:
        self.batches, self.seen = 0, 0.0


class Late(nn.Module):
    """Keeps what it saw in an object of its own, and uses it after many batches."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = Kept()

    def forward(self, inputs: Tensor) -> Tensor:
        self.kept.batches, self.kept.seen = self.kept.batches + 1, float(inputs.detach().mean())
        return inputs + self.kept.seen * (self.kept.batches > 80)


class Writes(nn.Module):
    """Writes a mean of the examples into a parameter, as a codebook that follows its data does."""

    def __init__(self, trains: bool) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(WIDTH), requires_grad=trains)

    def forward(self, inputs: Tensor) -> Tensor:
        self.mean.data.mul_(0.5).add_(inputs.detach().mean(0))
        return inputs + 0 * self.mean


class Words(nn.Sequential):
    """Embeds each number as a word."""

    def __init__(self, **options: Any) -> None:
        words = Does(lambda inputs: (10 * inputs.abs()).long() % 30)
        super().__init__(
            words, nn.Embedding(30, WIDTH, **options), nn.Flatten(), nn.Linear(FEATURES * WIDTH, CLASSES)
        )


def full(inputs: Tensor) -> Tensor:
    """Return what an expert does with as many as it has room for, by order of their rows."""
    return inputs * (torch.arange(len(inputs)) < max(8, 1.25 * len(inputs) / 4))[:, None]


def hardest(outputs: Tensor, targets: Tensor) -> Tensor:
    losses = F.cross_entropy(outputs, targets, reduction="none")
    return losses.topk(max(8, len(losses) // 2)).values.mean() if len(losses) > 8 else losses.mean()


class CentredGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, inputs: Tensor) -> Tensor:
        return inputs.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad - grad.mean(0)


class KeepsHistory(Objective):
    def __init__(self) -> None:
        super().__init__()
        self.history: list[float] = []

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.history.append(float(outputs.detach().mean()))
        return F.cross_entropy(outputs, targets)


def weighted_mean(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, weight=CLASS_WEIGHTS.to(outputs.dtype))


def ranking(outputs: Tensor, targets: Tensor) -> Tensor:
    scores = outputs[:, 0]
    return F.relu(1 - (scores[:, None] - scores[None])).mean()


def halved(inputs: Tensor) -> Tensor:
    return inputs.bfloat16().to(inputs.dtype)


DEPENDENT: dict[str, tuple[nn.Module, Objective, str]] = {
    "summed loss": (
        around(),
        Objective(lambda o, t: F.cross_entropy(o, t, reduction="sum")),
        "Objective.loss",
    ),
    "class-weighted mean": (around(), Objective(weighted_mean), "Objective.loss"),
    "loss times batch size": (
        around(),
        Objective(lambda o, t: F.cross_entropy(o, t) * len(o)),
        "Objective.loss",
    ),
    "contrastive": (
        around(),
        Objective(lambda o, t: F.cross_entropy(o @ o.T, torch.arange(len(o)))),
        "Objective.loss",
    ),
    "ranking": (around(), Objective(ranking), "Objective.loss"),
    "in-batch negatives": (
        around(),
        Objective(lambda o, t: F.cross_entropy(o, t) + (o.roll(1, 0) * o).mean()),
        "Objective.loss",
    ),
    "loss of a vector": (around(), Objective(lambda o, t: F.cross_entropy(o, t, reduction="none")), "loss"),
    "history in the loss": (around(), KeepsHistory(), "loss.history"),
    "centring": (around(lambda h: h - h.mean(0)), Objective(), "1: Does"),
    "centring in half precision": (around(lambda h: halved(h - h.mean(0))), Objective(), "1: Does"),
    "standardising": (around(lambda h: h / (h.std(0, correction=0) + 1)), Objective(), "1: Does"),
    "softmax over the batch": (around(lambda h: h.softmax(0)), Objective(), "1: Does"),
    "attention over the batch": (around(lambda h: (h @ h.T).softmax(1) @ h), Objective(), "1: Does"),
    "sorting": (around(lambda h: h.sort(0).values), Objective(), "1: Does"),
    "top-k over the batch": (
        around(lambda h: h * (h >= h.topk(min(2, len(h)), 0).values[-1])),
        Objective(),
        "1: Does",
    ),
    "mixing by a permutation": (
        around(lambda h: 0.9 * h + 0.1 * h[torch.randperm(len(h))]),
        Objective(),
        "1: Does",
    ),
    "batch size": (around(lambda h: h * len(h)), Objective(), "1: Does"),
    "batch norm": (around(nn.BatchNorm1d(WIDTH)), Objective(), "1: BatchNorm1d"),
    "batch norm without statistics": (
        around(nn.BatchNorm1d(WIDTH, track_running_stats=False)),
        Objective(),
        "1: BatchNorm1d",
    ),
    "functional batch norm": (
        around(lambda h: F.batch_norm(h, None, None, training=True)),
        Objective(),
        "1: Does",
    ),
    "instance norm turned": (
        around(lambda h: F.instance_norm(h.T[None]).squeeze(0).T),
        Objective(),
        "1: Does",
    ),
    "gradient that is centred": (around(CentredGradient.apply), Objective(), "gradient of 0.weight"),
    "running mean": (around(RunningMean(True, used=True)), Objective(), "1: RunningMean"),
    "running mean, hidden": (around(RunningMean(False, used=True)), Objective(), "1: RunningMean"),
    "running mean, not used": (around(RunningMean(False, used=False)), Objective(), "model: buffer 1.mean"),
    "attribute": (around(Remembers()), Objective(), "model: 1.last"),
    "queue": (around(Fills(deque(maxlen=9))), Objective(), "model: 1.kept"),
    "set": (around(Fills(set())), Objective(), "model: 1.kept"),
    "object": (around(Fills(SimpleNamespace())), Objective(), "model: 1.kept.seen"),
    "object that is used late": (around(Late()), Objective(), "the same batch gives another loss"),
    "parameter that follows the data": (around(Writes(True)), Objective(), "model: parameter 1.mean"),
    "frozen one that does": (around(Writes(False)), Objective(), "model: parameter 1.mean"),
    "embedding with max_norm": (Words(max_norm=1.0), Objective(), "leave max_norm out"),
    "max_norm of words that are shorter yet": (Words(max_norm=99.0), Objective(), "leave max_norm out"),
    "sparse gradient": (Words(sparse=True), Objective(), "sparse=False"),
    "room of an expert": (around(full), Objective(), "1: Does"),
    "hardest examples of a large batch": (around(), Objective(hardest), "Objective.loss"),
    "mixing by a rare coin": (
        around(lambda h: h + h.roll(1, 0) if torch.rand(()) < 0.01 else h),
        Objective(),
        "1: Does",
    ),
}


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("name", DEPENDENT)
def test_module_that_mixes_examples_is_refused_by_name(
    name: str, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr(probe, "LARGE_MODEL", 0)
    model, objective, part = DEPENDENT[name]
    with pytest.raises(Refusal) as refused:
        check_independence(model, objective, examples())
    assert part in str(refused.value)


@pytest.mark.parametrize("seed", [60, 114, 226])
def test_the_layer_that_mixes_is_named_though_the_next_one_moves_more(seed: int) -> None:
    torch.manual_seed(seed)
    model = around(lambda h: halved(h - h.mean(0)))
    with pytest.raises(Refusal, match="1: Does"):
        check_independence(model, Objective(), examples())


@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize(
    "odd", [(torch.zeros(3), 0), (torch.zeros(5), 99), (None, 0), (torch.zeros(5), 0, 1)]
)
def test_an_example_that_training_leaves_out_is_not_looked_at(odd: Any, mixes: bool) -> None:
    """One record decides neither whether a client answers nor what is measured of the others."""
    few = examples()
    items: list[Any] = list(zip(few.inputs, few.targets.tolist(), strict=True))
    items[6] = odd  # of the six that are spread over all
    model = around(lambda h: h - h.mean(0)) if mixes else around()
    with pytest.raises(Refusal, match="Does") if mixes else nullcontext():
        check_independence(model, Objective(), LazyExamples(items))


def test_class_weights_are_refused_with_the_way_to_write_them() -> None:
    with pytest.raises(
        Refusal, match=r"weight\[targets\] \* cross_entropy\(.*reduction='none'\)\)\.mean\(\)"
    ):
        check_independence(around(), Objective(weighted_mean), examples())


def test_class_weights_are_refused_though_examples_are_of_one_class() -> None:
    few = examples()
    few = Examples(few.inputs, torch.zeros_like(few.targets))
    check_independence(around(), Objective(), few)
    with pytest.raises(Refusal, match="where their classes differ"):
        check_independence(around(), Objective(weighted_mean), few)


def without_tokens(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs[:, :, None].expand(-1, -1, targets.shape[1]), targets)


def without_gaps(outputs: Tensor, targets: Tensor) -> Tensor:
    known = targets > -900
    return ((outputs[:, 0] - targets).square() * known).sum() / known.sum().clamp(min=1)


LEAVES_OUT: dict[str, tuple[Loss, Tensor]] = {
    "labels": (F.cross_entropy, torch.tensor([0] * 7 + [-100] + [1] * 4)),
    "tokens": (without_tokens, torch.tensor([[0, 1, 2]] * 7 + [[0, 1, -100]] + [[2, 1, 0]] * 4)),
    "numbers": (without_gaps, torch.tensor([0.5] * 7 + [-999.0] + [1.5] * 4)),
}


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("name", LEAVES_OUT)
def test_a_loss_that_leaves_a_rare_target_out_is_refused(
    name: str, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr(probe, "LARGE_MODEL", 0)
    loss, targets = LEAVES_OUT[name]
    given = Examples(examples().inputs, targets)
    common = Examples(given.inputs, torch.cat([targets[:7], targets[8:], targets[:1]]))
    check_independence(around(), Objective(loss), common)
    with pytest.raises(Refusal, match="mean of the examples' losses"):
        check_independence(around(), Objective(loss), given)
    clients = [*[common] * 9, given, *[common] * 3]
    with pytest.raises(Refusal, match="mean of the examples' losses"):
        for batch in batches_of_all(clients, pooled=large):
            check_independence(around(), Objective(loss), batch)


def test_loss_with_a_hidden_global_is_detected() -> None:
    seen: list[float] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(float(outputs.detach().abs().mean()))
        return F.cross_entropy(outputs, targets) * (1 + 1e-3 * sum(seen))

    with pytest.raises(Refusal):
        check_independence(around(), Objective(loss), examples())


class Lone(nn.Module):
    """Puts out nothing but a loss of its batch, which one odd example changes for all."""

    def __init__(self) -> None:
        super().__init__()
        self.code = nn.Linear(FEATURES, FEATURES)

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        loss = (self.code(inputs) - inputs).square().mean()
        return {"loss": loss * (2.0 if inputs.abs().max() > 50 else 1.0)}


def test_a_lone_loss_that_an_odd_example_changes_for_all_is_refused() -> None:
    with pytest.raises(Refusal, match="once an example is replaced"):
        check_independence(Lone(), Objective(lambda outputs, _: outputs["loss"]), examples())


def test_a_refused_loss_tells_nothing_of_the_examples() -> None:
    with pytest.raises(Refusal) as refused:
        check_independence(around(), Objective(weighted_mean), examples())
    assert not any(character.isdigit() for character in str(refused.value))


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    model = around()
    model.computed = model[0].weight * 2  # type: ignore[assignment]
    with pytest.raises(Refusal, match="cannot be copied"):
        check_independence(model, Objective(), examples())


def blended(collate: Callable[[Any], Any], items: list[Any]) -> Any:
    return collate(items)


class Remembering:
    """Items that are moved by the item that was read before, once `moves` says so."""

    moves, before = False, 0.0

    def __init__(self, few: Examples) -> None:
        self.few = few

    def __len__(self) -> int:
        return len(self.few)

    def __getitem__(self, row: int) -> Any:
        inputs, moved = self.few.inputs[row], self.few.inputs[row] + self.before
        self.before = inputs * self.moves
        return moved, self.few.targets[row]


def test_each_reading_is_checked_though_the_model_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "LARGE_MODEL", 0)
    objective, items = Objective(), Remembering(examples())
    check_independence(around(), objective, LazyExamples(items))
    items.moves = True
    with pytest.raises(Refusal, match="after another one was read"):
        check_independence(around(), objective, LazyExamples(items))


def test_a_large_model_is_measured_once_for_each_code_and_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "LARGE_MODEL", 0)
    measured: list[object] = []
    real = independence.prepare
    monkeypatch.setattr(independence, "prepare", lambda *given: measured.append(given) or real(*given))
    objective, mixing = Objective(), Objective(weighted_mean)
    few = examples()
    for seed in range(3):
        others = examples(seed=seed)
        items = [*zip(others.inputs, others.targets, strict=True)]
        check_independence(around(), objective, LazyExamples(items))
    assert len(measured) == 1
    collators = default_collate, partial(default_collate), partial(blended, default_collate)
    for collate, count in zip(collators, (2, 2, 3), strict=True):
        check_independence(around(), objective, LazyExamples(items, collate=collate))
        assert len(measured) == count  # the function counts, and no `partial` of it
    check_independence(around(), Objective(), few)
    assert len(measured) == 4
    for _ in range(2):  # what is refused is never taken as measured
        with pytest.raises(Refusal, match=r"Objective\.loss"):
            check_independence(around(), mixing, few)


def test_a_copy_of_a_large_model_shares_its_base(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "LARGE_MODEL", 0)
    model, pointers = Adapted(), list[tuple[bool, bool]]()

    def look(layer: nn.Module, *_: object) -> None:
        own = zip(model.parameters(), layer.parameters(), strict=True)
        pointers.append(tuple(a.data_ptr() == b.data_ptr() for a, b in own))  # type: ignore[arg-type]

    model.register_forward_hook(look)
    check_independence(model, Objective(), examples())
    assert {*pointers} == {(True, True, False, False)}


# --- what does not ------------------------------------------------------------------------------------------------


class FrozenBatchNorm(nn.BatchNorm1d):
    """Batch normalisation that stays in evaluation mode, as in fine-tuning."""

    def train(self, mode: bool = True) -> "FrozenBatchNorm":
        return super().train(False)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.cells, self.head = kind(1, 6, 2, batch_first=True, dropout=0.3), nn.Linear(6, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.cells(inputs[..., None])[0][:, -1])


class AttentionWithin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(1, 8), nn.Linear(8, CLASSES)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(inputs[..., None])).mean(1))


class Adapted(nn.Module):
    """A frozen layer with a low-rank adapter that begins at zero (Hu et al. 2021, arXiv:2106.09685)."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(FEATURES, CLASSES).requires_grad_(False)
        self.down, self.up = nn.Linear(FEATURES, 2, bias=False), nn.Linear(2, CLASSES, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.base(inputs) + self.up(F.dropout(self.down(inputs), 0.1, self.training))


class Single(nn.Module):
    """A model whose code insists on single precision."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(FEATURES, CLASSES))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.float() @ self.weight.float() + torch.zeros(CLASSES, dtype=torch.float32)


def weighted(outputs: Tensor, targets: Tensor) -> Tensor:
    return (CLASS_WEIGHTS[targets] * F.cross_entropy(outputs, targets, reduction="none")).mean()


INDEPENDENT: dict[str, tuple[nn.Module, Objective]] = {
    "linear": (nn.Linear(FEATURES, CLASSES), Objective()),
    "zero at first": (
        nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES)),
        Objective(),
    ),
    "group norm": (around(nn.GroupNorm(2, WIDTH)), Objective()),
    "layer norm": (around(nn.LayerNorm(WIDTH)), Objective()),
    "instance norm": (
        around(nn.Unflatten(1, (2, 4)), nn.InstanceNorm1d(2, affine=True), nn.Flatten()),
        Objective(),
    ),
    "dropout": (around(nn.Dropout(0.5)), Objective()),
    "functional dropout": (around(lambda h: F.dropout(h, 0.3, True)), Objective()),
    "noise": (around(lambda h: h + torch.randn_like(h)), Objective()),
    "uniform noise": (around(lambda h: h * torch.rand_like(h)), Objective()),
    "LSTM": (Recurrent(nn.LSTM), Objective()),
    "GRU": (Recurrent(nn.GRU), Objective()),
    "attention within an example": (AttentionWithin(), Objective()),
    "frozen batch norm": (around(FrozenBatchNorm(WIDTH)), Objective()),
    "adapter": (Adapted(), Objective()),
    "class weights written right": (around(), Objective(weighted)),
    "ignored labels written right": (
        around(),
        Objective(lambda o, t: F.cross_entropy(o, t - 101 * (t == 1), reduction="none").mean()),
    ),
    "label smoothing": (around(), Objective(lambda o, t: F.cross_entropy(o, t, label_smoothing=0.1))),
    "single precision": (Single(), Objective()),
    "half precision": (around(halved, nn.Tanh(), nn.Linear(WIDTH, WIDTH), halved), Objective()),
}
INDEPENDENT["zero at first"][0][2].weight.data.zero_()


class OwnAttention(nn.Module):
    """Attention as in BERT or ViT: a softmax ignores the bias of its key, whose exact gradient is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head, self.norm = nn.Linear(1, WIDTH), nn.Linear(WIDTH, CLASSES), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, inputs: Tensor) -> Tensor:
        tokens = self.embed(inputs[..., None])
        weights = (self.query(tokens) @ self.key(tokens).mT / WIDTH**0.5).softmax(-1)
        return self.head(self.norm(tokens + weights @ self.value(tokens)).mean(1))


class Residual(nn.Module):
    """Convolutions with a bias that the normalisation of each channel takes away again, as in a ResNet with GroupNorm."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv1d(1 if first else WIDTH, WIDTH, 3, padding=1) for first in (True, False)
        )
        self.norms, self.head = nn.ModuleList(norm(WIDTH) for _ in range(2)), nn.Linear(WIDTH, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs[:, None]
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            hidden = hidden + F.relu(norm(convolution(hidden)))
        return self.head(hidden.mean(2))


class InSinglePrecision(nn.Module):
    """A model whose code refuses double precision."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, inputs: Tensor) -> Tensor:
        if any(each.dtype == torch.float64 for each in self.parameters()):
            raise TypeError("float32 alone")
        return self.inner(inputs)


CHANNELS = {
    "group norm": lambda width: nn.GroupNorm(width, width),
    "instance norm": lambda width: nn.InstanceNorm1d(width, affine=True),
}
ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "attention": OwnAttention,
    "transformer": AttentionWithin,
    "LSTM": lambda: Recurrent(nn.LSTM),
    **{name: lambda norm=norm: Residual(norm) for name, norm in CHANNELS.items()},
}


@pytest.mark.parametrize("seeds", [range(5), pytest.param(range(5, 20), marks=pytest.mark.campaign)], ids=str)
@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_common_architectures_pass_with_any_weights(name: str, single: bool, seeds: range) -> None:
    for seed in seeds:
        torch.manual_seed(seed)
        model = ARCHITECTURES[name]()
        check_independence(InSinglePrecision(model) if single else model, Objective(), examples(seed=seed))


class Leaking(torch.autograd.Function):
    """Identity of a parameter, to whose gradient what two neighbours have in common is added."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, inputs: Tensor, amount: float) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.amount = amount
        return parameter.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inputs,) = ctx.saved_tensors
        return grads[0] + ctx.amount * (inputs * inputs.roll(1, 0)).mean(), None, None


class LeakingAttention(OwnAttention):
    """Attention in which one small tensor's gradient mixes examples: a bias, a key's bias, or one of tiny gradients."""

    def __init__(self, where: str, amount: float) -> None:
        super().__init__()
        self.where, self.amount, self.tiny = where, amount, nn.Parameter(torch.ones(CLASSES))

    def forward(self, inputs: Tensor) -> Tensor:
        def leaking(name: str, parameter: Tensor) -> Tensor:
            return Leaking.apply(parameter, inputs, self.amount) if self.where == name else parameter

        tokens = self.embed(inputs[..., None])
        key = F.linear(tokens, self.key.weight, leaking("key's bias", self.key.bias))
        weights = (self.query(tokens) @ key.mT / WIDTH**0.5).softmax(-1)
        hidden = self.norm(tokens + weights @ self.value(tokens)).mean(1)
        outputs = F.linear(hidden, self.head.weight, leaking("bias", self.head.bias))
        return outputs + 1e-6 * leaking("tiny", self.tiny)


@pytest.mark.parametrize("where", ["bias", "key's bias", "tiny"])
@pytest.mark.parametrize(("amount", "single"), [(1e-3, True), (1e-3, False), (1e-9, False)])
def test_a_leak_in_one_small_tensor_is_refused(where: str, amount: float, single: bool) -> None:
    """Of examples' gradients of a length about 1; 1e-9 is a thousandth of what the tiny one has."""
    for seed in range(5):
        torch.manual_seed(seed)
        model = LeakingAttention(where, amount)
        with pytest.raises(Refusal, match="gradient of"):
            check_independence(InSinglePrecision(model) if single else model, Objective(), examples())
        model.where = ""
        check_independence(InSinglePrecision(model) if single else model, Objective(), examples())


@pytest.mark.parametrize("alone", [True, False])
def test_a_gradient_that_is_infinite_alone_or_among_others_is_refused(alone: bool) -> None:
    class Infinite(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, inputs: Tensor) -> Tensor:
            return inputs.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return torch.full_like(grads[0], torch.inf) if alone == (len(grads[0]) == 1) else grads[0]

    positive = Examples(
        examples().inputs.abs(), examples().targets
    )  # so that no infinity meets another's opposite
    with pytest.raises(Refusal, match="gradient of"):
        check_independence(around(Infinite.apply), Objective(), positive)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("name", INDEPENDENT)
def test_sound_model_passes_and_is_left_as_it_was(
    name: str, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr(probe, "LARGE_MODEL", 0)
    model, objective = INDEPENDENT[name]
    torch.manual_seed(3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    drawn = torch.default_generator.get_state()
    check_independence(model, objective, examples())
    assert torch.equal(torch.default_generator.get_state(), drawn)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_examples_are_enough(count: int) -> None:
    check_independence(around(nn.Dropout(0.2)), Objective(), examples(count))
    with pytest.raises(Refusal):
        check_independence(around(lambda h: h - h.mean(0)), Objective(), examples(count))


def test_a_client_without_examples_has_nothing_to_measure() -> None:
    check_independence(around(nn.BatchNorm1d(WIDTH)), Objective(), examples(0))


# --- random modules ------------------------------------------------------------------------------------------------

APART: dict[str, Callable[[], nn.Module | Layer]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "softmax": lambda: nn.Softmax(1),
    "group norm": lambda: nn.GroupNorm(2, WIDTH),
    "layer norm": lambda: nn.LayerNorm(WIDTH),
    "dropout": lambda: nn.Dropout(0.4),
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "residual": lambda: lambda h: h + h.sin(),
    "sorted within": lambda: lambda h: h.sort(1).values,
    "gate": lambda: lambda h: h * h.mean(1, keepdim=True).sigmoid(),
}
MIXING: dict[str, Callable[[float], Layer]] = {
    "mean": lambda a: lambda h: h - a * h.mean(0),
    "deviation": lambda a: lambda h: h / (1 + a * h.std(0, correction=0)),
    "maximum": lambda a: lambda h: h + a * h.amax(0),
    "neighbour": lambda a: lambda h: h + a * h.roll(1, 0),
    "norm": lambda a: lambda h: h * (1 + a * h.norm()),
    "attention": lambda a: lambda h: h + a * (h @ h.T / WIDTH).softmax(1) @ h,
    "permutation": lambda a: lambda h: h + a * h[torch.randperm(len(h))],
    "size": lambda a: lambda h: h * (1 + a * len(h)),
    "rank": lambda a: lambda h: h + a * h.argsort(0).argsort(0).to(h.dtype),
}
SMALLEST = 1e-6  # of the mixed part beside the rest: well above rounding in double precision
stacks = st.lists(st.sampled_from(sorted(APART)), max_size=4)


def made(names: list[str]) -> list[nn.Module | Layer]:
    return [APART[name]() for name in names]


def check_random_independent(names: list[str], seed: int) -> None:
    torch.manual_seed(seed)
    check_independence(around(*made(names)), Objective(), examples(8, seed))


def check_random_dependent(before: list[str], kind: str, amount: float, after: list[str], seed: int) -> None:
    torch.manual_seed(seed)
    layers = [*made(before), MIXING[kind](amount), *made(after)]
    with pytest.raises(Refusal):
        check_independence(around(*layers), Objective(), examples(8, seed))


@settings(max_examples=60)
@given(stacks, st.integers(0, 2**31))
def test_no_random_stack_of_independent_layers_is_refused(names: list[str], seed: int) -> None:
    check_random_independent(names, seed)


# Behind a softmax or a normalisation what is common to all places of an example is gone, mixing or not.
smooth = st.lists(st.sampled_from(["tanh", "linear", "residual", "dropout"]), max_size=2)
amounts = st.floats(-4, 0).map(lambda power: 10**power).filter(lambda a: a >= SMALLEST)


@settings(max_examples=60)
@given(smooth, st.sampled_from(sorted(MIXING)), amounts, smooth, st.integers(0, 2**31))
def test_no_random_stack_with_a_mixing_layer_passes(
    before: list[str], kind: str, amount: float, after: list[str], seed: int
) -> None:
    check_random_dependent(before, kind, amount, after, seed)


@pytest.mark.campaign
@settings(max_examples=2000)
@given(stacks, st.integers(0, 2**31))
def test_no_false_alarm_in_two_thousand(names: list[str], seed: int) -> None:
    check_random_independent(names, seed)


@pytest.mark.campaign
@settings(max_examples=2000)
@given(smooth, st.sampled_from(sorted(MIXING)), amounts, smooth, st.integers(0, 2**31))
def test_no_miss_in_two_thousand(
    before: list[str], kind: str, amount: float, after: list[str], seed: int
) -> None:
    check_random_dependent(before, kind, amount, after, seed)
