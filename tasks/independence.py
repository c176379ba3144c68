"""Independence of examples: no example of a batch affects another one's output, loss or gradient.

DP-SGD bounds one example's contribution to a step's sum. The bound holds only if that contribution depends on no other
example and if only the parameters are carried from step to step. Both are measured here on the model's own code and on
a few of the owner's examples, before anything is spent: `CHECKS` lists the checks.

At the record level, if a model is evaluated on records or computes columns of them, its outputs are also measured in
evaluation mode, and metrics of single records after each other.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import lru_cache, partial
from itertools import islice
from types import FunctionType, ModuleType
from typing import Any, NamedTuple, cast
from weakref import ref

import numpy as np
import torch
from torch import Tensor, nn

from ..base.refusal import Refusal
from .arrays import COPIED
from .data import Data, Examples, LazyExamples, figures_of, leaves, mapped, rows_of
from .probe import (
    HALVES,
    WHOLE,
    Array,
    ConstantRandomness,
    Probe,
    are_tokens,
    equal,
    is_large,
    prepare,
    quiet_generators,
    seed,
    selected,
    spread,
)
from .protocol import Objective, Task

MAX_CLASS_BATCHES = 500  # batches of targets, of one example and some classes each
EXTREME = 1e3  # size of a replaced input relative to the batch: changes sorted places, maxima and thresholds
MOVED = 1e-3  # tolerance of a step's check, relative to a row's largest number: rows of equal batches are rounded alike
LATE = 64  # steps on other examples before the first ones are computed again
EXTREMES = 4  # examples of extreme targets, see `probe.extreme`
SHORT = 2  # tokens of a sequence in these steps of a large model
LARGE = 1_000_000  # numbers of a tensor that is too large to be copied for a comparison
MAX_ENTRIES = 1000  # entries of a container that are compared
MAX_DEPTH = 3  # depth of containers in attributes that are compared
# Shares of the tolerance: by which one tensor's gradient may differ relative to an example's whole gradient (at most 0.002
# was measured), and by which a layer's output must differ to be named, which the next layer may amplify.
ROUNDED = 0.1
NAMED = 0.1
OUTPUT_REMEDY = "make each example's output depend on that example alone (as GroupNorm and LayerNorm do)"
WEIGHTS_REMEDY = (
    "return the mean over the batch of losses that each look at one example; class weights so: "
    "(weight[targets] * cross_entropy(outputs, targets, reduction='none')).mean(), which counts an ignored label as zero"
)
STATE_REMEDY = "state that a step keeps reaches later steps without noise; keep nothing of the examples"
_MODULE_FIELDS = frozenset(vars(nn.Module()))


class Dependence(NamedTuple):
    """Verdict of a check: one example's part of a step depends on other examples."""

    part: str  # of the task: `model`, a loss by its name, an attribute
    value: str  # where in it, or how it shows; nothing of an example


class Mixing(Refusal):
    """Refusal during a run of a task that mixed the examples of a step."""


def check_independence(model: nn.Module, objective: Objective, data: Data) -> None:
    """Refuse a model or a loss with which one example's part of a step depends on another example.

    A large model passes once in a process for each code and form of examples.

    Args:
      model: in its initial state for training; it is not changed.
      objective: defines the loss.
      data: the owner's data, of which a few examples are read.
    """
    if not len(data):
        return
    if _is_measured(model, objective, data, "training"):
        return _check_reading(data)
    with quiet_generators():
        probe = prepare(model, objective, data)
        _refuse(CHECKS, probe)
    _check_reading(probe.data)
    _note_measured(model, objective, data, "training")


def _check_reading(data: Data | None) -> None:
    """Refuse lazy data whose items depend on the items that were read before: each client's, whatever was measured."""
    if isinstance(data, LazyExamples):
        from .reading_order import check_reading

        batches = spread(len(data))[:4].tensor_split((2, 3))  # positions of two examples, one and one
        check_reading(*(partial(data.batch, rows) for rows in batches))


