"""A task with a network of its own: 200 shops, each with 50 customers. Will a customer come back?"""

import torch
from torch import Tensor, nn

from fedveil.tasks import Examples

FEATURES, HIDDEN, CLASSES = 8, 16, 2
CUSTOMERS = 50


class Shops:
    """Any class with these members is a task; nothing is inherited."""

    simulated = True  # the customers are made up; say False once they are real

    def __init__(self, num_clients: int = 200) -> None:
        self.num_clients = num_clients

    def model(self) -> nn.Module:
        """Return a new model; the same values on every call, whatever the global random state."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean over the batch."""
        return nn.functional.cross_entropy(outputs, targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Return means over the examples given."""
        return {"accuracy": (outputs.argmax(1) == targets).float().mean().item()}

    def client_data(self, client: int) -> Examples:
        """Return one shop's customers: make them, or read them from its file."""
        return customers(seed=client, count=CUSTOMERS)

    def held_out(self) -> Examples:
        """Return what the model is never trained on."""
        return customers(seed=1_000_000, count=2_000)


def customers(seed: int, count: int) -> Examples:
    """Return inputs (count, FEATURES) float32 and targets (count,) int64."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, FEATURES, generator=generator)
    chance = torch.sigmoid(3 * inputs @ torch.linspace(-1, 1, FEATURES))
    return Examples(inputs, (torch.rand(count, generator=generator) < chance).long())
