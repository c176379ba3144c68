"""Training of a whole cohort at once for small models, with the same mathematics as one client at a time.

On a small model nearly all the time of a client is Python overhead. Clients are stacked, and one vectorised step
(`torch.func.vmap`) trains them all, with the same batches, order and seeds; a test verifies that the result equals that
of single clients up to float rounding. It is chosen when the model has few parameters; a model that cannot be
vectorised is trained client by client. Networks of few channels are stacked in `convolutions`, a few clients at a time.

Clients with different numbers of examples share a stack if the loss of a batch is the mean of its examples' losses, as
`tasks/independence.py` measures: smaller batches are padded with examples of weight 0, and a client that has taken all
steps leaves the stack. With any other loss only clients with equally many examples are stacked.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from flwr.app import RecordDict
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ...messages import wire
from ...messages.client_settings import TRAIN_LOSS, CanaryClients, training_settings
from ...messages.local_training import LocalTraining
from ...privacy.mechanisms.compression import Sketch
from ...privacy.mechanisms.private_sum import CohortSum, encode_rows
from ...privacy.mechanisms.sum_spec import SumSpec
from ...tasks.arrays import sent_state
from ...tasks.data import Examples, drawn_data_of, in_tensors, joined, mapped
from ...tasks.hardware import moved
from ...tasks.optimizers import ELEMENTWISE, own_optimizer
from ...tasks.protocol import StackedTask, Task, own_training
from ..extra import extra_clients
from ..private_update import computed_reply
from ..workbench import Workbench
from .batches import stacked_batches
from .in_place import begin
from .sgd import key_of_round, steps_of

logger = logging.getLogger("fedveil.client")

MAX_PARAMETERS = 50_000  # above it, one client's matrix products saturate a core and stacking gains nothing
MAX_STACK = 128  # clients in a stack, so that memory does not grow with the cohort
MAX_VISITS = 1 << 20  # of examples in a stack's epochs, whose order takes 8 bytes each
FREE_ROWS = 256  # of a step, below which Python dominates and padding costs nothing
# Rows of a first step of convolutions, over those without padding, up to which stacking pays.
PADDED_IMAGES = 1.2
MAX_IMAGES = 16  # clients that one process takes at a time, to stack the convolutions of a few in turn


class LoadedClient(NamedTuple):
    """Client with its examples."""

    client: int
    examples: Examples


Group = list[LoadedClient]  # in descending order of the number of examples
# Function from stacked parameters, inputs, targets, and shares as of `_shares`, to each client's loss, shape (clients,).
Losses = Callable[[dict[str, Tensor], Tensor, Tensor, "Tensor | None"], Tensor]
Layers = list[tuple[str, nn.Module]]  # each with the prefix of its parameters' names


class Product(NamedTuple):
    """Call of a linear layer.

    Attributes:
      name: prefix of its parameters' names.
      biased: whether it has a bias.
      inputs, outputs: of shape (clients, features, n).
    """

    name: str
    biased: bool
    inputs: Tensor
    outputs: Tensor


def can_vectorise(bench: Workbench, accelerator: str = "cpu") -> bool:
    """Return whether cohorts can be trained at once: without own ledgers, all trained, by layers or by vmap.

    Args:
      bench: on the processor.
      accelerator: on which cohorts train.
    """
    if bench.settings.record is not None or not (_all_train(bench) and _steps_stack(bench)):
        return False
    if accelerator == "cpu" and image_layers(bench):
        return _most_images(bench, bench.settings.training) > 1 and _traces(bench)
    return is_small(bench) and _traces(bench)


def image_layers(bench: Workbench) -> Layers:
    """Return the layers of a network of convolutions that is stacked in groups of channels; none for any other bench."""
    if bench.device.type != "cpu" or not bench.convolves:
        return []
    from .convolutions import convolutional

    return convolutional(bench.model)


def _most_images(bench: Workbench, training: LocalTraining, examples: Examples | None = None) -> int:
    """Return how many clients' convolutions pay in one stack, at least 1, by a client's examples or the first one's."""
    from .convolutions import most_clients

    try:
        inputs = (examples or _stackable(bench, 0)).inputs
        rows = min(max(1, len(inputs)), training.batch_size)
        return max(1, most_clients(image_layers(bench), inputs.new_zeros((1, *inputs.shape[1:])), rows))
    except Exception:  # noqa: BLE001 (on any error of the task's code, clients are trained one by one)
        return 1


