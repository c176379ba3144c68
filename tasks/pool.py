"""Pool of examples that a partition deals to simulated clients, for a task of one's own that has no clients yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from ..privacy.refusal import Refusal
from .data import Data, as_data, only
from .flwr_partition import FLWR, flwr_shares
from .partition import Indices, Partition
from .protocol import Task

if TYPE_CHECKING:
    from torch import Tensor, nn

DEALT = "partition of a pool"  # the option that says how: the partition's keys, num_clients and seed


@runtime_checkable
class PooledTask(Protocol):
    """Task of one's own whose data are one pool; it has all members of `Task` but `num_clients` and `client_data`.

    Where it also has `groups()`, the owner of each example, shape (n,), the natural partition deals by these.
    """

    def pool(self) -> Any:
        """Return all clients' data, in a form that `client_data` may have."""
        ...

    def labels(self) -> Any:
        """Return the class of each example of the pool, shape (n,)."""
        ...


@dataclass(frozen=True)
class Dealt:
    """Task over the shares of a pool; what it has no word for is its task's own."""

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
    """Return the task with its pool dealt to clients, or as it is where each client has its own data.

    Args:
      task: of the user's own.
      how: name, num_clients, seed and other keys of the partition; None where clients are real.

    Raises:
      Refusal: the partition does not suit the task.
    """
    if isinstance(task, Task) or not isinstance(task, PooledTask):
        if how is not None and how["name"] != "natural":
            remedy = (
                "this task gives each client its own data; leave it out, or give pool() and labels() instead"
            )
            raise Refusal("partition", how["name"], remedy)
        return task
    if how is None:
        remedy = "deals one pool to simulated clients; give client_data(client)"
        raise Refusal("task", type(task).__name__, remedy)
    data, labels = as_data(task.pool()), np.asarray(task.labels())
    owners: Any = getattr(task, "groups", None)
    groups = None if owners is None else np.asarray(owners())
    for name, each in (("labels", labels), ("groups", groups)):
        if each is not None and each.shape != (len(data),):
            raise Refusal(name, each.shape, f"give one for each of the pool's {len(data)} examples")
    count: Any = how["num_clients"] or getattr(task, "num_clients", None)
    if how["name"] == FLWR:
        return Dealt(task, data, flwr_shares({**how, "num_clients": count}, labels, groups))
    if count is None and groups is not None and how["name"] == "natural":
        count = len(np.unique(groups))
    if count is None:
        raise Refusal("task.num_clients", None, "say to how many clients the pool is dealt")
    given: dict[str, Any] = {**how, "num_clients": count}
    return Dealt(task, data, Partition(**given).shares(labels, groups))
