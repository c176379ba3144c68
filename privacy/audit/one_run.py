"""Lower bounds on epsilon from one training run, in which each canary is in or out by a fair coin.

Steinke, Nasr, Jagielski 2023 (arXiv:2305.08846), theorem 5.2: any mechanism, any adversary that may abstain.
Mahloujifar, Melis, Chaudhuri 2024 (arXiv:2410.22235), algorithm 3: the same against a whole curve, here mu-GDP's.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...base.refusal import Refusal
from ..accounting.gaussian import gaussian_mu
from .rates import binomial_tail

Scores = NDArray[np.float64]
# Shares of the canaries whose coins are guessed; alpha is split over them, so that the best one may be taken.
SHARES = (1.0, 0.5, 0.25, 0.1, 0.05, 0.02)
FAIR = 1e-6  # probability below which a split into in and out is refused: the coins were not fair


@dataclass(frozen=True)
class Guesses:
    """Guesses about the coins of canaries.

    Attributes:
      canaries: number of canaries.
      count: number of guesses, from 1 to `canaries`.
      correct: number of right guesses, from 0 to `count`.

    Raises:
      Refusal: a number is out of range.
    """

    canaries: int
    count: int
    correct: int

    def __post_init__(self) -> None:
        if not 0 <= self.correct <= self.count:
            raise Refusal("correct", self.correct, f"give a number from 0 to the {self.count} guesses")
        if not 1 <= self.count <= self.canaries:
            raise Refusal("guesses", self.count, f"give a number from 1 to the {self.canaries} canaries")


def steinke_p(guesses: Guesses, epsilon: float, delta: float) -> float:
    """Return a bound on the probability of this many right guesses under (epsilon, delta)-DP for every canary.

    With W ~ Bin(count, e^epsilon / (1 + e^epsilon)), `beta` is P[W >= correct] and `tail` is P[W >= correct - i], for
    i = 1 to correct; the bound is beta + 2 canaries delta max_i (tail - beta) / i (theorem 5.2).

    Args:
      guesses: their numbers.
      epsilon: epsilon of the claim, in nats.
      delta: delta of the claim, in [0, 1).
    """
    from scipy.special import bdtrc, expit

    count, correct, rate = guesses.count, guesses.correct, float(expit(epsilon))
    steps = np.arange(1, correct + 1)
    # bdtrc(k, n, p) is P[W > k], for k >= 0.
    tail = np.where(steps < correct, bdtrc(np.maximum(correct - steps - 1, 0), count, rate), 1.0)
    beta = binomial_tail(correct, count, rate)
    if correct == count:  # exact where 1 - rate rounds to 0
        beta = math.exp(count * math.log1p(-float(expit(-epsilon))))
    excess = float(np.max((tail - beta) / steps, initial=0.0))
    return min(1.0, beta + 2 * guesses.canaries * delta * excess)


def steinke_refutes(guesses: Guesses, delta: float, epsilon: float, alpha: float) -> bool:
    """Return whether (epsilon, delta) is refuted at level alpha, for any mechanism. Arguments as of `steinke_p`."""
    return steinke_p(guesses, epsilon, delta) < alpha


def gdp_refutes(guesses: Guesses, delta: float, epsilon: float, alpha: float) -> bool:
    """Return whether the Gaussian curve through (epsilon, delta) is refuted.

    It is no evidence against another mechanism with the same (epsilon, delta). `right` and `wrong` are the two sequences of
    algorithm 3, from `correct` right guesses down to none. Arguments as of `steinke_refutes`, with a delta above 0.
    """
    from scipy.special import ndtr, ndtri

    mu = gaussian_mu(epsilon, delta)
    right = alpha * guesses.correct / guesses.canaries
    wrong = alpha * (guesses.count - guesses.correct) / guesses.canaries
    for i in range(guesses.correct - 1, -1, -1):
        larger = float(ndtr(ndtri(right) - mu))
        if larger <= wrong:  # neither changes further
            break
        right = min(1.0, right + i / (guesses.count - i) * (larger - wrong))
        wrong = larger
    return right + wrong > guesses.count / guesses.canaries


def guesses_at(members: Scores, others: Scores, share: float) -> Guesses:
    """Guess *in* for the highest scores, *out* for the lowest, and abstain in between.

    Ties count against the guesser: any other order among them could reveal the coins.

    Args:
      members: scores of canaries that were in.
      others: scores of canaries that were out.
      share: share of the canaries that are guessed, in (0, 1]; at least two of them are.
    """
    total = len(members) + len(others)
    half = max(1, int(share * total) // 2)
    scores = np.concatenate([members, others])
    inside = np.arange(total) < len(members)
    highest = np.lexsort((inside, -scores))[:half]
    lowest = np.lexsort((~inside, scores))[:half]
    return Guesses(total, 2 * half, int(inside[highest].sum() + (~inside[lowest]).sum()))


def check_coins(members: int, others: int) -> None:
    """Refuse numbers of canaries in and out that fair coins hardly give: every one-run bound assumes fair coins."""
    from scipy.special import bdtr

    if min(members, others) < 1 or 2 * bdtr(min(members, others), members + others, 0.5) < FAIR:
        remedy = f"beside {others} outside; each canary must be in or out by a fair coin of its own"
        raise Refusal("members", members, remedy)
