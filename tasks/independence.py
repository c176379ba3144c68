"""Probe of independence: measures that no example of a batch touches another one's output, loss or gradient.

DP-SGD bounds what one example adds to a step's sum. The bound holds only where that part depends on no other example
and where nothing but the parameters is carried from step to step. Here both are measured on the model's own code
and on a few of the owner's examples, before anything is spent:

- an example is replaced, and no other row of the outputs moves (the generators of randomness are seeded alike);
- a part of the batch is computed alone, and its rows are those of the whole batch;
- the loss of the batch, and its gradient, are those of the mean of the examples' losses;
- the gradient of any weighted sum of the examples' losses is the sum of the gradients that each has alone;
- a step on other examples in between changes no result, no buffer and no attribute.

What is random in a layer is seeded where batches have the same size, and held constant where they differ, because
the same seed gives other draws to a tensor of another shape.
"""

from __future__ import annotations

import copy
import math
import random
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..privacy.refusal import Refusal
from .protocol import Examples, Objective

BATCH = 6  # examples of the probe; each pair of them is tried
SEED = 0x0FEDFE11  # of the layers' own randomness while the probe runs; it protects nothing
EXTREME = 1e3  # times an input's own size: moves sorted places, maxima and thresholds
LARGE = 1_000_000  # numbers in one tensor that are not copied to be compared
ROUNDINGS = 1e5  # of the least precise number in a model, by which equal results may differ
WEIGHTS_REMEDY = (
    "return the mean over the batch of losses that each look at one example; class weights so: "
    "(weight[targets] * cross_entropy(outputs, targets, reduction='none')).mean()"
)
STATE_REMEDY = "what a step leaves behind reaches later steps without noise; keep nothing of the examples"


@dataclass(frozen=True)
class Probe:
    """A model, a loss and a few examples, ready to be asked.

    Attributes:
      model: a copy, in training mode; double precision where the model can.
      objective: gives the loss of a batch.
      inputs: shape (n, ...).
      targets: shape (n, ...).
      tolerance: relative difference above which two results are told apart.
    """

    model: nn.Module
    objective: Objective
    inputs: Tensor
    targets: Tensor
    tolerance: float = 0.0

    def outputs(self, rows: Tensor | None = None, inputs: Tensor | None = None) -> Tensor:
        """Return the outputs of these rows, from the same random state at every call."""
        given = self.inputs if inputs is None else inputs
        _seed()
        return self.model(given if rows is None else given[rows])

    def losses(self, outputs: Tensor, targets: Tensor) -> list[Tensor]:
        """Return each example's loss by itself."""
        return [self.objective.loss(outputs[i : i + 1], targets[i : i + 1]) for i in range(len(targets))]

    def differ(self, a: Tensor, b: Tensor) -> bool:
        """Whether two results differ by more than rounding; NaN against NaN is no difference."""
        if a.shape != b.shape:
            return True
        if not a.is_floating_point():
            return not torch.equal(a, b)
        a, b = a.detach(), b.detach()
        if not torch.equal(a.isfinite(), b.isfinite()):
            return True
        a, b = a.nan_to_num(0, 0, 0).double(), b.nan_to_num(0, 0, 0).double()
        scale = max([float(each.abs().max()) for each in (a, b) if each.numel()], default=0.0)
        return bool(((a - b).abs() > self.tolerance * scale).any())

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters that train."""
        return [p for p in self.model.parameters() if p.requires_grad]


def check_independence(model: nn.Module, objective: Objective, examples: Examples) -> None:
    """Refuse a model or a loss with which one example's part of a step depends on another example.

    Args:
      model: in the state in which training begins; it is not changed.
      objective: its `loss` takes outputs and targets of a batch.
      examples: the owner's own; at most `BATCH` of them are looked at, and none is remembered.

    Raises:
      Refusal: naming the layer, the loss or the attribute, and what to do.
    """
    if len(examples) == 0:
        return
    with _quiet_generators(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        probe = _prepared(model, objective, examples)
        for check in (_check_rows, _check_parts, _check_loss, _check_gradients, _check_state):
            check(probe)


def _prepared(model: nn.Module, objective: Objective, examples: Examples) -> Probe:
    """Return the probe in double precision, or as it is where the model's code insists on its own."""
    rows = torch.arange(BATCH) % len(examples)
    inputs, targets = examples.inputs[rows].clone(), examples.targets[rows].clone()
    if len(examples) < BATCH and inputs.is_floating_point():  # equal rows would hide what orders them
        inputs[len(examples) :] *= 1 + torch.rand_like(inputs[len(examples) :])
    probe = Probe(_moved_off(_copied(model).double()), objective, _double(inputs), targets)
    precision = _Precision()
    try:
        with precision:
            objective.loss(probe.outputs(), targets)
    except (RuntimeError, TypeError):
        probe, precision = (
            Probe(_moved_off(_copied(model)), objective, inputs, targets),
            _Precision(),
        )
        with precision:
            objective.loss(probe.outputs(), targets)
    probe = replace(probe, tolerance=precision.tolerance)
    outputs = probe.outputs()
    if outputs.dim() == 0 or len(outputs) != BATCH:
        found = f"{BATCH} examples became outputs of shape {tuple(outputs.shape)}"
        raise Refusal("model", found, "the first dimension of the outputs must be the batch")
    return probe


