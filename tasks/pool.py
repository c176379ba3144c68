"""Pool of examples that a partition deals to simulated clients, for a user's task without clients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..base.refusal import Refusal
from .data import Data, as_data, only
from .flwr_partition import FLWR, flwr_shares
from .partition import Indices, Partition
from .protocol import PooledTask, Task

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Dealt:
    """User's task with its pool as `data` and, in `shares`, each client's rows; other attributes are the task's."""

    task: Any
    data: Data
    shares: tuple[Indices, ...]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    @property
    def simulated(self) -> bool:
        return self.task.simulated

    @property
    def num_clients(self) -> int:
        return len(self.shares)

    def model(self) -> nn.Module:
        return self.task.model()

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        return self.task.loss(outputs, targets)

    def metrics(self, outputs: Any, targets: Tensor) -> dict[str, float]:
        return self.task.metrics(outputs, targets)

    def held_out(self) -> Any:
        return self.task.held_out()

    def client_size(self, client: int) -> int:
        return len(self.shares[client])

    def client_data(self, client: int) -> Data:
        return only(self.data, self.shares[client])


def dealt(task: object, how: Mapping[str, Any] | None) -> object:
    """Return the user's task with its pool dealt to clients, or unchanged if each client has its own data.

    Args:
      task: instance of the user's class.
      how: name, num_clients, seed and other keys of the partition; None if the clients are real.
    """
    if isinstance(task, Task) or not isinstance(task, PooledTask):
        if how is not None and how["name"] != "natural":
            remedy = "this task gives each client its own data; leave it out, or define pool() and labels() instead"
            raise Refusal("partition", how["name"], remedy)
        return task
    if how is None:
        remedy = "deals one pool to simulated clients; define client_data(client) for real ones"
        raise Refusal("task", type(task).__name__, remedy)
    data, labels = as_data(task.pool()), np.asarray(task.labels())
    get_groups: Any = getattr(task, "groups", None)
    groups = None if get_groups is None else np.asarray(get_groups())
    for name, each in (("labels", labels), ("groups", groups)):
        if each is not None and each.shape != (len(data),):
            raise Refusal(name, each.shape, f"must have one for each of the pool's {len(data)} examples")
    count: Any = how["num_clients"] or getattr(task, "num_clients", None)
    if count is None and groups is not None and how["name"] == "natural":
        count = len(np.unique(groups))
    fields: dict[str, Any] = {**how, "num_clients": count}
    if how["name"] == FLWR:  # whose partitioner may know the number of clients
        return Dealt(task, data, flwr_shares(fields, labels, groups))
    if count is None:
        raise Refusal("task.num_clients", None, "give the number of clients to deal the pool to")
    return Dealt(task, data, Partition(**fields).shares(labels, groups))
