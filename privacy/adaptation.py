"""Adaptive choices of a run from earlier releases: the clipping norm and the noise multiplier.

Norm: module `mechanisms.adaptive_clipping`, which also explains why it needs no filter.

Noise: save budget while the loss falls, and spend it once the loss stalls. Lee and Kifer 2018 (arXiv:1808.09501) start
with much noise and lower it repeatedly; here it is lowered once. A run begins with more noise than its budget requires.
When the noised mean loss of the last `WINDOW` rounds is hardly below that of the `WINDOW` before, or at `LATEST` of the
rounds, the saved budget is spread over the remaining rounds, which get the smallest noise that fits. The time of this
change depends on outputs, and so do the events, so the RDP filter accounts for them (`filter`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from ..base.refusal import Range
from .mechanisms.private_sum import UNCLIPPED

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

    from .budget import Budget
    from .mechanisms.adaptive_clipping import AdaptiveClipping
    from .mechanisms.sum_spec import Segment
    from .plan import Plan

SAVING = 1.25  # noise over planned noise while saving: a round then costs about 0.64 of a planned one
WINDOW = 10  # rounds whose losses are averaged
STALLED = 0.98  # share of the earlier mean loss; only a mean loss below it is progress
LATEST = 0.75  # share of the rounds after which there is no more saving


@dataclass(frozen=True)
class Choices:
    """Choices for the next round; public, and part of a run's state.

    Attributes:
      clipping_norm: L2 norm of one client's whole contribution.
      noise_multiplier: noise std / sensitivity.
      losses: the noised mean losses of the last rounds, as many as the choice of noise uses.
    """

    clipping_norm: Annotated[float, Range(gt=0)]
    noise_multiplier: Annotated[float, Range(gt=0)]
    losses: tuple[float, ...] = ()


@dataclass(frozen=True)
class AdaptiveNoise:
    """Rule by which the noise of a run follows its losses; public.

    Attributes:
      plan: plan of the rounds after `start_round`, as `Plan.calibrate_for_filter` returns it.
      budget: budget that the filter guards.
      loss: name of the mean loss among the scalars of the private sum.
      prior: events that the ledger held when `plan` was made; they spend the budget as well.
      start_round: number of rounds completed before the plan was made.
    """

    plan: Plan
    budget: Budget
    loss: str
    prior: tuple[DpEvent, ...] = ()
    start_round: int = 0

    @property
    def first(self) -> float:
        """The noise multiplier while saving."""
        return SAVING * self.plan.noise

    def next_noise(self, noise: float, number: int, losses: Sequence[float]) -> float:
        """Return the noise multiplier of the round after round `number`; it changes once, when the saved budget is spent.

        Args:
          noise: noise multiplier of round `number`.
          number: number of the round, from 1.
          losses: the noised mean losses of the last rounds, the oldest first, up to that round's.
        """
        from dp_accounting.dp_event import SelfComposedDpEvent

        completed = number - self.start_round
        remaining = self.plan.num_rounds - completed
        is_saving = noise == self.first and remaining >= 1
        must_spend = stalled(losses) or completed >= LATEST * self.plan.num_rounds
        if not (is_saving and must_spend):
            return noise
        past = SelfComposedDpEvent(replace(self.plan, noise_multiplier=self.first).event(), completed)
        return replace(self.plan, num_rounds=remaining).calibrate(self.budget, (*self.prior, past)).noise


def stalled(losses: Sequence[float]) -> bool:
    """Return whether the last `WINDOW` rounds hardly lowered the loss of those before; False while there are too few."""
    latest, earlier = losses[-WINDOW:], losses[-2 * WINDOW : -WINDOW]
    return len(losses) >= 2 * WINDOW and sum(latest) > STALLED * sum(earlier)


@dataclass(frozen=True)
class Adaptation:
    """Adaptive choices of a run; None for a value that is fixed in advance."""

    clipping: AdaptiveClipping | None = None
    noise: AdaptiveNoise | None = None

    def first(self, plan: Plan) -> Choices:
        """Return the choices for the first round."""
        return Choices(plan.clipping_norm, self.noise.first if self.noise else plan.noise)

    def segments(self, plan: Plan, expected_size: float) -> tuple[Segment, ...]:
        """Return the segments that only the next choices need: adaptive clipping adds one; the noise follows a metric.

        Args:
          plan: plan of the round.
          expected_size: expected number of clients in the round's cohort, by which the sum is divided.
        """
        if self.clipping is None:
            return ()
        return (self.clipping.bit(plan.noise_over_clip, expected_size),)

    def next(self, last: Choices, number: int, scalars: Mapping[str, float]) -> Choices:
        """Return the choices for the round after round `number`.

        Args:
          last: the choices of round `number`.
          number: number of the round, from 1.
          scalars: the round's noised means by name; they include what the adaptive choices read.
        """
        if self.clipping is not None:
            norm = self.clipping.next_norm(last.clipping_norm, scalars[UNCLIPPED])
            last = replace(last, clipping_norm=norm)
        if self.noise is not None:
            losses = (*last.losses, scalars[self.noise.loss])[-2 * WINDOW :]
            noise = self.noise.next_noise(last.noise_multiplier, number, losses)
            last = replace(last, losses=losses, noise_multiplier=noise)
        return last


NOTHING_ADAPTS = Adaptation()
