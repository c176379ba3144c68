"""Probe of independence: it measures that no example of a batch affects another one's output, loss or gradient.

DP-SGD bounds one example's contribution to a step's sum. The bound holds only if that contribution depends on no other
example and if only the parameters are carried from step to step. Both are measured here on the model's own code and on
a few of the owner's examples, before anything is spent:

- an example is replaced, and no other row of the outputs moves (the generators of randomness are seeded alike);
- a part of the batch is computed alone, and its rows are those of the whole batch; so is one example many times;
- the loss of the batch, and its gradient, are those of the mean of the examples' losses, for targets in memory that it
  may leave out too;
- the gradient of any weighted sum of the examples' losses is the sum of the gradients that each has alone;
- a step on other examples in between changes no result, no parameter, no buffer and no attribute.

Where records are hidden, and a model is evaluated on them or says something of each, the outputs are measured in
evaluation mode as well, and metrics of single records in one order and the other.

What is random in a layer is seeded where batches have the same size, and held constant where they differ, because
the same seed gives other draws to a tensor of another shape. Several seeds and constants turn a coin both ways.
"""

from __future__ import annotations

import copy
import math
import multiprocessing
import os
import random
import signal
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from types import FunctionType, ModuleType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..base.refusal import Refusal
from .data import Data, Examples, LazyExamples, data_of_all, joined, leaves, mapped, only, rows_of, run_on
from .fingerprint import content_of
from .protocol import Objective, Task

MOST_CLASSES = 500  # batches of targets, of one example and some classes each
BATCH = 6  # examples of the probe; each pair of them is tested
MANY = 24  # examples of a batch that exceeds limits such as the capacity of an expert
# Of two examples after each of two others: equal coins would look like a memory in one of 100 000 data sets.
READINGS = 5
SEED = 0x0FEDFE11  # of the layers' own randomness while the probe runs; it protects nothing
EXTREME = 1e3  # times an input's own size: moves sorted places, maxima and thresholds
MOVED = 1e-3  # of a row's largest number: rows of equal batches are rounded alike
LATE = 64  # steps on other examples before the first ones are computed again
LARGE = 1_000_000  # numbers in one tensor that are not copied to be compared
MOST_LOOKED_INTO = 1000  # entries of a container that are compared
ROUNDINGS = 1e5  # of the least precise number in a model, by which equal results may differ
COARSEST = 0.1  # of what two results are: in half precision that many roundings would be all of them
ROUNDED = 0.1  # of that: share of an example's whole gradient by which a tensor may differ; 0.002 was measured at most
NAMED = 0.1  # of the tolerance: the layer that mixes may move less than the next one makes of it
REREAD = 1e-5  # by which a number of a client's data may differ that was computed again
WEIGHTS_REMEDY = (
    "return the mean over the batch of losses that each look at one example; class weights so: "
    "(weight[targets] * cross_entropy(outputs, targets, reduction='none')).mean(), which counts an ignored label as zero"
)
STATE_REMEDY = "state that a step keeps reaches later steps without noise; keep nothing of the examples"


