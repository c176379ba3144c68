"""Number of examples that are in memory at a time, in steps of DP-SGD and in evaluations (`engine.examples_at_once`).

A step's clipped sum is the sum of those of its parts, and an example's outputs do not depend on the others, so parts
change results by rounding alone. `auto` is as many examples as `ALLOWED` bytes hold. It is measured in two passes
of the model on zeros, once for each model and shape of inputs, so it depends on no value of the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from ..base.refusal import Refusal
from .arrays import copied_buffers
from .data import (
    BATCH,
    Batches,
    Data,
    Examples,
    batches_of,
    leaves,
    padded,
    padded_size,
    placeholder,
    rows_of,
    run_on,
)

if TYPE_CHECKING:
    from .data import Inputs

AUTO = "auto"
ALLOWED = 256 << 20  # bytes for each thread, by whose number batches are padded
# Bytes at the peak of a pass over those that are counted, the largest of 16 ratios, of four models in three engines and in
# evaluation: 3.9 for logits of 8192 words, and for convolutions that ghost clipping unfolds; 1.1 to 3.2 for others.
PEAK = 4
GRADIENT_COPIES = 2  # of each example's whole gradient where an engine holds it: 1.0 and 1.6 were measured

_measured: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], _ExampleBytes]] = WeakKeyDictionary()


class _ExampleBytes(NamedTuple):
    """Bytes of a model for one example: its inputs, what a pass saves for its backward pass, and the largest tensor."""

    inputs: float
    saved: float
    largest: float


class _PassBytes(NamedTuple):
    """Bytes in one pass: of its inputs, of what it saves for a backward pass, and of each tensor that it computes."""

    inputs: int
    saved: int
    sizes: Sequence[int]


FAILED = _ExampleBytes(0, 0, ALLOWED / PEAK / BATCH)  # in place of a measurement: `BATCH` examples at a time


class BatchParts(NamedTuple):
    """Parts of a batch in which no example changes the rounding of another: of `rows` examples, padded to at least `least`."""

    rows: int
    least: int

    def size(self, rows: int) -> int:
        """Return the number of examples to which a part of some rows is padded."""
        return max(rows, self.least)


class _Sizes(TorchFunctionMode):
    """Bytes of the tensors that functions of torch return in a block, in order; a mode of dispatch takes 2 s to import."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.sizes += [each.nbytes for each in leaves(result)]
        return result


def check_at_once(limit: str, field: str) -> None:
    """Refuse a limit of examples that is neither `auto` nor a whole number of at least 1; `field` is its name."""
    if limit != AUTO and not (limit.isdecimal() and int(limit)):
        raise Refusal(field, limit, f"give {AUTO}, or a whole number of at least 1")


def evaluated_at_once(limit: str, model: nn.Module, data: Batches) -> int:
    """Return the number of examples that a model evaluates at a time.

    Args:
      limit: `auto`, or the number in decimal.
      model: in evaluation mode.
      data: on the model's device; only the shape of an example is read.
    """
    if limit != AUTO:
        return int(limit)
    measured = _measured_at(model, data)
    return _number_in(measured.inputs + PEAK * measured.largest)


def evaluated_apart(limit: str, model: nn.Module, data: Batches) -> BatchParts:
    """Return the parts in which a model evaluates examples that are private from each other; arguments as above."""
    return _parts(evaluated_at_once(limit, model, data))


def trained_at_once(limit: str, model: nn.Module, data: Batches, whole_gradients: bool) -> BatchParts:
    """Return the parts of a step of DP-SGD.

    Args:
      limit: `auto`, or the number of examples in decimal.
      model: in training mode, without an engine's hooks.
      data: on the model's device; only the shape of an example is read.
      whole_gradients: whether the engine holds the whole gradient of each example.
    """
    if limit != AUTO:
        return _parts(int(limit))
    measured = _measured_at(model, data)
    gradient = sum(p.nbytes for p in model.parameters() if p.requires_grad) * whole_gradients
    activations = measured.saved + measured.largest
    return _parts(_number_in(measured.inputs + PEAK * activations + GRADIENT_COPIES * gradient))


def _number_in(size: float) -> int:
    """Return how many examples of this size in bytes are allowed at a time, at least 1."""
    return max(1, int(ALLOWED * torch.get_num_threads() / max(1.0, size)))


def _parts(rows: int) -> BatchParts:
    """Return parts of some examples or, if they are too few for `padded_size`, of one alone, which needs no padding."""
    least = padded_size(1)
    return BatchParts(rows, least) if rows >= least else BatchParts(1, 1)


