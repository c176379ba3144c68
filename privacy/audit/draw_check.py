"""Whether clients are drawn as the accountant was told, by how many are: each by a coin of its own, and no more often.

The count of a Poisson draw is binomial. A rate above the accounted one makes the counts too large; a draw of a fixed
size, which the Poisson accountant does not cover (Lebeda et al. 2024, arXiv:2405.20769), makes them too even. Who sees
the draw must be the auditor: to an adversary of the claim it is secret.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LEAST_VARIANCE = 9.0  # of a count, from which on a chi-square is near enough


def draw_p(counts: NDArray[np.int64], population: int | NDArray[np.int64], rate: float) -> float:
    """The probability of counts so large, or so even, where each of ``population`` is drawn with ``rate`` in (0, 1).

    ``counts`` (rounds,), of real clients; ``population``, of all rounds, or of each, (rounds,). Twice the smaller of the
    two.
    """
    from scipy.special import bdtrc, chdtr

    everybody = np.broadcast_to(population, counts.shape)
    total = int(counts.sum())
    large = float(bdtrc(total - 1, int(everybody.sum()), rate)) if total else 1.0
    mean, variance = everybody * rate, everybody * rate * (1 - rate)
    if variance.min() < LEAST_VARIANCE:
        return min(1.0, 2 * large)
    # Counts are whole: one that meets the mean exactly may stand for all within half of it.
    even = float(chdtr(len(counts), float(((np.abs(counts - mean) + 0.5) ** 2 / variance).sum())))
    return min(1.0, 2 * min(large, even))