# References to the tasks whose large models passed in this process, by use and form of the examples.
_passed: dict[str, list[ref[Any]]] = {}


def _is_measured(model: nn.Module, objective: Objective, data: Data, use: str) -> bool:
    """Return whether a large model passed with examples of this form; arguments as of `_note_measured`."""
    if not is_large(model):
        return False
    try:
        form = f"{use}: {_form(data)}"
    except Exception:  # noqa: BLE001 (of an example that cannot be read, which the probe leaves out)
        return False
    return any(each() is objective for each in _passed.get(form, ()))


def _note_measured(model: nn.Module, objective: Objective, data: Data, use: str) -> None:
    """Note that a large model passed, so that other clients' examples of the same form are not measured.

    Args:
      model: of any size; a small one is measured each time.
      objective: defines the loss.
      data: at least one example.
      use: `training` or `evaluation`.
    """
    if is_large(model):
        with suppress(Exception):  # an example that cannot be read, or an object without references
            _passed.setdefault(f"{use}: {_form(data)}", []).append(ref(objective))


def _code_of(value: Any) -> object:
    """Return the code of a function, also inside a `partial`; of any other object its class."""
    while isinstance(value, partial):
        value = value.func
    return getattr(value, "__code__", type(value))


def _form(data: Data) -> str:
    """Return types and dimensions of examples' tensors, and the code that reads, transforms and collates them."""
    tensors = leaves([*data.batch(spread(len(data))[:4])])
    functions = [getattr(data, name, None) for name in ("dataset", "transform", "collate")]
    codes = list(map(_code_of, functions))
    return repr([[(each.dtype, each.dim()) for each in tensors], codes])


def _refuse(checks: Checks, probe: Probe) -> None:
    """Apply checks in order; refuse the first dependence that one measures."""
    for measure, remedy in checks.items():
        if (dependence := measure(probe)) is not None:
            raise Refusal(*dependence, remedy)


def check_step(
    model: nn.Module, objective: Objective, read: Callable[[], tuple[Any, Tensor]], number: int
) -> None:
    """Check that no output or loss gradient of a step's other examples changes when its first example is replaced.

    Args:
      model: in training mode.
      objective: defines the loss.
      read: returns the step's batch, of at least two examples.
      number: number of the step; it seeds random layers, so that a rare coin falls differently in other steps.

    Raises:
      Mixing: one changed.
    """

    def results(inputs: Any, targets: Tensor) -> list[Any]:
        outputs = mapped(Tensor.detach, probe.outputs(inputs=inputs, draw=number))
        variables = _differentiable(outputs)
        return [outputs, *_gradient(variables, objective.loss(outputs, targets))]

    with quiet_generators():
        try:
            batch = read()
            probe = Probe(model, objective, *batch, {}, MOVED)
            replaced = mapped(lambda tensor: torch.cat([tensor[1:2], tensor[1:]]), batch)
            before, after = results(*batch), results(*replaced)
        except Exception:  # noqa: BLE001 (of the task's own code; the step itself leaves such an example out)
            return  # nothing was measured
    if probe.rows_differ(before, after, range(1, len(batch[1]))):
        remedy = "an example's part of a step changed when another example did; let it depend on that example alone"
        raise Mixing("model or loss", type(model).__name__, remedy)


def check_evaluated_apart(model: nn.Module, task: Task, data: Data) -> None:
    """Refuse a model that mixes examples in evaluation mode, or metrics of one example that depend on another's.

    The arguments are those of `check_independence`; the task is the objective and also defines the metrics.
    """
    if not len(data) or _is_measured(model, task, data, "evaluation"):
        return
    with quiet_generators():
        probe = prepare(model, task, data)
        probe.model.eval()
        _refuse(CHECKS_OF_OUTPUTS, probe)
        check_measured_apart(task, probe.outputs(), probe.targets)
    _note_measured(model, task, data, "evaluation")


