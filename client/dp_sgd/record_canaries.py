"""Canaries among a client's records: each trains or not by a coin, on the client's own path of DP-SGD.

White box (Nasr et al. 2023, arXiv:2302.07956): the gradient of a canary is one weight of a block that no other record
touches, longer than any clip, so that whoever sees every noised sum, as the accountant supposes, reads there what became
of one clipped record. One that is out is a record without a gradient, as zero-out adjacency has it, or with the opposite
one. Its score is the log likelihood ratio of in to out, than which no statistic tells them apart better. The block lives
for one round: it never leaves, and what leaves is trained as if it were not there. Coins and scores stay in a file of the
client's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...privacy.audit.kept_rows import arrays_of
from ...privacy.audit.one_run import Scores
from ...privacy.budget import Adjacency
from ...privacy.mechanisms.randomness import Stream
from ...privacy.plan import Plan
from ...privacy.refusal import Refusal
from ...strategies.record_plan import PoissonBatches
from ...tasks.protocol import Examples, Task

TOO_LONG = 10.0  # clips that a canary's gradient is long, so that the clip is tried


class Watched(nn.Module):
    """The model beside the block of canaries, (records, 1 + inputs) to (records, outputs + 2).

    The first column of the inputs, and the last of the outputs, says whose record it is: 0 the client's, j that of
    canary j, which is in, and -j that of canary j, which is out: without a gradient or, if `replaced`, with the opposite.
    """

    def __init__(self, model: nn.Module, canaries: int, shape: torch.Size, replaced: bool) -> None:
        super().__init__()
        self.model, self.shape, self.replaced = model, shape, replaced
        self.block = nn.Linear(canaries, 1, bias=False)
        nn.init.zeros_(self.block.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        whose = inputs[:, 0]
        numbers = torch.arange(1, self.block.in_features + 1, dtype=whose.dtype)
        marks = (whose[:, None] == numbers).to(self.block.weight.dtype)
        if self.replaced:
            marks = marks - (whose[:, None] == -numbers).to(marks.dtype)
        canary = self.block(marks)
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
    """What a client's round is trained with in place of its model, its loss and its examples; and (canaries,) scores."""

    model: Watched
    loss: WatchedLoss
    examples: Examples
    plan: Plan
    scores: Scores

    def after_step(self) -> None:
        """Add to each score the log likelihood ratio of the step that was just taken."""
        sampling, noised = self.plan.sampling, self.model.block.weight.grad
        assert isinstance(sampling, PoissonBatches) and noised is not None
        divisor = max(1, round(sampling.sample_rate * len(self.examples)))
        moved = noised.detach().double().numpy()[0] * divisor / self.plan.clipping_norm
        self.scores[:] += step_ratio(
            moved, self.plan.noise_over_clip, sampling.sample_rate, self.model.replaced
        )


def step_ratio(moved: Scores, noise: float, rate: float, replaced: bool = False) -> Scores:
    """The log likelihood ratio of one noised sum along each canary, `moved` in clips, like `noise`, its std.

    In, the sum is N(1, noise^2) with probability `rate`, else N(0, noise^2); out, it is N(0, noise^2) or, if `replaced`,
    what one opposite to the canary would make it.
    """

    def drawn(sums: Scores) -> Scores:  # against a record without a gradient
        there = (sums - 0.5) / noise**2
        return there if rate == 1 else np.logaddexp(np.log1p(-rate), np.log(rate) + there)

    return drawn(moved) - drawn(-moved) if replaced else drawn(moved)


def begin(model: nn.Module, task: Task, examples: Examples, coins: NDArray[np.bool_], plan: Plan) -> Round:
    """Add the canaries to a client's examples, and the block to its model, whose own parameters are shared.

    `plan` is that of the round, with the canaries among the records.
    """
    count, inputs = len(coins), examples.inputs
    with torch.no_grad():
        outputs = model(torch.zeros_like(inputs[:1]))
    whose = np.concatenate([np.zeros(len(examples)), np.arange(1, count + 1) * np.where(coins, 1, -1)])
    rows = torch.cat([inputs.flatten(1), inputs.new_zeros(count, inputs[0].numel())])
    marked = torch.cat([torch.from_numpy(whose).to(rows.dtype)[:, None], rows], 1)
    targets = torch.cat([examples.targets, examples.targets[:1].expand(count, *examples.targets.shape[1:])])
    shape = outputs.shape[1:] or torch.Size([1])
    watched = Watched(model, count, inputs.shape[1:], plan.adjacency is Adjacency.REPLACE_ONE)
    loss = WatchedLoss(task, shape, TOO_LONG * plan.clipping_norm)
    return Round(watched, loss, Examples(marked, targets), plan, np.zeros(count))


# --- the client's own file --------------------------------------------------------------------------------------


def coins_of(path: Path, count: int, stream: Stream) -> NDArray[np.bool_]:
    """The client's coins, tossed when they are first asked for and kept from then on."""
    if not path.exists():
        coins = np.unpackbits(np.frombuffer(stream.bytes(-(-count // 8)), np.uint8))[:count].astype(np.bool_)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "xb") as file:
            np.save(file, coins, allow_pickle=False)
    coins = arrays_of(path)[0].astype(np.bool_)
    if len(coins) != count:
        raise Refusal("canaries", count, f"this client began with {len(coins)}; give that number")
    return coins
