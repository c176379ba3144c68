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
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..base.refusal import Refusal
from .arrays import copy_with_base
from .data import Data, Examples, joined, leaves, mapped, only, rows_of, run_on
from .protocol import Objective

BATCH = 6  # examples that are selected, and of the probe of most models; each pair of them is tested
LARGE_MODEL = (
    10_000_000  # parameters above which a pass takes so long that a probe does with fewer: `OF_LARGE`
)
COMPARED = 1 << 20  # numbers that are compared at a time, in double precision
RESTORED = 1_000_000  # numbers of a frozen tensor that passes of a large model share and do not restore
SEED = 0x0FEDFE11  # of the layers' own randomness while the probe runs; it protects nothing
ROUNDINGS = 1e5  # roundings, in the least precise type of a model, by which equal results may differ
COARSEST = 0.1  # largest tolerance, relative; in half precision ROUNDINGS would exceed the results themselves
HALVES = (0.5, 0.0, 1 - 2**-24)  # constants for uniform draws; every coin falls differently at the last two
Array = Tensor | np.ndarray


@dataclass(frozen=True)
class Extent:
    """Size of a probe.

    Attributes:
      examples: of its batch.
      repeated: copies of one example in a batch that exceeds limits, such as the capacity of an expert.
      kinds: of inputs that replace an example's, of the three of `independence`.
      draws: random states in which each example is replaced in turn.
      tokens: of a sequence: the first and the last ones, if model and loss take so few.
    """

    examples: int
    repeated: int
    kinds: int
    draws: int
    tokens: float


WHOLE = Extent(BATCH, repeated=24, kinds=3, draws=BATCH, tokens=math.inf)
OF_LARGE = Extent(3, repeated=9, kinds=2, draws=1, tokens=32)


def is_large(model: nn.Module) -> bool:
    """Return whether a model has more than `LARGE_MODEL` parameters, frozen ones and buffers included."""
    return sum(tensor.numel() for tensor in chain(model.parameters(), model.buffers())) > LARGE_MODEL


