"""Plan of a run's privacy: sampling, clipping, noise and rounds, from which its epsilon follows."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..base.refusal import Refusal, positive, word
from .accounting.curve import PrivacyCurve, filter_curve, privacy_curve
from .accounting.epsilon import GATE_INTERVAL, PUBLISH_INTERVAL, forget_distributions
from .accounting.renyi_filter import accountant, admits, best_order, spent_epsilon
from .budget import Adjacency, Adversary, Budget, Unit
from .mechanisms.mechanism import CENTRAL, Mechanism
from .sampling import Sampling

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

# Range of the search for a noise multiplier, and its relative tolerance.
MIN_PLAN_NOISE, MAX_PLAN_NOISE = 2.0**-6, 2.0**24
NOISE_TOLERANCE = 1e-4
MIN_SHARE_LEFT = 0.01  # of a budget; with less the noise would be useless, so calibration is refused
MAX_ROUNDS = 1 << 20  # limit of `affordable_rounds`


class Unaffordable(Refusal):
    """Refusal of rounds that exceed the rest of the budget."""


@dataclass(frozen=True)
class Plan:
    """Plan of a run: sampling, clipping, noise and rounds, which define its privacy guarantee. All of it is public.

    Attributes:
      unit: unit of privacy.
      adjacency: relation of neighbouring data sets.
      sampling: draw of each round's participants, such as `fedveil.Poisson`.
      clipping_norm: largest L2 norm of one unit's contribution, above 0, in the units of the vectors.
      num_rounds: number of rounds, at least 1.
      noise_multiplier: noise std / sensitivity, above 0; the sensitivity is `clipping_norm`, twice that under
        replace-one. None until calibrated.
      adversaries: adversaries against whom the guarantee holds.
      filter_order: order of the RDP filter if noise depends on earlier releases; None if it is fixed in advance.
      mechanism: distribution of the noise, and the number of rounds that are one release.

    Raises:
      Refusal: a value is out of range, or the mechanism does not support the sampling or the adjacency.

    Example:
      >>> import fedveil as fv
      >>> from fedveil.privacy import Plan
      >>> plan = Plan("client", "zero-out", fv.All(), clipping_norm=1.0, num_rounds=10)
      >>> plan = plan.calibrate(fv.Budget("client", 3.0, 1e-4))
      >>> round(plan.noise_multiplier, 2), round(plan.epsilon(delta=1e-4), 2)
      (3.87, 3.0)
    """

    unit: Unit
    adjacency: Adjacency
    sampling: Sampling
    clipping_norm: float
    num_rounds: int
    noise_multiplier: float | None = None
    adversaries: tuple[Adversary, ...] = (Adversary.CLIENTS, Adversary.MODEL)
    filter_order: float | None = None
    mechanism: Mechanism = CENTRAL

    def __post_init__(self) -> None:
        object.__setattr__(self, "unit", word(Unit, "unit", self.unit))
        object.__setattr__(self, "adjacency", word(Adjacency, "adjacency", self.adjacency))
        object.__setattr__(self, "clipping_norm", positive("clipping_norm", self.clipping_norm))
        if self.noise_multiplier is not None:
            object.__setattr__(self, "noise_multiplier", positive("noise_multiplier", self.noise_multiplier))
        if not isinstance(self.num_rounds, int) or self.num_rounds < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise Refusal("num_rounds", self.num_rounds, "plan at least one round")
        self.mechanism.require(self.sampling, self.adjacency)

    @property
    def noise(self) -> float:
        """Noise multiplier of a calibrated plan; any other plan raises Refusal."""
        if self.noise_multiplier is None:
            raise Refusal("noise_multiplier", None, "calibrate the plan to a budget or give the noise")
        return self.noise_multiplier

    @property
    def noise_over_clip(self) -> float:
        """Noise std / clipping norm of one release, as accountants need it; it does not depend on the clipping norm."""
        return self.noise * self.adjacency.distance

    @property
    def noise_std(self) -> float:
        """Standard deviation of each round's fresh noise in a coordinate of the sum, in the units of the vectors."""
        return self.noise_over_clip * self.mechanism.sensitivity * self.clipping_norm

    def event(self) -> "DpEvent":
        """Return the privacy event of one release of a calibrated plan; any other plan raises Refusal.

        A release is a round or, with correlated noise, a cycle of rounds or the whole run.
        """
        return self.sampling.event(self.mechanism.event(self.noise_over_clip))

    def event_of(self, row: int) -> "DpEvent":
        """Return the charge of round ``row``, from 1: the whole release in the release's first round, nothing after it."""
        from dp_accounting.dp_event import NoOpDpEvent

        return NoOpDpEvent() if (row - 1) % (self.mechanism.rounds or 1) else self.event()

    def epsilon(self, delta: float, rounds: int | None = None, prior: "Sequence[DpEvent]" = ()) -> float:
        """Return epsilon after `rounds` rounds, computed on the fine grid of published values.

        Args:
          delta: in (0, 1).
          rounds: number of rounds; None for all rounds of the plan.
          prior: events that the same unit was charged before.
        """
        events = self._events(rounds, prior)
        return spent_epsilon(events, delta, self.adjacency, self.filter_order, PUBLISH_INTERVAL)

    def curve(
        self, budget: Budget, rounds: int | None = None, prior: "Sequence[DpEvent]" = ()
    ) -> PrivacyCurve:
        """Return epsilon for a range of deltas after `rounds` rounds; with an RDP filter, the curve of its budget.

        Args:
          budget: budget with the plan's unit and adjacency.
          rounds: number of rounds; None for all rounds of the plan.
          prior: events that the same unit was charged before.
        """
        if self.filter_order is not None:
            return filter_curve(budget, self.filter_order)
        return privacy_curve(self._events(rounds, prior), self.adjacency)

    def affordable_rounds(self, budget: Budget, prior: "Sequence[DpEvent]" = ()) -> int:
        """Return how many rounds of this noise, at most `MAX_ROUNDS`, fit what `prior` events leave of the budget."""
        self._check(budget)

        def affordable(rounds: int) -> bool:
            return admits(self._events(rounds, prior), budget, self.filter_order, GATE_INTERVAL)

        max_rounds = self.mechanism.rows or MAX_ROUNDS
        count, step = 0, self.num_rounds
        while count < max_rounds and affordable(count + step):
            count += step
            step = 1 if count == self.num_rounds else 2 * step  # most plans afford hardly more than they have
        while step > 1:  # `count` rounds are affordable, and `count + step` are not
            half = step // 2
            if affordable(count + half):
                count, step = count + half, step - half
            else:
                step = half
        return min(count, max_rounds)

    def require_one_round(self, budget: Budget, prior: "Sequence[DpEvent]" = ()) -> None:
        """Check that one round with this noise fits what `prior` events leave of the budget.

        Raises:
          Unaffordable: one round exceeds the budget; the refusal names the noise multiplier.
        """
        if not admits([*prior, self.event()], budget, self.filter_order):
            text = f"not even one round fits the rest of epsilon {budget.target_epsilon:g}; raise one of them"
            raise Unaffordable("noise_multiplier", self.noise_multiplier, text)

    def calibrate(self, budget: Budget, prior: "Sequence[DpEvent]" = ()) -> "Plan":
        """Return this plan with the smallest noise, up to a relative 1e-4, with which all rounds fit the budget.

        They fit on the ledger's coarse grid, so that it refuses none of them, and on the fine grid of published values.

        Args:
          budget: budget with the plan's unit and adjacency.
          prior: events that the same unit was charged before.

        Raises:
          Unaffordable: too little of the budget is left for any useful noise.
        """
        self._check(budget)
        spent = self._spent(prior, budget, PUBLISH_INTERVAL)
        if spent > (1 - MIN_SHARE_LEFT) * budget.target_epsilon:
            remedy = f"already spent ({spent:.4g}): raise it, or keep the model that you have"
            raise Unaffordable("target_epsilon", budget.target_epsilon, remedy)

        def cost(noise: float) -> float:
            if not prior:  # only the composed prior events would be of use for the next noise
                forget_distributions()
            planned = replace(self, noise_multiplier=noise)._events(None, prior)
            return self._spent(planned, budget, GATE_INTERVAL)

        noise = find_min_noise(cost, budget.target_epsilon)
        calibrated = replace(self, noise_multiplier=noise)
        while not calibrated._fits(budget, prior):  # on the fine grid; the search used the coarse one
            noise *= 1 + NOISE_TOLERANCE
            calibrated = replace(self, noise_multiplier=noise)
        return calibrated

    def calibrate_as_one_of(
        self,
        runs: int,
        budget: Budget,
        prior: "Sequence[DpEvent]" = (),
        num_rounds: int | None = None,
        other_events: "Sequence[DpEvent]" = (),
    ) -> "Plan":
        """Return this plan with noise with which `runs` identical runs together fit the budget.

        So every run gets an equal share. If `prior` leaves less than one share, the plan is calibrated to the rest.

        Args:
          runs: number of runs, at least 1.
          budget: budget with the plan's unit and adjacency.
          prior: events that the same unit was charged before.
          num_rounds: number of rounds of one whole run, if the plan is for the rest of one; None for the plan's.
          other_events: events of one run in addition to its rounds, such as evaluations.
        """
        self._check(budget)
        if other_events:
            self._check_other_events(budget, prior, other_events)
        prior = [*prior, *other_events]
        if runs > 1:
            all_runs = replace(self, num_rounds=runs * (num_rounds or self.num_rounds))
            together = all_runs.calibrate(budget, [each for each in other_events for _ in range(runs)])
            share = replace(together, num_rounds=self.num_rounds)
            if share._fits(budget, prior):
                return share
        return self.calibrate(budget, prior)

    def calibrate_for_filter(self, budget: Budget, prior: "Sequence[DpEvent]" = ()) -> "Plan":
        """Return this plan, calibrated under an RDP filter, for a run whose noise depends on its releases.

        The filter's order is the plan's. If that is None, it is the order that admits most rounds at the noise of
        `calibrate`. Arguments as of `calibrate`.
        """
        order = self.filter_order or best_order(self.calibrate(budget, prior).event(), budget, prior)
        return replace(self, filter_order=order).calibrate(budget, prior)

    def accountant(self, delta: float) -> str:
        """Return the description of the accountant that computes the plan's epsilon, for reports."""
        return accountant(delta, self.adjacency, self.filter_order)

    def _check_other_events(
        self, budget: Budget, prior: "Sequence[DpEvent]", other_events: "Sequence[DpEvent]"
    ) -> None:
        """Check that other events, such as evaluations, leave enough of the budget for the run's rounds."""
        before = self._spent(prior, budget, PUBLISH_INTERVAL)
        after = self._spent([*prior, *other_events], budget, PUBLISH_INTERVAL)
        if before <= (1 - MIN_SHARE_LEFT) * budget.target_epsilon < after:
            remedy = f"the run's planned evaluations and questions alone bring {before:.4g} to {after:.4g}: raise it, or ask less"
            raise Unaffordable("target_epsilon", budget.target_epsilon, remedy)

    def _check(self, budget: Budget) -> None:
        """Refuse a budget of another unit or adjacency than the plan's."""
        if budget.unit is not self.unit:
            remedy = f"plan and budget must protect the same unit, {self.unit}"
            raise Refusal("unit", str(budget.unit), remedy)
        if budget.adjacency is not self.adjacency:
            remedy = f"plan and budget must agree on {self.adjacency}"
            raise Refusal("adjacency", str(budget.adjacency), remedy)

    def _spent(self, events: "Sequence[DpEvent]", budget: Budget, interval: float) -> float:
        """Return the epsilon of events at the budget's delta, under the plan's filter if it has one."""
        return spent_epsilon(events, budget.target_delta, budget.adjacency, self.filter_order, interval)

    def _fits(self, budget: Budget, prior: "Sequence[DpEvent]") -> bool:
        """Return whether prior events and all rounds of the plan fit a budget, on the grid of published values."""
        events = self._events(None, prior)
        return admits(events, budget, self.filter_order, PUBLISH_INTERVAL)

    def _events(self, rounds: int | None, prior: "Sequence[DpEvent]") -> "list[DpEvent]":
        """Return prior events and those of `rounds` rounds, None for all; a cycle that has begun counts as a whole one."""
        from dp_accounting.dp_event import SelfComposedDpEvent

        rounds = self.num_rounds if rounds is None else rounds
        releases = -(-rounds // (self.mechanism.rounds or 1))
        return [*prior, SelfComposedDpEvent(self.event(), releases)]


def find_min_noise(cost: Callable[[float], float], target: float) -> float:
    """Return the smallest noise multiplier, up to a relative 1e-4, that costs at most ``target``.

    Args:
      cost: returns the epsilon of a noise multiplier; it must decrease with the noise.
      target: epsilon, above 0.

    Returns:
      A noise at which ``cost`` was evaluated. Doubling or halving brackets it, and the Illinois method (a regula falsi) on
      log cost over log noise narrows the bracket.
    """
    high = 1.0
    while (high_cost := cost(high)) > target:
        high *= 2
        if high > MAX_PLAN_NOISE:
            remedy = "no noise keeps the planned rounds within what is left of it"
            raise Unaffordable("target_epsilon", target, remedy)
    low = high / 2
    while (low_cost := cost(low)) <= target:
        if low < MIN_PLAN_NOISE:
            return low
        high, high_cost, low = low, low_cost, low / 2
    above, below = _log_ratio(low_cost, target), _log_ratio(high_cost, target)
    # `above` and `below` are the values at `low` and `high` of the function whose root is the noise. Where one end moves
    # twice in a row, Illinois halves the value of the other.
    moved = ""
    while high > low * (1 + NOISE_TOLERANCE) and high_cost < target * (1 - NOISE_TOLERANCE):
        share = min(max(above / (above - below), 0.01), 0.99)
        middle = low * (high / low) ** share
        middle_cost = cost(middle)
        if middle_cost > target:
            low, above = middle, _log_ratio(middle_cost, target)
            below /= 2 if moved == "low" else 1
            moved = "low"
        else:
            high, high_cost, below = middle, middle_cost, _log_ratio(middle_cost, target)
            above /= 2 if moved == "high" else 1
            moved = "high"
    return high


def _log_ratio(cost: float, target: float) -> float:
    """Return log(cost / target), whose root is in the middle of the tolerance; a cost of 0 or infinity is made finite."""
    return math.log(min(max(cost / target, 1e-9), 1e9) / (1 - NOISE_TOLERANCE / 2))
