"""Memorisation of planted training data: a task's probe for it, and the exposure of secrets.

Exposure (Carlini et al. 2019, arXiv:1802.08232) derives from the rank of a secret among all candidates. A secret drawn
uniformly that the model did not memorise has a uniform rank: rank / candidates is an exact p-value.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class MemorisationResult:
    """Result of one test at one look.

    Attributes:
      name: name of the test, the same at every look, such as `exposure`.
      p_value: probability of such evidence if nothing was memorised, exact; in [0, 1].
      figures: further numbers to display, by name, such as an exposure in bits or an AUC.
      refutes: whether the p-value also tests a claim of privacy, for any mechanism.
    """

    name: str
    p_value: float
    figures: Mapping[str, float] = field(default_factory=dict[str, float])
    refutes: bool = False


class MemorisationProbe(Protocol):
    """Probe of the released model for planted data; it must not read any client's own data."""

    def look(self, arrays: Mapping[str, NDArray[np.generic]], number: int) -> Sequence[MemorisationResult]:
        """Return the results of the tests after round `number`, on its model; equally many at every look."""
        ...


def pooled_p(results: Sequence[MemorisationResult]) -> float:
    """Return the p-value of a look: the smallest of its tests, times their number (Bonferroni); 1 without any test."""
    # NaN counts as 0, which is evidence.
    smallest = min((each.p_value if each.p_value >= 0 else 0.0 for each in results), default=1.0)
    return min(1.0, max(1, len(results)) * smallest)


@dataclass(frozen=True)
class Exposure:
    """Rank of a secret.

    Attributes:
      rank: 1 for the likeliest candidate; candidates of equal loss rank before the secret.
      candidates: number of candidates, the secret included.
    """

    rank: int
    candidates: int

    @property
    def bits(self) -> float:
        """Exposure: 0 to log2(candidates), 1.44 on average without memorisation."""
        return math.log2(self.candidates) - math.log2(self.rank)

    @property
    def p_value(self) -> float:
        """Probability of so low a rank without memorisation."""
        return self.rank / self.candidates


def exposure(secret_loss: float, other_losses: NDArray[np.floating]) -> Exposure:
    """Rank a secret by the model's losses.

    Args:
      secret_loss: loss on the secret.
      other_losses: losses on all other candidates, or on a uniform sample of them, (n,).
    """
    # "not >" instead of "<=": a loss of NaN must not make a secret look likely.
    return Exposure(1 + int((~(other_losses > secret_loss)).sum()), 1 + len(other_losses))


def fisher(p_values: Sequence[float]) -> float:
    """Return one p-value of independent ones (Fisher 1925): -2 sum ln p against chi-square of 2n degrees."""
    from scipy.special import chdtrc

    if min(p_values) <= 0:
        return 0.0
    return float(chdtrc(2 * len(p_values), -2 * sum(map(math.log, p_values))))
