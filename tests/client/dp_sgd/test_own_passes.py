"""Passes that torch's vmap repeats for each example: those one by one, for what book-keeping has no rule for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from shared.tasks import Classes
from torch import Tensor, nn

import fedveil as fv
from fedveil.base.refusal import Refusal
from fedveil.benchmarks.made_task import Made
from fedveil.benchmarks.workload import CLASSES
from fedveil.client.dp_sgd import train as dp_sgd
from fedveil.client.dp_sgd.clipped import ClippedParameters
from fedveil.client.dp_sgd.sketched import SketchedParameters, offsets_of
from fedveil.privacy.mechanisms.compression import Compression, Sketch
from fedveil.tasks.data import Examples

NORM = 0.3


class Patches(nn.Module):
    """A small vision transformer with a class token and positions, parameters of its own."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.patch = nn.Linear(4, 8)
        self.token, self.places = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout, batch_first=True, norm_first=True)
        self.out = nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        tokens = torch.cat([self.token.expand(len(images), -1, -1), self.patch(images)], dim=1)
        return self.out(self.block(tokens + self.places)[:, 0])


class Words(nn.Module):
    """Words with learned positions, which a batch shares."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(20, 8), nn.Embedding(4, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.out = nn.Linear(8, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        return self.out(self.block(self.words(words) + self.places(torch.arange(4))).mean(1))


class Tied(nn.Module):
    """A weight with two names, a frozen layer, and a scale without dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.scale, self.out = nn.Parameter(torch.tensor(1.5)), nn.Linear(4, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.out(self.second(self.first(self.frozen(inputs)).tanh()) * self.scale).mean(1)


class Looped(nn.Module):
    """A kernel that vmap repeats in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.out = nn.Parameter(torch.tensor(1.5)), nn.Linear(4, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.out((inputs * self.scale).renorm(2, 0, 1e3)).mean(1)


class Captured(nn.Module):
    """A parameter that the model also reads from a list, where torch.func does not replace it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.out = nn.Parameter(torch.tensor(1.5)), nn.Linear(4, CLASSES)
        self.scales = [self.scale]

    def forward(self, inputs: Tensor) -> Tensor:
        return self.out(inputs * self.scales[0]).mean(1)


class Branches(Made):
    """A loss that looks at a number, as vmap cannot."""

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        loss = super().loss(outputs, targets)
        return loss if float(loss.detach()) < 1e9 else loss * 2


class BranchesBackward(Made):
    """A loss whose gradient looks at a number."""

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        outputs.register_hook(lambda each: each if float(each.sum()) < 1e9 else each * 2)
        return super().loss(outputs, targets)


class OneEntry(Made):
    """A loss of shape (1,)."""

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        return super().loss(outputs, targets).reshape(1)


def examples_of(model: nn.Module, count: int) -> Examples:
    generator = torch.Generator().manual_seed(count)
    inputs = torch.randn(count, 4, 4, generator=generator)
    if isinstance(model, Words):
        inputs = torch.randint(20, (count, 4), generator=generator)
    return Examples(inputs, torch.arange(count) % CLASSES)


def clipped_sum(model: nn.Module, task: Made, examples: Examples, engine: str) -> list[Tensor]:
    clipped = ClippedParameters([p for p in model.parameters() if p.requires_grad], NORM)
    with dp_sgd.clipping(model, task, examples, clipped, engine) as clip:
        clip(np.arange(len(examples)))
        return [p.summed_grad.clone() for p in clipped.params]


def made(build_model: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return build_model()


@pytest.mark.parametrize("build_model", [Patches, Words, Tied])
@pytest.mark.parametrize("count", [1, 5, 40])
def test_vmap_clips_as_passes_one_by_one_do(build_model: Callable[[], nn.Module], count: int) -> None:
    model = made(build_model)
    examples = examples_of(model, count)
    assert dp_sgd.chosen_engine("auto", model, examples) == "vmap"
    together, alone = (clipped_sum(model, Made("tiny", 1), examples, each) for each in ("vmap", "one_by_one"))
    assert 0 < float(torch.cat([each.flatten() for each in alone]).norm()) <= NORM * count * (1 + 1e-5)
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_each_example_draws_its_own_dropout() -> None:
    model = made(lambda: Patches(dropout=0.5))
    one = examples_of(model, 1)
    equal = Examples(one.inputs.expand(2, -1, -1).clone(), one.targets.expand(2).clone())
    assert dp_sgd.chosen_engine("vmap", model, equal) == "vmap"
    clipped = ClippedParameters(model.parameters(), 1e9)
    kept: list[list[Tensor]] = []
    take = clipped.take
    clipped.take = lambda samples, count: (kept.append(list(samples)), take(samples, count))[1]  # pyright: ignore[reportAttributeAccessIssue]
    with dp_sgd.clipping(model, Made("tiny", 1), equal, clipped, "vmap") as clip:
        clip(np.arange(2))
    (samples,) = kept
    assert not any(torch.equal(each[0], each[1]) for each in samples if each.dim() > 2)


@pytest.mark.parametrize("build_task", [Branches, BranchesBackward, OneEntry])
def test_a_loss_that_vmap_cannot_repeat_trains(build_task: Callable[..., Made]) -> None:
    model, task = made(Patches), build_task("tiny", 1)
    examples = examples_of(model, 5)
    together, alone = (clipped_sum(model, task, examples, each) for each in ("vmap", "one_by_one"))
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert any(bool(each.any()) for each in together)


@pytest.mark.parametrize("build_model", [Patches, Tied])
def test_vmap_clips_compressed_gradients_as_one_by_one(build_model: Callable[[], nn.Module]) -> None:
    model = made(build_model)
    examples, trained = examples_of(model, 9), {n: p for n, p in model.named_parameters() if p.requires_grad}
    layout = {name: tuple(p.shape) for name, p in trained.items()}
    size = sum(p.numel() for p in trained.values())
    sketch = Sketch(Compression("project", size, size // 3), b"words of a round")
    assert dp_sgd.chosen_engine("auto", model, examples, compressed=True) == "vmap"
    sums: list[list[Tensor]] = []
    for engine in ("vmap", "one_by_one"):
        offsets = offsets_of([*trained], layout, sketch)
        clipped = SketchedParameters(trained.values(), NORM, offsets, sketch)
        with dp_sgd.clipping(model, Made("tiny", 1), examples, clipped, engine) as clip:
            clip(np.arange(9))
            sums.append([p.summed_grad.clone() for p in clipped.params])
    for one, other in zip(*sums, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


class Tokens(Classes):
    """A run's task, whose model has parameters of its own."""

    def model(self) -> nn.Module:
        return made(Patches)

    def client_data(self, client: int) -> Examples:
        examples = examples_of(Patches(), 20 + client)
        return Examples(examples.inputs, (examples.inputs.sum((1, 2)) > 0).long())


@pytest.mark.parametrize("level", [fv.Record, fv.RecordDistributed])
def test_a_run_by_vmap_trains_and_repeats_its_bits(level: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"cohort": "all", "num_rounds": 2, "quiet": True, "seed": 1}
    for name in ("one", "other"):
        run = fv.simulate(Tokens(), privacy=level(target_delta=1e-2), folder=tmp_path / name, **options)
        assert run.status == "completed"
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "other"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    start = Tokens().model().state_dict()
    assert not torch.equal(one["places"], start["places"]) and not torch.equal(one["token"], start["token"])


def test_vmap_reads_the_values_that_parameters_have_now() -> None:
    model = made(Tied)
    examples = examples_of(model, 5)
    clipped = ClippedParameters([p for p in model.parameters() if p.requires_grad], NORM)
    with dp_sgd.clipping(model, Made("tiny", 1), examples, clipped, "vmap") as clip:
        clip(np.arange(5))
        for parameter in clipped.params:
            parameter.data = parameter.data * 2 + 1
        clip(np.arange(5))
        sums = [p.summed_grad.clone() for p in clipped.params]
    for one, other in zip(sums, clipped_sum(model, Made("tiny", 1), examples, "one_by_one"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("build_model", [Looped, Captured])
def test_vmap_is_refused_where_it_loops_or_misses_gradients(build_model: Callable[[], nn.Module]) -> None:
    model = made(build_model)
    examples = examples_of(model, 3)
    assert dp_sgd.chosen_engine("auto", model, examples) != "vmap"
    remedy = "vmap cannot repeat a pass, or misses a gradient, in this model; use auto or (hooks|one_by_one)"
    with pytest.raises(Refusal, match=remedy):
        dp_sgd.chosen_engine("vmap", model, examples)