@dataclass(frozen=True)
class Probe:
    """A model, a loss and a batch of few examples.

    Attributes:
      model: a copy, in training mode; in double precision if its extent and its code allow that.
      objective: defines the loss.
      inputs: inputs of `extent.examples` examples.
      targets: shape (examples, ...).
      initial: values by name of the parameters that every pass starts from.
      tolerance: relative difference above which two results differ.
      data: the owner's data, from which the examples are; None in the middle of a run.
      extent: size of the probe.
      tokens: of a sequence, see `ends`; infinite if sequences are whole.
    """

    model: nn.Module
    objective: Objective
    inputs: Any
    targets: Tensor
    initial: Mapping[str, Tensor]
    tolerance: float = 0.0
    data: Data | None = None
    extent: Extent = WHOLE
    tokens: float = math.inf

    def outputs(self, rows: Tensor | None = None, inputs: Any = None, draw: int = 0) -> Any:
        """Return the model's outputs, from the same random state and parameters at every call.

        Args:
          rows: positions in the batch, shape (b,); None for all.
          inputs: a batch in place of the probe's own.
          draw: number of the random state.
        """
        inputs = self.inputs if inputs is None else inputs
        seed(draw)
        for name, parameter in self.model.named_parameters():
            if name in self.initial:
                parameter.data.copy_(self.initial[name])
        return run_on(self.model, inputs if rows is None else rows_of(inputs, rows))

    def losses(self, outputs: Any, targets: Tensor) -> list[Tensor]:
        """Return each example's loss by itself, for outputs and targets of n examples, shape (n, ...) each."""
        rows = [slice(row, row + 1) for row in range(len(targets))]
        return [self.objective.loss(rows_of(outputs, row), targets[row]) for row in rows]

    def loss_alone(self, row: int, inputs: Any = None) -> Tensor:
        """Return the loss of one row's example as a batch of its own; `inputs`, if any, replace the probe's."""
        rows = torch.tensor([row])
        return self.objective.loss(self.outputs(rows, inputs), self.targets[rows])

    def differ(self, a: Tensor, b: Tensor, by_row: bool = False) -> bool:
        """Return whether two results differ by more than rounding; NaN equals NaN, and infinity infinity.

        Args:
          a: one result.
          b: the other.
          by_row: whether rounding is relative to the largest number of each row, instead of that of the whole.
        """
        if a.shape != b.shape:
            return True
        if not a.is_floating_point():
            return not torch.equal(a, b)
        rows = len(a) if by_row else 1
        if not a.numel():
            return False
        blocks = [each.detach().reshape(rows, -1).split(max(1, COMPARED // rows), 1) for each in (a, b)]
        pairs = list(zip(*blocks, strict=True))
        if not all(torch.equal(x.isfinite(), y.isfinite()) for x, y in pairs):
            return True
        largest = [torch.maximum(_finite(x).abs(), _finite(y).abs()).amax(1, keepdim=True) for x, y in pairs]
        limit = self.tolerance * torch.stack(largest).amax(0)
        return any(bool(((_finite(x) - _finite(y)).abs() > limit).any()) for x, y in pairs)

    def rows_differ(self, a: Any, b: Any, rows: Sequence[int]) -> bool:
        """Return whether any of these rows differs by more than rounding between two trees of one structure."""
        index = list(rows)
        return any(
            x.dim() and (x.shape[1:] != y.shape[1:] or self.differ(x[index], y[index], by_row=True))
            for x, y in zip(leaves(a), leaves(b), strict=True)
        )

    def on(self, inputs: Any, targets: Tensor) -> Probe:
        """Return the probe with another batch, converted to its precision."""
        if any(p.dtype == torch.float64 for p in self.initial.values()):
            inputs, targets = mapped(_double, (inputs, targets))
        if self.tokens < math.inf:
            inputs, targets = mapped(partial(ends, self.tokens), (inputs, targets))
        return replace(self, inputs=inputs, targets=targets)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


def prepare(model: nn.Module, objective: Objective, data: Data) -> Probe:
    """Return a probe of a perturbed copy of the model on a few examples, of those on which training works if any.

    It computes in double precision, or in the model's own if that is large or its code does not allow that.
    """
    if is_large(model):
        return _prepared_large(model, objective, data)
    data = _usable(model, objective, data)
    inputs, targets = _few(data, WHOLE)
    double = mapped(_double, (inputs, targets))
    try:
        probe = _measured(_perturbed(_copied(model).double(), objective, *double))
    except (RuntimeError, TypeError):
        probe = _measured(_perturbed(_copied(model), objective, inputs, targets))
    return replace(probe, data=data)


def _prepared_large(model: nn.Module, objective: Objective, data: Data) -> Probe:
    """Return a large model's probe, on the ends of sequences of tokens if model and loss take them; else on whole ones."""
    extent = OF_LARGE
    with suppress(Exception):  # of the task's own code: an example that fails, or a sequence of other length
        inputs, targets = _few(data, extent)
        if all(map(are_tokens, leaves(inputs))):
            short = mapped(partial(ends, extent.tokens), (inputs, targets))
            probe = _measured(_perturbed(_copied(model), objective, *short))
            return replace(probe, data=data, extent=extent, tokens=extent.tokens)
    data = _usable(model, objective, data)
    probe = _measured(_perturbed(_copied(model), objective, *_few(data, extent)))
    return replace(probe, data=data, extent=extent)


def _few(data: Data, extent: Extent) -> tuple[Any, Tensor]:
    """Return a batch of as many examples as the extent says."""
    inputs, targets = mapped(torch.clone, data.batch(spread(len(data), extent.examples)))
    for tensor in leaves(inputs):
        # Fewer examples are repeated, and changed: equal rows would hide a layer that sorts the batch.
        repeated = tensor[len(data) :]
        if repeated.is_floating_point():
            repeated *= 1 + torch.rand_like(repeated)
    return inputs, targets


def are_tokens(tensor: Tensor) -> bool:
    """Return whether a tensor has whole numbers, shape (n, tokens)."""
    return tensor.dim() == 2 and not tensor.is_floating_point()


def ends(tokens: float, tensor: Tensor) -> Tensor:
    """Return the first and the last tokens of each sequence, shape (n, tokens); other tensors unchanged."""
    if not are_tokens(tensor) or tensor.shape[1] <= tokens:
        return tensor
    half = int(tokens) // 2
    return torch.cat([tensor[:, :half], tensor[:, -half:]], 1)


@torch.no_grad()
def _perturbed(model: nn.Module, objective: Objective, inputs: Any, targets: Tensor) -> Probe:
    """Return a probe with perturbed parameters: a layer that is initialised to zero would hide every dependence."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            size = float(parameter.abs().mean()) if parameter.numel() else 0.0
            parameter.add_(torch.randn_like(parameter) * (size or 0.1) / 2)
    initial = {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or parameter.numel() <= RESTORED
    }
    return Probe(model, objective, inputs, targets, initial)


def _measured(probe: Probe) -> Probe:
    """Return the probe with the tolerance that a first pass shows; refuse outputs that are no batch."""
    with _Precision() as precision:
        outputs = probe.outputs()
        probe.objective.loss(outputs, probe.targets)
    shapes = [tuple(tensor.shape) for tensor in leaves(outputs)]
    if not shapes:
        raise Refusal("model", type(outputs).__name__, "return a tensor, or a tuple or dictionary of them")
    # A number among several outputs, or one that bears a name, is a loss that the model computed itself.
    may_have_loss = len(shapes) > 1 or isinstance(outputs, dict)
    count = len(probe.targets)
    if any(shape[:1] != (count,) and not (shape == () and may_have_loss) for shape in shapes):
        value = f"{count} examples became outputs of shape {', '.join(map(str, shapes))}"
        raise Refusal("model", value, "the first dimension of the outputs must be the batch")
    return replace(probe, tolerance=precision.tolerance)


def _copied(model: nn.Module) -> nn.Module:
    """Return a copy in training mode; refuse a model that cannot be copied, since a measurement would change it.

    A copy of a large model shares the frozen tensors.
    """
    try:
        if is_large(model):
            return copy_with_base(model).train()
        return copy.deepcopy(model).train()
    except (RuntimeError, TypeError) as error:
        remedy = "it cannot be copied, so its independence cannot be measured; keep no computed tensor in it"
        raise Refusal("model", type(model).__name__, remedy) from error


def _finite(block: Tensor) -> Tensor:
    """Return a block in double precision, with zeros for NaN and infinity."""
    return block.double().nan_to_num(0, 0, 0)


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def equal(a: Any, b: Any) -> bool:
    """Return whether two arrays, tensors or numbers are equal to the bit; NaN equals NaN."""
    if isinstance(a, Array) and isinstance(b, Array):
        x, y = map(_as_array, (a, b))
        return np.shape(x) == np.shape(y) and np.array_equal(x, y, equal_nan=x.dtype.kind in "fc")
    return type(a) is type(b) and (a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b)))


def _as_array(value: Array) -> np.ndarray:
    """Return the values as an array, those of bfloat16, which NumPy lacks, in single precision."""
    if isinstance(value, Tensor) and value.dtype == torch.bfloat16:
        value = value.float()
    return np.asarray(value)


# --- examples of the probe ----------------------------------------------------------------------------------------


def spread(count: int, examples: int = BATCH) -> Tensor:
    """Return as many positions as `examples`, spread over the data, which may be sorted by class."""
    numbers = torch.arange(examples)
    return numbers * count // examples if count > examples else numbers % count


def selected(data: Data, examples: int = BATCH) -> Tensor:
    """Return positions of examples for the checks: spread over the data and, in memory, those of extreme targets.

    The number is the same for every client: in a batch of several clients, `spread` then selects one example of each.
    """
    rows = spread(len(data), examples)
    return torch.cat([rows, extreme(data.targets)]) if isinstance(data, Examples) else rows


def extreme(targets: Tensor) -> Tensor:
    """Return positions of targets that a loss may ignore, such as padding or missing labels.

    Such a value is the least or the greatest: these are the rows with the most and the fewest of each.
    """
    flat = targets.reshape(len(targets), -1)
    if not flat.numel():
        return torch.arange(0)
    counts = [(flat == value).sum(1) for value in flat.aminmax()]
    return torch.stack([row for count in counts for row in (count.argmax(), count.argmin())])


def _usable(model: nn.Module, objective: Objective, data: Data) -> Data:
    """Return the data, or if training fails on some of the selected examples, the selected ones on which it does not.

    Training leaves out an example that cannot be read, fails alone, or fits in no batch with others. A refusal of the
    client for one such example would drop all its records.
    """
    rows = selected(data).unique().tolist()
    trial_model = _copied(model)

    def trains(rows: list[int]) -> bool:
        """Return whether model and loss take these examples as one batch."""
        try:
            inputs, targets = data.batch(torch.tensor(rows))
            objective.loss(run_on(trial_model, inputs), targets)
        except Exception:  # noqa: BLE001 (of the task's own code)
            return False
        return True

    usable: list[int] = []
    with quiet_generators(), torch.no_grad():
        if trains(rows):
            return data
        for row in rows:
            if trains([*usable, row]):
                usable.append(row)
    return only(data, np.array(usable)) if usable else data


def batches_of_all(clients: Iterable[Data], pooled: bool = False) -> Iterator[Data]:
    """Yield data for the checks, with examples of each client that has some.

    Up to `BATCH` clients share a batch. Lazy data, several inputs, and data of another shape are yielded separately.

    Args:
      clients: data of each client.
      pooled: whether all clients share one batch, of the examples that are `selected` among all; of a large model.
    """
    shared: list[Examples] = []
    for data in clients:
        if not len(data):
            continue
        if not isinstance(data, Examples) or not isinstance(data.inputs, Tensor):
            yield data
            continue
        examples = only(data, selected(data).numpy())
        if shared and _form(examples) != _form(shared[0]):
            yield data
            continue
        shared.append(examples)
        if len(shared) == BATCH:
            pool, shared = joined(shared), []
            if pooled:
                shared.append(only(pool, selected(pool).numpy()))
            else:
                yield pool
    if shared:
        yield joined(shared)


def _form(data: Examples) -> list[tuple[torch.Size, torch.dtype]]:
    return [(tensor.shape, tensor.dtype) for tensor in (data.inputs, data.targets)]


# --- randomness while the probe runs ------------------------------------------------------------------------------


def seed(draw: int = 0) -> None:
    """Seed the generators of torch, NumPy and Python; each number of a draw gives another state."""
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
    """Dispatch mode for code that is not compiled; torch would else load its compiler, for most of a second, to skip it."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class ConstantRandomness(_Mode):
    """Context in which layers draw constants of any shape: `half` if uniform, 0 if normal, 1 if a coin; no dropout.

    `drew` says whether such a constant was drawn.
    """

    def __init__(self, half: float = 0.5) -> None:
        super().__init__()
        self.constants: dict[str, float] = dict.fromkeys(("rand", "rand_like", "uniform", "uniform_"), half)
        self.constants |= {"bernoulli": 1.0, "bernoulli_": 1.0}
        self.constants |= dict.fromkeys(("randn", "randn_like", "normal", "normal_"), 0.0)
        self.drew = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "native_dropout":  # which then drops nothing
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        result = func(*args, **(kwargs or {}))
        if name in self.constants and isinstance(result, Tensor):
            self.drew = True
            result.fill_(self.constants[name])
        return result


class _Precision(_Mode):
    """Context that records the `tolerance` of a model's least precise type; it refuses an embedding with max_norm."""

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
