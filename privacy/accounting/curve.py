"""Curve of a guarantee: epsilon at many deltas, mu-GDP and zCDP where they hold, and the trade-off of a test's errors.

A pair (epsilon, delta) is one point. Gaussian releases alone have a closed form (module `gaussian`). Other events have
the points of one composed privacy loss distribution: where delta(epsilon) bounds every test between two neighbours, a
test of false positive rate a has a false negative rate of at least

    max over epsilon of 1 - delta(epsilon) - e^epsilon a  and  e^-epsilon (1 - delta(epsilon) - a)

(Dong et al. 2019, arXiv:1905.02383, proposition 2.12). The bound holds for every epsilon, so the maximum is taken over
a grid.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from ...base.bounded_decoding import json_number
from ..budget import Adjacency, Budget
from .epsilon import GATE_INTERVAL, PUBLISH_INTERVAL, Events, epsilon, grouped, losses_of, with_one_gaussian
from .events import Counts, gaussian_scale
from .gaussian import gaussian_epsilon
from .renyi_filter import epsilon_of_filter

DELTAS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9, 1e-10)
GROUPS = (2, 5, 10)  # numbers of one person's records whose joint epsilon is reported
FALSE_POSITIVES = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5)
# Number of epsilons at which delta is read for the trade-off, and the largest of them: e to it is still a float.
_STEPS, _LARGEST = 1000, 700.0
Pairs = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class PrivacyCurve:
    """Privacy guarantee of one unit, as a curve.

    Attributes:
      epsilon: (delta, epsilon) at each of `DELTAS`; epsilon may be infinite.
      mu: mu-GDP if every release is Gaussian; else None.
      trade_off: (false positive rate, false negative rate) at each of `FALSE_POSITIVES`. The second is a lower bound
        for every test of the unit's participation.
    """

    epsilon: Pairs
    mu: float | None
    trade_off: Pairs

    @property
    def rho(self) -> float | None:
        """Parameter of zCDP if every release is Gaussian; else None."""
        return None if self.mu is None else self.mu * self.mu / 2

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON; JSON has no infinity, so it is spelled."""
        points = [[delta, json_number(each)] for delta, each in self.epsilon]
        return {"epsilon": points, "rho": self.rho, "mu": self.mu, "trade_off": [*map(list, self.trade_off)]}


def privacy_curve(events: Events, adjacency: Adjacency, interval: float = PUBLISH_INTERVAL) -> PrivacyCurve:
    """Return the curve of all events together.

    Args:
      events: as in `epsilon`.
      adjacency: the relation of neighbours.
      interval: step of the PLD's grid in nats; one composition serves all deltas.

    Raises:
      Refusal: an event that cannot be accounted.
    """
    counts = grouped(events)
    mu = _mu(counts, adjacency)
    if mu is not None:
        normal = NormalDist()
        errors = [(rate, normal.cdf(normal.inv_cdf(1 - rate) - mu)) for rate in FALSE_POSITIVES]
        return PrivacyCurve([(d, gaussian_epsilon(mu, d)) for d in DELTAS], mu, errors)
    pairs = [(delta, epsilon(dict(counts), delta, adjacency, interval)) for delta in DELTAS]
    points, largest_epsilon = pairs, pairs[-1][1]
    losses = losses_of(counts, DELTAS[-1], adjacency, interval) if math.isfinite(largest_epsilon) else None
    if losses is not None:
        from .loss_distributions import deltas

        grid = np.linspace(0.0, min(largest_epsilon, _LARGEST), _STEPS)
        points = [*zip(deltas(losses, grid).tolist(), grid.tolist(), strict=True), *pairs]
    return PrivacyCurve(pairs, None, _trade_off(points))


def filter_curve(budget: Budget, order: float) -> PrivacyCurve:
    """Return the curve of an RDP filter, which promises the whole of its budget.

    Args:
      budget: epsilon and delta that the filter guards.
      order: order of the filter.
    """
    pairs = [(delta, epsilon_of_filter(budget, order, delta)) for delta in DELTAS]
    return PrivacyCurve(pairs, None, _trade_off(pairs))


def group_epsilons(events: Events, delta: float, adjacency: Adjacency) -> list[tuple[int, float]]:
    """Return (records, epsilon) for each size in `GROUPS` of one person's records, given the events of one record.

    The epsilon follows from the joint effect of the records on each noised sum; it is below the general bound of group
    privacy.

    Args:
      events: as in `epsilon`, of Gaussian noise on sums of Poisson-sampled records.
      delta: in (0, 1).
      adjacency: the relation of neighbours.

    Returns:
      An empty list if there is an event of another kind, or if no accountant covers several records.
    """
    counts = grouped(events)
    scales = [(scale, n) for leaf, n in counts if (scale := gaussian_scale(leaf)) is not None]
    is_sampled = any(rate != 1 for (rate, _), _ in scales)
    if len(scales) < len(counts) or (adjacency is Adjacency.REPLACE_ONE and is_sampled):
        return []
    from .gaussian_mixture import group_event  # brings dp_accounting, which few readers need

    epsilons: list[tuple[int, float]] = []
    for records in GROUPS:
        group_counts = {group_event(noise, rate, records): n for (rate, noise), n in scales}
        epsilons.append((records, epsilon(group_counts, delta, adjacency, GATE_INTERVAL)))
    return epsilons


def largest(units: Iterable[Events]) -> list[Counts]:
    """Return the counted events of those units that may have the largest loss: no other unit's events contain theirs."""
    candidates = {counts: dict(counts) for counts in map(grouped, units)}
    return [
        mine
        for mine in candidates
        if not any(
            other is not mine and all(other_counts.get(leaf, 0) >= n for leaf, n in mine)
            for other, other_counts in candidates.items()
        )
    ]


def worst(curves: Iterable[PrivacyCurve]) -> PrivacyCurve:
    """Return the pointwise worst of at least one curve, which holds for each of several units with separate data."""
    all_curves = list(curves)
    mus = [each.mu for each in all_curves if each.mu is not None]
    return PrivacyCurve(
        [max(points) for points in zip(*(each.epsilon for each in all_curves), strict=True)],
        max(mus) if len(mus) == len(all_curves) else None,
        [min(points) for points in zip(*(each.trade_off for each in all_curves), strict=True)],
    )


def _mu(counts: Counts, adjacency: Adjacency) -> float | None:
    """Return mu of mu-GDP if every event is Gaussian; else None."""
    from dp_accounting.dp_event import GaussianDpEvent

    leaves = with_one_gaussian(dict(counts))  # of Gaussians at most one
    if not all(isinstance(leaf, GaussianDpEvent) for leaf in leaves):
        return None
    return sum(adjacency.distance / float(leaf.noise_multiplier) for leaf in leaves)


def _trade_off(points: Pairs) -> Pairs:
    """Return (rate, least false negative rate) at each of `FALSE_POSITIVES` by the module's formula.

    Args:
      points: (delta, epsilon) pairs; one with an infinite epsilon bounds nothing.
    """
    deltas, epsilons = np.array([each for each in points if math.isfinite(each[1])]).reshape(-1, 2).T

    def missed(rate: float) -> float:
        bounds = (1 - deltas - np.exp(epsilons) * rate, np.exp(-epsilons) * (1 - deltas - rate))
        return float(max(np.max(each, initial=0.0) for each in bounds))

    with np.errstate(over="ignore"):
        return [(rate, missed(rate)) for rate in FALSE_POSITIVES]
