"""Probe of a model: a copy of it, its loss and a few examples, run again and again from the same state.

What is random in a layer is seeded where batches have the same size, and held constant where they differ, because the
same seed gives other draws to a tensor of another shape. Two results are equal up to the rounding of the least precise
type in which the model computes.
"""

from __future__ import annotations

import copy
import math
import random
import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..base.refusal import Refusal
from .data import Data, Examples, joined, leaves, mapped, only, rows_of, run_on
from .protocol import Objective

BATCH = 6  # examples of the probe; each pair of them is tested
SEED = 0x0FEDFE11  # of the layers' own randomness while the probe runs; it protects nothing
ROUNDINGS = 1e5  # of the least precise number in a model, by which equal results may differ
COARSEST = 0.1  # of what two results are: in half precision that many roundings would be all of them
HALVES = (0.5, 0.0, 1 - 2**-24)  # coins of any probability fall on both sides of the last two
Array = Tensor | np.ndarray


@dataclass(frozen=True)
class Probe:
    """A model, a loss and a few examples.

    Attributes:
      model: a copy, in training mode; double precision where the model can.
      objective: gives the loss of a batch.
      inputs: of `BATCH` examples.
      targets: shape (BATCH, ...).
      initial: the parameters' values before the first forward pass.
      tolerance: relative difference above which two results differ.
      data: the examples are of these; None in the middle of a run.
    """

    model: nn.Module
    objective: Objective
    inputs: Any
    targets: Tensor
    initial: tuple[Tensor, ...]
    tolerance: float = 0.0
    data: Data | None = None

    def outputs(self, rows: Tensor | None = None, inputs: Any = None, draw: int = 0) -> Any:
        """Return the outputs of these rows, from the same random state and parameters at every call."""
        inputs = self.inputs if inputs is None else inputs
        seed(draw)
        for parameter, value in zip(self.model.parameters(), self.initial, strict=True):
            parameter.data.copy_(value)
        return run_on(self.model, inputs if rows is None else rows_of(inputs, rows))

    def losses(self, outputs: Any, targets: Tensor) -> list[Tensor]:
        """Return each example's loss by itself."""
        rows = [slice(row, row + 1) for row in range(len(targets))]
        return [self.objective.loss(rows_of(outputs, row), targets[row]) for row in rows]

    def loss_alone(self, row: int, inputs: Any = None) -> Tensor:
        """Return the loss of a batch of one example."""
        rows = torch.tensor([row])
        return self.objective.loss(self.outputs(rows, inputs), self.targets[rows])

    def differ(self, a: Tensor, b: Tensor, by_row: bool = False) -> bool:
        """Whether two results, or rows of them, differ by more than rounding; NaN against NaN is no difference."""
        if a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()):
            return True
        if not a.is_floating_point():
            return not torch.equal(a, b)
        a, b = (each.detach().nan_to_num(0, 0, 0).double() for each in (a, b))
        a, b = (each.reshape(len(a) if by_row and a.numel() else 1, -1) for each in (a, b))
        scale = torch.maximum(a.abs(), b.abs()).amax(1, keepdim=True) if a.numel() else 0.0
        return bool(((a - b).abs() > self.tolerance * scale).any())

    def rows_differ(self, a: Any, b: Any, rows: Sequence[int]) -> bool:
        """Whether any of these rows of any output differs."""
        index = list(rows)
        return any(
            x.dim() and (x.shape[1:] != y.shape[1:] or self.differ(x[index], y[index], by_row=True))
            for x, y in zip(leaves(a), leaves(b), strict=True)
        )

    def on(self, inputs: Any, targets: Tensor) -> Probe:
        """Return the probe on another batch, in its own precision."""
        if any(p.dtype == torch.float64 for p in self.initial):
            inputs, targets = mapped(_double, (inputs, targets))
        return replace(self, inputs=inputs, targets=targets)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


def prepare(model: nn.Module, objective: Objective, data: Data) -> Probe:
    """Return the probe in double precision, or in the model's own if its code requires that.

    Raises:
      Refusal: the model cannot be copied, or its outputs are no batch.
    """
    data = _usable(model, objective, data)
    inputs, targets = mapped(torch.clone, data.batch(spread(len(data))))
    for tensor in leaves(inputs):
        if len(data) < BATCH and tensor.is_floating_point():  # equal rows would hide what orders them
            tensor[len(data) :] *= 1 + torch.rand_like(tensor[len(data) :])
    double = mapped(_double, (inputs, targets))
    try:
        probe = _measured(_perturbed(_copied(model).double(), objective, *double))
    except (RuntimeError, TypeError):
        probe = _measured(_perturbed(_copied(model), objective, inputs, targets))
    return replace(probe, data=data)


