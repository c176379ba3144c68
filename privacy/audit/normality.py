"""Gaussian scores of one variance, in or out: an estimate of epsilon with its interval, and two tests.

Andrew et al. 2023 (arXiv:2302.03098) fit two variances; a Gaussian mechanism has one, and fitting one avoids the upward
bias. An estimate above the claim raises no alarm, because half of all correct runs have one. The tests raise alarms.
"""

import math
from dataclasses import dataclass

import numpy as np

from ...base.refusal import Refusal
from ..accounting.gaussian import gaussian_epsilon, gaussian_mu, last_true
from .one_run import Scores
from .rates import binomial_tail


@dataclass(frozen=True)
class Separation:
    """Distance of the members' mean score above the others', and the numbers of scores.

    Attributes:
      mu: distance over the common standard deviation of the scores.
      members: number of canaries that were in.
      others: number of canaries that were out.
    """

    mu: float
    members: int
    others: int

    def p_value(self, mu: float) -> float:
        """Return the probability of a separation at least this large if the mechanism is mu-GDP (noncentral t)."""
        from scipy.stats import nct

        if math.isinf(mu):
            return 1.0
        if not math.isfinite(self.mu):
            return 0.0 if self.mu > 0 else 1.0
        scale = math.sqrt(self.members * self.others / (self.members + self.others))
        degrees = self.members + self.others - 2
        return float(nct.sf(self.mu * scale, degrees, mu * scale))


@dataclass(frozen=True)
class Estimate:
    """Epsilon at one delta, and an interval that misses it with a given probability."""

    epsilon: float
    low: float
    high: float


def separation(members: Scores, others: Scores) -> Separation:
    """Return the distance of the members' scores from the others'.

    Args:
      members: scores of canaries that were in, at least two.
      others: scores of canaries that were out, at least two.
    """
    if min(len(members), len(others)) < 2:
        remedy = "give at least 2 of canaries in and 2 of canaries out"
        raise Refusal("scores", min(len(members), len(others)), remedy)
    pooled = sum((len(each) - 1) * float(np.var(each, ddof=1)) for each in (members, others))
    spread = math.sqrt(pooled / (len(members) + len(others) - 2))
    apart = float(np.mean(members) - np.mean(others))
    mu = apart / spread if spread else math.copysign(math.inf, apart or -1.0)
    return Separation(mu, len(members), len(others))


def estimate(apart: Separation, delta: float, alpha: float = 0.05) -> Estimate:
    """Return the estimate of epsilon from a separation of scores, with a two-sided interval.

    Args:
      apart: the separation of the scores.
      delta: in (0, 1).
      alpha: probability that the interval misses.
    """
    low = last_true(lambda mu: apart.p_value(mu) < alpha / 2)
    high = last_true(lambda mu: apart.p_value(mu) < 1 - alpha / 2)
    return Estimate(*(gaussian_epsilon(mu, delta) for mu in (apart.mu, low, high)))


def separation_refutes(apart: Separation, delta: float, epsilon: float, alpha: float) -> bool:
    """Return whether the noncentral t test refutes (epsilon, delta) at level alpha."""
    return apart.p_value(gaussian_mu(epsilon, delta)) < alpha


def right_of_median(members: Scores, others: Scores) -> int:
    """Return how many canaries the median of all scores classifies right; ties count as wrong.

    The median is a fair threshold, as it does not depend on the coins. Arguments as of `separation`.
    """
    middle = np.median(np.concatenate([members, others]))
    return int((members > middle).sum() + (others < middle).sum())


def accuracy_p(right: int, total: int, mu: float) -> float:
    """Return the probability of this many right guesses if the mechanism is mu-GDP: Bin(total, Phi(mu/2)).

    It assumes only independent scores, so it complements the t test, which also assumes the Gaussian form.

    Args:
      right: number of right guesses.
      total: number of guesses, each at a fair coin.
      mu: mu of the claim.
    """
    from scipy.special import ndtr

    return binomial_tail(right, total, float(ndtr(mu / 2)))
