"""Task whose model is wide and whose data are few."""

import torch
from torch import Tensor, nn

from fedveil.tasks.data import Examples

CLIENTS = 3


class Wide:
    simulated = True
    num_clients = CLIENTS

    def __init__(self, width: int) -> None:
        self.width = width

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Linear(self.width, self.width, bias=False)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        return {"accuracy": float((outputs.argmax(-1) == targets).float().mean())}

    def client_data(self, client: int) -> Examples:
        del client
        return Examples(torch.ones(2, self.width), torch.zeros(2, dtype=torch.long))

    def held_out(self) -> Examples:
        return self.client_data(0)