@torch.no_grad()
def _perturbed(model: nn.Module, objective: Objective, inputs: Any, targets: Tensor) -> Probe:
    """Perturb the parameters: a layer that is initialised to zero would hide every dependence."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            size = float(parameter.abs().mean()) if parameter.numel() else 0.0
            parameter.add_(torch.randn_like(parameter) * (size or 0.1) / 2)
    return Probe(model, objective, inputs, targets, tuple(p.detach().clone() for p in model.parameters()))


def _measured(probe: Probe) -> Probe:
    """Return the probe with the tolerance of a first run; refuse outputs that are no batch."""
    with _Precision() as precision:
        outputs = probe.outputs()
        probe.objective.loss(outputs, probe.targets)
    shapes = [tuple(tensor.shape) for tensor in leaves(outputs)]
    if not shapes:
        raise Refusal("model", type(outputs).__name__, "return a tensor, or a tuple or dictionary of them")
    # A number among several outputs, or one that bears a name, is a loss that the model computed itself.
    lone = len(shapes) == 1 and not isinstance(outputs, dict)
    if any(shape[:1] != (BATCH,) and (shape or lone) for shape in shapes):
        value = f"{BATCH} examples became outputs of shape {', '.join(map(str, shapes))}"
        raise Refusal("model", value, "the first dimension of the outputs must be the batch")
    return replace(probe, tolerance=precision.tolerance)


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


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def equal(a: Any, b: Any) -> bool:
    """Return whether two arrays, tensors or numbers are equal to the bit; NaN equals NaN."""
    if isinstance(a, Array) and isinstance(b, Array):
        x, y = np.asarray(a), np.asarray(b)
        return np.shape(a) == np.shape(b) and np.array_equal(x, y, equal_nan=x.dtype.kind in "fc")
    return type(a) is type(b) and (a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b)))


# --- examples of the probe ----------------------------------------------------------------------------------------


def spread(count: int) -> Tensor:
    """Return `BATCH` positions spread over the data, which may be sorted by class."""
    numbers = torch.arange(BATCH)
    return numbers * count // BATCH if count > BATCH else numbers % count


def selected(data: Data) -> Tensor:
    """Return positions of examples for the checks: spread over the data and, in memory, those of extreme targets.

    As many of every client, so that in a batch of several clients each part of it holds one example of each.
    """
    rows = spread(len(data))
    return torch.cat([rows, _extreme(data.targets)]) if isinstance(data, Examples) else rows


def _extreme(targets: Tensor) -> Tensor:
    """Return positions of targets that a loss may ignore, such as padding or missing labels.

    Such a value is the least or the greatest: these are the rows with the most and the fewest of each.
    """
    flat = targets.reshape(len(targets), -1)
    counts = [(flat == end).sum(1) for end in flat.aminmax()] if flat.numel() else []
    rows = [row for count in counts for row in (count.argmax(), count.argmin())]
    return torch.stack(rows) if rows else torch.arange(0)


def _usable(model: nn.Module, objective: Objective, data: Data) -> Data:
    """Return the data without those of the selected examples that training leaves out.

    Such an example cannot be read, fails alone, or fits in no batch with others. A failure of the whole client would
    drop all its records because of one.
    """
    rows, trial, batch = selected(data).unique().tolist(), _copied(model), list[int]()

    def trains(rows: list[int]) -> bool:
        try:
            inputs, targets = data.batch(torch.tensor(rows))
            objective.loss(run_on(trial, inputs), targets)
        except Exception:  # noqa: BLE001 (of the task's own code)
            return False
        return True

    with quiet_generators(), torch.no_grad():
        if trains(rows):
            return data
        for row in rows:
            if trains([*batch, row]):
                batch.append(row)
    return only(data, np.array(batch)) if batch else data


def batches_of_all(clients: Iterable[Data]) -> Iterator[Data]:
    """Yield data for the checks, with an example of each client that has some.

    Up to `BATCH` clients share a batch. Lazy data, and data of another shape than the first, are yielded separately.
    """
    shared: list[Examples] = []
    for data in clients:
        if not len(data):
            continue
        few = isinstance(data, Examples) and only(data, selected(data).numpy())
        if not few or not isinstance(few.inputs, Tensor) or (shared and _form(few) != _form(shared[0])):
            yield data
            continue
        shared.append(few)
        if len(shared) == BATCH:
            yield joined(shared)
            shared = []
    if shared:
        yield joined(shared)


def _form(data: Examples) -> list[tuple[torch.Size, torch.dtype]]:
    return [(tensor.shape, tensor.dtype) for tensor in (data.inputs, data.targets)]


# --- randomness while the probe runs ------------------------------------------------------------------------------


def seed(draw: int = 0) -> None:
    """Seed the generators of torch, NumPy and Python; each draw differs."""
    torch.default_generator.manual_seed(SEED + draw)
    np.random.seed((SEED + draw) & 0x7FFFFFFF)
    random.seed(SEED + draw)


@contextmanager
def quiet_generators() -> Generator[None]:
    """Restore every generator afterwards, suppress warnings, and enable gradients."""
    states = torch.default_generator.get_state(), np.random.get_state(), random.getstate()
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.default_generator.set_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


class _Mode(TorchDispatchMode):
    """Mode that torch's compiler does not handle: to skip it, torch would first load the compiler for most of a second."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class ConstantRandomness(_Mode):
    """Replaces random draws of layers by constants, for any shape of the draw; uniform ones by `half`."""

    def __init__(self, half: float = 0.5) -> None:
        super().__init__()
        self.constants: dict[str, float] = dict.fromkeys(("rand", "rand_like", "uniform", "uniform_"), half)
        self.constants |= {"bernoulli": 1.0, "bernoulli_": 1.0}
        self.constants |= dict.fromkeys(("randn", "randn_like", "normal", "normal_"), 0.0)
        self.drew = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        result = func(*args, **(kwargs or {}))
        if name in self.constants and isinstance(result, Tensor):
            self.drew = True
            result.fill_(self.constants[name])
        return result


class _Precision(_Mode):
    """Records the least precise type in which a model computes."""

    def __init__(self) -> None:
        super().__init__()
        self.tolerance = ROUNDINGS * torch.finfo(torch.float64).eps

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.embedding_renorm_:
            remedy = "rescales the rows of the examples' words, which reveals them without noise; leave max_norm out"
            raise Refusal("model", "an embedding with max_norm", remedy)
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                # Below double precision fewer roundings meet: rows of a batch differ by some hundreds at most.
                eps = torch.finfo(tensor.dtype).eps
                rounding = min(COARSEST, eps * (ROUNDINGS if eps < 1e-12 else ROUNDINGS / 100))
                self.tolerance = max(self.tolerance, rounding)
        return result
