"""Training of a cohort client by client in the process's single model; each update is added to the sum directly.

The arithmetic equals that of a ClientApp with `private_update`, bit for bit, which a test checks; it saves a message
and five passes over the model for each client. It supports only plain training: DP-SGD needs a ledger.
"""

# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false
# torch's optimisers make the same calls; there is no public name for them.

import logging
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from flwr.app import RecordDict
from numpy.typing import NDArray
from torch import Tensor

from ...base.refusal import Refusal
from ...messages import wire
from ...messages.client_settings import TRAIN_LOSS, training_settings
from ...messages.local_training import LocalTraining
from ...privacy.mechanisms.compression import Sketch
from ...privacy.mechanisms.private_sum import CohortSum, NotFinite, add_update
from ...privacy.mechanisms.sum_spec import SumSpec
from ...tasks.arrays import load_arrays, memory_alone, read_arrays
from ...tasks.data import Examples, data_of, drawn_data_of
from ...tasks.hardware import moved, placed
from ...tasks.independence import LATE
from ...tasks.reading_order import check_reading
from ..extra import extra_clients
from ..workbench import Workbench
from .sgd import key_of_round, seed_layers, train

logger = logging.getLogger("fedveil.client")

ROUNDING = 1e-6  # deviation that `check_apart` allows, relative to the largest number in the model
MAX_OTHER = 2  # examples of the other client in a step of `check_apart`, which takes many of them


class AveragedArray(NamedTuple):
    """Averaged array of a round: the trained tensor minus the received array is the update."""

    update: NDArray[Any]  # memory for the update; on a CPU perhaps the tensor's own, which it overwrites
    tensor: Tensor
    received: NDArray[Any]


@dataclass(frozen=True, eq=False)
class InPlaceRound:
    """One instruction for every client of a cohort.

    Attributes:
      bench: task and model.
      training: its settings.
      run: name of the run.
      number: of the round.
      key: of the round; examples' orders and layers' draws derive from it.
      received: arrays of the instruction, in the order of `state`, on the model's device.
      state: the model's parameters and buffers.
      averaged: the arrays that are averaged, in the layout's order.
      hides_clients: whether whole clients are hidden, so that a client must not reveal that it has no examples.
      sketch: compression of updates; None leaves them whole.
    """

    bench: Workbench
    training: LocalTraining
    run: str
    number: int
    key: int
    received: list[Tensor]
    state: list[Tensor]
    averaged: list[AveragedArray]
    hides_clients: bool
    sketch: Sketch | None

    def train(self, client: int) -> dict[str, float] | str:
        """Reset the model, train it on a client's data, and return the values of its metrics, or the reason to drop the client."""
        bench = self.bench
        try:
            data = drawn_data_of(bench.task, client)
            if not len(data) and not self.hides_clients:
                return wire.DROP_REASONS[wire.NO_EXAMPLES]
            bench.forget()
            with torch.no_grad():
                torch._foreach_copy_(self.state, self.received)
            if not len(data):  # it answers with a zero update
                return {wire.WEIGHT: 0.0, TRAIN_LOSS: 0.0}
            bench.load_own(client, self.run, self.number)
            seed_layers(self.key, client, data, bench.device)
            examples = placed(data, bench.device)
            loss = train(bench.model, bench.task, examples, self.training, client, self.key, bench.precision)
            bench.require_base()
            bench.store_own(client, self.run, self.number)
        except Exception:
            logger.exception("round failed at this client")
            return "failed"
        return {wire.WEIGHT: float(len(data))} | ({} if loss is None else {TRAIN_LOSS: loss})

    def add_canary(self, client: int, cohort_sum: CohortSum, spec: SumSpec) -> bool:
        """Add a client's update to the sum, in place, if it is a canary of an audit; return whether it is one."""
        canaries = self.bench.settings.canary_clients
        if client not in canaries:
            return False
        extra_clients().add_canary(cohort_sum, self._start, spec, canaries, client, self.sketch)
        return True

    @cached_property
    def _start(self) -> NDArray[np.floating]:
        """Received arrays that are averaged, flat, in the layout's order."""
        return np.concatenate([np.ravel(each.received) for each in self.averaged])

    def add(self, cohort_sum: CohortSum, scalars: dict[str, float] | str, spec: SumSpec) -> None:
        """Add the update of the client that `train` trained last, or count it as dropped; this may overwrite the model.

        Args:
          cohort_sum: of the round, changed in place.
          scalars: what `train` returned for that client.
          spec: of the sum.
        """
        if isinstance(scalars, str):
            return cohort_sum.drop(scalars)
        for each in self.averaged:
            np.subtract(each.tensor.cpu().numpy(), each.received, out=each.update)
        whole = [np.ravel(each.update) for each in self.averaged]
        update = whole if self.sketch is None else self.sketch.of(np.concatenate(whole))
        try:
            add_update(cohort_sum, update, scalars, spec)
        except NotFinite as error:  # as in a message
            logger.warning("%s; this client answers with a zero update", error)
            add_update(cohort_sum, np.zeros(0), scalars, spec)


