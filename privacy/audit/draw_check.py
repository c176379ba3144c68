"""Whether clients are drawn as the accountant was told, by how many are: each by a coin of its own, and no more often.

The count of a Poisson draw is binomial. A rate above the accounted one makes the counts too large; a draw of a fixed
size, which the Poisson accountant does not cover (Lebeda et al. 2024, arXiv:2405.20769), makes them too even. Who sees
the draw must be the auditor: to an adversary of the claim it is secret.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LEAST_VARIANCE = 9.0  # of a count, from which on a chi-square is near enough


def draw_p(counts: NDArray[np.int64], population: int, rate: float) -> float:
    """The probability of counts so large, or so even, where each of ``population`` is drawn with ``rate`` in (0, 1).

    ``counts`` (rounds,), of real clients. Twice the smaller of the two.
    """
    from scipy.special import bdtrc, chdtr

    mean, rounds = population * rate, len(counts)
    total = int(counts.sum())
    large = float(bdtrc(total - 1, population * rounds, rate)) if total else 1.0
    variance = mean * (1 - rate)
    if variance < LEAST_VARIANCE:
        return min(1.0, 2 * large)
    # Counts are whole: one that meets the mean exactly may stand for all within half of it.
    even = float(chdtr(rounds, float(((np.abs(counts - mean) + 0.5) ** 2).sum()) / variance))
    return min(1.0, 2 * min(large, even))
