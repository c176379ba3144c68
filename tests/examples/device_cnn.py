"""A device's own task, for measurements: the convolutional network of the shipped task, on made-up pictures."""

import torch
from torch import nn

from fedveil.tasks.data import Examples

RECORDS, CLASSES = 600, 10


class Pictures:
    """600 pictures of 28 x 28 at one client."""

    simulated = True  # a deployed client does not believe it
    num_clients = 1

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 16, 8, stride=2, padding=3),
            nn.Tanh(),
            nn.MaxPool2d(2, 1),
            nn.Conv2d(16, 32, 4, stride=2),
            nn.Tanh(),
            nn.MaxPool2d(2, 1),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 32),
            nn.Tanh(),
            nn.Linear(32, CLASSES),
        )

    def loss(self, outputs, targets):
        return nn.functional.cross_entropy(outputs, targets)

    def metrics(self, outputs, targets):
        return {}

    def client_data(self, client: int) -> Examples:
        draw = torch.Generator().manual_seed(client)
        inputs = torch.randn(RECORDS, 1, 28, 28, generator=draw)
        return Examples(inputs, torch.randint(0, CLASSES, (RECORDS,), generator=draw))

    def held_out(self) -> Examples:
        return self.client_data(1)