@dataclass(frozen=True)
class Probe:
    """A model, a loss and a few examples, prepared for the checks.

    Attributes:
      model: a copy, in training mode; double precision where the model can.
      objective: gives the loss of a batch.
      inputs: of `BATCH` examples.
      targets: shape (BATCH, ...).
      begun: the parameters' values before the first forward pass.
      tolerance: relative difference above which two results differ.
    """

    model: nn.Module
    objective: Objective
    inputs: Any
    targets: Tensor
    begun: tuple[Tensor, ...]
    tolerance: float = 0.0

    def outputs(self, rows: Tensor | None = None, inputs: Any = None, draw: int = 0) -> Any:
        """Return the outputs of these rows, from the same random state and parameters at every call."""
        given = self.inputs if inputs is None else inputs
        _seed(draw)
        for parameter, value in zip(self.model.parameters(), self.begun, strict=True):
            parameter.data.copy_(value)
        return run_on(self.model, given if rows is None else rows_of(given, rows))

    def losses(self, outputs: Any, targets: Tensor) -> list[Tensor]:
        """Return each example's loss by itself."""
        rows = [slice(i, i + 1) for i in range(len(targets))]
        return [self.objective.loss(rows_of(outputs, row), targets[row]) for row in rows]

    def loss_alone(self, row: int) -> Tensor:
        """Return the loss of a batch of one example."""
        rows = torch.tensor([row])
        return self.objective.loss(self.outputs(rows), self.targets[rows])

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

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters that train."""
        return [p for p in self.model.parameters() if p.requires_grad]


def check_independence(model: nn.Module, objective: Objective, data: Data) -> None:
    """Refuse a model or a loss with which one example's part of a step depends on another example.

    Args:
      model: in its initial state for training; it is not changed.
      objective: its `loss` takes outputs and targets of a batch.
      data: the owner's own; only a few examples are read, and none is kept.

    Raises:
      Refusal: a check failed; the sentence names the layer, the loss or the attribute, and the remedy.
    """
    _on_what_fits(_check_trained, model, objective, data)


def _check_trained(model: nn.Module, objective: Objective, data: Data) -> None:
    probe = _prepared(model, objective, data)
    for check in (_check_rows, _check_parts, _check_loss, _check_gradients, _check_state):
        check(probe)
    if isinstance(data, Examples):
        inputs, targets = _as_in(probe, data.batch(_chosen(data)[-BATCH:]))
        _check_loss(replace(probe, inputs=inputs, targets=targets))
    else:
        own, one, other = (partial(data.batch, rows) for rows in _spread(len(data))[:4].tensor_split((2, 3)))
        check_reading(own, one, other)
        if data.collate is not None:
            _check_collate(probe, data)


class Mixing(Refusal):
    """Refusal of a task that mixed the examples of a step in the middle of a run."""


def check_step(
    model: nn.Module, objective: Objective, read: Callable[[], tuple[Any, Tensor]], number: int
) -> None:
    """Refuse a model or a loss with which others' outputs or loss gradients move if a step's first example is replaced.

    Args:
      model: in training mode.
      objective: its `loss` takes outputs and targets of a batch.
      read: returns the batch, of at least two examples.
      number: of the step; it seeds what is random, so that a rare coin falls differently in other steps.

    Raises:
      Mixing: they moved.
    """
    found: list[list[Any]] = []
    with _quiet_generators():
        try:
            batch = read()
            probe = Probe(model, objective, *batch, tuple(p.detach() for p in model.parameters()), MOVED)
            for inputs, targets in (batch, mapped(lambda each: torch.cat([each[1:2], each[1:]]), batch)):
                outputs = mapped(Tensor.detach, probe.outputs(inputs=inputs, draw=number))
                moving = [each.requires_grad_() for each in leaves(outputs) if each.is_floating_point()]
                found.append([outputs, *_gradient(moving, objective.loss(outputs, targets))])
        except Exception:  # noqa: BLE001 (the step itself leaves an example out on which the task fails)
            return
    calm, after = found
    if _moved(probe, calm, after, range(1, len(batch[1]))):
        remedy = "an example's part of a step changed when another example did; let it depend on that example alone"
        raise Mixing("model or loss", type(model).__name__, remedy)


def check_evaluated_apart(model: nn.Module, task: Task, data: Data) -> None:
    """Refuse a model that mixes examples in evaluation mode, or metrics of one example that depend on another's.

    Arguments as of `check_independence`, which has passed.
    """
    with torch.no_grad():
        _on_what_fits(_check_evaluated, model, task, data)


def _check_evaluated(model: nn.Module, task: Any, data: Data) -> None:
    probe = _prepared(model, task, data)
    probe.model.eval()
    _check_rows(probe)
    _check_parts(probe)
    check_measured_apart(task, probe.outputs(), probe.targets)


def _on_what_fits(
    check: Callable[[nn.Module, Objective, Data], None], model: nn.Module, objective: Objective, data: Data
) -> None:
    """Check on the data or, if that fails, without the selected examples that training leaves out.

    Such an example cannot be read, fails alone, or fits in no batch with others. A failure of the whole client would
    drop all its records because of one.
    """
    if len(data) == 0:
        return
    with _quiet_generators():
        try:
            return check(model, objective, data)
        except Exception:
            seen = (_chosen(data) if isinstance(data, Examples) else _spread(len(data))).unique().tolist()
            made, fit = _copied(model), list[int]()
            for row in seen:
                with suppress(Exception), torch.no_grad():
                    inputs, targets = data.batch(torch.tensor([*fit, row]))
                    objective.loss(run_on(made, inputs), targets)
                    fit.append(row)
            if len(fit) in (0, len(seen)):
                raise
        check(model, objective, only(data, np.array(fit)))


def check_reading(read: Callable[[], Any], one: Callable[[], Any], other: Callable[[], Any]) -> None:
    """Refuse data whose items depend on the items that were read before.

    Items are read several times: data with an own random generator differ also after the same items, and pass.

    Args:
      read: returns some examples.
      one: reads other examples first.
      other: reads yet other examples first.
    """

    def after(before: Callable[[], Any]) -> list[Tensor]:
        before()
        _seed()
        return [each.clone() for each in leaves(read())]

    def alike(found: Sequence[list[Tensor]]) -> bool:
        return all(_same(a, b) for later in found for a, b in zip(found[0], later, strict=False))

    with _quiet_generators():
        after(one)  # a cache that the first reading fills is no memory of examples
        found = [after(before) for before in (one, other) * READINGS]
    if alike(found[::2]) and alike(found[1::2]) and not alike(found):
        remedy = "let the data set and its transform keep nothing of the items that they read"
        raise Refusal("data", "an example differs after another one was read", remedy)


def check_order(task: Task) -> None:
    """Refuse a task with which a client's data depend on the clients whose data were read before.

    Forked processes read all clients in one order and in the other: each begins with the present state of the task, its
    modules and their caches, and leaves that as it is. Data in memory are read whole, of others a few items.

    Args:
      task: of which no client has been read.

    Raises:
      Refusal: a client's data differ by more than rounding.
    """
    clients = range(task.num_clients)
    one, other = _read(task, clients), _read(task, clients[::-1])
    if not (apart := [each for each in clients if one[each] != other[each]]):
        return
    again = _read(task, clients)  # data that differ in the same order too are random
    for client in [each for each in apart if one[each] == again[each]][:: max(1, len(apart) - 1)]:
        a, b = (np.frombuffer(_read(task, order, client)[client]) for order in (clients, clients[::-1]))
        least = REREAD * float(np.abs(np.nan_to_num(a)).max(initial=0)) / 100
        if a.shape != b.shape or not np.allclose(a, b, REREAD, least, equal_nan=True):
            remedy = (
                "a client's data change with the clients that were read before; compute them from its own and public "
                "data, and a generator's seed from its number"
            )
            raise Refusal("client_data", type(task).__name__, remedy)


def _read(task: Task, order: Sequence[int], whole: int | None = None) -> dict[int, bytes]:
    """Return each client's content as a new process reads them in this order; refuse if it dies."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    if (process := os.fork()) == 0:
        with suppress(BaseException):
            torch.set_num_threads(1)  # the pool of threads is not forked
            for client in order:
                theirs.send_bytes(_content(task, client, client == whole))
        os._exit(0)
    theirs.close()
    try:
        with ours:
            return {client: ours.recv_bytes() for client in order}
    except EOFError as error:
        remedy = "the process that read all clients to compare them died, as where memory ends; make room"
        raise Refusal("client_data", type(task).__name__, remedy) from error
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def _content(task: Task, client: int, whole: bool) -> bytes:
    """Return a hash of a client's data, or all their numbers; nothing if they fail, or differ after the same seed."""
    try:
        _seed()
        data = data_of_all(task, client)
        if isinstance(data, LazyExamples):
            few, rows = data, _spread(len(data))
            once, data = (Examples(*(_seed(), few.batch(rows))[1]) for _ in range(2))
            if content_of(once) != content_of(data):
                return b""
        if not whole:
            return str(content_of(data)).encode()
        numbers = leaves((data.inputs, data.targets))
        return b"".join(each.double().contiguous().numpy().tobytes() for each in numbers)
    except Exception:  # noqa: BLE001 (of the task's own code, which the checks of its data name)
        return b""


