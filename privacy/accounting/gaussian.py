"""Curve of the Gaussian mechanism in closed form: mu, epsilon and delta, each from the other two.

Plain Gaussian releases together are one Gaussian, whose mu is the root of the summed squares of sensitivity over noise
(Dong et al. 2019, arXiv:1905.02383, corollary 3.3). It is (epsilon, delta)-DP exactly for the delta of Balle and Wang
(2018, arXiv:1805.06530, theorem 8). No accountant is needed, so a small device can keep its ledger without loading one,
and an audit uses the same curve as the ledger. Epsilon is in nats. mu is always the first argument.
"""

import json
import math
from collections.abc import Callable, Mapping
from functools import lru_cache

from ...base.refusal import real
from ..budget import Adjacency
from .events import MIN_NOISE

# Relative error of a term of delta: erfc and exp are good to 1e-15, and so are their arguments, of at most 700.
SLACK = 1e-12
VACUOUS_EPSILON = 1e6  # a larger epsilon is reported as infinite
LARGEST = 1e5  # where `last_true` gives up
_LARGEST_EXPONENT = 700.0  # e to this is still a float
_BISECTIONS = 200
_PRECISION = 1e-7  # of `last_true`


@lru_cache(maxsize=1 << 14)
def _precision_of(event_json: str) -> float | None:
    """Return 1 / noise_multiplier^2 of an event's canonical JSON: inf for too little noise, None for another kind."""
    event = json.loads(event_json)
    if event.get("kind") != "Gaussian":
        return None
    noise = real("noise_multiplier", event["noise_multiplier"])
    return math.inf if noise < MIN_NOISE else noise**-2


def composed(counts: Mapping[str, int]) -> float | None:
    """Return the sum of 1 / noise^2 of all events, mu squared under zero-out; None if one is no plain Gaussian.

    Args:
      counts: how often each event happened, by its canonical JSON.
    """
    parts = [(_precision_of(text), n) for text, n in sorted(counts.items()) if n]
    terms = [precision * n for precision, n in parts if precision is not None]
    return math.fsum(terms) if len(terms) == len(parts) else None


def exact_epsilon(counts: Mapping[str, int], delta: float, adjacency: Adjacency) -> float | None:
    """Return the epsilon of counted events, rounded up; None if one is no plain Gaussian.

    Args:
      counts: how often each event happened, by its canonical JSON.
      delta: in (0, 1).
      adjacency: relation of neighbours; under replace-one a unit moves the sum twice as far.
    """
    precision = composed(counts)
    if precision is None:
        return None
    return gaussian_epsilon(math.sqrt(precision) * adjacency.distance, delta)


def gaussian_delta(mu: float, epsilon: float) -> float:
    """Return the least delta at which mu-GDP is (epsilon, delta)-DP, rounded up.

    Args:
      mu: sensitivity over noise, at least 0; sqrt(T) times that for T releases.
      epsilon: at least 0.
    """
    if mu == 0 or math.isinf(mu):
        return 0.0 if mu == 0 else 1.0
    # Balle and Wang: Phi(-lower) - e^epsilon Phi(-upper).
    lower, upper = epsilon / mu - mu / 2, epsilon / mu + mu / 2
    first = _normal_cdf(-lower)
    if epsilon < _LARGEST_EXPONENT:
        second = math.exp(epsilon) * _normal_cdf(-upper)
    else:
        second = _far_tail(lower, upper)
    return min(max(first * (1 + SLACK) - second * (1 - SLACK), 0.0), 1.0)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return the least epsilon at which mu-GDP is (epsilon, delta)-DP, rounded up.

    Args:
      mu: as in `gaussian_delta`; an estimate below 0 counts as 0.
      delta: in (0, 1).

    Returns:
      At least 0; inf beyond `VACUOUS_EPSILON`.
    """
    low, high = 0.0, 1.0
    if mu <= 0 or gaussian_delta(mu, low) <= delta:
        return low
    while gaussian_delta(mu, high) > delta:
        low, high = high, 2 * high
        if low > VACUOUS_EPSILON:
            return math.inf
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if gaussian_delta(mu, middle) > delta else (low, middle)
    return high


def gaussian_mu(epsilon: float, delta: float) -> float:
    """Return the mu at which mu-GDP has exactly this epsilon at this delta.

    Args:
      epsilon: at least 0.
      delta: in (0, 1).
    """
    return last_true(lambda mu: gaussian_delta(mu, epsilon) <= delta)


def last_true(holds: Callable[[float], bool]) -> float:
    """Return by bisection the largest x at which `holds` is true; inf past `LARGEST`.

    Args:
      holds: a condition that is true below some x >= 0, and false above it.
    """
    low, high = 0.0, 1.0
    while holds(high):
        low, high = high, 2 * high
        if high > LARGEST:
            return math.inf
    while high - low > _PRECISION * max(high, 1.0):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _far_tail(lower: float, upper: float) -> float:
    """Return e^epsilon Phi(-upper), rounded down, where 2 epsilon = upper^2 - lower^2 and upper > 37 (Mills' ratio)."""
    mills = (1 - (1 - (3 - 15 / upper**2) / upper**2) / upper**2) / upper
    return math.exp(-(lower**2) / 2) * mills / math.sqrt(2 * math.pi)


def _normal_cdf(value: float) -> float:
    return math.erfc(-value / math.sqrt(2)) / 2
