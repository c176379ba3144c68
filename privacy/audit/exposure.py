"""Exposure of planted secrets (Carlini et al. 2019, arXiv:1802.08232): the rank of a secret among those it might have been.

A secret drawn uniformly that the model did not memorise has a uniform rank: rank / candidates is an exact p-value.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Exposure:
    """``rank`` of a secret, 1 for the likeliest, of ``candidates`` with itself; equal losses count against it."""

    rank: int
    candidates: int

    @property
    def bits(self) -> float:
        """log2(candidates) - log2(rank): 0 to log2(candidates), 1.44 on average where nothing was memorised."""
        return math.log2(self.candidates) - math.log2(self.rank)

    @property
    def p_value(self) -> float:
        """The probability of so low a rank where nothing was memorised."""
        return self.rank / self.candidates


def exposure(secret_loss: float, other_losses: NDArray[np.floating]) -> Exposure:
    """From the model's loss on the secret, and on all or a uniform sample of the others it might have been."""
    # Not "at most": a loss that is no number must not make a secret look likely.
    return Exposure(1 + int((~(other_losses > secret_loss)).sum()), 1 + len(other_losses))


def fisher(p_values: Sequence[float]) -> float:
    """One p-value of several independent ones (Fisher 1925): -2 sum ln p against a chi-square of 2n degrees."""
    from scipy.special import chdtrc

    if min(p_values) <= 0:
        return 0.0
    return float(chdtrc(2 * len(p_values), -2 * sum(map(math.log, p_values))))
