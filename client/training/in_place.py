"""Training a cohort client by client in this process's one model, each update added to the sum straight from it.

The arithmetic is that of a ClientApp behind `private_update`, bit for bit, which a test holds; what is saved is a
message and five passes over the model for each client. For plain training alone: DP-SGD has a ledger to ask.
"""

# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false
# torch's optimisers make the same calls; there is no public name for them.

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from flwr.app import RecordDict
from numpy.typing import NDArray
from torch import Tensor

from ...configs.local_training import LocalTraining
from ...privacy.mechanisms.private_sum import CohortSum, add_update
from ...privacy.mechanisms.randomness import Randomness
from ...privacy.mechanisms.sum_spec import SumSpec
from ...strategies.canaries import add_canary
from ...strategies.wire import WEIGHT, layout_of, only_arrays, read_round, view
from ..app import TRAIN_LOSS, Workbench, seed_layers, training_settings
from .sgd import train

logger = logging.getLogger("fedveil.client")

Move = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]


@dataclass(frozen=True, eq=False)
class InPlaceRound:
    """One instruction, as every client of a cohort follows it.

    Attributes:
      bench: the task and the model.
      training: how to train.
      key: what the orders of the examples and the layers' own draws derive from.
      received: the instruction's arrays, in the order of `state`.
      state: the model's parameters and buffers.
      update: room for trained minus received of all arrays that are averaged, flat, in the layout's order.
      moves: for each of them its part of `update`, the model's array and the received one.
    """

    bench: Workbench
    training: LocalTraining
    key: int
    received: list[Tensor]
    state: list[Tensor]
    update: NDArray[np.floating]
    moves: list[Move]

    def train(self, client: int) -> dict[str, float] | None:
        """Train the model on one client's data and return its scalars; None if it failed, which its log explains."""
        try:
            examples = self.bench.task.client_data(client)
            with torch.no_grad():
                torch._foreach_copy_(self.state, self.received)
            seed_layers(self.key, client)
            loss = train(self.bench.model, self.bench.task, examples, self.training, client, self.key)
        except Exception:
            logger.exception("round failed at this client")
            return None
        return {WEIGHT: float(len(examples)), TRAIN_LOSS: loss}

    def add_canary(self, client: int, cohort_sum: CohortSum, spec: SumSpec) -> bool:
        """Add what a canary of an audit sends; return whether this client is one."""
        dummies = self.bench.settings.canaries
        if dummies is None or client not in dummies:
            return False
        add_canary(cohort_sum, self._start, spec, dummies, client)
        return True

    @cached_property
    def _start(self) -> NDArray[np.floating]:
        """The received arrays that are averaged, flat, in the layout's order."""
        return np.concatenate([np.ravel(received) for _, _, received in self.moves])

    def add(self, cohort_sum: CohortSum, scalars: dict[str, float], spec: SumSpec) -> None:
        """Add the update of the client that was trained last."""
        for part, trained, received in self.moves:
            np.subtract(trained, received, out=part)
        try:
            add_update(cohort_sum, self.update, scalars, spec)
        except ValueError:
            logger.exception("round failed at this client")
            cohort_sum.drop("failed")


def begin(bench: Workbench, content: RecordDict) -> InPlaceRound:
    """Return the round that this instruction asks for."""
    _, number = read_round(content)
    arrays = only_arrays(content)
    own = {name: tensor.detach() for name, tensor in bench.model.state_dict(keep_vars=True).items()}
    received = {name: np.require(view(array), requirements=["C", "W"]) for name, array in arrays.items()}
    layout = layout_of(arrays)
    bounds = np.cumsum([0, *(math.prod(shape) for shape in layout.values())])
    update = np.empty(bounds[-1], np.result_type(*(received[name] for name in layout)))
    moves: list[Move] = [
        (update[start:stop].reshape(shape), own[name].numpy(), received[name])
        for (name, shape), start, stop in zip(layout.items(), bounds[:-1], bounds[1:], strict=True)
    ]
    return InPlaceRound(
        bench,
        training_settings(content, bench.settings),
        int(Randomness(bench.settings.seed).stream("training", number).uint64(1)[0]),
        [torch.from_numpy(value) for value in received.values()],
        [own[name] for name in received],
        update,
        moves,
    )
