"""Audit of a running run: the claim so far, the measurement by canaries, and the alarms.

All results are computed from the rows of `round_rows` and the canaries' coins, so a finished run gives the same numbers
as the running one, and a run that was killed and resumed gives the same numbers as an uninterrupted one.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ...base.refusal import Refusal
from ..accounting.epsilon import GATE_INTERVAL
from ..accounting.gaussian import gaussian_epsilon, gaussian_mu
from ..accounting.renyi_filter import spent_epsilon
from ..budget import Adjacency
from .alarms import AlarmState, Check, Look
from .canary_clients import KnownRounds, round_scores
from .interference import Interference, interference, weighted_products
from .normality import accuracy_p, estimate, right_of_median, separation
from .one_run import Scores
from .round_rows import Rows
from .sum_audit import watched_coordinates

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

BOOK_LOOKS = 10  # number of rounds at which the ledger's count is tested
INTERVAL_ALPHA = 0.05  # probability that the interval of an estimate misses


@dataclass(frozen=True)
class AuditTerms:
    """Terms of an audit, fixed before the first round; public.

    Attributes:
      num_rounds: number of planned rounds.
      alpha: probability that a correct run raises any alarm.
      looks: rounds at which canaries and the probe are evaluated, ascending.
      canaries: number of canary clients; 0 without any.
      dimension: number of coordinates of an update.
      support: number of coordinates that one canary may use.
      delta: delta of the claim; 0 without a client-level claim.
      adjacency: adjacency of the claim.
      filter_order: order of the RDP filter that the claim relies on; None without a filter.
      rate: expected share of rounds with a given canary.
      clients: size of the population at the start of the run, if the claim relies on a secret draw from it; else 0.
      probed: whether data were planted to detect memorisation.
      records: whether clients have canary records, which test the claim of `record_epsilon`.
      losses: whether the losses of odd records test that claim.
      record_epsilon: epsilon that clients claim for their records.
      of_unit: number of records of one unit, each sampled independently, if the sum hides records.
      arms: number of arms of the clients, which have one round each in turn.
      in_arms: number of the last round of a single arm, 0 if there is none; later rounds are of all clients.
      own_noise: unit that each client hides by noise of its own; empty if clients add none, None in older releases.
    """

    num_rounds: int
    alpha: float
    looks: tuple[int, ...] = ()
    canaries: int = 0
    dimension: int = 0
    support: int = 0
    delta: float = 0.0
    adjacency: Adjacency = Adjacency.ZERO_OUT
    filter_order: float | None = None
    rate: float = 1.0
    clients: int = 0
    probed: bool = False
    records: bool = False
    losses: bool = False
    record_epsilon: float = 0.0
    of_unit: int = 1
    arms: int = 1
    in_arms: int = 0
    own_noise: str | None = None

    def arm_of(self, number: int) -> int | None:
        """Return the arm of a round, from 0; None for a round of all clients."""
        return (number - 1) % self.arms if number <= self.in_arms else None

    def alarms(self) -> AlarmState:
        """Return the false-alarm budget, split over all looks of the run."""
        planned: dict[Check, int] = {}
        if self.delta:
            planned |= {Check.NORM: self.num_rounds, Check.REUSE: self.num_rounds}
            planned[Check.BOOKS] = BOOK_LOOKS
        if self.clients:
            planned[Check.DRAW] = self.num_rounds
        if self.canaries:
            planned |= {Check.CANARIES: len(self.looks), Check.ACCURACY: len(self.looks)}
        if self.records:
            planned |= {Check.RECORDS: len(self.looks), Check.RECORDS_ACCURACY: len(self.looks)}
        if self.probed:
            planned[Check.MEMORISATION] = len(self.looks)
        if self.losses:
            planned[Check.LOSSES] = len(self.looks)
        return AlarmState(planned, self.alpha)

    def due(self, before: int, number: int) -> bool:
        """Return whether a look at the canaries is due: one is planned after `before`, the last released round, up to `number`."""
        return any(before < look <= number for look in self.looks)

    def books_due(self, before: int, number: int) -> bool:
        """Return whether a test of the ledger's count is due, by the rounds of `due`; never without a client-level claim."""
        looks = spread_looks(BOOK_LOOKS, self.num_rounds) if self.delta else ()
        return any(before < look <= number for look in looks)


def spread_looks(looks: int, num_rounds: int) -> tuple[int, ...]:
    """Return the rounds of at most `looks` looks, evenly spread, the last round among them."""
    return tuple(sorted({max(1, round(num_rounds * k / looks)) for k in range(1, looks + 1)}))