def check_measured_apart(task: Task, outputs: Any, targets: Tensor, size: int = 1) -> None:
    """Refuse metrics that depend on earlier measurements, and so on other records or clients.

    Args:
      task: defines the metrics.
      outputs: outputs of a model.
      targets: shape (n, ...).
      size: number of examples that are measured together.
    """

    def metrics_of_parts(outputs: Any) -> list[str]:
        parts = [slice(start, start + size) for start in range(0, len(targets), size)]
        return [_metrics(task, rows_of(outputs, part), targets[part]) for part in parts]

    before = metrics_of_parts(outputs)
    # Extreme outputs, since a maximum that the task keeps may already be that of all examples.
    metrics_of_parts(mapped(lambda tensor: tensor * -EXTREME, outputs))
    if before != metrics_of_parts(outputs):
        name = f"{type(task).__name__}.metrics"
        remedy = "return the metrics of one batch, and keep nothing of earlier ones"
        raise Refusal(name, "the same examples give other metrics after another batch was measured", remedy)


def _metrics(task: Task, outputs: Any, targets: Tensor) -> str:
    """Return the metrics as text, in which NaN equals NaN; empty if the task's code fails, as on examples of one class."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return repr(figures_of(task, outputs, targets))
    except Exception:  # noqa: BLE001 (of the task's own code)
        return ""


# --- outputs ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _other_rows(probe: Probe) -> Dependence | None:
    """Replace each example in turn; return the layer that mixes examples if the output of another one changes."""
    count = probe.extent.examples
    outputs_of = lru_cache(maxsize=1)(partial(probe.outputs, None, None))
    for row in range(count):
        others, draw = [other for other in range(count) if other != row], row % probe.extent.draws
        run, outputs = partial(probe.outputs, draw=draw), outputs_of(draw)
        for inputs in islice(_replacements(probe.inputs, row), probe.extent.kinds):
            run_replaced = partial(run, inputs=inputs)
            if probe.rows_differ(outputs, run_replaced(), others):
                traces = (_traced(probe.model, each, others) for each in (run, run_replaced))
                return _mixing_layer(probe, *traces)
    return None


def _replacements(inputs: Any, row: int) -> Iterator[Any]:
    """Yield the batch with another example in one row: that of the next row, and two of extreme size."""

    def with_neighbour(tensor: Tensor) -> Tensor:
        return _with_row(tensor, row, tensor[(row + 1) % len(tensor)])

    def with_extreme(sign: float, tensor: Tensor) -> Tensor:
        example = tensor[row]
        if not tensor.is_floating_point():  # whole numbers may be indices: the same ones in another order
            return _with_row(tensor, row, example.flatten().flip(0).reshape(example.shape))
        size = EXTREME * (float(tensor.abs().max()) or 1.0)
        return _with_row(tensor, row, sign * size * torch.rand_like(example))

    yield mapped(with_neighbour, inputs)
    for sign in (1.0, -1.0):
        yield mapped(partial(with_extreme, sign), inputs)


def _with_row(tensor: Tensor, row: int, value: Tensor) -> Tensor:
    copied = tensor.clone()
    copied[row] = value
    return copied


@torch.no_grad()
def _rows_of_parts(probe: Probe) -> Dependence | None:
    """Compute parts of the batch alone, and one example many times; return the mixing layer if a row differs."""
    # Positions of one example, of two, of all but one, and of one example that is repeated.
    count = probe.extent.examples
    two, several = torch.tensor([0, count - 1]), torch.arange(count - 1)
    parts = torch.tensor([0]), two, several, torch.zeros(probe.extent.repeated).long()
    for half in HALVES:
        with ConstantRandomness(half) as randomness:
            outputs = probe.outputs()
            for part in parts:
                run, rows = partial(probe.outputs, part), range(len(part))
                if probe.rows_differ(rows_of(outputs, part), run(), rows):
                    trace_of_batch = _traced(probe.model, probe.outputs, part.tolist())
                    return _mixing_layer(probe, trace_of_batch, _traced(probe.model, run, rows))
        if not randomness.drew:
            break  # other constants would give the same
    return None


class LayerTrace(NamedTuple):
    """Some rows of a layer's first input and first output tensor in one pass; empty if they have no such rows."""

    inputs: Tensor
    outputs: Tensor


