"""Who takes part in a round. A cohort both draws the clients and is the only place where the privacy
amplification by that draw enters the accounting, so the two cannot drift apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from dp_accounting.dp_event import DpEvent, PoissonSampledDpEvent

from ..privacy.mechanisms.randomness import Stream
from ..privacy.refusal import Refusal


class Cohort(Protocol):
    """A rule that draws the clients of a round, and what that draw is worth."""

    @property
    def name(self) -> str:
        """The rule's word: poisson, fixed or all."""
        ...

    def draw(self, population: Sequence[int], stream: Stream) -> list[int]:
        """Return the clients of one round, in the population's order."""
        ...

    def expected_size(self, population: int) -> float:
        """Return the fixed denominator of the mean: the number of clients a round expects."""
        ...

    def event(self, mechanism: DpEvent) -> DpEvent:
        """Return what one round reveals to somebody who cannot see who took part."""
        ...


@dataclass(frozen=True)
class Poisson:
    """Every client takes part independently with probability `rate` in (0, 1]. Secret draws are amplified."""

    rate: float
    name: str = "poisson"

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise Refusal("cohort.rate", self.rate, "give a probability above 0 and at most 1")

    def draw(self, population: Sequence[int], stream: Stream) -> list[int]:
        """Return each client with probability `rate` (to within 2^-64); the result may be empty."""
        if self.rate == 1:
            return list(population)
        chosen = stream.uint64(len(population)) < np.uint64(int(self.rate * 2**64))
        return [population[int(index)] for index in np.flatnonzero(chosen)]

    def expected_size(self, population: int) -> float:
        """Return rate * population."""
        return self.rate * population

    def event(self, mechanism: DpEvent) -> DpEvent:
        """Return the Poisson-sampled mechanism."""
        return mechanism if self.rate == 1 else PoissonSampledDpEvent(float(self.rate), mechanism)


@dataclass(frozen=True)
class Fixed:
    """Exactly `size` clients, uniformly without replacement.

    Nothing is claimed for the draw: the Poisson accountant does not apply to it (Lebeda et al. 2024,
    arXiv:2405.20769), so a round costs what it costs a client who always takes part.
    """

    size: int
    name: str = "fixed"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise Refusal("cohort.size", self.size, "give at least 1 client a round")

    def draw(self, population: Sequence[int], stream: Stream) -> list[int]:
        """Return `size` clients: those with the smallest of independent uniform keys."""
        if self.size > len(population):
            raise Refusal(
                "cohort.size", self.size, f"only {len(population)} clients are there; ask for fewer"
            )
        order = np.argsort(stream.uint64(len(population)), kind="stable")[: self.size]
        return [population[int(index)] for index in np.sort(order)]

    def expected_size(self, population: int) -> float:
        """Return `size`."""
        del population
        return float(self.size)

    def event(self, mechanism: DpEvent) -> DpEvent:
        """Return the mechanism itself."""
        return mechanism


@dataclass(frozen=True)
class All:
    """Every client, every round. There is no draw, and so no amplification."""

    name: str = "all"

    def draw(self, population: Sequence[int], stream: Stream) -> list[int]:
        """Return the population."""
        del stream
        return list(population)

    def expected_size(self, population: int) -> float:
        """Return the population's size."""
        return float(population)

    def event(self, mechanism: DpEvent) -> DpEvent:
        """Return the mechanism itself."""
        return mechanism


def likely_participations(cohort: Cohort, population: int, num_rounds: int, deviations: float = 3.0) -> int:
    """Return how often one client takes part in `num_rounds` rounds, unless it is unusually lucky.

    The mean plus `deviations` standard deviations of the binomial count, at most `num_rounds`. Whoever is drawn
    more often than that finds its own budget spent and sits out, which its ledger decides, not this number.
    """
    rate = min(1.0, cohort.expected_size(population) / population)
    spread = deviations * math.sqrt(num_rounds * rate * (1 - rate))
    return min(num_rounds, max(1, math.ceil(num_rounds * rate + spread)))