def check_measured_apart(task: Task, outputs: Any, targets: Tensor, each: int = 1) -> None:
    """Refuse metrics that depend on earlier measurements, and so on other records or clients.

    Args:
      task: defines the metrics.
      outputs: of a model.
      targets: shape (n, ...).
      each: number of examples measured together.
    """
    parts = [slice(start, start + each) for start in range(0, len(targets), each)]
    # Extreme outputs in between: a maximum that the task keeps may already be that of all examples.
    first, _, again = (
        [_found(task, rows_of(given, part), targets[part]) for part in parts]
        for given in (outputs, mapped(lambda tensor: tensor * -EXTREME, outputs), outputs)
    )
    if first != again:
        name = f"{type(task).__name__}.metrics"
        remedy = "return the metrics of one batch, and keep nothing of earlier ones"
        raise Refusal(name, "the same examples give other metrics after another batch was measured", remedy)


def _found(task: Task, outputs: Any, targets: Tensor) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return repr({name: float(value) for name, value in task.metrics(outputs, targets).items()})
    except Exception:  # noqa: BLE001 (of the task's own code, such as an area under a curve, which few examples do not have)
        return ""


def _spread(count: int) -> Tensor:
    """Return `BATCH` positions spread over the data, which may be sorted by class."""
    numbers = torch.arange(BATCH)
    return numbers * count // BATCH if count > BATCH else numbers % count