def _mixing_layer(
    probe: Probe, trace: Mapping[str, LayerTrace], other: Mapping[str, LayerTrace]
) -> Dependence:
    """Return the innermost layer whose output, but not its input, differs between two passes; else the model."""
    finer = replace(probe, tolerance=NAMED * probe.tolerance)

    def differ(a: Tensor, b: Tensor) -> bool:
        return len(a) == len(b) > 0 and finer.differ(a, b, by_row=True)

    mixing = (
        name
        for name, layer in trace.items()
        if name in other
        and differ(layer.outputs, other[name].outputs)
        and not differ(layer.inputs, other[name].inputs)
    )
    name = next(mixing, "")
    kind = type(probe.model.get_submodule(name)).__name__
    return Dependence("model", f"{name}: {kind}" if name else kind)


def _traced(model: nn.Module, run: Callable[[], Any], rows: Sequence[int]) -> dict[str, LayerTrace]:
    """Return the traces of a pass by layer, in the order in which layers finish: inner ones first."""
    trace: dict[str, LayerTrace] = {}

    def rows_of_first(tree: Any) -> Tensor:
        """Return these rows of the first tensor of a tree; none if it lacks them."""
        tensor = next(iter(leaves(tree)), torch.empty(0))
        if tensor.dim() == 0 or len(tensor) <= max(rows):
            return torch.empty(0)
        return tensor.detach()[torch.tensor([*rows])]

    def record(name: str, _: nn.Module, inputs: Any, output: Any) -> None:
        trace[name] = LayerTrace(rows_of_first(inputs), rows_of_first(output))

    with ExitStack() as hooks:
        for name, layer in model.named_modules():
            hooks.enter_context(layer.register_forward_hook(partial(record, name)))
        run()
    return trace


# --- the loss -----------------------------------------------------------------------------------------------------


def _loss_of_batch(probe: Probe) -> Dependence | None:
    """Compare the loss of the batch with the mean of the examples' losses; return the loss's name if they differ."""
    with ConstantRandomness():
        outputs = mapped(Tensor.detach, probe.outputs())
        losses = [probe.loss_alone(row) for row in range(len(probe.targets))] if _has_loss(outputs) else []
    fault = _loss_of_model(probe, outputs, losses) if losses else _loss_of_outputs(probe, outputs)
    return Dependence(f"{type(probe.objective).__name__}.loss", fault) if fault else None


# The faults name no number: these are losses of an owner's examples, and the sentence is printed and logged.
def _loss_of_outputs(probe: Probe, outputs: Any) -> str:
    """Return how the loss or its gradient is not that of the mean, at several outputs and targets; empty if it is."""
    for variant, targets in _variants(outputs, probe.targets):
        variables = _differentiable(variant)
        loss = _number(probe.objective.loss(variant, targets))
        mean = torch.stack(probe.losses(variant, targets)).mean()
        if probe.differ(loss, mean):
            return "it is not the mean of the examples' losses"
        for a, b in zip(_gradient(variables, loss), _gradient(variables, mean), strict=True):
            if probe.differ(a, b):
                return "its gradient is not that of the mean of the examples' losses"
    for targets in _targets_of_every_class(outputs, probe.targets):
        try:
            loss, losses = probe.objective.loss(outputs, targets), probe.losses(outputs, targets)
        except (RuntimeError, LookupError, ValueError):
            continue  # a class that the loss does not know
        if probe.differ(loss, torch.stack(losses).mean()):
            return "it is not the mean of the examples' losses where their classes differ"
    return ""


