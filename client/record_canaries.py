"""Canaries among a client's records: each trains or not by a coin, on the client's own path of DP-SGD.

White box (Nasr et al. 2023, arXiv:2302.07956): the gradient of a canary is one weight of a block that no other record
touches, longer than any clip, so that whoever sees the client's update reads there what became of one clipped record. One
that is out is a record without a gradient, as zero-out adjacency has it. The block lives for one round: it never
leaves, and what leaves is trained as if it were not there. Coins and scores stay in a file of the client's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..privacy.audit.one_run import Scores
from ..privacy.mechanisms.randomness import Stream
from ..privacy.planning import Plan
from ..privacy.refusal import Refusal
from .batches import PoissonBatches
from .tasks.protocol import Examples, Task

TOO_LONG = 10.0  # clips that a canary's gradient is long, so that the clip is tried
SUFFIX = ".canaries"


class Watched(nn.Module):
    """The model beside the block of canaries, (records, 1 + inputs) to (records, outputs + 2).

    The first column of the inputs, and the last of the outputs, says whose record it is: 0 the client's, j that of
    canary j, which is in, and -j that of canary j, which is out.
    """

    def __init__(self, model: nn.Module, canaries: int, shape: torch.Size) -> None:
        super().__init__()
        self.model, self.shape = model, shape
        self.block = nn.Linear(canaries, 1, bias=False)
        nn.init.zeros_(self.block.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        whose = inputs[:, 0]
        numbers = torch.arange(1, self.block.in_features + 1, dtype=whose.dtype)
        canary = self.block((whose[:, None] == numbers).to(self.block.weight.dtype))
        outputs = self.model(inputs[:, 1:].unflatten(1, self.shape)).flatten(1)
        return torch.cat([outputs, canary, whose[:, None].to(outputs.dtype)], 1)


@dataclass(frozen=True)
class WatchedLoss:
    """A task's loss over its own records, and a linear one over the canaries that are in."""

    task: Task
    shape: torch.Size
    slope: float

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean over the batch."""
        own = outputs[:, -1] == 0
        total = self.slope * outputs[:, -2].sum()
        if bool(own.any()):
            own_outputs = outputs[own][:, :-2].unflatten(1, self.shape)
            total = total + self.task.loss(own_outputs, targets[own]) * own.sum()
        return total / len(outputs)


@dataclass(frozen=True)
class Round:
    """What a client's round is trained with in place of its model, its loss and its examples."""

    model: Watched
    loss: WatchedLoss
    examples: Examples

    def scores(self, plan: Plan, learning_rate: float) -> Scores:
        """The released sum along each canary in standard deviations of its noise, (canaries,), after training."""
        assert isinstance(plan.sampling, PoissonBatches)
        divisor = max(1, round(plan.sampling.sample_rate * len(self.examples)))
        moved = -self.model.block.weight.detach().double().numpy()[0] * divisor / learning_rate
        return moved / (plan.noise_std * plan.sampling.steps**0.5)


def begin(model: nn.Module, task: Task, examples: Examples, coins: NDArray[np.bool_], clip: float) -> Round:
    """Add the canaries to a client's examples, and the block to its model, whose own parameters are shared."""
    count, inputs = len(coins), examples.inputs
    with torch.no_grad():
        outputs = model(torch.zeros_like(inputs[:1]))
    whose = np.concatenate([np.zeros(len(examples)), np.arange(1, count + 1) * np.where(coins, 1, -1)])
    rows = torch.cat([inputs.flatten(1), inputs.new_zeros(count, inputs[0].numel())])
    marked = torch.cat([torch.from_numpy(whose).to(rows.dtype)[:, None], rows], 1)
    targets = torch.cat([examples.targets, examples.targets[:1].expand(count, *examples.targets.shape[1:])])
    shape = outputs.shape[1:] or torch.Size([1])
    watched = Watched(model, count, inputs.shape[1:])
    return Round(watched, WatchedLoss(task, shape, TOO_LONG * clip), Examples(marked, targets))


# --- the client's own file --------------------------------------------------------------------------------------


def coins_of(path: Path, count: int, stream: Stream) -> NDArray[np.bool_]:
    """The client's coins, tossed when they are first asked for and kept from then on."""
    if not path.exists():
        coins = np.unpackbits(np.frombuffer(stream.bytes(-(-count // 8)), np.uint8))[:count].astype(np.bool_)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "xb") as file:
            np.save(file, coins, allow_pickle=False)
    coins = _read(path)[0].astype(np.bool_)
    if len(coins) != count:
        raise Refusal("canaries", count, f"this client began with {len(coins)}; give that number")
    return coins


def note(path: Path, number: int, plan: Plan, scores: Scores) -> None:
    """Add the scores of round `number`; nothing else than this file ever holds them."""
    assert isinstance(plan.sampling, PoissonBatches)
    with open(path, "ab") as file:
        np.save(file, np.concatenate([[number, plan.sampling.steps], scores]), allow_pickle=False)


def gathered(paths: Sequence[Path]) -> tuple[Scores, Scores]:
    """The scores of all canaries that were in and of all that were out, over all of these clients' rounds.

    Each client's rounds are added with the weights of their noise, so that a canary that is out scores N(0, 1).
    """
    inside: list[Scores] = []
    outside: list[Scores] = []
    for path in paths:
        coins, *rounds = _read(path)
        last = {int(row[0]): row for row in rounds}  # a round that was done again counts once
        if not last:
            continue
        rows = np.stack(list(last.values()))
        steps = rows[:, 1:2]
        total = (rows[:, 2:] * np.sqrt(steps)).sum(0) / np.sqrt(steps.sum())
        inside.append(total[coins.astype(np.bool_)])
        outside.append(total[~coins.astype(np.bool_)])
    empty = np.zeros(0)
    return np.concatenate([empty, *inside]), np.concatenate([empty, *outside])


def _read(path: Path) -> list[NDArray[np.float64]]:
    arrays: list[NDArray[np.float64]] = []
    with open(path, "rb") as file:
        while True:
            try:
                arrays.append(np.load(file, allow_pickle=False))
            except (EOFError, ValueError):  # the end, or a row that a crash cut short
                return arrays
