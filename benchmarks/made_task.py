"""The made workload as a `Task` of the package, trained by its own ClientApp."""

from __future__ import annotations

from torch import Tensor, nn

from ..tasks.classification import cross_entropies
from ..tasks.data import Examples
from .workload import build, count_of, examples_of


class Made:
    """A `Task` over made data of any number of clients, each made when it is asked for."""

    simulated = True

    def __init__(self, workload: str, num_clients: int) -> None:
        self.workload = workload
        self.num_clients = num_clients

    def model(self) -> nn.Module:
        """Return the workload's model."""
        return build(self.workload)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy."""
        return nn.functional.cross_entropy(outputs, targets)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return each client's mean cross-entropy."""
        return cross_entropies(outputs, targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Return the accuracy."""
        return {"accuracy": float((outputs.argmax(-1) == targets).float().mean())}

    def client_data(self, client: int) -> Examples:
        """Return a client's examples."""
        return Examples(*examples_of(self.workload, client))

    def client_size(self, client: int) -> int:
        """Return how many examples a client has."""
        return count_of(self.workload, client)

    def held_out(self) -> Examples:
        """Return the first client's examples: nothing is evaluated here."""
        return self.client_data(0)