def _loss_of_model(probe: Probe, outputs: Any, losses: Sequence[Tensor]) -> str:
    """Return how a loss that the model itself computes is not the mean of the examples' losses; empty if it is.

    If the model has no output besides the loss, no other check sees its rows. So each example is also replaced, and the
    loss must remain the mean.
    """
    loss = _number(probe.objective.loss(outputs, probe.targets))
    if probe.differ(loss, torch.stack([*losses]).mean()):
        return "it is not the mean of the examples' losses"
    for row in range(len(losses)) if len(leaves(outputs)) == 1 else ():
        for inputs in _replacements(probe.inputs, row):
            with ConstantRandomness():
                loss = probe.objective.loss(probe.outputs(inputs=inputs), probe.targets)
                others = [*losses[:row], *losses[row + 1 :]]
                mean = torch.stack([*others, probe.loss_alone(row, inputs)]).mean()
            if probe.differ(loss, mean):
                return "it is not the mean of the examples' losses once an example is replaced"
    return ""


def _number(loss: Tensor) -> Tensor:
    """Return a loss; refuse one that is not a scalar."""
    if loss.dim() != 0:
        raise Refusal("loss", f"shape {tuple(loss.shape)}", "it must be one number; " + WEIGHTS_REMEDY)
    return loss


def _has_loss(outputs: Any) -> bool:
    """Return whether there is a number among the outputs: a loss that the model itself computed."""
    return any(tensor.dim() == 0 for tensor in leaves(outputs))


def _variants(outputs: Any, targets: Tensor) -> Iterator[tuple[Any, Tensor]]:
    """Yield batches of outputs and targets: the present ones, and outputs with small and with large noise.

    A loss with a margin or a maximum may mix examples only at other outputs than the present ones. One of the batches has
    many rows, of which a loss may use only some.
    """
    few = len(targets)
    many = few if sum(tensor.numel() for tensor in leaves(outputs)) > LARGE else WHOLE.repeated

    def with_noise(scale: float, tensor: Tensor) -> Tensor:
        if not scale or not tensor.is_floating_point() or not tensor.numel():
            return tensor.clone()
        size = float(tensor.abs().max().nan_to_num()) or 1.0
        return tensor + scale * size * torch.randn_like(tensor)

    for scale, count in ((0.0, few), (1.0, many), (30.0, few)):
        rows = torch.arange(count) % few
        yield mapped(partial(with_noise, scale), rows_of(outputs, rows)), targets[rows]


