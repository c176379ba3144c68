"""Training of a cohort client by client in the process's single model; each update is added to the sum directly.

The arithmetic equals that of a ClientApp with `private_update`, bit for bit, which a test checks; it saves a message
and five passes over the model for each client. It supports only plain training: DP-SGD needs a ledger.
"""

# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false
# torch's optimisers make the same calls; there is no public name for them.

import logging
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

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
from ...tasks.data import Data, Examples, data_of, drawn_data_of
from ...tasks.hardware import moved, placed
from ...tasks.independence import LATE
from ...tasks.reading_order import check_reading
from ..extra import extra_clients
from ..workbench import Workbench
from .sgd import key_of_round, seed_layers, train

logger = logging.getLogger("fedveil.client")

ROUNDING = 1e-6  # of the largest number in a model
FEW = 2  # examples of a step of the other client

Move = tuple[NDArray[Any], Tensor, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class InPlaceRound:
    """One instruction for every client of a cohort.

    Attributes:
      bench: task and model.
      training: its settings.
      key: of the round; examples' orders and layers' draws derive from it.
      received: arrays of the instruction, in the order of `state`, on the model's device.
      state: the model's parameters and buffers.
      update: trained minus received of each averaged array, flat, in the layout's order; on a CPU they overwrite the
        trained arrays.
      moves: for each of those, its update, the model's tensor and the received array.
      hides: whether whole clients are hidden, so that a client must not reveal that it has no examples.
      sketch: compression of updates; None leaves them whole.
    """

    bench: Workbench
    training: LocalTraining
    key: int
    received: list[Tensor]
    state: list[Tensor]
    update: list[NDArray[np.floating]]
    moves: list[Move]
    hides: bool = False
    sketch: Sketch | None = None

    def train(self, client: int) -> dict[str, float] | str:
        """Train the model on one client's data and return its scalars, or the reason for a failure, which the log explains."""
        try:
            data = drawn_data_of(self.bench.task, client)
            if not len(data) and not self.hides:
                return wire.DROP_REASONS[wire.NO_EXAMPLES]
            self.bench.forget()
            with torch.no_grad():
                torch._foreach_copy_(self.state, self.received)
            if not len(data):  # it answers with a zero update
                return {wire.WEIGHT: 0.0, TRAIN_LOSS: 0.0}
            bench = self.bench
            seed_layers(self.key, client, data, bench.device)
            examples = placed(data, bench.device)
            loss = train(bench.model, bench.task, examples, self.training, client, self.key, bench.precision)
            bench.require_base()
        except Exception:
            logger.exception("round failed at this client")
            return "failed"
        return {wire.WEIGHT: float(len(data))} | ({} if loss is None else {TRAIN_LOSS: loss})

    def add_canary(self, client: int, cohort_sum: CohortSum, spec: SumSpec) -> bool:
        """Add the update of a canary client, and return whether the client is a canary.

        Args:
          client: number of the client.
          cohort_sum: changed in place.
          spec: of the sum.
        """
        dummies = self.bench.settings.canary_clients
        if client not in dummies:
            return False
        extra_clients().add_canary(cohort_sum, self._start, spec, dummies, client, self.sketch)
        return True

    @cached_property
    def _start(self) -> NDArray[np.floating]:
        """Received arrays that are averaged, flat, in the layout's order."""
        return np.concatenate([np.ravel(received) for _, _, received in self.moves])

    def add(self, cohort_sum: CohortSum, scalars: dict[str, float] | str, spec: SumSpec) -> None:
        """Add the update of the client that was trained last, or count its failure.

        Args:
          cohort_sum: changed in place.
          scalars: of that client, or the reason, as `train` returned it.
          spec: of the sum.
        """
        if isinstance(scalars, str):
            return cohort_sum.drop(scalars)
        for part, trained, received in self.moves:
            np.subtract(trained.cpu().numpy(), received, out=part)
        update = self.update if self.sketch is None else self.sketch.of(np.concatenate(self.update))
        try:
            add_update(cohort_sum, update, scalars, spec)
        except NotFinite as error:  # as in a message
            logger.warning("%s; this client answers with a zero update", error)
            add_update(cohort_sum, np.zeros(0), scalars, spec)


def check_apart(bench: Workbench) -> None:
    """Refuse a task that leaks state from one client to the next one in this process.

    A client trains on few of its examples, then another client, for as many steps as it takes until state in an object of
    any class is likely to be used, then the first again: its vector must be the same.

    Args:
      bench: of the task, not used otherwise.

    Raises:
      Refusal: the vectors differ.
    """
    start = read_arrays(bench.model)
    training = replace(bench.settings.training, local_epochs=1)
    pair: list[Data] = []
    for client in range(bench.task.num_clients):
        if len(data := data_of(bench.task, client)):
            pair.append(data)
        if len(pair) == 2:
            break
    else:
        return  # there are no two clients
    first_batch, second_batch = (partial(each.batch, torch.arange(min(2, len(each)))) for each in pair)
    check_reading(first_batch, first_batch, second_batch)
    # Copies of a task's own batches, so that nothing random is read twice.
    batches = training.batch_size, min(training.batch_size, max(1, len(pair[1]) // 2), FEW)
    few = [Examples(*d.batch(torch.arange(min(2 * b, len(d))))) for d, b in zip(pair, batches, strict=True)]

    def trained(which: int) -> dict[str, NDArray[Any]]:
        bench.forget()
        load_arrays(bench.model, start)
        examples = placed(few[which], bench.device)
        seed_layers(0, which, examples, bench.device)
        settings = replace(training, batch_size=batches[which])
        train(bench.model, bench.task, examples, settings, which, 0, bench.precision)
        bench.require_base()
        return read_arrays(bench.model)

    def vector(arrays: dict[str, NDArray[Any]]) -> NDArray[np.float64]:
        return np.concatenate([np.ravel(each).astype(np.float64) for each in arrays.values()])

    before = vector(trained(0))
    for _ in range(LATE // 2):  # two steps each
        trained(1)
    after = vector(trained(0))
    if not np.allclose(before, after, rtol=0, atol=ROUNDING * float(np.abs(before).max()), equal_nan=True):
        remedy = "another vector after another client has trained; keep nothing of the examples in the loss or the optimizer"
        raise Refusal("task", type(bench.task).__name__, f"a client gives {remedy}")


def begin(bench: Workbench, content: RecordDict) -> InPlaceRound:
    """Return the round of an instruction."""
    _, number = wire.read_round(content)
    arrays, spec = wire.only_arrays(content), wire.sum_spec_of(content)
    state = bench.model.state_dict(keep_vars=True)
    tensors = {name: each.detach() for name, each in state.items() if isinstance(each, Tensor)}
    received = {name: np.require(wire.view(array), requirements=["C", "W"]) for name, array in arrays.items()}
    layout = wire.layout_of(arrays)
    memory, moves = memory_alone(tensors, layout), list[Move]()
    for name in layout:
        room = memory.get(name)
        if room is None or room.dtype != received[name].dtype:
            room = np.empty_like(received[name])
        moves.append((room, tensors[name], received[name]))
    return InPlaceRound(
        bench,
        training_settings(content, bench.settings),
        key_of_round(bench.settings.seed, number),
        [moved(torch.from_numpy(value), bench.device) for value in received.values()],
        [tensors[name] for name in received],
        [np.ravel(part) for part, _, _ in moves],
        moves,
        spec.clipping_norm is not None,
        wire.sketch_for(content, spec),
    )