def _measured_at(model: nn.Module, data: Batches) -> _ExampleBytes:
    """Return the bytes of one example, measured once for each shape of inputs; `FAILED` if the model fails on zeros."""
    with suppress(Exception):  # of the task's own code, as on data without examples
        two = placeholder(data, 2)
        key = (model.training, *((tuple(each.shape[1:]), each.dtype) for each in leaves(two)))
        by_shape = _measured.setdefault(model, {})
        if key not in by_shape:
            by_shape[key] = FAILED
            by_shape[key] = _difference(_pass(model, two), _pass(model, rows_of(two, slice(1))))
        return by_shape[key]
    return FAILED


def _difference(more: _PassBytes, fewer: _PassBytes) -> _ExampleBytes:
    """Return what one example adds: weights that are unpacked, or masks of one shape, are in memory once."""
    # From the last one, as what a first pass alone computes comes first.
    pairs = zip(reversed(more.sizes), reversed(fewer.sizes), strict=False)
    largest = max((size - other for size, other in pairs), default=0)
    return _ExampleBytes(more.inputs - fewer.inputs, more.saved - fewer.saved, largest)


def _pass(model: nn.Module, inputs: Inputs) -> _PassBytes:
    """Run the model on these inputs, and return the bytes of its tensors."""
    own = set(map(_address, (*model.parameters(), *model.buffers(), *leaves(inputs))))
    saved = dict[int, int]()  # by address: a tensor that several operations save is one in memory
    references: list[Tensor] = []  # so that no other tensor gets the address of a freed one

    def save(tensor: Tensor) -> None:
        # Not the tensor itself, and no backward pass reads it: the graph, which has this function, would hold itself.
        references.append(tensor.detach())
        saved[_address(tensor)] = tensor.nbytes

    with torch.enable_grad(), saved_tensors_hooks(save, lambda each: each), _Sizes() as functions:
        outputs_of(model, inputs)
    activations = sum(size for address, size in saved.items() if address not in own)
    return _PassBytes(sum(each.nbytes for each in leaves(inputs)), activations, functions.sizes)


def _address(tensor: Tensor) -> int:
    """Return the address of a tensor's memory, or a number of the object itself where another library packs it."""
    with suppress(RuntimeError, NotImplementedError):
        return tensor.untyped_storage().data_ptr()
    return id(tensor)


def outputs_of(model: nn.Module, batch: Inputs) -> list[Tensor]:
    """Return the tensors that the model, run once, returns; its buffers and torch's random state stay as they are."""
    buffers = copied_buffers(model)
    with torch.random.fork_rng(devices=[]):
        return leaves(run_on(lambda *args, **fields: functional_call(model, buffers, args, fields), batch))


def answers(
    model: nn.Module,
    data: Data,
    limit: str,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Iterator[tuple[Any, Tensor]]:
    """Yield a model's outputs with the targets: of all examples in memory at once if the outputs fit, else part by part.

    Args:
      model: in evaluation mode.
      data: on the model's device.
      limit: number of examples that the model gets at a time, as of `evaluated_at_once`.
      precision: returns the context in which the model runs.
    """
    whole: list[tuple[Tensor, Tensor]] = []
    for inputs, targets in batches_of(data, evaluated_at_once(limit, model, data)):
        with precision():
            outputs = run_on(model, inputs)
        if _fits(outputs, len(targets), data):
            whole.append((outputs, targets))
        else:
            yield outputs, targets
    if whole:
        yield torch.cat([outputs for outputs, _ in whole]), torch.cat([targets for _, targets in whole])


def outputs_apart(model: Callable[[Tensor], Tensor], inputs: Tensor, limit: str = AUTO) -> Tensor:
    """Return a model's outputs for rows that may be private from each other, shape (n, ...), computed part by part.

    Args:
      model: in evaluation mode.
      inputs: shape (n, ...).
      limit: number of rows that the model gets at a time, as of `evaluated_at_once`.
    """
    parts = evaluated_apart(limit, cast(nn.Module, model), Examples(inputs, inputs))
    if len(inputs) <= parts.rows:
        return model(inputs)
    return torch.cat(
        [model(padded(rows, parts.size(len(rows))))[: len(rows)] for rows in inputs.split(parts.rows)]
    )


def _fits(outputs: Any, rows: int, data: Data) -> bool:
    """Return whether outputs like these of some rows are one tensor that fits into memory for all the data."""
    if not isinstance(outputs, Tensor) or outputs.shape[:1] != (rows,) or not isinstance(data, Examples):
        return False
    return PEAK * outputs.nbytes * len(data) <= ALLOWED * rows
