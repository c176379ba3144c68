"""Cost of data that are read lazily: a local epoch beside a plain loop over torch's DataLoader, with the same items."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..client.training.sgd import train, with_fast_kernels
from ..messages.local_training import LocalTraining
from ..simulations.simulate import restoring_state
from ..tasks.data import LazyExamples
from .engines import Options
from .made_task import Made
from .stopwatch import cpu_milliseconds
from .tables import Row, conditions, ratio, result_of
from .workload import LEARNING_RATE, build, examples_of

BATCH = 32
CLIENTS = 30  # whose examples together are one data set


class Flipped(Dataset[tuple[Tensor, Tensor]]):
    """Images of some clients, each mirrored by a coin when it is read."""

    def __init__(self, workload: str) -> None:
        held = [examples_of(workload, client) for client in range(CLIENTS)]
        self.images, self.labels = (torch.cat(parts) for parts in zip(*held, strict=True))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        image = self.images[row]
        return image.flip(-1) if torch.rand(()) < 0.5 else image, self.labels[row]


def run_loading(options: Options) -> Row:
    """Measure an epoch of each workload both ways, in turns."""
    before = conditions()
    with restoring_state():
        torch.set_num_threads(1)
        rows = [_measure(name, options.size.rounds * options.repeats) for name in options.workloads]
    notes = [f"the fastest turn of each; batches of {BATCH}; items are mirrored by a coin as they are read"]
    return result_of("loading", before, {"Milliseconds of CPU: an epoch of one client": rows}, notes)


def _measure(workload: str, turns: int) -> Row:
    data, task, training = Flipped(workload), Made(workload, 1), LocalTraining(LEARNING_RATE, 1, BATCH)
    loader = DataLoader(data, batch_size=BATCH, shuffle=True)
    ours, theirs = with_fast_kernels(build(workload)), with_fast_kernels(build(workload))
    ways: dict[str, Callable[[], object]] = {
        "fedveil": lambda: train(ours, task, LazyExamples(data), training, 0, 0),
        "plain": lambda: _plain(theirs, loader),
    }
    fastest = {name: float(f"{min(each):.3g}") for name, each in cpu_milliseconds(ways, turns).items()}
    return {
        "workload": workload,
        "examples": len(data),
        **fastest,
        "ratio": ratio(fastest["fedveil"], fastest["plain"]),
    }


def _plain(model: nn.Module, loader: DataLoader[tuple[Tensor, Tensor]]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for inputs, targets in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
