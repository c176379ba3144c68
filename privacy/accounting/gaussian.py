"""What plain Gaussian releases cost together, exactly: they are one Gaussian, and its trade-off has a closed form.

Composition adds the squares of sensitivity over noise (Dong et al. 2019, arXiv:1905.02383, corollary 3.3); for their
root mu, a release is (epsilon, delta)-DP exactly for the delta of Balle and Wang (2018, arXiv:1805.06530, theorem 8).
No accountant is needed, so that a small device can hold its ledger without loading one.
"""

import json
import math
from collections.abc import Mapping
from functools import lru_cache

from ..budget import Adjacency, real
from .events import MIN_NOISE

# Relative error of a term of delta: erfc and exp are good to 1e-15, and so are their arguments, of at most 700.
SLACK = 1e-12
MOST_EPSILON = 1e6  # beyond, epsilon is reported as infinite
_LARGEST_EXPONENT = 700.0  # e to this is still a float
_BISECTIONS = 200


@lru_cache(maxsize=1 << 14)
def precision_of(event_json: str) -> float | None:
    """1 / noise_multiplier^2 of an event as a ledger writes it; inf for too little noise, None for another kind."""
    event = json.loads(event_json)
    if event.get("kind") != "Gaussian":
        return None
    noise = real("noise_multiplier", event["noise_multiplier"])
    return math.inf if noise < MIN_NOISE else noise**-2


def composed(counts: Mapping[str, int]) -> float | None:
    """The precision of events, by their JSON, that happened so often each; None where one is no plain Gaussian."""
    parts = [(precision_of(text), n) for text, n in sorted(counts.items()) if n]
    if any(precision is None for precision, _ in parts):
        return None
    return math.fsum((precision or 0.0) * n for precision, n in parts)


def exact_epsilon(counts: Mapping[str, int], delta: float, adjacency: Adjacency) -> float | None:
    """Epsilon at `delta` of events, by their JSON, that happened so often each; None where one is no plain Gaussian."""
    precision = composed(counts)
    return None if precision is None else gaussian_epsilon(precision, delta, adjacency)


def gaussian_delta(precision: float, epsilon: float, adjacency: Adjacency) -> float:
    """The least delta at which releases of this precision in all are (epsilon, delta)-DP, rounded up."""
    mu = math.sqrt(precision) * (2 if adjacency is Adjacency.REPLACE_ONE else 1)
    if mu == 0 or math.isinf(mu):
        return 0.0 if mu == 0 else 1.0
    first = _normal(mu / 2 - epsilon / mu)
    # Without its second term delta only grows.
    second = math.exp(epsilon) * _normal(-mu / 2 - epsilon / mu) if epsilon < _LARGEST_EXPONENT else 0.0
    return min(max(first * (1 + SLACK) - second * (1 - SLACK), 0.0), 1.0)


def gaussian_epsilon(precision: float, delta: float, adjacency: Adjacency) -> float:
    """The least epsilon at which releases of this precision in all are (epsilon, delta)-DP, rounded up; inf beyond 1e6."""
    low, high = 0.0, 1.0
    if gaussian_delta(precision, low, adjacency) <= delta:
        return low
    while gaussian_delta(precision, high, adjacency) > delta:
        low, high = high, 2 * high
        if low > MOST_EPSILON:
            return math.inf
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if gaussian_delta(precision, middle, adjacency) > delta else (low, middle)
    return high


def _normal(value: float) -> float:
    return math.erfc(-value / math.sqrt(2)) / 2