def batches_of_all(clients: Iterable[Data]) -> Iterator[Data]:
    """Yield data for the checks, with an example of each client.

    Up to `BATCH` clients share a batch. Lazy data, and data of another shape than the first, are yielded separately.

    Args:
      clients: the data of each, some of which may be empty.
    """
    shared: list[Examples] = []
    for data in clients:
        if not len(data):
            continue
        few = isinstance(data, Examples) and only(data, _chosen(data).numpy())
        if not few or not isinstance(few.inputs, Tensor) or (shared and not _alike(few, shared[0])):
            yield data
            continue
        shared.append(few)
        if len(shared) == BATCH:
            yield joined(shared)
            shared = []
    if shared:
        yield joined(shared)


def _alike(a: Examples, b: Examples) -> bool:
    pairs = (a.inputs, b.inputs), (a.targets, b.targets)
    return all(one.shape == other.shape and one.dtype == other.dtype for one, other in pairs)


def _chosen(data: Examples) -> Tensor:
    """Return positions of equally many examples of every client, one of each at every `BATCH`-th part of all joined."""
    return torch.cat([_spread(len(data)), _telling(data.targets)])


def _telling(targets: Tensor) -> Tensor:
    """Return positions of targets that a loss may ignore, such as padding or missing labels.

    Such a value is the least or the greatest: these are the rows with the most and the fewest of each.
    """
    flat = targets.reshape(len(targets), -1)
    counts = [(flat == end).sum(1) for end in flat.aminmax()] if flat.numel() else []
    places = [place for count in counts for place in (count.argmax(), count.argmin())]
    return torch.stack(places) if places else torch.arange(0)


def _prepared(model: nn.Module, objective: Objective, data: Data) -> Probe:
    """Return the probe in double precision, or in the model's own if its code requires that."""
    inputs, targets = mapped(torch.clone, data.batch(_spread(len(data))))
    for tensor in leaves(inputs):
        if len(data) < BATCH and tensor.is_floating_point():  # equal rows would hide what orders them
            tensor[len(data) :] *= 1 + torch.rand_like(tensor[len(data) :])
    probe = _probe(_copied(model).double(), objective, *mapped(_double, (inputs, targets)))
    precision = _Precision()
    try:
        with precision:
            objective.loss(probe.outputs(), probe.targets)
    except (RuntimeError, TypeError):
        probe, precision = _probe(_copied(model), objective, inputs, targets), _Precision()
        with precision:
            objective.loss(probe.outputs(), targets)
    probe = replace(probe, tolerance=precision.tolerance)
    outputs = probe.outputs()
    shapes = [tuple(each.shape) for each in leaves(outputs)]
    if not shapes:
        raise Refusal("model", type(outputs).__name__, "return a tensor, or a tuple or dictionary of them")
    # A number among several outputs, or one that bears a name, is a loss that the model computed itself.
    lone = len(shapes) == 1 and not isinstance(outputs, dict)
    if any(each[:1] != (BATCH,) and (each or lone) for each in shapes):
        found = f"{BATCH} examples became outputs of shape {', '.join(map(str, shapes))}"
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
def _probe(model: nn.Module, objective: Objective, inputs: Any, targets: Tensor) -> Probe:
    """Perturb the parameters: a layer that is initialised to zero would hide every dependence."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            size = float(parameter.abs().mean()) if parameter.numel() else 0.0
            parameter.add_(torch.randn_like(parameter) * (size or 0.1) / 2)
    return Probe(model, objective, inputs, targets, tuple(p.detach().clone() for p in model.parameters()))


@torch.no_grad()
def _check_rows(probe: Probe) -> None:
    """Replace one example; the outputs of the others may not change."""
    for row in range(BATCH):
        calm = probe.outputs(draw=row)
        for replaced in _replacements(probe.inputs, row):
            after = probe.outputs(inputs=replaced, draw=row)
            if _moved(probe, calm, after, [i for i in range(BATCH) if i != row]):
                layer = _culprit(probe, partial(probe.outputs, inputs=replaced, draw=row), row)
                _refuse_layer(probe, layer, "one example's output changes when another example does")


def _replacements(inputs: Any, row: int) -> Iterator[Any]:
    """Yield the batch with another example in one row: a neighbour's, and two that are out of all proportion."""

    def with_row(make: Callable[[Tensor], Tensor]) -> Any:
        def changed(tensor: Tensor) -> Tensor:
            other = tensor.clone()
            other[row] = make(tensor)
            return other

        return mapped(changed, inputs)

    yield with_row(lambda tensor: tensor[(row + 1) % BATCH])
    for sign in (1.0, -1.0):
        yield with_row(partial(_extreme, row, sign))