@dataclass(frozen=True)
class Measured:
    """Claim and measurement after a round, in epsilon.

    Attributes:
      round: number of the round.
      claimed: the claim.
      epsilon: the estimate.
      low: lower end of the estimate's interval.
      high: upper end of the estimate's interval.
      ceiling: the largest epsilon that the canaries could have shown.
      p_values: p-value of the claim by each of the two tests, one of which confirms the other's alarm.
      lower: lower bounds on epsilon by the name of the method; empty if they were not computed.
    """

    round: int
    claimed: float
    epsilon: float
    low: float
    high: float
    ceiling: float
    p_values: Mapping[Check, float]
    lower: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class Evidence:
    """Rows of a run so far, with the terms and coins of its audit.

    Attributes:
      terms: terms of the audit.
      coins: which canaries were in, (canaries,).
      rows: one for each released round, at least one.
    """

    terms: AuditTerms
    coins: NDArray[np.bool_]
    rows: Rows

    def _event(self, rate: float, noise: float) -> DpEvent:
        """Return the event of a round by its columns `rate` and `charged`."""
        from dp_accounting.dp_event import NoOpDpEvent

        from ..accounting.gaussian_mixture import group_event

        if noise == 0:
            return NoOpDpEvent()
        return group_event(noise, rate, self.terms.of_unit)

    @cached_property
    def claimed(self) -> float:
        """Epsilon of these rounds by the accountant, against an adversary that sees their sums."""
        return self.claimed_after(())

    def claimed_after(self, before: Sequence[DpEvent]) -> float:
        """Return the epsilon of these rounds together with `before`, events of the same clients' earlier releases.

        A client is in one arm, so for each event the maximum over the arms counts.
        """
        from dp_accounting.dp_event import SelfComposedDpEvent

        terms, by_arm = self.terms, defaultdict[int | None, Counter[tuple[float, float]]](Counter)
        for row in self.rows:
            by_arm[terms.arm_of(int(row["round"]))][float(row["rate"]), float(row["charged"])] += 1
        of_all, in_arms = by_arm.pop(None, Counter()), Counter[tuple[float, float]]()
        for counts in by_arm.values():
            in_arms |= counts
        charged = of_all + in_arms
        events = [SelfComposedDpEvent(self._event(*pair), times) for pair, times in charged.items()]
        return spent_epsilon(
            [*before, *events], terms.delta, terms.adjacency, terms.filter_order, GATE_INTERVAL
        )

    @property
    def amplified(self) -> bool:
        """Whether the claim relies on a secret draw; then no statistic may use who was drawn."""
        return bool((self.rows["rate"] < 1).any())

    @cached_property
    def scores(self) -> tuple[Scores, Scores]:
        """Scores of the canaries that were in, and of those that were out.

        Raises:
          Refusal: fewer than two of either can be scored.
        """
        # If a secret draw amplifies, a canary's rounds may not be used, so all count; else only those that it was in.
        along, norms = self.rows["along"].astype(np.float64), self.rows["norm"].astype(np.float64)
        if self.amplified or self.rows["taken"].all():
            scores, coins = weighted_products(self.rows, self.terms.num_rounds, self.interference), self.coins
        else:
            included = self.rows["taken"].any(axis=0)
            event = self._event(float(self.rows["rate"][0]), float(self.rows["charged"][0]))
            rounds = KnownRounds(self.rows["taken"][:, included], event)
            scores = round_scores(along[:, included], norms, self.terms.dimension, rounds)
            coins = self.coins[included]
        if min(coins.sum(), (~coins).sum()) < 2:
            raise Refusal("canaries", len(coins), "too few were drawn so far; give more")
        return scores[coins], scores[~coins]

    @cached_property
    def interference(self) -> Interference:
        """Energy of other clients' updates, which lie in the canaries' way."""
        coordinates = watched_coordinates(self.terms.dimension)
        return interference(self.rows, self.terms.num_rounds, coordinates)

    @property
    def ceiling(self) -> float:
        """Epsilon that canaries could have shown without noise: the updates of other clients interfere with them."""
        # Unless the draw is secret, only a canary's own rounds count, and those of others do not interfere.
        share = self.terms.rate if self.amplified else math.sqrt(self.terms.rate)
        mu = share * self.interference.ceiling_mu() * self.terms.adjacency.distance
        return gaussian_epsilon(mu, self.terms.delta)

    def measured(self) -> Measured:
        """Return the measurement by canaries after these rounds."""
        members, others = self.scores
        apart, mu = separation(members, others), gaussian_mu(self.claimed, self.terms.delta)
        point = estimate(apart, self.terms.delta, INTERVAL_ALPHA)
        right, total = right_of_median(members, others), len(members) + len(others)
        p_values = {Check.CANARIES: apart.p_value(mu), Check.ACCURACY: accuracy_p(right, total, mu)}
        number = int(self.rows["round"][-1])
        return Measured(number, self.claimed, point.epsilon, point.low, point.high, self.ceiling, p_values)


def look_of(terms: AuditTerms, row: Rows, measured: Measured | None, records: Measured | None = None) -> Look:
    """Return what the alarms judge after a round: every p-value that was computed for it, and what canaries could show.

    Args:
      terms: terms of the audit.
      row: row of the round, shape ().
      measured: measurement by canaries; None if it is not due.
      records: measurement by canary records; None if it is not due.
    """
    p_values: dict[Check, float] = {}
    if terms.delta:
        p_values |= {Check.NORM: float(row["norm_p"]), Check.REUSE: float(row["reuse_p"])}
    if terms.clients:
        p_values[Check.DRAW] = float(row["draw_p"])
    optional = (("probe_p", Check.MEMORISATION), ("losses_p", Check.LOSSES), ("books_p", Check.BOOKS))
    for name, test in optional:
        if not math.isnan(float(row[name])):
            p_values[test] = float(row[name])
    if records is not None:
        p_values |= records.p_values
    if measured is None:
        return Look(p_values)
    return Look(p_values | dict(measured.p_values), measured.claimed, measured.ceiling)
