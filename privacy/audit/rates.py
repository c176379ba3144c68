"""Rates with exact limits, and the lower bound on epsilon from many independent runs.

Clopper, Pearson 1934; Jagielski, Ullman, Oprea 2020 (arXiv:2006.07709); for mu-GDP Nasr et al. 2023 (arXiv:2302.07956).
"""

import math
from typing import NamedTuple

from ..accounting.gaussian import gaussian_mu


class Hits(NamedTuple):
    """Number of hits among a number of trials."""

    hits: int
    trials: int


class ErrorRates(NamedTuple):
    """Rates of false positives and of false negatives."""

    false: float
    missed: float


def binomial_tail(count: int, trials: int, rate: float) -> float:
    """Return the probability of at least `count` successes in independent trials with this rate of success."""
    from scipy.special import bdtrc

    return float(bdtrc(count - 1, trials, rate)) if count else 1.0


def rate_below(hits: int, trials: int, alpha: float) -> float:
    """Return the lower limit of a rate.

    Args:
      hits: from 0 to `trials`.
      trials: at least 1.
      alpha: probability, at most, that the limit misses.
    """
    from scipy.special import betaincinv

    return float(betaincinv(hits, trials - hits + 1, alpha)) if hits else 0.0


def rate_above(hits: int, trials: int, alpha: float) -> float:
    """Return the upper limit of a rate; arguments as of `rate_below`."""
    from scipy.special import betainccinv

    return float(betainccinv(hits + 1, trials - hits, alpha)) if hits < trials else 1.0


def worst_rates(false: Hits, missed: Hits, alpha: float) -> ErrorRates:
    """Return upper limits of both error rates, which hold together with probability 1 - `alpha` at least."""
    return ErrorRates(
        rate_above(false.hits, false.trials, alpha / 2), rate_above(missed.hits, missed.trials, alpha / 2)
    )


def rates_refute(rates: ErrorRates, delta: float, epsilon: float) -> bool:
    """Return whether no (epsilon, delta)-DP mechanism has error rates as small as these.

    Args:
      rates: upper limits of a test's error rates.
      delta: delta of the claim, in [0, 1).
      epsilon: epsilon of the claim, in nats.
    """
    power = math.exp(min(epsilon, 700.0))
    return 1 - delta - rates.missed > power * rates.false or 1 - delta - rates.false > power * rates.missed


def rates_refute_gdp(rates: ErrorRates, delta: float, epsilon: float) -> bool:
    """Return whether the Gaussian curve through (epsilon, delta) has no error rates as small as these.

    Arguments as of `rates_refute`, with a delta above 0.
    """
    from scipy.special import ndtri

    return -float(ndtri(rates.false)) - float(ndtri(rates.missed)) > gaussian_mu(epsilon, delta)