def _targets_of_every_class(outputs: Any, targets: Tensor) -> Iterator[Tensor]:
    """Yield batches of targets with several classes, in which every class occurs: a client's may all be of one class.

    There are none unless outputs are logits, shape (n, classes), and targets their classes.
    """
    if not isinstance(outputs, Tensor) or outputs.dim() != 2 or targets.dim() != 1:
        return
    classes = outputs.shape[1]
    if targets.is_floating_point() or not bool(((targets >= 0) & (targets < classes)).all()):
        return
    others = len(targets) - 1
    for first in range(0, classes, max(others, classes // MAX_CLASS_BATCHES)):
        next_classes = (first + torch.arange(others)) % classes
        yield torch.cat([targets[:1], next_classes])


def _loss_of_extreme_targets(probe: Probe) -> Dependence | None:
    """Apply `_loss_of_batch` to examples in memory whose targets are extreme, which a loss may ignore."""
    if not isinstance(probe.data, Examples):
        return None
    count = max(EXTREMES, probe.extent.examples)
    extreme_rows = selected(probe.data, probe.extent.examples)[-count:]
    return _loss_of_batch(probe.on(*probe.data.batch(extreme_rows)))


def _collated_loss(probe: Probe) -> Dependence | None:
    """Collate an item of lazy data with others, and with copies of itself; return `collate` if its loss changes."""
    data = probe.data
    if not isinstance(data, LazyExamples) or data.collate is None:
        return None

    def first_loss(items: list[Any]) -> Tensor:
        """Return the loss of the first of these items, collated into one batch."""
        seed()
        batch = probe.on(*data.collated(items))
        outputs = batch.outputs()
        if _has_loss(outputs):  # which is that of all items
            return batch.loss_alone(0).detach()
        return batch.objective.loss(rows_of(outputs, slice(1)), batch.targets[:1]).detach()

    items = data.items(spread(len(data), probe.extent.examples).tolist())
    for row, item in enumerate(items[: len(items) // 2]):
        others = [*items[:row], *items[row + 1 :]]
        with ConstantRandomness():
            with_others, with_itself = first_loss([item, *others]), first_loss([item] * len(items))
        if probe.differ(with_others, with_itself):
            return Dependence("collate", "one example's loss changes when another example does")
    return None


# --- gradients ----------------------------------------------------------------------------------------------------


def _gradients(probe: Probe) -> Dependence | None:
    """Compare the gradient of a weighted sum of losses with the sum of single ones; name a parameter that differs."""
    if not probe.parameters:
        return None
    parameters = list(probe.parameters.values())
    count = len(probe.targets)
    weights = (1 + torch.arange(count, dtype=torch.float64) / count).tolist()
    with ConstantRandomness():
        outputs = probe.outputs()
        if _has_loss(outputs):  # the model's own, in which examples have equal weights
            weights = [1.0] * count
            loss: Any = probe.objective.loss(outputs, probe.targets) * count
        else:
            losses = probe.losses(outputs, probe.targets)
            loss = sum(weight * single for weight, single in zip(weights, losses, strict=True))
        gradient_of_sum = _gradient(parameters, loss)
        sum_of_gradients, norms = [torch.zeros_like(p) for p in parameters], 0.0
        for row, weight in enumerate(weights):
            single = _gradient(parameters, probe.loss_alone(row))
            sum_of_gradients = [a + weight * b for a, b in zip(sum_of_gradients, single, strict=True)]
            norms += weight * _norm(single)
    # An example is clipped by its whole gradient: a tensor's part that is zero, as of the bias of an attention's key, has
    # the roundings of the whole. Infinity and NaN are no rounding.
    rounding = ROUNDED * probe.tolerance * norms
    for name, a, b in zip(probe.parameters, gradient_of_sum, sum_of_gradients, strict=True):
        if probe.differ(a, b) and not _norm([a - b]) <= rounding < math.inf:
            return Dependence("model", f"gradient of {name}")
    return None


def _differentiable(outputs: Any) -> list[Tensor]:
    """Let the floating-point tensors of outputs require gradients, and return them as variables of `_gradient`."""
    return [tensor.requires_grad_() for tensor in leaves(outputs) if tensor.is_floating_point()]


def _norm(gradient: Sequence[Tensor]) -> float:
    """Return the L2 norm of all tensors together."""
    return math.hypot(*(float(tensor.detach().double().norm()) for tensor in gradient))


def _gradient(variables: Sequence[Tensor], loss: Any) -> list[Tensor]:
    """Return the gradient of a loss by each variable, zeros for one on which the loss does not depend."""
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        return [torch.zeros_like(variable) for variable in variables]
    parts = torch.autograd.grad(loss, variables, allow_unused=True, retain_graph=True)
    gradients = cast(Sequence[Tensor | None], parts)
    if any(g is not None and g.is_sparse for g in gradients):
        raise Refusal("model", "a sparse gradient", "no engine clips it; give the embedding sparse=False")
    return [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, variables, strict=True)]


# --- state --------------------------------------------------------------------------------------------------------


def _state_of_steps(probe: Probe) -> Dependence | None:
    """Take steps on two batches in turn; return the state, or the loss, that depends on the batch before."""

    def step(rows: Sequence[int]) -> Tensor:
        """Return the loss of some rows after a forward and a backward pass."""
        index = torch.tensor(rows)
        loss = probe.objective.loss(probe.outputs(index), probe.targets[index])
        _gradient(list(probe.parameters.values()), loss)
        return loss.detach().clone()

    count = probe.extent.examples
    one, other = [*range((count + 1) // 2)], [*range(count - 1, count // 2 - 1, -1)]
    step(one)  # state that the first call creates is no memory of examples
    initial_arrays = {name: value for name, value in _state(probe) if isinstance(value, Array)}
    loss, state = step(one), dict(_state(probe))
    step(other)
    other_state = dict(_state(probe))
    changed = [name for name, value in initial_arrays.items() if not equal(value, state.get(name))]
    names = sorted({*state, *other_state})
    changed += [name for name in names if not equal(state.get(name), other_state.get(name))]
    if changed:
        return Dependence(changed[0], "changed by a step")
    _late_steps(probe, torch.tensor(other[:1]))
    if probe.differ(loss, step(one)):
        return Dependence("model or loss", "the same batch gives another loss after a step on others")
    return None


@torch.no_grad()
def _late_steps(probe: Probe, rows: Tensor) -> None:
    """Compute a loss many times: state in an object that `_state` does not read may affect only later steps.

    A large model reads the start of a sequence of tokens alone, unless that fails, as for a loss of whole sequences.
    """
    targets, inputs = probe.targets[rows], rows_of(probe.inputs, rows)
    if probe.extent is not WHOLE and all(map(are_tokens, [*leaves(inputs), targets])):
        start = mapped(lambda tensor: tensor[:, :SHORT], inputs)
        with suppress(Exception):
            probe.objective.loss(probe.outputs(inputs=start), targets[:, :SHORT])
            inputs, targets = start, targets[:, :SHORT]
    for _ in range(LATE):
        probe.objective.loss(probe.outputs(inputs=inputs), targets)


def _state(probe: Probe) -> Iterator[tuple[str, Any]]:
    """Yield name and value of all state of the model and the objective: copies of arrays, sums of parameters, numbers."""
    for name, buffer in probe.model.named_buffers():
        state: Any = buffer._version
        if probe.extent is WHOLE or buffer.numel() <= COPIED:
            state = buffer.detach().clone()
        yield f"model: buffer {name}", state
    for name, parameter in probe.model.named_parameters():
        has_sum = type(parameter) is nn.Parameter  # and is not another library's packed weight
        yield f"model: parameter {name}", float(parameter.detach().sum()) if has_sum else parameter._version
    for name, module in probe.model.named_modules():
        path = f"model: {name or type(module).__name__}"
        yield from _attributes(path, {k: v for k, v in vars(module).items() if k not in _MODULE_FIELDS})
    yield from _attributes("loss", getattr(probe.objective, "__dict__", {}))


def _attributes(path: str, values: Mapping[Any, Any], depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield name and value of the arrays and numbers among an object's attributes or a container's entries, recursively."""
    for key, value in values.items():
        name = f"{path}.{key}"
        if isinstance(value, Tensor):
            if isinstance(value, nn.Parameter):
                continue  # which is in the model's state
            version = f"{value.data_ptr()} {value._version}"
            yield name, version if value.numel() > LARGE else value.detach().clone()
        elif isinstance(value, np.ndarray):
            yield name, value.copy()
        elif isinstance(value, int | float | str | bool):
            yield name, value
        elif depth < MAX_DEPTH:
            if isinstance(value, list | tuple | set | deque):
                yield f"{name}: length", len(value)
                value = dict(enumerate(islice(value, MAX_ENTRIES)))
            elif not isinstance(value, Mapping | type | FunctionType | ModuleType | Examples | LazyExamples):
                value = getattr(value, "__dict__", {})
            yield from _attributes(name, value if isinstance(value, Mapping) else {}, depth + 1)


# --- the table ----------------------------------------------------------------------------------------------------

Checks = Mapping[Callable[[Probe], Dependence | None], str]  # a measurement, and the remedy if it is not None
CHECKS_OF_OUTPUTS: Checks = {
    _other_rows: f"one example's output changes when another example does; {OUTPUT_REMEDY}",
    _rows_of_parts: f"an example's output depends on the size of its batch; {OUTPUT_REMEDY}",
}
CHECKS: Checks = {
    **CHECKS_OF_OUTPUTS,
    _loss_of_batch: WEIGHTS_REMEDY,
    _gradients: "an example's gradient depends on the rest of its batch; make it depend on that example alone",
    _state_of_steps: STATE_REMEDY,
    _loss_of_extreme_targets: WEIGHTS_REMEDY,
    _collated_loss: "transform each example separately, and hide padding from the model",
}