def _copied(model: nn.Module) -> nn.Module:
    """Return a copy in training mode.

    Raises:
      Refusal: the model holds what cannot be copied, so that nothing can be measured without changing it.
    """
    try:
        return copy.deepcopy(model).train()
    except (RuntimeError, TypeError) as error:
        remedy = "it cannot be copied, so its independence cannot be measured; keep no computed tensor in it"
        raise Refusal("model", type(model).__name__, remedy) from error


def _double(inputs: Tensor) -> Tensor:
    return inputs.double() if inputs.is_floating_point() else inputs


@torch.no_grad()
def _moved_off(model: nn.Module) -> nn.Module:
    """Move the parameters a little: behind a layer that begins at zero nothing can be seen."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            size = float(parameter.abs().mean()) if parameter.numel() else 0.0
            parameter.add_(torch.randn_like(parameter) * (size or 0.1) / 2)
    return model


def _check_rows(probe: Probe) -> None:
    """Replace one example; nobody else's output may move."""
    calm = probe.outputs().detach()
    for row in range(BATCH):
        for replaced in _replacements(probe.inputs, row):
            moved = _moved(
                probe, calm, probe.outputs(inputs=replaced).detach(), [i for i in range(BATCH) if i != row]
            )
            if moved:
                layer = _culprit(probe, partial(probe.outputs, inputs=replaced), row)
                _refuse_layer(probe, layer, "one example's output changes when another example does")


def _replacements(inputs: Tensor, row: int) -> Iterator[Tensor]:
    """Yield the batch with another example in one row: a neighbour's, and two that are out of all proportion."""
    other = inputs.clone()
    other[row] = inputs[(row + 1) % len(inputs)]
    if not torch.equal(other, inputs):
        yield other
    if inputs.is_floating_point():
        size = float(inputs.abs().max()) or 1.0
        for sign in (1.0, -1.0):
            extreme = inputs.clone()
            extreme[row] = sign * EXTREME * size * torch.rand_like(inputs[row])
            yield extreme
    else:
        shuffled = inputs.clone()
        shuffled[row] = inputs[row].flatten().flip(0).reshape(inputs[row].shape)
        yield shuffled


def _check_parts(probe: Probe) -> None:
    """Compute parts of the batch alone; their rows may not differ."""
    with _ConstantRandomness():
        whole = probe.outputs().detach()
        for part in (torch.tensor([0]), torch.tensor([1, 4]), torch.arange(BATCH - 1)):
            alone = probe.outputs(part).detach()
            if alone.shape[1:] != whole.shape[1:] or _moved(probe, whole[part], alone, range(len(part))):
                layer = _culprit(probe, partial(probe.outputs, part), None, part)
                _refuse_layer(probe, layer, "an example's output depends on the size of its batch")


def _check_loss(probe: Probe) -> None:
    """Hold the loss of the batch, and its gradient, against the mean of the examples' losses, at several outputs."""
    with _ConstantRandomness():
        calm = probe.outputs().detach()
    for outputs in _outputs_near(calm):
        outputs.requires_grad_()
        together = probe.objective.loss(outputs, probe.targets)
        if together.dim() != 0:
            raise Refusal(
                "loss", f"shape {tuple(together.shape)}", "it must be one number; " + WEIGHTS_REMEDY
            )
        alone = torch.stack(probe.losses(outputs, probe.targets)).mean()
        name = f"{type(probe.objective).__name__}.loss"
        if probe.differ(together, alone):
            # No number: these are losses of an owner's examples, and the sentence is printed and logged.
            raise Refusal(name, "it is not the mean of the examples' losses", WEIGHTS_REMEDY)
        ours, theirs = (_gradient([outputs], each)[0] for each in (together, alone))
        if probe.differ(ours, theirs):
            raise Refusal(
                name, "its gradient is not that of the mean of the examples' losses", WEIGHTS_REMEDY
            )


