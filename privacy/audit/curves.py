"""How well the best attack may do: (epsilon, delta) and mu-GDP as curves of error rates, and one search over both.

Dong, Roth, Su 2022 (arXiv:1905.02383): mu-GDP, its (epsilon, delta) in corollary 2.13. Epsilon in nats.
"""

import math
from collections.abc import Callable

# Past this a bound is told as infinite.
LARGEST = 1e5
_PRECISION = 1e-7


def last_true(holds: Callable[[float], bool]) -> float:
    """The largest x at which ``holds``, which is true below some x >= 0 and false above; inf past `LARGEST`."""
    low, high = 0.0, 1.0
    while holds(high):
        low, high = high, 2 * high
        if high > LARGEST:
            return math.inf
    while high - low > _PRECISION * max(high, 1.0):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def gaussian_delta(epsilon: float, mu: float) -> float:
    """The delta of mu-GDP at ``epsilon`` >= 0; ``mu`` > 0 is sensitivity over noise, sqrt(T) times that for T rounds."""
    from scipy.special import log_ndtr, ndtr

    below = -epsilon / mu - mu / 2
    return float(ndtr(-epsilon / mu + mu / 2)) - math.exp(min(epsilon + float(log_ndtr(below)), 0.0))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The epsilon >= 0 of mu-GDP at ``delta`` in (0, 1); 0 for ``mu`` <= 0, inf for an infinite one."""
    if mu <= 0 or math.isinf(mu):
        return math.inf if mu > 0 else 0.0
    return last_true(lambda epsilon: gaussian_delta(epsilon, mu) > delta)


def gaussian_mu(epsilon: float, delta: float) -> float:
    """The mu at which mu-GDP has exactly this ``epsilon`` at ``delta`` in (0, 1)."""
    return last_true(lambda mu: gaussian_delta(epsilon, mu) <= delta)
