"""Workloads that every contender trains: models and made data; torch alone is needed, so that any engine's Python reads it.

A workload is a model and how many examples clients have: `tiny` 20 to 50, `tiny-equal` 40 each, `tiny-power` by a power law.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

EXAMPLES = 40  # of each client where all have equally many: four steps of a batch
FEWEST, MOST = 20, 50  # of a client otherwise
# By a power law: at least 10, most of them under 16, a mean of about 28, the largest capped.
POWER, POWER_FEWEST, POWER_MOST = 1.5, 10, 1000
BATCH_SIZE = 10
LEARNING_RATE = 0.05
CLASSES = 10
CLIPPING_NORM = 1.0
IDLE_STEP = 0.001  # of every parameter of an idle client: Flower's clipping divides by the update's norm
NOISE_MULTIPLIER = 1.0
_POOL = 4000  # different examples; client k's are a window into them, so that a client costs nothing to make
_SEED = 20


@dataclass(frozen=True)
class Size:
    """How much there is to do.

    Attributes:
      clients: the population.
      cohort: clients of each round.
      rounds: measured rounds; one more comes before them, and is not counted.
    """

    clients: int = 1000
    cohort: int = 100
    rounds: int = 3


def tiny() -> nn.Module:
    """2410 parameters on 8 x 8 pixels."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, CLASSES))


def cnn(first: int, second: int, hidden: int) -> nn.Module:
    """Return two convolutions and two linear layers on 28 x 28 pixels.

    Args:
      first: channels of the first convolution.
      second: channels of the second.
      hidden: width between the linear layers.
    """
    return nn.Sequential(
        nn.Conv2d(1, first, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(first, second, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(second * 7 * 7, hidden),
        nn.ReLU(),
        nn.Linear(hidden, CLASSES),
    )


def wide(width: int, layers: int) -> nn.Module:
    """Return a perceptron on 28 x 28 pixels whose parameters are what costs.

    Args:
      width: of each hidden layer.
      layers: between hidden ones.
    """
    hidden = [part for _ in range(layers) for part in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), nn.Linear(784, width), nn.ReLU(), *hidden, nn.Linear(width, CLASSES))


class Residual(nn.Module):
    """Two convolutions beside a path that skips them (He et al. 2016), normalised in groups, which no example shares."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.between, self.after = nn.GroupNorm(8, outputs), nn.GroupNorm(8, outputs)
        same = inputs == outputs and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return shape (batch, outputs, height, width), smaller by the stride."""
        inner = nn.functional.relu(self.between(self.first(images)))
        return nn.functional.relu(self.after(self.second(inner)) + self.skip(images))


def resnet(widths: tuple[int, ...], blocks: int) -> nn.Module:
    """Return a residual network on 28 x 28 pixels, as for small images: no pooling behind the first convolution.

    Args:
      widths: channels of each stage; every stage but the first halves the image.
      blocks: of a stage.
    """
    layers: list[nn.Module] = [nn.Conv2d(1, widths[0], 3, padding=1, bias=False), nn.GroupNorm(8, widths[0])]
    layers.append(nn.ReLU())
    inputs = widths[0]
    for stage, outputs in enumerate(widths):
        for block in range(blocks):
            layers.append(Residual(inputs, outputs, 2 if stage and not block else 1))
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES))


class RowReader(nn.Module):
    """An LSTM that reads an image of 28 x 28 pixels row by row, and a linear layer on its last state."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cells, self.out = nn.LSTM(28, width, batch_first=True), nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, shape (batch, classes)."""
        return self.out(self.cells(images.flatten(1, 2))[0][:, -1])


class Adapted(nn.Module):
    """A frozen linear layer and a low-rank one beside it (Hu et al. 2021, arXiv:2106.09685)."""

    def __init__(self, inputs: int, outputs: int, rank: int = 8) -> None:
        super().__init__()
        self.frozen = nn.Linear(inputs, outputs).requires_grad_(False)
        self.down, self.up = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the sum of both."""
        return self.frozen(inputs) + self.up(self.down(inputs))


def adapted(width: int) -> nn.Module:
    """Return a perceptron on 28 x 28 pixels whose wide layers are frozen but for adapters.

    Args:
      width: of each hidden layer.
    """
    layers = [nn.Flatten(), Adapted(784, width), nn.ReLU(), Adapted(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, CLASSES))


MODELS = {
    "tiny": tiny,
    "cnn-100k": lambda: cnn(8, 16, 124),  # 99 838 parameters
    "cnn-1m": lambda: cnn(32, 64, 320),  # 1 025 866 parameters
}
EQUAL, BY_POWER = "-equal", "-power"
TRAINED = tuple(f"{name}{kind}" for name in MODELS for kind in ("", EQUAL))
MODELS["idle-100k"] = lambda: nn.Linear(316, 316)  # 100 172 parameters; its clients do nothing
IDLE = ("idle-100k",)
MODELS["wide-10m"] = lambda: wide(2000, 2)  # 9 594 010 parameters
MODELS["wide-100m"] = lambda: wide(5600, 3)  # 98 548 810 parameters
WIDE = ("wide-10m", "wide-100m")
MODELS["resnet-18"] = lambda: resnet((64, 128, 256, 512), 2)  # 11 171 018 parameters
MODELS["resnet-272k"] = lambda: resnet((16, 32, 64), 3)  # 271 994 parameters
MODELS["lstm-82k"] = lambda: RowReader(128)  # 82 186 parameters
MODELS["adapters-700k"] = lambda: adapted(512)  # 23 690 of 688 266 parameters train
OTHERS = ("resnet-272k", "lstm-82k", "adapters-700k")  # layers other than those of `TRAINED`
WORKLOADS = tuple(f"{name}{kind}" for name in MODELS for kind in ("", EQUAL, BY_POWER))


def build(name: str) -> nn.Module:
    """Return the model of that name, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        return MODELS[_model(name)]()


def _model(name: str) -> str:
    return name.removesuffix(EQUAL).removesuffix(BY_POWER)


@cache
def _pool(side: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(_SEED)
    return (
        torch.randn(_POOL, 1, side, side, generator=generator),
        torch.randint(0, CLASSES, (_POOL,), generator=generator),
    )


def count_of(name: str, client: int) -> int:
    """Return how many examples a client has."""
    if name.endswith(EQUAL):
        return EXAMPLES
    spread = (client + 1) * 0x9E3779B1 % 2**32 / 2**32  # Knuth's multiplicative hash: even over [0, 1)
    if name.endswith(BY_POWER):
        return min(POWER_MOST, int(POWER_FEWEST * (1 - spread) ** (-1 / POWER)))
    return FEWEST + int(spread * (MOST + 1 - FEWEST))


def examples_of(name: str, client: int) -> tuple[Tensor, Tensor]:
    """Return a client's inputs, shape (n, 1, side, side), and targets, made when asked for."""
    inputs, targets = _pool(8 if _model(name) == "tiny" else 28)
    first = client * EXAMPLES % (_POOL - POWER_MOST)
    last = first + count_of(name, client)
    return inputs[first:last], targets[first:last]
