"""The seam for what only a task can look for: whether the model has memorised what was planted in the training data."""

from __future__ import annotations

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
