"""Task of few points: clients with a dozen of two classes each, the last one with a single point."""

import torch

from fedveil import Examples

ROWS = 12


class Coins:
    """`Task` whose labels are the sign of a sum.

    Args:
      num_clients: of which the last one can hold no point out.
    """

    simulated = True

    def __init__(self, num_clients: int = 40) -> None:
        self.num_clients = num_clients

    def model(self) -> torch.nn.Module:
        model = torch.nn.Linear(4, 2)
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[0.3, -0.2, 0.1, 0.0], [-0.1, 0.4, 0.0, 0.2]]))
            model.bias.zero_()
        return model

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs, targets)

    def metrics(self, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
        return {"accuracy": (outputs.argmax(1) == targets).double().mean().item()}

    def client_data(self, client: int) -> Examples:
        rows = 1 if client == self.num_clients - 1 else ROWS
        inputs = torch.randn(rows, 4, generator=torch.Generator().manual_seed(client))
        return Examples(inputs, (inputs.sum(1) > 0).long())

    def held_out(self) -> Examples:
        return self.client_data(1000)