def _extreme(row: int, sign: float, tensor: Tensor) -> Tensor:
    """Return a row out of all proportion; of whole numbers, which may be indices, the row in another order."""
    own = tensor[row]
    if not tensor.is_floating_point():
        return own.flatten().flip(0).reshape(own.shape)
    return sign * EXTREME * (float(tensor.abs().max()) or 1.0) * torch.rand_like(own)


@torch.no_grad()
def _check_parts(probe: Probe) -> None:
    """Compute parts of the batch alone, and one example many times; the rows may not differ."""
    parts = torch.tensor([0]), torch.tensor([1, 4]), torch.arange(BATCH - 1), torch.zeros(MANY).long()
    for half in _HALVES:
        with _ConstantRandomness(half) as random_layers:
            whole = probe.outputs()
            for part in parts:
                if _moved(probe, rows_of(whole, part), probe.outputs(part), range(len(part))):
                    layer = _culprit(probe, partial(probe.outputs, part), None, part)
                    _refuse_layer(probe, layer, "an example's output depends on the size of its batch")
        if not random_layers.drew:
            return


def _check_loss(probe: Probe) -> None:
    """Hold the loss of the batch, and its gradient, against the mean of the examples' losses, at several outputs."""
    with _ConstantRandomness():
        calm = mapped(Tensor.detach, probe.outputs())
        inside = [probe.loss_alone(row) for row in range(BATCH)] if _has_loss(calm) else None
    many = BATCH if inside is not None or sum(each.numel() for each in leaves(calm)) > LARGE else MANY
    for outputs, targets in _outputs_near(calm, probe.targets, many):
        fractions = [each for each in leaves(outputs) if each.is_floating_point()]
        for each in fractions:
            each.requires_grad_()
        together = probe.objective.loss(outputs, targets)
        if together.dim() != 0:
            remedy = "it must be one number; " + WEIGHTS_REMEDY
            raise Refusal("loss", f"shape {tuple(together.shape)}", remedy)
        alone = torch.stack(inside or probe.losses(outputs, targets)).mean()
        name = f"{type(probe.objective).__name__}.loss"
        if probe.differ(together, alone):
            # No number: these are losses of an owner's examples, and the sentence is printed and logged.
            raise Refusal(name, "it is not the mean of the examples' losses", WEIGHTS_REMEDY)
        if inside is not None:  # made by the model, where `_check_gradients` looks
            if len(leaves(calm)) == 1:
                _check_lone_loss(probe, inside)
            return
        for ours, theirs in zip(_gradient(fractions, together), _gradient(fractions, alone), strict=True):
            if probe.differ(ours, theirs):
                found = "its gradient is not that of the mean of the examples' losses"
                raise Refusal(name, found, WEIGHTS_REMEDY)
    for classes in _of_every_class(calm, probe.targets):
        try:
            together, alone = probe.objective.loss(calm, classes), probe.losses(calm, classes)
        except (RuntimeError, LookupError, ValueError):
            continue  # a class that the loss does not know
        if probe.differ(together, torch.stack(alone).mean()):
            found = "it is not the mean of the examples' losses where their classes differ"
            raise Refusal(f"{type(probe.objective).__name__}.loss", found, WEIGHTS_REMEDY)