def is_small(bench: Workbench) -> bool:
    """Return whether the model has few parameters, all trained and sent, and no buffers."""
    return sum(p.numel() for p in bench.model.parameters()) <= MAX_PARAMETERS and _all_train(bench)


def _all_train(bench: Workbench) -> bool:
    """Return whether all of the model is parameters that are trained and sent."""
    parameters = list(bench.model.parameters())
    all_train = len(parameters) == len(bench.model.state_dict()) == len(sent_state(bench.model))
    return all_train and next(bench.model.buffers(), None) is None


def stacked_layers(bench: Workbench) -> Layers:
    """Return the layers of a small perceptron whose losses can be stacked, as `perceptron` does; none for any other bench."""
    if not (is_small(bench) and _traces(bench)):
        return []
    return perceptron(bench.model, _stackable(bench, 0).inputs.dim() == 2)


def _steps_stack(bench: Workbench) -> bool:
    """Return whether one optimiser of stacked parameters equals one for each client, because it acts on each number alone."""
    if own_training(bench.task) is not None:
        return False
    name = bench.settings.training.optimizer.name
    return own_optimizer(bench.task) is None if name == "auto" else name in ELEMENTWISE


def _traces(bench: Workbench) -> bool:
    """Return whether a vectorised step of this model runs at all."""
    bench.forget()  # the model's state before its first forward pass
    start = {name: p.detach() for name, p in bench.model.named_parameters()}
    try:
        examples = _stackable(bench, 0)
        inputs, targets = (
            moved(each[:1].unsqueeze(0), bench.device) for each in (examples.inputs, examples.targets)
        )
        _gradients(_losses(bench, inputs.dim() == 3), stacked(start, 1), inputs, targets, None)
    except Exception:  # noqa: BLE001 (on any error of the task's code, clients are trained one by one)
        return False
    return True


def _received(bench: Workbench, content: RecordDict) -> dict[str, Tensor]:
    """Reset the bench, and return a copy of the arrays that an instruction's clients start from, by name."""
    bench.forget()
    arrays = wire.only_arrays(content)
    return {
        name: moved(torch.from_numpy(np.array(wire.view(arrays[name]))), bench.device)
        for name in wire.layout_of(arrays)
    }


def train_ahead(bench: Workbench, content: RecordDict, clients: Sequence[int]) -> dict[int, RecordDict]:
    """Return the app's replies of clients that can be stacked, by their number, on a bench that `can_vectorise`.

    A client that fails has none: it fails again where it trains alone, and is answered for there.

    Args:
      bench: task and model.
      content: the instruction of all these clients.
      clients: their numbers.
    """
    start, training = _received(bench, content), training_settings(content, bench.settings)
    key = key_of_round(bench.settings.seed, wire.read_round(content)[1])
    real = [client for client in clients if client not in bench.settings.canary_clients]
    filled = [one for one in _loaded(bench, real, []) if len(one.examples)]
    ends = np.cumsum([value.numel() for value in start.values()])[:-1]
    replies: dict[int, RecordDict] = {}
    for group in _stacks(bench, filled, training):
        with suppress(Exception):
            update, scalars = _train_group(bench, group, start, training, key)
            metrics = [
                dict(zip(scalars, row, strict=True)) for row in np.stack([*scalars.values()], 1).tolist()
            ]
            for (client, _), row, own in zip(group, update, metrics, strict=True):
                parts = zip(start, np.split(row, ends), strict=True)
                shaped = {name: part.reshape(start[name].shape) for name, part in parts}
                replies[client] = computed_reply(shaped, own)
    return replies


