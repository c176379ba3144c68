"""Canary records of a client: each is trained on or not by a coin, in the client's own DP-SGD.

White box (Nasr et al. 2023, arXiv:2302.07956): the gradient of a canary is one weight of a block that no other record
touches, longer than any clip. An adversary that sees every noised sum, as the accountant assumes, observes there the
effect of one clipped record. A canary that is out is a record without a gradient, as in zero-out adjacency, or with the
opposite gradient. Its score is the log likelihood ratio of in to out, the most powerful statistic. The block lives for
one round and never leaves, and the model is trained as if it were not there. Coins and scores stay in a file of the
client's own.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..base.refusal import Refusal
from ..messages.record_settings import CanaryRecords
from ..privacy.audit import client_rows
from ..privacy.audit.canary_clients import coins_of
from ..privacy.audit.one_run import Scores
from ..privacy.budget import Adjacency
from ..privacy.mechanisms.randomness import Randomness, Stream
from ..privacy.plan import Plan
from ..strategies.record_plan import PoissonBatches
from ..tasks.data import Data, Examples, LazyExamples, placeholder
from ..tasks.optimizers import own_optimizer
from ..tasks.protocol import Task

TOO_LONG = 10.0  # norm of a canary's gradient over the clipping norm, which tests the clip


class Watched(nn.Module):
    """Model with the block of canaries, from shape (n, 1 + inputs) to (n, outputs + 2).

    The first column of the inputs and the last of the outputs identify the record: 0 for the client's, j for canary j
    that is in, -j for canary j that is out.

    Args:
      model: the client's.
      canaries: number of canaries.
      shape: of one input of the model.
      replaced: whether a canary that is out has the opposite gradient instead of none.
    """

    def __init__(self, model: nn.Module, canaries: int, shape: torch.Size, replaced: bool) -> None:
        super().__init__()
        # client/extra.py knows the parameters by these names: MODEL_PREFIX and BLOCK.
        self.model, self.shape, self.replaced = model, shape, replaced
        self.block = nn.Linear(canaries, 1, bias=False)
        nn.init.zeros_(self.block.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        owners = inputs[:, :1]  # 0, j or -j
        numbers = torch.arange(1, self.block.in_features + 1, dtype=owners.dtype, device=owners.device)
        # 1 for a canary that is in, in the column of its weight.
        marks = (owners == numbers).to(self.block.weight.dtype)
        if self.replaced:
            marks = marks - (owners == -numbers).to(marks.dtype)
        outputs = self.model(inputs[:, 1:].unflatten(1, self.shape)).flatten(1)
        return torch.cat([outputs, self.block(marks), owners.to(outputs.dtype)], 1)


@dataclass(frozen=True)
class WatchedLoss:
    """Task's loss over its own records, and a linear loss over the canaries."""

    task: Task  # gives the loss of its own records
    shape: torch.Size  # of one output of the model
    slope: float  # norm of a canary's gradient

    @property
    def optimizer(self) -> Callable[..., torch.optim.Optimizer] | None:
        """The task's own optimiser, if it defines one."""
        return own_optimizer(self.task)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss over the batch.

        Args:
          outputs: of `Watched`, shape (n, outputs + 2).
          targets: shape (n,); those of canaries are ignored.
        """
        is_client = outputs[:, -1] == 0
        total = self.slope * outputs[:, -2].sum()
        if bool(is_client.any()):
            client_outputs = outputs[is_client][:, :-2].unflatten(1, self.shape)
            total = total + self.task.loss(client_outputs, targets[is_client]) * is_client.sum()
        return total / len(outputs)


@dataclass(frozen=True)
class CanariedRound:
    """Round of a client with canary records.

    Attributes:
      model: replaces the client's.
      loss: replaces its task's.
      examples: its own and then the canaries.
      plan: of the round, with the canaries among the records.
      scores: log likelihood ratios so far, shape (canaries,); they grow with each step.
      path: of the file of coins and scores.
    """

    model: Watched
    loss: WatchedLoss
    examples: Data
    plan: Plan
    scores: Scores
    path: Path = Path()

    def after_step(self) -> None:
        """Add the last step's log likelihood ratio to each score; the block's gradient must be that step's noised mean."""
        plan, noised = self.plan, self.model.block.weight.grad
        assert isinstance(plan.sampling, PoissonBatches) and noised is not None
        rate = plan.sampling.sample_rate
        batch_size = max(1, round(rate * len(self.examples)))  # by which DP-SGD divides the noisy sum
        noisy_sum = noised.detach().cpu().double().numpy()[0] * batch_size / plan.clipping_norm
        self.scores[:] += client_rows.step_ratio(noisy_sum, plan.noise_over_clip, rate, self.model.replaced)

    def keep(self, number: int) -> None:
        """Append the scores of round `number` to the file."""
        client_rows.append(self.path, number, self.scores)