def _of_every_class(outputs: Any, targets: Tensor) -> Iterator[Tensor]:
    """Yield targets in which each class stands beside others: few examples of one client may all be of one."""
    if not isinstance(outputs, Tensor) or outputs.dim() != 2 or targets.dim() != 1:
        return
    classes = outputs.shape[1]
    if targets.is_floating_point() or not bool(((targets >= 0) & (targets < classes)).all()):
        return
    for first in range(0, classes, max(BATCH - 1, classes // MOST_CLASSES)):
        yield torch.cat([targets[:1], (first + torch.arange(BATCH - 1)) % classes])


def _check_lone_loss(probe: Probe, alone: Sequence[Tensor]) -> None:
    """Replace one example; the loss, of which no outputs tell whose part is whose, may move by that one's alone."""
    name = f"{type(probe.objective).__name__}.loss"
    for row in range(BATCH):
        for replaced in _replacements(probe.inputs, row):
            with _ConstantRandomness():
                together = probe.objective.loss(probe.outputs(inputs=replaced), probe.targets)
                own = torch.tensor([row])
                outputs = probe.outputs(inputs=rows_of(replaced, own))
                moved = [*alone[:row], probe.objective.loss(outputs, probe.targets[own]), *alone[row + 1 :]]
            if probe.differ(together, torch.stack(moved).mean()):
                found = "it is not the mean of the examples' losses once an example is replaced"
                raise Refusal(name, found, WEIGHTS_REMEDY)


def _outputs_near(calm: Any, targets: Tensor, many: int) -> Iterator[tuple[Any, Tensor]]:
    """Yield possible outputs of a model: a loss with a margin or a maximum mixes examples only away from it.

    Args:
      calm: outputs of the probe's examples.
      targets: of these.
      many: rows of one of the batches, of which a loss may use only some.
    """

    def moved(scale: float, each: Tensor) -> Tensor:
        if not each.is_floating_point() or not each.numel():
            return each.clone()
        size = float(each.abs().max().nan_to_num()) or 1.0
        return each + scale * size * torch.randn_like(each) if scale else each.clone()

    for scale, count in ((0.0, BATCH), (1.0, many), (30.0, BATCH)):
        rows = torch.arange(count) % BATCH
        given = calm if count == BATCH else rows_of(calm, rows)
        yield mapped(partial(moved, scale), given), targets[rows]


def _check_gradients(probe: Probe) -> None:
    """Compare the gradient of a weighted sum of the examples' losses with the sum of their single gradients."""
    if not probe.parameters:
        return
    weights = (1 + torch.arange(BATCH, dtype=torch.float64) / BATCH).tolist()
    with _ConstantRandomness():
        outputs = probe.outputs()
        if _has_loss(outputs):  # it weighs all alike
            weights = [1.0] * BATCH
            loss: Any = probe.objective.loss(outputs, probe.targets) * BATCH
        else:
            losses = probe.losses(outputs, probe.targets)
            loss = sum(weight * each for weight, each in zip(weights, losses, strict=True))
        together = _gradient(probe.parameters, loss)
        alone, length = [torch.zeros_like(p) for p in probe.parameters], 0.0
        for row, weight in enumerate(weights):
            single = _gradient(probe.parameters, probe.loss_alone(row))
            alone = [total + weight * g for total, g in zip(alone, single, strict=True)]
            length += weight * _norm(single)
    least = ROUNDED * probe.tolerance * length
    trained = (name for name, p in probe.model.named_parameters() if p.requires_grad)
    for name, ours, theirs in zip(trained, together, alone, strict=True):
        # A gradient that is zero, as of the bias of an attention's key, has the roundings of the whole one, which is
        # clipped as one. Compared so that infinity and NaN are refused.
        if probe.differ(ours, theirs) and not _norm([ours - theirs]) <= least < math.inf:
            remedy = (
                "an example's gradient depends on the rest of its batch; make it depend on that example alone"
            )
            raise Refusal("model", f"gradient of {name}", remedy)


def _norm(gradient: Sequence[Tensor]) -> float:
    return math.hypot(*(float(each.detach().double().norm()) for each in gradient))


def _gradient(of: Sequence[Tensor], loss: Any) -> list[Tensor]:
    """Return the gradient of the loss, zeros for a tensor that it does not depend on."""
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        return [torch.zeros_like(each) for each in of]
    found = cast(Sequence[Tensor | None], torch.autograd.grad(loss, of, allow_unused=True, retain_graph=True))
    if any(g is not None and g.is_sparse for g in found):
        raise Refusal("model", "a sparse gradient", "no engine clips it; give the embedding sparse=False")
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, of, strict=True)]


def _check_state(probe: Probe) -> None:
    """Take steps on two batches in turn; neither results nor state may depend on which came before."""

    def step(rows: Sequence[int]) -> Tensor:
        chosen = torch.tensor(rows)
        loss = probe.objective.loss(probe.outputs(chosen), probe.targets[chosen])
        _gradient(probe.parameters, loss)
        return loss.detach().clone()

    one, other = [0, 1, 2], [5, 4, 3]
    step(one)  # state that the first call creates is no memory of examples
    begun = {name: value for name, value in _kept(probe) if isinstance(value, _ARRAY)}
    first, kept_one = step(one), dict(_kept(probe))
    changed = [name for name, value in begun.items() if not _same(value, kept_one.get(name))]
    step(other)
    kept_other = dict(_kept(probe))
    names = sorted({*kept_one, *kept_other})
    if changed := [
        *changed,
        *(name for name in names if not _same(kept_one.get(name), kept_other.get(name))),
    ]:
        raise Refusal(changed[0], "changed by a step", STATE_REMEDY)
    with torch.no_grad():
        for _ in range(LATE):  # state of an object that nothing looks into may be used late
            probe.objective.loss(probe.outputs(torch.tensor(other[:1])), probe.targets[other[:1]])
    if probe.differ(first, step(one)):
        found = "the same batch gives another loss after a step on others"
        raise Refusal("model or loss", found, STATE_REMEDY)


