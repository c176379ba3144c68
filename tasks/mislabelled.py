"""Odd examples with random labels for black-box audits: a coin decides whether each trains at its simulated client.

Odd examples that trained have lower losses than the others only if the model memorised them. Each is a held-out example
with its inputs in random order, so that it teaches nothing about the task and is easy to recognise. A task whose inputs
are not one tensor in memory may make its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..base.refusal import Refusal
from ..privacy.audit import client_rows
from .batch_memory import AUTO, answers
from .data import (
    Data,
    Examples,
    LazyExamples,
    data_of,
    derived,
    held_out_of,
    in_tensors,
    joined,
    only,
    rows_of,
)
from .optimizers import own_optimizer
from .protocol import ProbedTask, Task, own_training

if TYPE_CHECKING:
    from ..privacy.audit.memorisation import MemorisationProbe

MOST = 1000  # largest number of odd examples
ONLY_TENSORS = "its odd examples are made of held-out ones; use audit=light"
SHARE = 0.2  # largest number of odd examples, as a share of the clients' own; about half of them train


@runtime_checkable
class OddTask(Task, Protocol):
    """Task that makes odd examples of its held-out ones."""

    def odd_examples(self, count: int, generator: np.random.Generator) -> Data:
        """Return odd examples with random targets, which no client has; of the same form as the clients' data.

        Args:
          count: number of examples.
          generator: source of all that is random in them.
        """
        ...


@dataclass(frozen=True)
class Mislabelled:
    """Task whose clients have odd examples in addition to their own.

    Attributes:
      task: the task without odd examples.
      odd: n odd examples.
      owners: client of each odd example, shape (n,).
      coins: whether each trains at its client, shape (n,).
    """

    task: Task
    odd: Data
    owners: NDArray[np.int64]
    coins: NDArray[np.bool_]

    @property
    def simulated(self) -> bool:
        return self.task.simulated

    @property
    def num_clients(self) -> int:
        return self.task.num_clients

    @property
    def curvature(self) -> float | None:
        return getattr(self.task, "curvature", None)

    @property
    def squared_length(self) -> float | None:
        return getattr(self.task, "squared_length", None)

    @property
    def final_model(self) -> Callable[[dict[str, NDArray[Any]]], dict[str, NDArray[Any]]] | None:
        return getattr(self.task, "final_model", None)

    def model(self) -> nn.Module:
        return self.task.model()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.task.loss(outputs, targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        return self.task.metrics(outputs, targets)

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        return derived(self.task, means)

    def held_out(self) -> Data:
        return held_out_of(self.task)

    @property
    def optimizer(self) -> Callable[..., torch.optim.Optimizer] | None:
        return own_optimizer(self.task)

    @property
    def train(self) -> Callable[..., float | None] | None:
        return own_training(self.task)

    def client_data(self, client: int) -> Data:
        own, odd = data_of(self.task, client), only(self.odd, self._planted(client))
        if isinstance(own, LazyExamples) and isinstance(odd, LazyExamples):
            from torch.utils.data import ConcatDataset

            return replace(own, dataset=ConcatDataset([own.dataset, odd.dataset]), persons=None)
        return joined([_in_memory(own), _in_memory(odd)])

    def _planted(self, client: int) -> NDArray[np.int64]:
        """Return the positions in `odd` of the examples that train at a client."""
        return np.flatnonzero((self.owners == client) & self.coins)

    def planted_at(self, client: int) -> int:
        """Return the number of odd examples that train at a client; they are its last ones."""
        return len(self._planted(client))

    def memorisation_probe(self) -> MemorisationProbe | None:
        """Return the task's own probe, if any; the audit tests odd examples itself, by a claim that no task knows."""
        return self.task.memorisation_probe() if isinstance(self.task, ProbedTask) else None


def mislabelled(task: Task, seed: int) -> Mislabelled:
    """Return a simulated task with odd examples, owners and coins that are drawn from a seed; refuse real data."""
    if not task.simulated:
        raise Refusal("audit", "full", "no example is planted in real data; use audit=light")
    generator = np.random.default_rng([seed, MOST, task.num_clients])
    clients = (data_of(task, client) for client in range(task.num_clients))
    if isinstance(task, OddTask):
        make = task.odd_examples
    else:
        make, clients = partial(_shuffled, _in_memory(held_out_of(task))), map(_in_memory, clients)
    count = max(2, min(MOST, int(SHARE * sum(map(len, clients)))))
    odd = make(count, generator)
    owners = generator.integers(task.num_clients, size=count)
    return Mislabelled(task, odd, owners, generator.random(count) < 0.5)


def _shuffled(held_out: Examples, count: int, generator: np.random.Generator) -> Examples:
    """Return held-out examples with their inputs in random order and the targets of others."""
    sources = torch.from_numpy(generator.integers(len(held_out), size=count))
    inputs = held_out.inputs[sources].flatten(1)
    order = torch.from_numpy(generator.permuted(np.tile(np.arange(inputs.shape[1]), (count, 1)), axis=1))
    shuffled = inputs.gather(1, order).unflatten(1, held_out.inputs.shape[1:])
    sources_of_labels = torch.from_numpy(generator.integers(len(held_out), size=count))
    return Examples(shuffled, held_out.targets[sources_of_labels])


def _in_memory(data: Data) -> Examples:
    """Return data whose inputs are one tensor in memory, or refuse others."""
    return in_tensors(data, "audit", "full", ONLY_TENSORS)


@torch.no_grad()
def losses_of(task: Task, model: nn.Module, data: Data, limit: str = AUTO) -> NDArray[np.float64]:
    """Return the loss of each of n examples by itself, shape (n,); the model is put into evaluation mode.

    Args:
      task: defines the loss.
      model: to evaluate.
      data: the examples.
      limit: of those in memory, as of `evaluated_at_once`.
    """
    losses: list[float] = []
    for outputs, targets in answers(model.eval(), data, limit):
        rows = [slice(i, i + 1) for i in range(len(targets))]
        losses += [float(task.loss(rows_of(outputs, row), targets[row])) for row in rows]
    return np.array(losses)


def keep_losses(folder: Path, client: int, number: int, losses: NDArray[np.float64]) -> None:
    """Append the losses of a client's records under a round's model to the client's file.

    They reveal which records the model memorised (arXiv:2411.05743), so the file is for the owner alone.

    Args:
      folder: folder with one file per client.
      client: number of the client.
      number: number of the round.
      losses: of each record.
    """
    folder.mkdir(parents=True, exist_ok=True)
    client_rows.append(folder / f"{client}{client_rows.LOSSES}", number, losses.astype(np.float32))
