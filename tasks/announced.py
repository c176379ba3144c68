"""Task whose number of clients is known before its data are read, for plans that need nothing else."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .protocol import Task

if TYPE_CHECKING:
    from torch import Tensor, nn


class AnnouncedTask:
    """Simulated task that is loaded at the first access to its model or data."""

    simulated = True

    def __init__(self, num_clients: int, load: Callable[[], Task]) -> None:
        self.num_clients = num_clients
        self._load = load

    @cached_property
    def _task(self) -> Task:
        return self._load()

    def model(self) -> nn.Module:
        """Return a new model."""
        return self._task.model()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean over the batch."""
        return self._task.loss(outputs, targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Return means over the examples given."""
        return self._task.metrics(outputs, targets)

    def client_data(self, client: int) -> Any:
        """Return the examples of one client."""
        return self._task.client_data(client)

    def held_out(self) -> Any:
        """Return the held-out examples."""
        return self._task.held_out()