def _check_collate(probe: Probe, data: LazyExamples) -> None:
    """Collate an item with others, and with copies of itself; its loss may not change."""
    items = data.items(_spread(len(data)).tolist())
    for first, own in enumerate(items[: BATCH // 2]):
        others = [*items[:first], *items[first + 1 :]]
        with _ConstantRandomness():
            among, alone = (_first_loss(probe, data, [own, *rest]) for rest in (others, [own] * len(others)))
        if probe.differ(among, alone):
            remedy = "transform each example separately, and hide padding from the model"
            raise Refusal("collate", "one example's loss changes when another example does", remedy)


def _first_loss(probe: Probe, data: LazyExamples, items: list[Any]) -> Tensor:
    """Return the first example's loss; if the model computes it, that of a batch of its row alone."""
    _seed()
    inputs, targets = _as_in(probe, data.collated(items))
    outputs, own = probe.outputs(inputs=inputs), torch.tensor([0])
    outputs = probe.outputs(inputs=rows_of(inputs, own)) if _has_loss(outputs) else rows_of(outputs, own)
    return probe.objective.loss(outputs, targets[:1]).detach()


def _as_in(probe: Probe, batch: Any) -> Any:
    """Return a batch with its floating-point tensors in the probe's type."""
    wide = any(each.dtype == torch.float64 for each in probe.begun)
    return mapped(_double, batch) if wide else batch


def _kept(probe: Probe) -> Iterator[tuple[str, Any]]:
    """Yield name and copied value of all state of the model and the objective."""
    for name, buffer in probe.model.named_buffers():
        yield f"model: buffer {name}", buffer.detach().clone()
    for name, parameter in probe.model.named_parameters():
        plain = type(parameter) is nn.Parameter  # other libraries' packed weights have no sum
        yield f"model: parameter {name}", float(parameter.detach().sum()) if plain else parameter._version
    for name, module in probe.model.named_modules():
        path = f"model: {name or type(module).__name__}"
        yield from _inside(path, {k: v for k, v in vars(module).items() if k not in _MODULE_OWN}, 0)
    yield from _inside("loss", getattr(probe.objective, "__dict__", {}), 0)


_MODULE_OWN = frozenset(vars(nn.Module()))
_DEPTH = 3  # of containers in attributes
_ARRAY = Tensor | np.ndarray


def _inside(path: str, values: Mapping[Any, Any], depth: int) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{path}.{key}"
        if isinstance(value, Tensor):
            if not isinstance(value, nn.Parameter):
                written = f"{value.data_ptr()} {value._version}"  # of a tensor too large to copy, such as a task's data
                yield name, written if value.numel() > LARGE else value.detach().clone()
        elif isinstance(value, np.ndarray):
            yield name, value.copy()
        elif isinstance(value, int | float | str | bool):
            yield name, value
        elif depth < _DEPTH:
            if isinstance(value, list | tuple | set | deque):
                yield f"{name}: length", len(value)
                value = dict(enumerate(islice(value, MOST_LOOKED_INTO)))
            elif not isinstance(value, Mapping | type | FunctionType | ModuleType | Examples | LazyExamples):
                value = getattr(value, "__dict__", {})
            yield from _inside(name, value if isinstance(value, Mapping) else {}, depth + 1)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, _ARRAY) and isinstance(b, _ARRAY):
        return np.shape(a) == np.shape(b) and bool(
            np.array_equal(np.asarray(a), np.asarray(b), equal_nan=np.asarray(a).dtype.kind in "fc")
        )
    return type(a) is type(b) and (a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b)))


def _culprit(
    probe: Probe, again: Callable[[], Tensor], row: int | None, part: Tensor | None = None
) -> str | None:
    """Return the innermost layer whose output changes at rows where its input does not."""
    probe = replace(probe, tolerance=NAMED * probe.tolerance)
    calm = _traced(probe.model, partial(probe.outputs, draw=row or 0))
    disturbed = _traced(probe.model, again)
    rows = [i for i in range(BATCH) if i != row] if part is None else part.tolist()
    for name, (inputs, outputs) in calm.items():  # in the order in which layers finish: inner ones first
        if name not in disturbed:
            continue
        now_in, now_out = disturbed[name]
        where = rows if part is None else range(len(rows))
        before_in, before_out = (_rows(each, rows) for each in (inputs, outputs))
        after_in, after_out = (_rows(each, where) for each in (now_in, now_out))
        if before_out is None or after_out is None:
            continue
        still = before_in is None or after_in is None or not probe.differ(before_in, after_in, by_row=True)
        moved = before_out.shape != after_out.shape or probe.differ(before_out, after_out, by_row=True)
        if still and moved:
            return name
    return None


