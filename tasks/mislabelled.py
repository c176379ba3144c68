"""Odd examples with random labels for black-box audits: a coin decides whether each trains at its simulated client.

Odd examples that trained have lower losses than the others only if the model memorised them. Each is a held-out example
with its inputs in random order, so that it teaches nothing about the task and is easy to recognise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..base.refusal import Refusal
from ..privacy.audit import client_rows
from .batch_memory import AUTO, answers
from .data import Data, Examples, data_of, held_out_of, in_tensors, joined, only, rows_of
from .optimizers import own_optimizer
from .protocol import ProbedTask, Task, own_training

if TYPE_CHECKING:
    from ..privacy.audit.memorisation import MemorisationProbe

MOST = 1000  # largest number of odd examples
ONLY_TENSORS = "its odd examples are made of held-out ones; use audit=light"
SHARE = 0.2  # largest number of odd examples, as a share of the clients' own; about half of them train


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
    odd: Examples
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

    def model(self) -> nn.Module:
        return self.task.model()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.task.loss(outputs, targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        return self.task.metrics(outputs, targets)

    def held_out(self) -> Data:
        return held_out_of(self.task)

    @property
    def optimizer(self) -> Callable[..., torch.optim.Optimizer] | None:
        return own_optimizer(self.task)

    @property
    def train(self) -> Callable[..., float | None] | None:
        return own_training(self.task)

    def client_data(self, client: int) -> Examples:
        own = in_tensors(data_of(self.task, client), "audit", "full", ONLY_TENSORS)
        return joined([own, only(self.odd, self._planted(client))])

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
    held_out = in_tensors(held_out_of(task), "audit", "full", ONLY_TENSORS)
    clients = (data_of(task, client) for client in range(task.num_clients))
    total = sum(len(in_tensors(data, "audit", "full", ONLY_TENSORS)) for data in clients)
    count = max(2, min(MOST, int(SHARE * total)))
    sources = torch.from_numpy(generator.integers(len(held_out), size=count))
    inputs = held_out.inputs[sources].flatten(1)
    order = torch.from_numpy(generator.permuted(np.tile(np.arange(inputs.shape[1]), (count, 1)), axis=1))
    shuffled = inputs.gather(1, order).unflatten(1, held_out.inputs.shape[1:])
    sources_of_labels = torch.from_numpy(generator.integers(len(held_out), size=count))
    odd = Examples(shuffled, held_out.targets[sources_of_labels])
    owners = generator.integers(task.num_clients, size=count)
    return Mislabelled(task, odd, owners, generator.random(count) < 0.5)


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
