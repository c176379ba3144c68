"""Exact limits of a rate, and the lower bound on epsilon from many independent runs.

Clopper, Pearson 1934; Jagielski, Ullman, Oprea 2020 (arXiv:2006.07709); for mu-GDP Nasr et al. 2023 (arXiv:2302.07956).
"""

import math

from ..accounting.gaussian import gaussian_mu


def rate_below(hits: int, trials: int, alpha: float) -> float:
    """The lower limit of a rate, missed with probability ``alpha`` at most."""
    from scipy.special import betaincinv

    return float(betaincinv(hits, trials - hits + 1, alpha)) if hits else 0.0


def rate_above(hits: int, trials: int, alpha: float) -> float:
    """The upper limit of a rate, missed with probability ``alpha`` at most."""
    from scipy.special import betainccinv

    return float(betainccinv(hits + 1, trials - hits, alpha)) if hits < trials else 1.0


def worst_rates(false: tuple[int, int], missed: tuple[int, int], alpha: float) -> tuple[float, float]:
    """Upper limits, together at ``alpha``, of the false positive and the false negative rate; each (count, trials)."""
    return rate_above(*false, alpha / 2), rate_above(*missed, alpha / 2)


def rates_refute(rates: tuple[float, float], delta: float, epsilon: float) -> bool:
    """Whether no (epsilon, delta)-DP mechanism has error rates as small as both of ``rates``."""
    one, other = rates
    power = math.exp(min(epsilon, 700.0))
    return 1 - delta - other > power * one or 1 - delta - one > power * other


def rates_refute_gdp(rates: tuple[float, float], delta: float, epsilon: float) -> bool:
    """The same for the Gaussian curve through (epsilon, delta); ``delta`` in (0, 1)."""
    from scipy.special import ndtri

    return -float(ndtri(rates[0])) - float(ndtri(rates[1])) > gaussian_mu(epsilon, delta)
