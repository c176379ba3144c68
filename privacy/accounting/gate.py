"""Gate that admits a next release, within milliseconds after thousands of releases of any noise."""

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from ..budget import Adjacency, Budget
from .epsilon import (
    FINEST_INTERVAL,
    GATE_INTERVAL,
    MIN_PLD_DELTA,
    MIN_STEPS,
    SETTLED,
    VACUOUS_EPSILON,
    bounds,
    coarsened,
    finer,
    first_interval,
    has_distribution,
    in_order,
    rounded,
    typical_loss,
    with_one_gaussian,
)
from .events import Counts, Leaf, gaussian_scale, leaves
from .renyi import Vector, from_renyi, relation_of, renyi_holds, renyi_vector

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

MAX_HISTORIES = 4  # that are followed: one for each adversary and one to spare
MAX_FITTING = 1 << 12  # budgets and sets of leaves of which counts are known to fit
DOUBLINGS = 5  # of counts that fit by RDP, which are then known to fit up to 32 times
MAX_CACHED_EVENTS = 1 << 14  # events whose leaves are remembered

LeafCounts = dict[int, int]  # how often each leaf happened, by the leaf's number in the gate's list


@dataclass(frozen=True)
class _Facts:
    """Facts about a leaf under one adjacency, by the functions of the same names; `renyi` is its `renyi_vector`."""

    renyi: Vector | None
    renyi_holds: bool
    has_distribution: bool
    typical_loss: float


@dataclass
class _History:
    """Releases on a ledger that fit its budget, and a look-ahead.

    Attributes:
      budget: budget of the ledger.
      base: counted leaves of the releases when PLD last admitted one; RDP and the look-ahead leave it.
      composed: for each step of a grid, the counts that were last composed on it, and their PLD.
      worst: number of the leaf by which the look-ahead counts: it covers releases of no larger loss. None without one.
      times: how many releases like `worst` fit after `base`.
      growing: whether the look-ahead still doubles; not after it has met the budget.
    """

    budget: Budget
    base: LeafCounts = field(default_factory=dict[int, int])
    composed: dict[float, tuple[LeafCounts, Any]] = field(default_factory=dict[float, tuple[LeafCounts, Any]])
    worst: int | None = None
    times: int = 0
    growing: bool = True


