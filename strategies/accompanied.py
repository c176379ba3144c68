"""A cohort with canary clients beside the real ones: dummies of an audit, drawn by the same rule at the same rate.

The real clients are drawn as they would be without canaries, so that nothing about them is accounted differently; the
mean divides by the real cohort.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dp_accounting.dp_event import DpEvent

from ..privacy.mechanisms.randomness import Stream
from .cohorts import Cohort, Earlier, Fixed, MinSeparation


@dataclass(frozen=True)
class Accompanied:
    """Draws from a population whose first `clients` are real and whose others are canaries.

    Attributes:
      real: draws the real clients; its expected size and its event are those of the whole.
      canaries: draws the others.
      clients: how many are real.
    """

    real: Cohort
    canaries: Cohort
    clients: int

    @property
    def name(self) -> str:
        """The real clients' rule."""
        return self.real.name

    def draw(self, population: Sequence[int], stream: Stream, earlier: Earlier = ()) -> list[int]:
        """Return the real clients of a round and, after them, the canaries."""
        real, dummies = population[: self.clients], population[self.clients :]
        drawn: list[int] = []
        for cohort, nodes in ((self.real, real), (self.canaries, dummies)):
            known = set(nodes)
            drawn += cohort.draw(nodes, stream, [[n for n in each if n in known] for each in earlier])
        return drawn

    def expected_size(self, population: int) -> float:
        """Return how many real clients of so many a round expects."""
        return self.real.expected_size(population)

    def event(self, mechanism: DpEvent) -> DpEvent:
        """Return what one round reveals of a real client."""
        return self.real.event(mechanism)


def accompanied(cohort: Cohort, clients: int, canaries: int) -> Cohort:
    """Return the cohort of so many real clients with so many canaries drawn beside it."""
    if canaries == 0:
        return cohort
    own = cohort
    if isinstance(cohort, Fixed | MinSeparation):
        own = replace(cohort, size=max(1, cohort.size * canaries // clients))
    return Accompanied(cohort, own, clients)
