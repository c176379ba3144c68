"""Clipped sums on a second device: each rule makes its tensors there, and gives the processor's sums."""

import runpy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fedveil.client.dp_sgd.book_keeping import SUBSTITUTES
from fedveil.client.dp_sgd.clipped import ClippedParameters
from fedveil.client.dp_sgd.example_gradients import GHOST, RULES
from fedveil.client.dp_sgd.train import ENGINES

OTHER = runpy.run_path(str(Path(__file__).parents[2] / "faults" / "other_device.py"))
ROWS, PADDED, CLASSES, CLIP = 3, 4, 5, 0.5


class Reader(nn.Module):
    """Words' vectors, a layer on them, and a linear layer on the mean of its outputs."""

    def __init__(self, layer: nn.Module, attends: bool = False) -> None:
        super().__init__()
        self.embedding, self.layer, self.out = nn.Embedding(9, 8), layer, nn.Linear(8, CLASSES)
        self.attends = attends

    def forward(self, words: Tensor) -> Tensor:
        vectors = self.embedding(words)
        result: Any = self.layer(vectors, vectors, vectors) if self.attends else self.layer(vectors)
        return self.out((result if isinstance(result, Tensor) else result[0]).mean(1))


def seer(layer: nn.Module) -> nn.Module:
    """A layer on images or other grids of four channels, and a linear layer on the means of its channels."""
    return nn.Sequential(layer, nn.Tanh(), nn.Flatten(2), Mean(), nn.Linear(4, CLASSES))


class Mean(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.mean(-1)


# A model for each layer that has a rule, and the shape of an example's numbers; None: words.
MODELS: dict[type[nn.Module], tuple[Callable[[], nn.Module], tuple[int, ...] | None]] = {
    nn.Linear: (lambda: Reader(nn.Linear(8, 8)), None),
    NonDynamicallyQuantizableLinear: (lambda: Reader(NonDynamicallyQuantizableLinear(8, 8)), None),
    nn.Embedding: (lambda: Reader(nn.Identity()), None),
    nn.LayerNorm: (lambda: Reader(nn.LayerNorm(8)), None),
    nn.RMSNorm: (lambda: Reader(nn.RMSNorm(8)), None),
    nn.RNN: (lambda: Reader(nn.RNN(8, 8, batch_first=True)), None),
    nn.LSTM: (lambda: Reader(nn.LSTM(8, 8, 2, batch_first=True)), None),
    nn.GRU: (lambda: Reader(nn.GRU(8, 4, batch_first=True, bidirectional=True)), None),
    nn.MultiheadAttention: (lambda: Reader(nn.MultiheadAttention(8, 2, batch_first=True), True), None),
    nn.GroupNorm: (lambda: seer(nn.GroupNorm(2, 4)), (4, 5, 5)),
    nn.Conv1d: (lambda: seer(nn.Conv1d(2, 4, 3, padding=1)), (2, 9)),
    nn.Conv2d: (lambda: seer(nn.Conv2d(2, 4, 3, groups=2)), (2, 6, 6)),
    nn.Conv3d: (lambda: seer(nn.Conv3d(2, 4, 2, dilation=2)), (2, 4, 4, 4)),
}


@pytest.fixture(autouse=True)
def elsewhere() -> Iterator[None]:
    with OTHER["other_device"](), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def sums(engine: str, layer: type[nn.Module], device: str) -> dict[str, Tensor]:
    """The clipped sums over three rows, padded, as tensors of the processor."""
    make, shape = MODELS[layer]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = make()
        numbers = torch.randint(9, (ROWS, 7)) if shape is None else torch.randn(ROWS, *shape)
    model, numbers, targets = model.to(device), numbers.to(device), (torch.arange(ROWS) % CLASSES).to(device)
    clipped = ClippedParameters([p for p in model.parameters() if p.requires_grad], CLIP)

    def forward(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        index = rows[torch.arange(count).clamp(max=len(rows) - 1)]
        outputs = model(numbers[index])
        return outputs, cross_entropy(outputs, targets[index])

    with ENGINES[engine](model, forward, clipped) as clipped_sums:
        assert bool(clipped_sums(torch.arange(ROWS), PADDED).all())
        found: dict[str, Any] = dict(model.named_parameters())
        assert all(p.summed_grad.device.type == device for p in found.values())
        return {name: p.summed_grad.cpu() for name, p in found.items()}


@pytest.mark.parametrize("layer", [*RULES, *SUBSTITUTES], ids=lambda layer: layer.__name__)
def test_each_rule_gives_the_processors_sums_on_a_device(layer: type[nn.Module]) -> None:
    torch.testing.assert_close(sums("book_keeping", layer, "meta"), sums("book_keeping", layer, "cpu"))


@pytest.mark.parametrize("layer", GHOST, ids=lambda layer: layer.__name__)
def test_ghost_clipping_makes_its_norms_on_the_device(layer: type[nn.Module]) -> None:
    torch.testing.assert_close(sums("ghost", layer, "meta"), sums("ghost", layer, "cpu"))
