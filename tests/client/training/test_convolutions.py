"""Convolutions of several clients at once: equal to those of single clients, and only where they are and pay."""

import copy
import runpy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, RecordDict
from hypothesis import strategies as st
from torch import Tensor, nn

from fedveil.client.training import cohort_training, convolutions
from fedveil.client.training.cohort_training import can_vectorise, image_layers, sum_cohort
from fedveil.client.training.convolutions import convolutional, forward_images, most_clients
from fedveil.client.training.in_place import begin
from fedveil.client.workbench import Workbench
from fedveil.messages.client_settings import TRAIN_LOSS, ClientSettings
from fedveil.messages.local_training import LocalTraining, Optimizer
from fedveil.messages.wire import WEIGHT, instruct, memory_arrays
from fedveil.privacy.mechanisms.private_sum import CohortSum
from fedveil.privacy.mechanisms.sum_spec import Segment, SumSpec
from fedveil.tasks.arrays import read_arrays
from fedveil.tasks.data import Examples

SIDE, CLASSES = 9, 3
SIZES = (12, 11, 11, 9, 5, 5, 4, 1)
SETTINGS = ClientSettings("made", LocalTraining(0.1, local_epochs=2, batch_size=5), seed=3)
SPEC = SumSpec(None, (Segment(TRAIN_LOSS, 5.0), Segment(WEIGHT, 1e9)))


MADE = runpy.run_path(str(Path(__file__).with_name("test_cohort_training.py")))
identity = MADE["identity"]


def small() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2)),
            nn.Sequential(nn.GroupNorm(2, 4), nn.Conv2d(4, 6, 2, bias=False), nn.Sigmoid()),
            nn.Flatten(),
            nn.Linear(54, CLASSES),
        )


@dataclass
class Made(MADE["Made"]):
    """Random images, as many for each client as `sizes` says."""

    sizes: tuple[int, ...] = SIZES
    build: Callable[[], nn.Module] = small
    loss_of: Callable[..., Tensor] = nn.functional.cross_entropy
    side: int = SIDE

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.loss_of(outputs, targets)

    def client_data(self, client: int) -> Examples:
        source = torch.Generator().manual_seed(client)
        inputs = torch.randn(self.sizes[client], 2, self.side, self.side, generator=source)
        return Examples(inputs, torch.randint(CLASSES, (self.sizes[client],), generator=source))


def bench_of(task: Made, training: LocalTraining = SETTINGS.training) -> Workbench:
    bench = Workbench(replace(SETTINGS, training=training))
    bench.__dict__["task"] = task
    return bench


def content_of(task: Made) -> RecordDict:
    arrays = memory_arrays(read_arrays(task.model()))
    return instruct(RecordDict({"arrays": arrays, "config": ConfigRecord({})}), SPEC, "run", 1)


def sums(bench: Workbench, task: Made) -> tuple[np.ndarray, np.ndarray]:
    """Return the sums of stacks and of clients that are trained in place."""
    size = sum(p.numel() for p in bench.model.parameters()) + SPEC.segment_size
    content, single = content_of(task), CohortSum(np.zeros(size))
    together = sum_cohort(bench, content, range(len(task.sizes)), SPEC, size)
    begun = begin(bench, content)
    for client in range(len(task.sizes)):
        begun.add(single, begun.train(client), SPEC)
    assert (together.replies, together.dropped) == (single.replies, single.dropped)
    return together.total, single.total


@st.composite
def networks(draw: Any) -> nn.Module:
    """Draw a network of up to three convolutions with pools and norms between them."""
    layers: list[nn.Module] = []
    channels, side = 2, SIDE
    for _ in range(draw(st.integers(1, 3))):
        groups, padding = draw(st.sampled_from([1, 2])), draw(st.integers(0, 2))
        kernel, stride = draw(st.integers(1, min(3, side))), draw(st.integers(1, 2))
        dilation = draw(st.integers(1, 2 if 2 * (kernel - 1) < side else 1))
        outputs, bias = 2 * draw(st.integers(1, 3)), draw(st.booleans())
        layers.append(nn.Conv2d(channels, outputs, kernel, stride, padding, dilation, groups, bias))
        channels, side = outputs, (side + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        layers.append(draw(st.sampled_from([nn.ReLU(), nn.Tanh(), nn.GELU(), nn.ReLU(inplace=True)])))
        if draw(st.booleans()):
            layers.append(nn.GroupNorm(2, channels, affine=draw(st.booleans())))
        pools = [nn.MaxPool2d(2, ceil_mode=True), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2)]
        if side > 1 and draw(st.booleans()):
            pool = draw(st.sampled_from(pools))
            layers.append(pool)
            side = 2 if pool is pools[2] else (side + (pool is pools[0])) // 2
    width = channels * side * side
    layers += [nn.Flatten(), nn.Linear(width, 5, bias=draw(st.booleans())), nn.Tanh(), nn.Linear(5, CLASSES)]
    torch.manual_seed(draw(st.integers(0, 99)))
    return copy.deepcopy(nn.Sequential(*layers)).double()


@hypothesis.settings(max_examples=60)
@hypothesis.given(networks(), st.integers(1, 4), st.integers(1, 3))
def test_a_stack_has_each_clients_outputs_and_gradients(model: nn.Module, clients: int, rows: int) -> None:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    layers = convolutional(model)
    assert layers
    weights = {
        name: (p.detach() + 0.3 * torch.randn(clients, *p.shape).double()).requires_grad_()
        for name, p in model.named_parameters()
    }
    inputs = torch.randn(clients, rows, 2, SIDE, SIDE).double()
    outputs, back = forward_images(layers, weights, inputs), torch.randn(clients, rows, CLASSES).double()
    gradients = torch.autograd.grad((outputs * back).sum(), list(weights.values()))
    for client in range(clients):
        own = {name: value[client].detach().requires_grad_() for name, value in weights.items()}
        alone = torch.func.functional_call(model, own, (inputs[client].clone(),))
        torch.testing.assert_close(outputs[client], alone, rtol=1e-9, atol=1e-9)
        expected = torch.autograd.grad((alone * back[client]).sum(), list(own.values()))
        for gradient, other in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient[client], other, rtol=1e-8, atol=1e-8)


