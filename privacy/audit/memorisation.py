"""The seam for what only a task can look for: whether the model has memorised what was planted in the training data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Memorised:
    """One test of one look.

    Attributes:
      name: of the test, the same at every look, such as ``exposure``.
      p_value: how rare such evidence is if nothing was memorised, exact; in [0, 1].
      shown: numbers to stand beside it by name, such as an exposure in bits or an AUC.
      refutes: whether it is how rare such evidence is if a claim of privacy holds, whatever the mechanism.
    """

    name: str
    p_value: float
    shown: Mapping[str, float] = field(default_factory=dict[str, float])
    refutes: bool = False


class MemorisationProbe(Protocol):
    """Looks at the released model and at what was planted; it must not read what any client owns."""

    def look(self, arrays: Mapping[str, NDArray[np.generic]], number: int) -> Sequence[Memorised]:
        """Return the tests of the global arrays after round `number`; equally many at every look."""
        ...


def pooled_p(found: Sequence[Memorised]) -> float:
    """The p-value of a look: the smallest, times their number; 1 without any."""
    # Not "at least": what is no number is evidence.
    smallest = min((each.p_value if each.p_value >= 0 else 0.0 for each in found), default=1.0)
    return min(1.0, max(1, len(found)) * smallest)


# --- exposure of planted secrets


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
