"""Samplings: the draw of a round's participants, for accounting."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent


class Sampling(Protocol):
    """Draw of a round's participants; the only place where amplification enters the accounting."""

    @property
    def name(self) -> str:
        """The word that reports print: ``poisson``, ``fixed``, ``all``."""
        ...

    def event(self, mechanism: "DpEvent") -> "DpEvent":
        """Return the event of one round whose participants run ``mechanism``."""
        ...


@dataclass(frozen=True)
class Turns:
    """Bounds on participation by turns; a sampling with such bounds has them as its `turns`.

    Attributes:
      separation: rounds from one participation of a client to its next, at least 1.
      max_participations: most rounds in which one client takes part, at least 1; None if only their number limits it.
    """

    separation: int
    max_participations: int | None


def min_participations(size: int, population: int, num_rounds: int) -> int:
    """Return how often the busiest client takes part at least, if `size` of `population` clients do in every round."""
    return -(-num_rounds * size // population)