@hypothesis.settings(max_examples=15)
@hypothesis.given(
    st.lists(st.integers(0, 23), min_size=2, max_size=9),
    st.integers(1, 2),
    st.sampled_from([1, 4, 100]),
    st.sampled_from([0.0, 0.6]),
    st.sampled_from(["sgd", "adam"]),
)
def test_uneven_clients_train_in_stacks_as_they_do_alone(
    sizes: list[int], epochs: int, batch_size: int, mu: float, optimizer: str
) -> None:
    task = Made(tuple(sizes))
    training = LocalTraining(0.02, epochs, batch_size, proximal_mu=mu, optimizer=Optimizer(optimizer))
    np.testing.assert_allclose(*sums(bench_of(task, training), task), rtol=1e-4, atol=1e-4)


def compared_with_the_mean(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs - outputs.mean(0), targets)


@pytest.mark.parametrize(
    ("loss_of", "sizes"),
    [
        (nn.functional.cross_entropy, [[12, 11], [11, 9, 5], [5, 4, 1]]),
        (compared_with_the_mean, [[12], [11, 11], [9], [5, 5], [4], [1]]),
    ],
)
def test_stacks_are_as_large_as_pays(
    loss_of: Callable[..., Tensor], sizes: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    task, stacks = Made(loss_of=loss_of), list[list[int]]()
    train_group: Any = vars(cohort_training)["_train_group"]

    def spy(bench: Workbench, group: Any, *rest: Any) -> Any:
        stacks.append([len(examples) for _, examples in group])
        return train_group(bench, group, *rest)

    monkeypatch.setattr(cohort_training, "_train_group", spy)
    largest = 4 * SIDE * SIDE
    monkeypatch.setattr(convolutions, "CACHED", 3 * 5 * largest)  # of three clients' steps
    np.testing.assert_allclose(*sums(bench_of(task), task), rtol=1e-4, atol=1e-4)
    assert stacks == sizes
    example = torch.zeros(1, 2, SIDE, SIDE)
    assert most_clients(convolutional(small()), example, 5) == 3
    assert most_clients(convolutional(small()), example, 16) == 0


def same() -> nn.Module:
    bend = nn.Tanh()
    return nn.Sequential(nn.Conv2d(2, 2, 3), bend, nn.Conv2d(2, 2, 3), bend, nn.Flatten(), nn.Linear(50, 3))


class Own(nn.Sequential):
    """A sequence whose forward function is its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


APART = {
    "circular padding": lambda: nn.Sequential(
        nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), nn.Flatten(), nn.Linear(162, CLASSES)
    ),
    "its own forward": lambda: Own(nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(98, CLASSES)),
    "one layer twice": same,
    "dropout": lambda: nn.Sequential(nn.Conv2d(2, 2, 3), nn.Dropout(), nn.Flatten(), nn.Linear(98, CLASSES)),
    "a linear layer on rows of pixels": lambda: nn.Sequential(
        nn.Conv2d(2, 2, 3), nn.Linear(7, 4), nn.Flatten(), nn.Linear(56, CLASSES)
    ),
    "a norm of rows": lambda: nn.Sequential(
        nn.Conv2d(2, 2, 3), nn.Flatten(), nn.LayerNorm(98), nn.Linear(98, CLASSES)
    ),
    "rows that are flattened in part": lambda: nn.Sequential(
        nn.Conv2d(2, 2, 3), nn.Flatten(2), nn.Linear(49, CLASSES)
    ),
    "no convolution": lambda: nn.Sequential(nn.AvgPool2d(3), nn.Flatten(), nn.Linear(18, CLASSES)),
    "many parameters": lambda: nn.Sequential(nn.Conv2d(2, 50, 3), nn.Flatten(), nn.Linear(2450, 100)),
}


@pytest.mark.parametrize("build", APART.values(), ids=list(APART))
def test_other_networks_are_not_stacked_by_channels(build: Callable[[], nn.Module]) -> None:
    assert convolutional(small())
    assert convolutional(build()) == []


def test_only_networks_whose_stacks_pay_are_stacked() -> None:
    assert can_vectorise(bench_of(Made()))
    wide = Made(
        side=100, build=lambda: nn.Sequential(nn.Conv2d(2, 8, 3, 2), nn.Flatten(), nn.Linear(19208, 3))
    )
    assert image_layers(bench_of(wide)) and not can_vectorise(
        bench_of(wide, replace(SETTINGS.training, batch_size=9))
    )
    assert can_vectorise(bench_of(wide))
    middle = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(196, 300), nn.Linear(300, CLASSES))
    task = Made(build=lambda: copy.deepcopy(middle))
    assert can_vectorise(bench_of(task)) and not can_vectorise(bench_of(task), "cuda")


def test_clients_of_odd_shapes_fail_alone(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL", "fedveil.client")
    task = Made((5, 5, 5))
    whole, odd = task.client_data, Examples(torch.zeros(6, 2, 3, 3), torch.zeros(6, dtype=torch.int64))
    task.client_data = lambda client: whole(client) if client else odd  # type: ignore[method-assign]
    size = sum(p.numel() for p in small().parameters()) + SPEC.segment_size
    total = sum_cohort(bench_of(task), content_of(task), range(3), SPEC, size)
    assert (total.replies, total.dropped) == (2, {"failed": 1})