def _outputs_near(calm: Tensor) -> Iterator[Tensor]:
    """Yield what a model may put out: losses with a margin or a maximum show what they are only away from it."""
    yield calm.clone()
    size = float(calm.abs().max().nan_to_num()) or 1.0
    for scale in (1.0, 30.0):
        yield calm + scale * size * torch.randn_like(calm)


def _check_gradients(probe: Probe) -> None:
    """Hold the gradient of a weighted sum of the examples' losses against what each gives alone."""
    if not probe.parameters:
        return
    weights = 1 + torch.arange(BATCH, dtype=torch.float64) / BATCH
    with _ConstantRandomness():
        outputs = probe.outputs()
        losses = probe.losses(outputs, probe.targets)
        together = _gradient(
            probe.parameters, sum(w * each for w, each in zip(weights.tolist(), losses, strict=True))
        )
        alone = [torch.zeros_like(p) for p in probe.parameters]
        for row, weight in enumerate(weights.tolist()):
            rows = torch.tensor([row])
            single = probe.objective.loss(probe.outputs(rows), probe.targets[rows])
            alone = [
                total + weight * g
                for total, g in zip(alone, _gradient(probe.parameters, single), strict=True)
            ]
    names = [name for name, p in probe.model.named_parameters() if p.requires_grad]
    for name, ours, theirs in zip(names, together, alone, strict=True):
        if probe.differ(ours, theirs):
            remedy = "an example's gradient depends on the rest of its batch; let each example's be its own"
            raise Refusal("model", f"gradient of {name}", remedy)


def _gradient(of: Sequence[Tensor], loss: Any) -> list[Tensor]:
    """Return the loss' gradient, zeros where it does not depend on a tensor."""
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        return [torch.zeros_like(each) for each in of]
    found = cast(Sequence[Tensor | None], torch.autograd.grad(loss, of, allow_unused=True, retain_graph=True))
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, of, strict=True)]


def _check_state(probe: Probe) -> None:
    """Take steps on two batches in turn; neither results nor anything that is kept may tell which came before."""

    def step(rows: Sequence[int]) -> Tensor:
        chosen = torch.tensor(rows)
        loss = probe.objective.loss(probe.outputs(chosen), probe.targets[chosen])
        _gradient(probe.parameters, loss)
        return loss.detach().clone()

    one, other = [0, 1, 2], [5, 4, 3]
    step(one)  # what is made once, at the first call, is no memory of examples
    begun = dict(_kept(probe))
    first, kept_one = step(one), dict(_kept(probe))
    for name, value in begun.items():
        if not _same(value, kept_one.get(name)) and _is_array(value):
            _refuse_state(name)
    step(other)
    kept_other = dict(_kept(probe))
    for name in sorted({*kept_one, *kept_other}):
        if not _same(kept_one.get(name), kept_other.get(name)):
            _refuse_state(name)
    if probe.differ(first, step(one)):
        raise Refusal(
            "model or loss", "the same batch gives another loss after a step on others", STATE_REMEDY
        )


def _refuse_state(name: str) -> None:
    raise Refusal(name, "changed by a step", STATE_REMEDY)


def _kept(probe: Probe) -> Iterator[tuple[str, Any]]:
    """Yield all that the model and the objective hold beside the parameters, copied: name and value."""
    for name, buffer in probe.model.named_buffers():
        yield f"model: buffer {name}", buffer.detach().clone()
    for name, module in probe.model.named_modules():
        path = f"model: {name or type(module).__name__}"
        yield from _inside(path, {k: v for k, v in vars(module).items() if k not in _MODULE_OWN}, 0)
    yield from _inside("loss", getattr(probe.objective, "__dict__", {}), 0)


_MODULE_OWN = frozenset(vars(nn.Module()))
_DEPTH = 3  # of containers in attributes


def _inside(path: str, values: Mapping[Any, Any], depth: int) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{path}.{key}"
        if isinstance(value, Tensor):
            if not isinstance(value, nn.Parameter):
                yield name, _version(value) if value.numel() > LARGE else value.detach().clone()
        elif isinstance(value, np.ndarray):
            yield name, value.copy()
        elif isinstance(value, int | float | str | bool):
            yield name, value
        elif isinstance(value, Mapping) and depth < _DEPTH:
            yield from _inside(name, value, depth + 1)
        elif isinstance(value, list | tuple) and depth < _DEPTH:
            yield f"{name}: length", len(value)
            yield from _inside(name, dict(enumerate(value)), depth + 1)


def _version(value: Tensor) -> str:
    """Return what tells whether a tensor that is too large to copy, such as a task's data, was written to."""
    return f"{value.data_ptr()} {value._version}"


def _is_array(value: object) -> bool:
    return isinstance(value, Tensor | np.ndarray)