def check_apart(bench: Workbench) -> None:
    """Check that a task leaks no state from one client to the next one in this process.

    One client takes two steps, another client `LATE` steps, after which state that an object keeps is likely to be used,
    and the first client the same two steps again: its trained model must be the same. Fewer than two clients with data
    pass. Nothing else may use the bench, whose model stays trained.

    Raises:
      Refusal: the models differ.
    """
    start = read_arrays(bench.model)
    training = replace(bench.settings.training, local_epochs=1)
    filled = (data for client in range(bench.task.num_clients) if len(data := data_of(bench.task, client)))
    pair = list(islice(filled, 2))
    if len(pair) < 2:
        return
    first_batch, second_batch = (partial(each.batch, torch.arange(min(2, len(each)))) for each in pair)
    check_reading(first_batch, first_batch, second_batch)
    batch_sizes = training.batch_size, min(training.batch_size, max(1, len(pair[1]) // 2), MAX_OTHER)
    # Copies of a task's own batches, for two steps, so that nothing random is read twice.
    rows = [torch.arange(min(2 * size, len(data))) for size, data in zip(batch_sizes, pair, strict=True)]
    copies = [Examples(*data.batch(each)) for data, each in zip(pair, rows, strict=True)]

    def trained(client: int) -> NDArray[np.float64]:
        bench.forget()
        load_arrays(bench.model, start)
        examples = placed(copies[client], bench.device)
        seed_layers(0, client, examples, bench.device)
        settings = replace(training, batch_size=batch_sizes[client])
        train(bench.model, bench.task, examples, settings, client, 0, bench.precision)
        bench.require_base()
        return np.concatenate([np.ravel(each).astype(float) for each in read_arrays(bench.model).values()])

    before = trained(0)
    for _ in range(LATE // 2):  # two steps each
        trained(1)
    after = trained(0)
    if not np.allclose(before, after, rtol=0, atol=ROUNDING * float(np.abs(before).max()), equal_nan=True):
        remedy = "another vector after another client has trained; keep nothing of the examples in the loss or the optimizer"
        raise Refusal("task", type(bench.task).__name__, f"a client gives {remedy}")


def begin(bench: Workbench, content: RecordDict) -> InPlaceRound:
    """Return the round of an instruction for every client of a cohort; it shares the memory of the bench's model."""
    run, number = wire.read_round(content)
    arrays, spec = wire.only_arrays(content), wire.sum_spec_of(content)
    state = bench.model.state_dict(keep_vars=True)
    tensors = {name: each.detach() for name, each in state.items() if isinstance(each, Tensor)}
    received = {name: np.require(wire.view(array), requirements=["C", "W"]) for name, array in arrays.items()}
    layout = wire.layout_of(arrays)
    memory, averaged = memory_alone(tensors, layout), list[AveragedArray]()
    for name in layout:
        update = memory.get(name)
        if update is None or update.dtype != received[name].dtype:
            update = np.empty_like(received[name])
        averaged.append(AveragedArray(update, tensors[name], received[name]))
    return InPlaceRound(
        bench,
        training_settings(content, bench.settings),
        run,
        number,
        key_of_round(bench.settings.seed, number),
        received=[moved(torch.from_numpy(value), bench.device) for value in received.values()],
        state=[tensors[name] for name in received],
        averaged=averaged,
        hides_clients=spec.clipping_norm is not None,
        sketch=wire.sketch_for(content, spec),
    )