def _rows(value: Tensor | None, rows: Sequence[int]) -> Tensor | None:
    if value is None or value.dim() == 0 or len(value) <= max(rows):
        return None
    return value[torch.tensor(list(rows))]


def _traced(model: nn.Module, run: Callable[[], Tensor]) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """Return the first input and the first output tensor of each layer."""
    seen: dict[str, tuple[Tensor | None, Tensor | None]] = {}

    def note(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        del module
        first = (next((each.detach().clone() for each in leaves(value)), None) for value in (inputs, output))
        seen[name] = (next(first), next(first))

    handles = [m.register_forward_hook(partial(note, name)) for name, m in model.named_modules()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _refuse_layer(probe: Probe, name: str | None, what: str) -> None:
    layer = dict(probe.model.named_modules()).get(name or "", probe.model)
    where = f"{name}: {type(layer).__name__}" if name else type(layer).__name__
    remedy = "make each example's output depend on that example alone (as GroupNorm and LayerNorm do)"
    raise Refusal("model", where, f"{what}; {remedy}")


def _moved(probe: Probe, before: Any, after: Any, rows: Sequence[int]) -> bool:
    """Return whether any of these rows of any output differs."""
    pairs = zip(leaves(before), leaves(after), strict=True)
    return any(
        a.dim() and (a.shape[1:] != b.shape[1:] or probe.differ(a[list(rows)], b[list(rows)], by_row=True))
        for a, b in pairs
    )


def _has_loss(outputs: Any) -> bool:
    """Return whether there is a number among the outputs: a loss that the model itself computed."""
    return any(each.dim() == 0 for each in leaves(outputs))


# --- randomness while the probe runs ------------------------------------------------------------------------------


def _seed(draw: int = 0) -> None:
    torch.default_generator.manual_seed(SEED + draw)
    np.random.seed((SEED + draw) & 0x7FFFFFFF)
    random.seed(SEED + draw)


@contextmanager
def _quiet_generators() -> Generator[None]:
    """Restore every generator afterwards, suppress warnings, and enable gradients."""
    kept = torch.default_generator.get_state(), np.random.get_state(), random.getstate()
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.default_generator.set_state(kept[0])
        np.random.set_state(kept[1])
        random.setstate(kept[2])


_HALVES = (0.5, 0.0, 1 - 2**-24)  # coins of any probability fall on both sides of the last two


class _Mode(TorchDispatchMode):
    """Mode that torch's compiler does not handle: to skip it, torch would first load the compiler for most of a second."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class _ConstantRandomness(_Mode):
    """Replaces random draws of layers by constants, for any shape of the draw.

    Args:
      half: constant for uniform draws.
    """

    def __init__(self, half: float = 0.5) -> None:
        super().__init__()
        self.given: dict[str, float] = dict.fromkeys(("rand", "rand_like", "uniform", "uniform_"), half)
        self.given |= {"bernoulli": 1.0, "bernoulli_": 1.0}
        self.given |= dict.fromkeys(("randn", "randn_like", "normal", "normal_"), 0.0)
        self.drew = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name == "native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        drawn = func(*args, **kwargs)
        if name in self.given and isinstance(drawn, Tensor):
            self.drew = True
            drawn.fill_(self.given[name])
        return drawn


class _Precision(_Mode):
    """Records the least precise type in which a model computes."""

    def __init__(self) -> None:
        super().__init__()
        self.tolerance = ROUNDINGS * torch.finfo(torch.float64).eps

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        made = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten.embedding_renorm_:
            remedy = "rescales the rows of the examples' words, which reveals them without noise; leave max_norm out"
            raise Refusal("model", "an embedding with max_norm", remedy)
        for each in made if isinstance(made, tuple | list) else (made,):
            if isinstance(each, Tensor) and each.is_floating_point():
                # Below double precision fewer roundings meet: rows of a batch differ by some hundreds at most.
                eps = torch.finfo(each.dtype).eps
                allowed = min(COARSEST, eps * (ROUNDINGS if eps < 1e-12 else ROUNDINGS / 100))
                self.tolerance = max(self.tolerance, allowed)
        return made
