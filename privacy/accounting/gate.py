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

MAX_LINES = 4  # histories that are followed: one for each adversary and one to spare
MAX_FITTING = 16  # histories that are known to fit, of each budget
MAX_CACHED_EVENTS = 1 << 14  # events whose leaves are remembered

LeafCounts = dict[int, int]  # how often each leaf happened, by the leaf's number in the gate's list


@dataclass(frozen=True)
class _Facts:
    """Facts about a leaf under one adjacency."""

    renyi: Vector | None
    renyi_holds: bool
    has_distribution: bool
    typical_loss: float


@dataclass
class _Line:
    """History that grows: `base` fits, composed on each grid used, and so do `times` leaves like `worst`."""

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
    """

    def __init__(self) -> None:
        self._leaves: list[Leaf] = []
        self._numbers: dict[Leaf, int] = {}
        self._cached_leaves: dict[int, tuple[Any, list[tuple[int, int]]]] = {}
        self._facts: dict[tuple[Adjacency, int], _Facts] = {}
        self._rounded: dict[tuple[int, float], int] = {}
        self._lines: list[_Line] = []
        self._failing: dict[tuple[Budget, float], list[LeafCounts]] = {}
        self._fitting: dict[Budget, list[LeafCounts]] = {}
        self._lock = Lock()

    def fits(
        self, spent: "Iterable[DpEvent] | Mapping[DpEvent, int]", proposed: "DpEvent", budget: Budget
    ) -> bool:
        """Return whether a release after others stays within a budget.

        Raises:
          Refusal: an event that cannot be accounted.
        """
        with self._lock:
            step = self._count([proposed])
            total = _sum(self._count(spent), step)
            fitting = self._fitting.setdefault(budget, [])
            if any(_covers(each, total) for each in fitting):
                return True
            line = self._line(total, budget)
            fits = self._has_room(line, total) or self._fits(line, total, step)
            if fits:
                ahead = {} if line.worst is None else {line.worst: line.times}
                more = _sum(line.base, ahead)
                largest = more if _covers(more, total) else total
                others = [each for each in fitting if not _covers(largest, each)]
                self._fitting[budget] = [largest, *others[: MAX_FITTING - 1]]
            return fits

    def _fits(self, line: _Line, total: LeafCounts, step: LeafCounts) -> bool:
        budget = line.budget
        facts = [self._facts_of(number, budget.adjacency) for number in total]
        size = _by_renyi(total, facts, budget.target_delta)
        if size is not None and size <= budget.target_epsilon and all(each.renyi_holds for each in facts):
            return True
        loss = min((each.typical_loss for each in facts), default=math.inf)
        interval = first_interval(loss, GATE_INTERVAL, size)
        failing = self._failing.setdefault((budget, interval), [])
        if any(_covers(total, less) for less in failing):
            return False
        finite = size is None or size <= VACUOUS_EPSILON
        composable = all(each.has_distribution for each in facts) and budget.target_delta >= MIN_PLD_DELTA
        if finite and composable and self._affords(line, total, interval, {}):
            self._advance(line, total, step, interval)
            return True
        upper_bounds = bounds(self._leaf_counts(total), budget.target_delta, budget.adjacency, GATE_INTERVAL)
        if any(bound <= budget.target_epsilon for bound in upper_bounds):
            return True
        failing.append(total)
        return False

    def _count(self, events: "Iterable[DpEvent] | Mapping[DpEvent, int]") -> LeafCounts:
        from dp_accounting.dp_event import SelfComposedDpEvent

        counts: LeafCounts = {}
        for event, times in events.items() if isinstance(events, Mapping) else ((each, 1) for each in events):
            if type(event) is SelfComposedDpEvent and type(event.count) is int and event.count >= 0:
                event, times = event.event, times * event.count
            for number, n in self._parts(event) if times else ():
                counts[number] = counts.get(number, 0) + n * times
        return counts

    def _parts(self, event: Any) -> list[tuple[int, int]]:
        # By identity: comparing events would take longer than everything else.
        cached = self._cached_leaves.get(id(event))
        if cached is None or cached[0] is not event:
            if len(self._cached_leaves) >= MAX_CACHED_EVENTS:
                self._cached_leaves.clear()
            cached = event, [(self._number(leaf), n) for leaf, n in leaves(event)]
            self._cached_leaves[id(event)] = cached
        return cached[1]

    def _number(self, leaf: Leaf) -> int:
        if leaf not in self._numbers:
            self._numbers[leaf] = len(self._leaves)
            self._leaves.append(leaf)
        return self._numbers[leaf]

    def _leaf_counts(self, counts: LeafCounts) -> Counts:
        return in_order({self._leaves[number]: n for number, n in counts.items()})

    def _facts_of(self, number: int, adjacency: Adjacency) -> _Facts:
        key, leaf = (adjacency, number), self._leaves[number]
        if key not in self._facts:
            self._facts[key] = _Facts(
                renyi_vector(leaf, adjacency),
                renyi_holds(leaf, adjacency),
                has_distribution(leaf, adjacency),
                typical_loss(leaf),
            )
        return self._facts[key]

    def _line(self, total: LeafCounts, budget: Budget) -> _Line:
        for line in self._lines:
            if line.budget == budget and _covers(total, line.base):
                return line
        self._lines = [_Line(budget), *self._lines[: MAX_LINES - 1]]
        return self._lines[0]

    def _has_room(self, line: _Line, total: LeafCounts) -> bool:
        further = {k: n - line.base.get(k, 0) for k, n in total.items() if n > line.base.get(k, 0)}
        if line.worst is None or sum(further.values()) > line.times:
            return False
        worst = self._leaves[line.worst]
        return all(k == line.worst or _is_dominated(self._leaves[k], worst) for k in further)

    def _affords(self, line: _Line, total: LeafCounts, interval: float, further: LeafCounts) -> bool:
        """Return whether `wanted` and `further` fit, by PLD on grids as fine as it takes."""
        from . import loss_distributions

        relation, budget, before = relation_of(line.budget.adjacency), line.budget, math.inf
        grid = max(interval, GATE_INTERVAL)
        kinds = {number: type(self._leaves[number]).__name__ for number in total}
        gaussian = {number: n for number, n in total.items() if kinds[number] == "GaussianDpEvent"}
        others = {number: n for number, n in total.items() if number not in gaussian}
        rest = with_one_gaussian({self._leaves[number]: n for number, n in _sum(gaussian, further).items()})
        while True:
            losses: Any = self._compose(line, others, grid)
            losses = loss_distributions.distribution(in_order(rest), relation, grid, losses)
            delta = losses.get_delta_for_epsilon(budget.target_epsilon)
            if delta <= budget.target_delta:
                return True
            small = losses.get_delta_for_epsilon(MIN_STEPS * grid) <= budget.target_delta
            settled = interval < GATE_INTERVAL and before - delta <= SETTLED * delta
            if (grid <= interval and not small) or settled or grid <= FINEST_INTERVAL:
                return False
            before, grid = delta, finer(grid)

    def _compose(self, line: _Line, total: LeafCounts, interval: float) -> Any:
        """Return the losses of `wanted`, from those last composed on this grid where they are part of it."""
        from . import loss_distributions

        relation = relation_of(line.budget.adjacency)
        kinds = coarsened(total, self._round)
        before, losses = line.composed.get(interval, ({}, None))
        if not _covers(kinds, before):
            before, losses = {}, None
        more = {kind: n - before.get(kind, 0) for kind, n in kinds.items()}
        losses = loss_distributions.distribution(self._leaf_counts(more), relation, interval, losses)
        line.composed[interval] = kinds, losses
        return losses

    def _round(self, number: int, levels: float) -> int:
        key = number, levels
        if key not in self._rounded:
            self._rounded[key] = self._number(rounded(self._leaves[number], levels))
        return self._rounded[key]

    def _advance(self, line: _Line, total: LeafCounts, step: LeafCounts, interval: float) -> None:
        line.base, min_times = total, sum(step.values())
        line.worst = self._worst(total, step) if line.growing or line.times else None
        if line.worst is None:
            return
        times = max(2 * line.times if line.growing else line.times, min_times)
        while times and not self._affords(line, total, interval, {line.worst: times}):
            times = max(times // 2, min_times) if times > min_times else 0
            line.growing = False
        line.times = times

    def _worst(self, total: LeafCounts, step: LeafCounts) -> int | None:
        """Return a leaf whose privacy loss dominates every Gaussian of `wanted` and all of `step`."""
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
    vectors = [each.renyi for each in facts if each.renyi is not None]
    if not counts or len(vectors) < len(facts):
        return None if counts else 0.0
    return from_renyi(np.array(list(counts.values()), float) @ np.array(vectors), delta)


def _is_dominated(leaf: Leaf, other: Leaf) -> bool:
    mine, others = gaussian_scale(leaf), gaussian_scale(other)
    return mine is not None and others is not None and mine[0] <= others[0] and mine[1] >= others[1]


def _sum(counts: LeafCounts, more: LeafCounts) -> LeafCounts:
    return counts | {number: counts.get(number, 0) + n for number, n in more.items()}


def _covers(larger: LeafCounts, smaller: LeafCounts) -> bool:
    return all(larger.get(number, 0) >= n for number, n in smaller.items())
