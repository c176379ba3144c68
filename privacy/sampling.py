"""Samplings: the draw of a round's participants, for accounting."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent


ASSUMED = (
    "It is assumed that which clients answer first does not depend on the data that is hidden: the cohorts are public, and "
    "would be the same if a client answered with zeros in its time."
)


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
      by_arrival: whether those of the drawn clients take part that answer first, so that a round's cohort is known only
        when they have; the others of the draw have not taken part.
      staleness: number of rounds, at most 1, by which an answer may come after the round that invited its client, and
        counts in the later one.
    """

    separation: int
    max_participations: int | None
    by_arrival: bool = False
    staleness: int = 0

    @property
    def assumption(self) -> str:
        """Sentence on what the guarantee assumes of the clients, beside the bounds; empty without such an assumption."""
        return ASSUMED if self.by_arrival else ""

    def resting(self, earlier: Sequence[Sequence[int]]) -> set[int]:
        """Return the clients that may not take part in the next round, given the cohorts of all rounds before."""
        resting = {
            client for cohort in earlier[max(0, len(earlier) - self.separation + 1) :] for client in cohort
        }
        if self.max_participations is not None:
            counts = Counter(client for cohort in earlier for client in cohort)
            resting |= {client for client, count in counts.items() if count >= self.max_participations}
        return resting


NO_BOUNDS = Turns(separation=1, max_participations=None)


def min_participations(size: int, population: int, num_rounds: int) -> int:
    """Return how often the busiest client takes part at least, if `size` of `population` clients do in every round."""
    return -(-num_rounds * size // population)