def begin_round(
    model: nn.Module, task: Task, data: Data, plan: Plan, count: int, randomness: Randomness, ledger: Path
) -> CanariedRound:
    """Return the round of `begin` with `count` canaries, whose coins and scores are in a file beside the client's ledger."""
    path = ledger.with_suffix(client_rows.SUFFIX)
    number = int.from_bytes(path.stem.encode()[:6])  # a seeded simulation gives each client coins of its own
    coins = coins_in(path, count, randomness.stream("record canaries", number))
    return replace(begin(model, task, data, coins, plan), path=path)


def begin(model: nn.Module, task: Task, data: Data, coins: NDArray[np.bool_], plan: Plan) -> CanariedRound:
    """Return a client's round with canaries added to its examples and the block added to its model.

    Args:
      model: the client's; its parameters are shared.
      task: gives the loss.
      data: the client's own.
      coins: whether each canary trains, shape (canaries,).
      plan: of the round, with the canaries among the records.
    """
    count, replaced = len(coins), plan.adjacency is Adjacency.REPLACE_ONE
    model, loss = watch(model, task, data, count, replaced, plan.clipping_norm)
    return CanariedRound(model, loss, with_canary_rows(data, coins), plan, np.zeros(count))


def watch(
    model: nn.Module, task: Task, data: Data, count: int, replaced: bool, norm: float
) -> tuple[Watched, WatchedLoss]:
    """Return a model with the block of its canaries, and their joint loss.

    Args:
      model: its parameters are shared.
      task: gives the loss of its own records.
      data: some of those, whose inputs are one tensor.
      count: number of canaries.
      replaced: whether a canary that is out has the opposite gradient instead of none.
      norm: clipping norm of each example's gradient.
    """
    inputs = cast(Tensor, placeholder(data, 1))  # `observer.check` refuses others
    with torch.no_grad():
        outputs = model(inputs)
    watched = Watched(model, count, inputs.shape[1:], replaced)
    watched.block.to(inputs.device)
    return watched, WatchedLoss(task, outputs.shape[1:] or torch.Size([1]), TOO_LONG * norm)


def with_canary_rows(data: Data, coins: NDArray[np.bool_], first: int = 1) -> Data:
    """Return a client's examples as inputs of `Watched`, canaries last; a client without examples has no canary.

    Args:
      data: the client's own, whose inputs are one tensor.
      coins: which of its canaries are in, shape (canaries,).
      first: number of the first of them, from 1.
    """
    count, size = len(coins) if len(data) else 0, len(data)
    numbers = (first + np.arange(count)) * np.where(coins[:count], 1, -1)
    owners = torch.from_numpy(np.concatenate([np.zeros(size, np.int64), numbers]))
    sources = torch.arange(size + count) * (owners == 0)
    whole = partial(_with_owners, data, owners, sources)
    if isinstance(data, Examples):
        return Examples(*whole(torch.arange(size + count)))
    return LazyExamples(range(size + count), collate=lambda rows: whole(torch.tensor(rows)))


def _with_owners(data: Data, owners: Tensor, sources: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return inputs of `Watched` and targets of some rows.

    Args:
      data: a client's own.
      owners: first column of all rows, shape (n,).
      sources: example of each row, shape (n,); a canary has its target, and zeros as inputs.
      rows: positions, shape (b,).
    """
    inputs, targets = data.batch(sources[rows])
    column = owners[rows, None].to(inputs)
    return torch.cat([column, inputs.flatten(1) * (column == 0)], 1), targets


def coins_of_step(canaries: CanaryRecords) -> NDArray[np.bool_]:
    """Return whether each canary of a step is included, shape (count,), in the clients' order."""
    return coins_of(bytes.fromhex(canaries.seed), canaries.count)


def with_canaries(data: Data, canaries: CanaryRecords, client: int) -> Data:
    """Return the records of one client in a step on all clients' records: its data and its canaries."""
    first = client * canaries.each
    return with_canary_rows(data, coins_of_step(canaries)[first : first + canaries.each], first + 1)


def coins_in(path: Path, count: int, stream: Stream) -> NDArray[np.bool_]:
    """Return a client's coins, shape (count,), which the first call draws into its file; refuse another `count` later."""
    if not path.exists():
        bits = np.unpackbits(np.frombuffer(stream.bytes(-(-count // 8)), np.uint8))[:count]
        client_rows.begin(path, bits.astype(np.bool_))
    coins = client_rows.arrays_of(path)[0].astype(np.bool_)
    if len(coins) != count:
        raise Refusal("canaries", count, f"this client began with {len(coins)}; give that number")
    return coins
