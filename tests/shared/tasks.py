"""Tasks that tests train on: random points, of which a model learns whether the sum of their numbers is positive.

A test overrides what it is about: the model, how many rows a client has, whose they are.
"""

import torch
from torch import Tensor, nn

from fedveil.tasks.data import Examples


class Classes:
    """Loss, accuracy and held-out data of a task with classes; `held_out_client` is the client that nobody trains."""

    simulated: bool = True
    num_clients: int = 3
    held_out_client = 9

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        return {"accuracy": (outputs.argmax(1) == targets).float().mean().item()}

    def client_data(self, client: int) -> Examples:
        raise NotImplementedError

    def held_out(self) -> Examples:
        return self.client_data(self.held_out_client)


class Points(Classes):
    """`rows` points of `width` numbers for each client, and a linear model."""

    rows, width = 20, 4

    def model(self) -> nn.Module:
        return nn.Linear(self.width, 2)

    def client_data(self, client: int) -> Examples:
        inputs = torch.randn(self.rows, self.width, generator=torch.Generator().manual_seed(client))
        return Examples(inputs, (inputs.sum(1) > 0).long())


class RealPoints(Points):
    """Points that are nobody else's business: real data, with public held-out ones."""

    simulated, held_out_public = False, True