class Gate:
    """Gate for one more release: it admits what `within` admits, and nothing above the budget.

    RDP is tried first, because it is additive. If it is too loose, the composed PLD of the spent events is cached and
    only new events are composed with it. The gate also looks ahead: it finds how many further releases fit, and these
    need no computation as long as none has a larger privacy loss than the one used for the look-ahead. The result
    depends only on budget and events, so all ledgers of a process share `GATE`, and clients with the same plan compose
    their rounds once.

    Leaves are numbered, and `LeafCounts` are by these numbers, because hashing a leaf takes long.
    """

    def __init__(self) -> None:
        self._leaves: list[Leaf] = []  # by number
        self._numbers: dict[Leaf, int] = {}
        self._cached_leaves: dict[int, tuple[Any, list[tuple[int, int]]]] = {}  # by the id of the event
        self._facts: dict[tuple[Adjacency, int], _Facts] = {}  # by adjacency and the leaf's number
        self._rounded: dict[tuple[int, float], int] = {}  # by the leaf's number and the levels
        self._histories: list[_History] = []  # the newest first
        self._failing: dict[tuple[Budget, float], list[LeafCounts]] = {}  # refused, by budget and grid step
        # Admitted counts, by budget and leaves; smaller counts fit as well.
        self._fitting: dict[tuple[Budget, frozenset[int]], LeafCounts] = {}
        self._lock = Lock()

    def fits(
        self, spent: "Iterable[DpEvent] | Mapping[DpEvent, int]", proposed: "DpEvent", budget: Budget
    ) -> bool:
        """Return whether the spent events and a proposed one stay within a budget.

        Raises:
          Refusal: an event that cannot be accounted.
        """
        with self._lock:
            step = self._count([proposed])
            total = _sum(self._count(spent), step)
            kind = budget, frozenset(total)
            if _covers(self._fitting.get(kind, {}), total):
                return True
            history = self._history_of(total, budget)
            fits = self._has_room(history, total) or self._fits(history, total, step)
            if fits:
                ahead = {} if history.worst is None else {history.worst: history.times}
                more = _sum(history.base, ahead)
                if len(self._fitting) >= MAX_FITTING:
                    self._fitting.clear()
                self._fitting[kind] = more if _covers(more, total) else self._doubled(total, budget)
            return fits

    def _fits(self, history: _History, total: LeafCounts, step: LeafCounts) -> bool:
        """Return by computation whether `total`, which ends with `step`, fits; if PLD shows it, it is the new base."""
        budget = history.budget
        if self._fits_by_renyi(total, budget):
            return True
        facts = [self._facts_of(number, budget.adjacency) for number in total]
        size = _by_renyi(total, facts, budget.target_delta) or 0.0
        loss = min((each.typical_loss for each in facts), default=math.inf)
        interval = first_interval(loss, GATE_INTERVAL, size)
        failing = self._failing.setdefault((budget, interval), [])
        if any(_covers(total, less) for less in failing):
            return False
        has_pld = all(each.has_distribution for each in facts) and budget.target_delta >= MIN_PLD_DELTA
        if size <= VACUOUS_EPSILON and has_pld and self._affords(history, total, interval, {}):
            self._advance(history, total, step, interval)
            return True
        upper_bounds = bounds(self._leaf_counts(total), budget.target_delta, budget.adjacency, GATE_INTERVAL)
        if any(bound <= budget.target_epsilon for bound in upper_bounds):
            return True
        failing.append(total)
        return False

    def _fits_by_renyi(self, total: LeafCounts, budget: Budget) -> bool:
        """Return whether RDP, which is additive, shows that counts stay within a budget."""
        facts = [self._facts_of(number, budget.adjacency) for number in total]
        epsilon = _by_renyi(total, facts, budget.target_delta)
        return epsilon is not None and epsilon <= budget.target_epsilon and all(f.renyi_holds for f in facts)

    def _doubled(self, total: LeafCounts, budget: Budget) -> LeafCounts:
        """Return counts that fit, doubled as often as they still fit by RDP, so that later ones need no computation."""
        for _ in range(DOUBLINGS):
            twice = _sum(total, total)
            if not self._fits_by_renyi(twice, budget):
                break
            total = twice
        return total

    def _count(self, events: "Iterable[DpEvent] | Mapping[DpEvent, int]") -> LeafCounts:
        """Return the leaves of events with their counts."""
        from dp_accounting.dp_event import SelfComposedDpEvent

        counts: LeafCounts = {}
        for event, times in events.items() if isinstance(events, Mapping) else ((each, 1) for each in events):
            if type(event) is SelfComposedDpEvent and type(event.count) is int and event.count >= 0:
                event, times = event.event, times * event.count
            for number, n in self._parts(event) if times else ():
                counts[number] = counts.get(number, 0) + n * times
        return counts

    def _parts(self, event: Any) -> list[tuple[int, int]]:
        """Return the numbers of an event's leaves, each with its count."""
        # The cache goes by identity: comparing events would take longer than everything else.
        cached = self._cached_leaves.get(id(event))
        if cached is None or cached[0] is not event:
            if len(self._cached_leaves) >= MAX_CACHED_EVENTS:
                self._cached_leaves.clear()
            cached = event, [(self._number(leaf), n) for leaf, n in leaves(event)]
            self._cached_leaves[id(event)] = cached
        return cached[1]

    def _number(self, leaf: Leaf) -> int:
        """Return the number of a leaf, which gets one if it has none."""
        if leaf not in self._numbers:
            self._numbers[leaf] = len(self._leaves)
            self._leaves.append(leaf)
        return self._numbers[leaf]

    def _leaf_counts(self, counts: LeafCounts) -> Counts:
        return in_order({self._leaves[number]: n for number, n in counts.items()})

    def _facts_of(self, number: int, adjacency: Adjacency) -> _Facts:
        """Return the facts about the leaf of this number, computed once."""
        key, leaf = (adjacency, number), self._leaves[number]
        if key not in self._facts:
            self._facts[key] = _Facts(
                renyi_vector(leaf, adjacency),
                renyi_holds(leaf, adjacency),
                has_distribution(leaf, adjacency),
                typical_loss(leaf),
            )
        return self._facts[key]

    def _history_of(self, total: LeafCounts, budget: Budget) -> _History:
        """Return the history that `total` continues, or a new one; the oldest of `MAX_HISTORIES` is then forgotten."""
        for history in self._histories:
            if history.budget == budget and _covers(total, history.base):
                return history
        self._histories = [_History(budget), *self._histories[: MAX_HISTORIES - 1]]
        return self._histories[0]

    def _has_room(self, history: _History, total: LeafCounts) -> bool:
        """Return whether the look-ahead of a history covers `total`."""
        base = history.base
        further = {number: n - base.get(number, 0) for number, n in total.items() if n > base.get(number, 0)}
        if history.worst is None or sum(further.values()) > history.times:
            return False
        worst = self._leaves[history.worst]
        return all(
            number == history.worst or _is_dominated(self._leaves[number], worst) for number in further
        )

    def _affords(self, history: _History, total: LeafCounts, interval: float, ahead: LeafCounts) -> bool:
        """Return whether `total` and `ahead`, a look-ahead, fit together, by PLD on grids that are refined as in `epsilon`."""
        from . import loss_distributions

        relation, budget = relation_of(history.budget.adjacency), history.budget
        grid, last_delta = max(interval, GATE_INTERVAL), math.inf
        kinds = {number: type(self._leaves[number]).__name__ for number in total}
        gaussian = {number: n for number, n in total.items() if kinds[number] == "GaussianDpEvent"}
        others = {number: n for number, n in total.items() if number not in gaussian}
        rest = with_one_gaussian({self._leaves[number]: n for number, n in _sum(gaussian, ahead).items()})
        while True:
            losses: Any = self._compose(history, others, grid)
            losses = loss_distributions.distribution(in_order(rest), relation, grid, losses)
            delta = losses.get_delta_for_epsilon(budget.target_epsilon)
            if delta <= budget.target_delta:
                return True
            is_coarse = losses.get_delta_for_epsilon(MIN_STEPS * grid) <= budget.target_delta
            settled = interval < GATE_INTERVAL and last_delta - delta <= SETTLED * delta
            if (grid <= interval and not is_coarse) or settled or grid <= FINEST_INTERVAL:
                return False
            last_delta, grid = delta, finer(grid)

    def _compose(self, history: _History, total: LeafCounts, interval: float) -> Any:
        """Return the PLD of `total`, computed from the one last composed on this grid if `total` contains its leaves."""
        from . import loss_distributions

        relation = relation_of(history.budget.adjacency)
        kinds = coarsened(total, self._round)
        earlier, losses = history.composed.get(interval, ({}, None))
        if not _covers(kinds, earlier):
            earlier, losses = {}, None
        more = {kind: n - earlier.get(kind, 0) for kind, n in kinds.items()}
        losses = loss_distributions.distribution(self._leaf_counts(more), relation, interval, losses)
        history.composed[interval] = kinds, losses
        return losses

    def _round(self, number: int, levels: float) -> int:
        """Return the number of a leaf rounded as `rounded` says."""
        key = number, levels
        if key not in self._rounded:
            self._rounded[key] = self._number(rounded(self._leaves[number], levels))
        return self._rounded[key]

    def _advance(self, history: _History, total: LeafCounts, step: LeafCounts, interval: float) -> None:
        """Make `total`, which fits and ends with `step`, the base of a history, and look ahead from it.

        The look-ahead doubles until it meets the budget. From then on it is halved, down to one more step and to nothing.
        """
        history.base, min_times = total, sum(step.values())
        history.worst = self._worst(total, step) if history.growing or history.times else None
        if history.worst is None:
            return
        times = max(2 * history.times if history.growing else history.times, min_times)
        while times and not self._affords(history, total, interval, {history.worst: times}):
            times = max(times // 2, min_times) if times > min_times else 0
            history.growing = False
        history.times = times

    def _worst(self, total: LeafCounts, step: LeafCounts) -> int | None:
        """Return the number of a leaf that dominates every Gaussian of `total` and all of `step`; None if there is none."""
        from dp_accounting.dp_event import GaussianDpEvent, PoissonSampledDpEvent

        if any(gaussian_scale(self._leaves[number]) is None for number in step):
            return next(iter(step)) if len(step) == 1 else None
        scales = [scale for number in total if (scale := gaussian_scale(self._leaves[number])) is not None]
        if not scales:
            return None
        rate, noise = max(rate for rate, _ in scales), min(noise for _, noise in scales)
        query = GaussianDpEvent(noise)
        return self._number(query if rate == 1 else PoissonSampledDpEvent(rate, query))


GATE = Gate()  # of all ledgers of this process
# A forked worker begins anew: another thread of its parent may have held the lock.
os.register_at_fork(after_in_child=GATE.__init__)


def _by_renyi(counts: LeafCounts, facts: list[_Facts], delta: float) -> float | None:
    """Return epsilon by RDP of counted leaves, whose `facts` are in the same order; None if RDP does not cover one."""
    vectors = [each.renyi for each in facts if each.renyi is not None]
    if not counts or len(vectors) < len(facts):
        return None if counts else 0.0
    return from_renyi(np.array(list(counts.values()), float) @ np.array(vectors), delta)


def _is_dominated(leaf: Leaf, other: Leaf) -> bool:
    """Return whether a Gaussian, sampled or not, has no larger privacy loss than another one."""
    mine, others = gaussian_scale(leaf), gaussian_scale(other)
    return mine is not None and others is not None and mine[0] <= others[0] and mine[1] >= others[1]


def _sum(counts: LeafCounts, more: LeafCounts) -> LeafCounts:
    return counts | {number: counts.get(number, 0) + n for number, n in more.items()}


def _covers(larger: LeafCounts, smaller: LeafCounts) -> bool:
    """Return whether counts contain other counts."""
    return all(larger.get(number, 0) >= n for number, n in smaller.items())
