"""Who takes part in a round. A cohort both draws the clients and is the only place where the privacy
amplification by that draw enters the accounting, so the two cannot drift apart."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from dp_accounting.dp_event import DpEvent, PoissonSampledDpEvent

from ..privacy.mechanisms.randomness import Stream
from ..privacy.refusal import Refusal

Earlier = Sequence[Sequence[int]]  # the cohorts of all rounds before, in their order


class Cohort(Protocol):
    """A rule that draws the clients of a round, and what that draw is worth."""

    @property
    def name(self) -> str:
        """The rule's word: poisson, fixed or all; or what it promises instead of a random sample."""
        ...

    def draw(self, population: Sequence[int], stream: Stream, earlier: Earlier = ()) -> list[int]:
        """Return the clients of one round, in the population's order, given those of the rounds before."""
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
    secret: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise Refusal("cohort.rate", self.rate, "give a probability above 0 and at most 1")

    def draw(self, population: Sequence[int], stream: Stream, earlier: Earlier = ()) -> list[int]:
        """Return each client with probability `rate` (to within 2^-64); the result may be empty."""
        del earlier
        if self.rate == 1:
            return list(population)
        chosen = stream.uint64(len(population)) < np.uint64(int(self.rate * 2**64))
        return [population[int(index)] for index in np.flatnonzero(chosen)]

    def expected_size(self, population: int) -> float:
        """Return rate * population."""
        return self.rate * population

    def event(self, mechanism: DpEvent) -> DpEvent:
        """Return the Poisson-sampled mechanism."""
        return (
            PoissonSampledDpEvent(float(self.rate), mechanism) if self.secret and self.rate < 1 else mechanism
        )


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

    def draw(self, population: Sequence[int], stream: Stream, earlier: Earlier = ()) -> list[int]:
        """Return `size` clients: those with the smallest of independent uniform keys."""
        del earlier
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

    def draw(self, population: Sequence[int], stream: Stream, earlier: Earlier = ()) -> list[int]:
        """Return the population."""
        del stream, earlier
        return list(population)

    def expected_size(self, population: int) -> float:
        """Return the population's size."""
        return float(population)

    def event(self, mechanism: DpEvent) -> DpEvent:
        """Return the mechanism itself."""
        return mechanism


@dataclass(frozen=True)
class MinSeparation:
    """At most `size` clients, none twice within `separation` rounds nor more than `max_participations` times in all.

    Nothing random is claimed: who takes part may be public. Whoever was drawn has taken part, also if no reply came.
    """

    size: int
    separation: int
    max_participations: int

    def __post_init__(self) -> None:
        for field in ("size", "separation", "max_participations"):
            if getattr(self, field) < 1:
                raise Refusal(f"cohort.{field}", getattr(self, field), "give at least 1")

    @property
    def name(self) -> str:
        """What the accounting relies on."""
        return (
            f"no sampling assumption; at most {self.max_participations} participations, "
            f"separation {self.separation}"
        )

    def draw(self, population: Sequence[int], stream: Stream, earlier: Earlier = ()) -> list[int]:
        """Return `size` of those who may, the ones with fewest participations first; fewer where fewer may."""
        counts = Counter(client for cohort in earlier for client in cohort)
        recent = {
            client for cohort in earlier[max(0, len(earlier) - self.separation + 1) :] for client in cohort
        }
        keys = stream.uint64(len(population)).tolist()
        eligible = [
            (counts[client], key, client)
            for client, key in zip(population, keys, strict=True)
            if client not in recent and counts[client] < self.max_participations
        ]
        chosen = {client for _, _, client in sorted(eligible)[: self.size]}
        return [client for client in population if client in chosen]

    def expected_size(self, population: int) -> float:
        """Return `size`."""
        del population
        return float(self.size)

    def event(self, mechanism: DpEvent) -> DpEvent:
        """Return the mechanism itself."""
        return mechanism


@dataclass(frozen=True)
class OverSelected:
    """More clients are invited than a round needs, for some will not answer.

    What the draw is worth is what it is worth to those who are invited; the mean divides by the planned cohort,
    however many answer.

    Attributes:
      invited: who is drawn.
      planned: as many as a round needs.
    """

    invited: Cohort
    planned: Cohort

    @property
    def name(self) -> str:
        """The rule's word."""
        return self.invited.name

    def draw(self, population: Sequence[int], stream: Stream, earlier: Earlier = ()) -> list[int]:
        """Return those who are invited: all, where so many clients have left that fewer are there."""
        if self.invited.expected_size(len(population)) > len(population):
            return list(population)
        return self.invited.draw(population, stream, earlier)

    def expected_size(self, population: int) -> float:
        """Return the planned cohort's."""
        return self.planned.expected_size(population)

    def event(self, mechanism: DpEvent) -> DpEvent:
        """Return what a round reveals of whoever may be invited."""
        return self.invited.event(mechanism)


def over_selected(planned: Poisson | Fixed, times: float, population: int) -> Cohort:
    """Return the cohort of which so many times as many are invited as planned, or all where they are fewer."""
    if times == 1:
        return planned
    if isinstance(planned, Poisson):
        return OverSelected(replace(planned, rate=min(1.0, planned.rate * times)), planned)
    return OverSelected(Fixed(min(population, math.ceil(planned.size * times))), planned)


def invitation(cohort: Cohort) -> Cohort:
    """Return what draws those whom a round asks, whether or not it needs them all."""
    return cohort.invited if isinstance(cohort, OverSelected) else cohort


def invited_size(cohort: Cohort, population: int) -> float:
    """Return how many clients a round is expected to ask, which over-selection makes more than it needs."""
    return min(float(population), invitation(cohort).expected_size(population))


def tossed_rate(cohort: Cohort) -> float:
    """Return the probability in (0, 1] with which a secret coin invites each client; 1 where nothing is claimed of one."""
    asked = invitation(cohort)
    return asked.rate if isinstance(asked, Poisson) and asked.secret else 1.0


def beside(cohort: Cohort, clients: int, canaries: int) -> Cohort:
    """Return how so many canaries of an audit are drawn beside so many clients: by the same rule, at the same rate."""
    asked = invitation(cohort)
    if isinstance(asked, Fixed | MinSeparation):
        return replace(asked, size=min(canaries, max(1, asked.size * canaries // clients)))
    return asked


def likely_participations(cohort: Cohort, population: int, num_rounds: int, deviations: float = 3.0) -> int:
    """Return how often one client takes part in `num_rounds` rounds, unless it is unusually lucky.

    The mean plus `deviations` standard deviations of the binomial count, at most `num_rounds`. Whoever is drawn
    more often than that finds its own budget spent and sits out, which its ledger decides, not this number.
    """
    if isinstance(cohort, MinSeparation):
        return min(num_rounds, cohort.max_participations)
    rate = min(1.0, invited_size(cohort, population) / population)
    spread = deviations * math.sqrt(num_rounds * rate * (1 - rate))
    return min(num_rounds, max(1, math.ceil(num_rounds * rate + spread)))