def sum_cohort(
    bench: Workbench, content: RecordDict, clients: Sequence[int], spec: SumSpec, size: int
) -> CohortSum:
    """Return the sum of clients' vectors, shape (size,), on a bench that `can_vectorise`; a client that fails drops out."""
    start, training = _received(bench, content), training_settings(content, bench.settings)
    _, number = wire.read_round(content)
    cohort_sum = CohortSum(np.zeros(size))
    sketch = wire.sketch_for(content, spec)
    key = key_of_round(bench.settings.seed, number)

    def add(group: Group) -> None:
        """Train a group and add its updates; if that fails, train each client alone, and drop one that fails."""
        try:
            update, scalars = _train_group(bench, group, start, training, key)
        except Exception:
            if len(group) > 1:
                for one in group:
                    add([one])
                return
            logger.exception("round failed at this client")
            return cohort_sum.drop("failed")
        add_rows(cohort_sum, update, scalars, spec, sketch)

    canaries = bench.settings.canary_clients
    real = [client for client in clients if client not in canaries]
    apart: list[int] = []  # clients that are trained one by one
    for first in range(0, len(real), MAX_STACK):
        loaded = _loaded(bench, real[first : first + MAX_STACK], apart)
        filled = [one for one in loaded if len(one.examples)]
        if len(filled) < len(loaded):
            _add_blanks(len(loaded) - len(filled), spec, cohort_sum)
        for group in _stacks(bench, filled, training):
            add(group)
    if apart:
        single = begin(bench, content)
        for client in apart:
            single.add(cohort_sum, single.train(client), spec)
    _add_canaries(canaries, [client for client in clients if client in canaries], spec, cohort_sum, sketch)
    return cohort_sum


def _add_canaries(
    canaries: CanaryClients,
    clients: Sequence[int],
    spec: SumSpec,
    cohort_sum: CohortSum,
    sketch: Sketch | None,
) -> None:
    """Add the updates of these canary clients of an audit to the sum."""
    size = cohort_sum.total.size - spec.segment_size if sketch is None else sketch.compression.coordinates
    for first in range(0, len(clients), MAX_STACK):
        update = extra_clients().canary_updates(canaries, clients[first : first + MAX_STACK], size)
        metrics = {name: np.full(len(update), value) for name, value in canaries.metrics.items()}
        add_rows(cohort_sum, update, metrics, spec, sketch)


def _loaded(bench: Workbench, clients: Sequence[int], apart: list[int]) -> Group:
    """Return the clients with their examples; append those that cannot be stacked, such as of lazy data, to `apart`."""
    loaded: Group = []
    for client in clients:
        try:
            loaded.append(LoadedClient(client, _stackable(bench, client)))
        except Exception:  # noqa: BLE001 (it fails again where it trains alone, and is logged)
            apart.append(client)
    return sorted(loaded, key=_records, reverse=True)


def _records(one: LoadedClient) -> int:
    return len(one.examples)


def _stacks(bench: Workbench, clients: Group, training: LocalTraining) -> list[Group]:
    """Return the clients in groups that are trained at once.

    Clients with different numbers of examples share a group only if the loss keeps examples independent, and if the first
    step, with all batches padded to the widest, has at most `FREE_ROWS` rows or twice as many as without padding.
    """
    stacks, layers = [list(group) for _, group in groupby(clients, _records)], image_layers(bench)
    most, free = 2.0, FREE_ROWS
    if layers:
        most, free = PADDED_IMAGES, 0
    if len(stacks) > 1 and bench.isolates_examples(lambda: joined([examples for _, examples in clients])):
        stacks = _filled_up(clients, training, most, free)
    if not layers:
        return stacks
    return [
        part for group in stacks for part in _parts(group, _most_images(bench, training, group[0].examples))
    ]