def _same(a: Any, b: Any) -> bool:
    if _is_array(a) and _is_array(b):
        return np.shape(a) == np.shape(b) and bool(
            np.array_equal(np.asarray(a), np.asarray(b), equal_nan=np.asarray(a).dtype.kind in "fc")
        )
    return type(a) is type(b) and (a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b)))


def _culprit(
    probe: Probe, again: Callable[[], Tensor], row: int | None, part: Tensor | None = None
) -> str | None:
    """Return the innermost layer whose output moves at rows where its input does not."""
    calm, disturbed = _traced(probe.model, probe.outputs), _traced(probe.model, again)
    rows = [i for i in range(BATCH) if i != row] if part is None else part.tolist()
    for name, (inputs, outputs) in calm.items():  # in the order in which layers end: inner ones first
        if name not in disturbed:
            continue
        now_in, now_out = disturbed[name]
        where = rows if part is None else range(len(rows))
        before_in, before_out = (_rows(each, rows) for each in (inputs, outputs))
        after_in, after_out = (_rows(each, where) for each in (now_in, now_out))
        if before_out is None or after_out is None:
            continue
        still = before_in is None or after_in is None or not probe.differ(before_in, after_in)
        if still and (before_out.shape != after_out.shape or probe.differ(before_out, after_out)):
            return name
    return None


def _rows(value: Tensor | None, rows: Sequence[int]) -> Tensor | None:
    if value is None or value.dim() == 0 or len(value) <= max(rows):
        return None
    return value[torch.tensor(list(rows))]


def _traced(model: nn.Module, run: Callable[[], Tensor]) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """Return the first tensor that went into each layer, and the first that came out."""
    seen: dict[str, tuple[Tensor | None, Tensor | None]] = {}

    def note(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        del module
        seen[name] = (_first(inputs), _first(output))

    handles = [m.register_forward_hook(partial(note, name)) for name, m in model.named_modules()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _first(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, list | tuple):
        return next((found for each in value if (found := _first(each)) is not None), None)
    return None


def _refuse_layer(probe: Probe, name: str | None, what: str) -> None:
    layer = dict(probe.model.named_modules()).get(name or "", probe.model)
    where = f"{name}: {type(layer).__name__}" if name else type(layer).__name__
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):  # pyright: ignore[reportPrivateUsage]
        remedy = f"use torch.nn.GroupNorm(groups, {layer.num_features}), which looks at one example at a time"
    else:
        remedy = "let each example's output follow from that example alone (GroupNorm and LayerNorm do)"
    raise Refusal("model", where, f"{what}; {remedy}")


def _moved(probe: Probe, before: Tensor, after: Tensor, rows: Sequence[int]) -> bool:
    return any(probe.differ(before[i], after[i]) for i in rows)


# --- randomness while the probe runs ------------------------------------------------------------------------------


def _seed() -> None:
    torch.default_generator.manual_seed(SEED)
    np.random.seed(SEED & 0x7FFFFFFF)
    random.seed(SEED)


@contextmanager
def _quiet_generators() -> Generator[None]:
    """Put every generator back afterwards, and let no gradient mode of the caller in."""
    kept = torch.default_generator.get_state(), np.random.get_state(), random.getstate()
    try:
        with torch.enable_grad():
            yield
    finally:
        torch.default_generator.set_state(kept[0])
        np.random.set_state(kept[1])
        random.setstate(kept[2])


_HALF = ("rand", "rand_like", "uniform", "uniform_")
_ONE = ("bernoulli", "bernoulli_")
_ZERO = ("randn", "randn_like", "normal", "normal_")


class _ConstantRandomness(TorchDispatchMode):
    """Gives layers the middle of what they might draw, whatever the shape of the draw."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        name = str(func.overloadpacket).removeprefix("aten.")
        if name == "native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        drawn = func(*args, **kwargs)
        for names, value in ((_HALF, 0.5), (_ONE, 1.0), (_ZERO, 0.0)):
            if name in names and isinstance(drawn, Tensor):
                return drawn.fill_(value)
        return drawn


class _Precision(TorchDispatchMode):
    """Notes the least precise type that a model computes in."""

    def __init__(self) -> None:
        super().__init__()
        self.tolerance = ROUNDINGS * torch.finfo(torch.float64).eps

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else (made,):
            if isinstance(each, Tensor) and each.is_floating_point():
                # Below double precision fewer roundings meet: rows of a batch differ by some hundreds at most.
                eps = torch.finfo(each.dtype).eps
                self.tolerance = max(self.tolerance, eps * (ROUNDINGS if eps < 1e-12 else ROUNDINGS / 100))
        return made