def _parts(group: Group, most: int) -> list[Group]:
    """Return the group in parts of at most so many clients, equal but for one."""
    parts = -(-len(group) // most)
    return [group[len(group) * n // parts : len(group) * (n + 1) // parts] for n in range(parts)]


def _filled_up(clients: Group, training: LocalTraining, most: float, free: int) -> list[Group]:
    """Return the clients in groups of uneven ones, as `_stacks`.

    Args:
      clients: of the cohort.
      training: its settings.
      most: rows of a group's first step, padded, over those without padding.
      free: rows of such a step that are always allowed.
    """
    stacks: list[Group] = []
    # Of the last stack: rows of a client's first step at most, of all clients' first steps, and examples of all epochs.
    widest = rows = visits = 0
    for one in clients:
        own_rows = min(records := _records(one), training.batch_size)
        own_visits = records * training.local_epochs
        rows, visits = rows + own_rows, visits + own_visits
        if stacks and visits <= MAX_VISITS and widest * (len(stacks[-1]) + 1) <= max(most * rows, free):
            stacks[-1].append(one)
            continue
        stacks.append([one])
        widest, rows, visits = own_rows, own_rows, own_visits
    return stacks


def _add_blanks(count: int, spec: SumSpec, cohort_sum: CohortSum) -> None:
    """Drop this many clients without examples; where whole clients are hidden, add a zero update for each instead."""
    if spec.clipping_norm is None:
        return cohort_sum.drop(wire.DROP_REASONS[wire.NO_EXAMPLES], count)
    update = np.zeros((count, cohort_sum.total.size - spec.segment_size), np.float32)
    add_rows(cohort_sum, update, {s.name: np.zeros((count, *s.shape)) for s in spec.segments}, spec, None)


def _stackable(bench: Workbench, client: int) -> Examples:
    """Return a client's examples as tensors, or raise Refusal if they have no common shape and type."""
    remedy = "stacked clients need tensors of equal shape and type"
    return in_tensors(drawn_data_of(bench.task, client), "client_data", client, remedy)


def _train_group(
    bench: Workbench, group: Group, start: Mapping[str, Tensor], training: LocalTraining, key: int
) -> tuple[NDArray[np.float32], dict[str, NDArray[np.float64]]]:
    """Train the clients of a group at once; return their updates as rows, and their metrics by name, shape (clients,)."""
    records = np.array([_records(one) for one in group])
    first = np.cumsum(records) - records  # row of each client's first example
    inputs = moved(torch.cat([examples.inputs for _, examples in group]), bench.device)
    targets = moved(torch.cat([examples.targets for _, examples in group]), bench.device)
    batches = stacked_batches(
        records, training.batch_size, training.local_epochs, clients=[client for client, _ in group], key=key
    )
    losses_of, trained = _losses(bench, inputs.dim() == 2), list(stacked(start, len(group)).values())
    origins = [value.unsqueeze(0) for value in start.values()]
    steps = steps_of(bench.task, trained, origins, training)
    losses, num_steps = torch.zeros(len(group), device=bench.device), np.zeros(len(group))
    for positions, counts in batches:
        active = len(counts)  # clients, the first of the group, that have not taken all their steps
        steps.keep_first(active)
        index = moved(torch.from_numpy((first[:active, None] + positions).ravel()), bench.device)
        gradients, loss = _gradients(
            losses_of,
            dict(zip(start, steps.values, strict=True)),
            inputs.index_select(0, index).unflatten(0, positions.shape),
            targets.index_select(0, index).unflatten(0, positions.shape),
            _shares(counts, bench.device),
        )
        with torch.no_grad():
            steps.take(gradients)
            losses[:active] += loss
        num_steps[:active] += 1
    with torch.no_grad():
        moves = [(v - origin).unsqueeze(-1).flatten(1) for v, origin in zip(trained, origins, strict=True)]
        update = torch.cat(moves, dim=1).cpu().numpy()
    if len(set(records)) > 1 and not bool(losses.isfinite().all()):
        raise FloatingPointError("an example by itself may have no loss where its batch has one")
    return update, {
        wire.WEIGHT: records.astype(np.float64),
        TRAIN_LOSS: losses.cpu().double().numpy() / num_steps,
    }


def _shares(counts: NDArray[np.intp], device: torch.device) -> Tensor | None:
    """Return each example's weight in its client's mean, shape (clients, width); None if no batch is padded."""
    if counts.min() == counts.max():
        return None
    shares = (np.arange(counts.max()) < counts[:, None]) / counts[:, None]
    return moved(torch.from_numpy(shares.astype(np.float32)), device)


def stacked(start: Mapping[str, Tensor], clients: int) -> dict[str, Tensor]:
    """Return a copy of the parameters for each client, shape (clients, ...)."""
    return {name: value.unsqueeze(0).repeat(clients, *([1] * value.dim())) for name, value in start.items()}


def _forward(bench: Workbench, flat: bool) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    """Return the function of all clients' weights and inputs that computes their outputs; `flat` as of `perceptron`."""
    if images := image_layers(bench):
        from .convolutions import forward_images

        return partial(forward_images, images)
    if layers := perceptron(bench.model, flat):
        return lambda weights, inputs: forward(layers, weights, inputs)[0]
    return vmap(partial(functional_call, bench.model))


def _losses(bench: Workbench, flat: bool) -> Losses:
    """Return the function that computes each client's loss with the task's model; `flat` as of `perceptron`."""
    outputs_of, loss_of = _forward(bench, flat), _loss_of(bench.task)

    def losses(weights: dict[str, Tensor], inputs: Tensor, targets: Tensor, shares: Tensor | None) -> Tensor:
        with bench.precision():
            outputs = outputs_of(weights, inputs)
            if shares is None:
                return loss_of(outputs, targets)
            return (example_losses(bench.task, outputs, targets).unflatten(0, shares.shape) * shares).sum(1)

    return losses


def _loss_of(task: Task) -> Callable[[Any, Tensor], Tensor]:
    """Return the function that gives the loss of each client's batch, shape (clients,)."""
    return task.losses if isinstance(task, StackedTask) else vmap(task.loss)


def example_losses(task: Task, outputs: Any, targets: Tensor) -> Tensor:
    """Return the loss of each example alone, shape (clients * n,), from outputs and targets of shape (clients, n, ...)."""
    return _loss_of(task)(mapped(_as_batches_of_one, outputs), _as_batches_of_one(targets))


def _as_batches_of_one(examples: Tensor) -> Tensor:
    """Return each example as a client's only one, shape (clients * n, 1, ...), from shape (clients, n, ...)."""
    return examples.flatten(0, 1).unsqueeze(1)


def perceptron(model: nn.Module, flat: bool) -> Layers:
    """Return the layers of a perceptron, none for another model; unless examples are flat, the first layer flattens them."""
    layers = [("", model)]
    if type(model) is nn.Sequential:
        layers = [(f"{name}.", layer) for name, layer in model.named_children()]
        if len(layers) < len(model):  # one layer is used twice, and named once
            return []
    flat = flat or isinstance(layers[0][1], nn.Flatten)
    return layers if flat and all(_is_plain(layer) for _, layer in layers) else []


def _is_plain(layer: nn.Module) -> bool:
    """Return whether a layer is linear and all trained, acts on each number alone, or flattens each example."""
    if not all(parameter.requires_grad for parameter in layer.parameters()):
        return False
    if isinstance(layer, nn.Flatten):
        return (layer.start_dim, layer.end_dim) == (1, -1)
    return type(layer) in (nn.Linear, nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU)


def forward(layers: Layers, weights: Mapping[str, Tensor], inputs: Tensor) -> tuple[Tensor, list[Product]]:
    """Return the outputs of all clients' perceptrons, shape (clients, n, ...), and the layers' products.

    This is vmap without its cost at every layer. The graph of constant weights begins at the first product.
    """
    values = inputs.flatten(2).transpose(1, 2)  # examples last: gradients then have the layout of the weights
    products: list[Product] = []
    for name, layer in layers:
        if isinstance(layer, nn.Linear):
            weight, bias = weights[f"{name}weight"], weights.get(f"{name}bias")
            before = values
            values = weight @ before if bias is None else torch.baddbmm(bias.unsqueeze(2), weight, before)
            if not values.requires_grad:
                values.requires_grad_()
            products.append(Product(name, bias is not None, before, values))
        elif not isinstance(layer, nn.Flatten):
            values = layer(values)
    return values.transpose(1, 2), products


def _gradients(
    losses_of: Losses, values: Mapping[str, Tensor], inputs: Tensor, targets: Tensor, shares: Tensor | None
) -> tuple[Sequence[Tensor], Tensor]:
    """Return each client's gradients and loss; a client's parameters enter only its own loss, so the sum gives all gradients."""
    weights = {name: value.detach().requires_grad_() for name, value in values.items()}
    losses = losses_of(weights, inputs, targets, shares)
    return torch.autograd.grad(losses.sum(), list(weights.values()), materialize_grads=True), losses.detach()


def add_rows(
    cohort_sum: CohortSum,
    update: NDArray[np.floating],
    scalars: dict[str, NDArray[np.float64]],
    spec: SumSpec,
    sketch: Sketch | None,
) -> None:
    """Add clients to the sum: their updates, one in each row, compressed by the sketch, and their metrics, by name.

    A client whose update is not finite answers with zeros where whole clients are hidden, and drops out otherwise.
    """
    update = update if sketch is None else sketch.of(update)
    finite = np.isfinite(update).all(axis=1)
    update[~finite] = 0
    usable = np.full(len(update), True)
    if spec.clipping_norm is None:
        usable = np.logical_and.reduce([finite, *map(np.isfinite, scalars.values())])
    cohort_sum.drop("not finite", int((~usable).sum()))
    rows = encode_rows(update[usable], {name: values[usable] for name, values in scalars.items()}, spec)
    cohort_sum.total += rows.sum(axis=0)
    cohort_sum.replies += len(rows)
