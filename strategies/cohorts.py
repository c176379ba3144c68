"""Cohorts: the rules that draw the clients of a round, and the amplification of each draw.

A cohort draws the clients and is the only place where the privacy amplification by that draw enters the accounting, so
the two cannot diverge. Its attributes describe all other properties of the draw; no code tests its type.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

from dp_accounting.dp_event import DpEvent, PoissonSampledDpEvent

from ..base.refusal import Refusal
from ..privacy.mechanisms.randomness import Stream
from ..privacy.sampling import Turns, min_participations
from .draws import SPARSE, coins, subset

DEVIATIONS = 3.0  # standard deviations above a client's mean participations, for which noise is planned
PRESENT = 0.75  # of all clients, that a cohort by arrival counts on; the others may be away or too slow for any round
Earlier = Sequence[Sequence[int]]  # the cohorts of all rounds before, in their order


class Cohort(Protocol):
    """Rule that draws the clients of a round, with the event of the draw."""

    @property
    def name(self) -> str:
        """The rule's name: poisson, fixed or all; or its bounds on participation instead of a random sample."""
        ...

    @property
    def coin(self) -> float | None:
        """Probability with which an independent coin invites each client; None without such coins."""
        ...

    @property
    def secret(self) -> bool:
        """Whether the draw counts as hidden, so that it amplifies; `with_label` returns the cohort with a public draw."""
        ...

    @property
    def replaces(self) -> bool:
        """Whether another client takes the place of one that leaves; add-or-remove-one is then no adjacency."""
        ...

    @property
    def turns(self) -> Turns | None:
        """Bounds on the number and separation of a client's participations; None without bounds.

        With such bounds the whole run is one release.
        """
        ...

    def draw(self, population: Sequence[int], stream: Stream, earlier: Earlier = ()) -> list[int]:
        """Return the clients of one round, in the population's order.

        Args:
          population: all clients.
          stream: random words of the round's draw.
          earlier: the cohorts of the rounds before, in their order.
        """
        ...

    def expected_size(self, population: int) -> float:
        """Return the fixed denominator of the mean: the number of clients a round expects."""
        ...

    def event(self, mechanism: DpEvent) -> DpEvent:
        """Return the event of one round, whose sum is noised by `mechanism`, for adversaries that cannot see the draw."""
        ...


@dataclass(frozen=True)
class Poisson:
    """Every client takes part independently with probability `rate` in (0, 1]. Secret draws are amplified.

    Attributes:
      rate: probability, in (0, 1].
      name: what reports print.
      secret: whether nobody but the server learns who took part.

    Raises:
      Refusal: the rate is out of range.

    Example:
      >>> import fedveil as fv
      >>> fv.Poisson(0.25).expected_size(400)
      100.0
    """

    rate: float
    name: str = "poisson"
    secret: bool = True
    replaces: bool = field(default=False, init=False, repr=False)
    turns: None = field(default=None, init=False, repr=False)

    @property
    def coin(self) -> float:
        """The rate."""
        return self.rate

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise Refusal("cohort.rate", self.rate, "give a probability above 0 and at most 1")

    def draw(self, population: Sequence[int], stream: Stream, earlier: Earlier = ()) -> list[int]:
        """Return each client with probability `rate` (to within 2^-64); the result may be empty."""
        if self.rate == 1:
            return list(population)
        return [population[index] for index in coins(len(population), self.rate, stream).tolist()]

    def expected_size(self, population: int) -> float:
        """Return rate * population."""
        return self.rate * population

    def event(self, mechanism: DpEvent) -> DpEvent:
        """Return the Poisson-sampled mechanism."""
        return (
            PoissonSampledDpEvent(float(self.rate), mechanism) if self.secret and self.rate < 1 else mechanism
        )


@dataclass(frozen=True)
class _Plain:
    """Base of cohorts whose draw does not amplify."""

    coin: None = field(default=None, init=False, repr=False)
    secret: bool = field(default=False, init=False, repr=False)

    def event(self, mechanism: DpEvent) -> DpEvent:
        """Return the mechanism itself."""
        return mechanism


@dataclass(frozen=True)
class Fixed(_Plain):
    """Exactly `size` clients, uniformly without replacement.

    The draw does not amplify: the Poisson accountant does not apply to it (Lebeda et al. 2024, arXiv:2405.20769), so a
    round is charged as for a client that always takes part.

    Attributes:
      size: clients of a round, at least 1.
      name: what reports print.

    Raises:
      Refusal: the size is out of range.

    Example:
      >>> import fedveil as fv
      >>> fv.Fixed(20).expected_size(400)
      20.0
    """

    size: int
    name: str = "fixed"
    replaces: bool = field(default=True, init=False, repr=False)
    turns: None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise Refusal("cohort.size", self.size, "give at least 1 client a round")

    def draw(self, population: Sequence[int], stream: Stream, earlier: Earlier = ()) -> list[int]:
        """Return `size` clients, each choice of them as likely as any other."""
        if self.size > len(population):
            remedy = f"only {len(population)} clients are there; ask for fewer"
            raise Refusal("cohort.size", self.size, remedy)
        return [population[index] for index in subset(len(population), self.size, stream).tolist()]

    def expected_size(self, population: int) -> float:
        """Return `size`."""
        return float(self.size)


@dataclass(frozen=True)
class All(_Plain):
    """Every client, every round. There is no draw, and so no amplification.

    Attributes:
      name: what reports print.

    Example:
      >>> import fedveil as fv
      >>> fv.All().expected_size(400)
      400.0
    """

    name: str = "all"
    replaces: bool = field(default=False, init=False, repr=False)
    turns: None = field(default=None, init=False, repr=False)

    def draw(self, population: Sequence[int], stream: Stream, earlier: Earlier = ()) -> list[int]:
        """Return the population."""
        return list(population)

    def expected_size(self, population: int) -> float:
        """Return the population's size."""
        return float(population)


@dataclass(frozen=True)
class MinSeparation(_Plain):
    """At most `size` clients, none twice within `separation` rounds nor more than `max_participations` times in all.

    The draw does not amplify, and may be public. A drawn client counts as having taken part, even without a reply.

    Attributes:
      size: clients of a round, at least 1.
      separation: rounds from one participation of a client to its next, at least 1.
      max_participations: largest number of rounds of one client in the whole run, at least 1.

    Raises:
      Refusal: a value is out of range.

    Example:
      >>> import fedveil as fv
      >>> fv.MinSeparation(size=20, separation=20, max_participations=5).name
      'no sampling assumption; at most 5 participations, separation 20'
    """

    size: int
    separation: int
    max_participations: int
    replaces: bool = field(default=True, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("size", "separation", "max_participations"):
            if getattr(self, name) < 1:
                raise Refusal(f"cohort.{name}", getattr(self, name), "give at least 1")

    @property
    def name(self) -> str:
        """The bounds that the accounting uses."""
        return (
            f"no sampling assumption; at most {self.max_participations} participations, "
            f"separation {self.separation}"
        )

    @property
    def turns(self) -> Turns:
        """Bounds that the draw keeps."""
        return Turns(self.separation, self.max_participations)

    def draw(self, population: Sequence[int], stream: Stream, earlier: Earlier = ()) -> list[int]:
        """Return `size` of the eligible clients, those with the fewest participations first; fewer if fewer are eligible."""
        counts = Counter(client for cohort in earlier for client in cohort)
        if isinstance(population, range) and len(counts) + self.size <= len(population) // SPARSE:
            # Enough clients have never taken part; these come first, so they alone are drawn from.
            past = [population.index(client) for client in counts if client in population]
            return [population[index] for index in subset(len(population), self.size, stream, past).tolist()]
        resting = self.turns.resting(earlier)
        keys = stream.uint64(len(population)).tolist()
        eligible = [
            (counts[client], key, client)
            for client, key in zip(population, keys, strict=True)
            if client not in resting
        ]
        chosen = {client for _, _, client in sorted(eligible)[: self.size]}
        return [client for client in population if client in chosen]

    def expected_size(self, population: int) -> float:
        """Return `size`."""
        return float(self.size)


@dataclass(frozen=True)
class First(_Plain):
    """The first `size` clients that answer, none twice within `separation` rounds nor more than `max_participations` times.

    A round invites more clients than it needs, uniformly among those that may take part, and a client takes part if it is
    among the first to answer. That depends on the clients, so nothing amplifies. The guarantee assumes that who answers
    first does not depend on the data that it hides.

    Attributes:
      size: clients of a round, at least 1.
      separation: rounds from one participation of a client to its next, at least 1.
      max_participations: largest number of rounds of one client in the whole run, at least 1.
      over_selection: invited clients over `size`, at least 1.
      staleness: 1 if a client that is still at work when its round ends may be among the first of the next one; else 0.

    Raises:
      Refusal: a value is out of range.

    Example:
      >>> import fedveil as fv
      >>> fv.First(size=20, separation=10, max_participations=10).expected_size(400)
      20.0
    """

    size: int
    separation: int
    max_participations: int
    over_selection: float = 1.5
    staleness: int = 1
    replaces: bool = field(default=True, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("size", "separation", "max_participations", "over_selection"):
            if getattr(self, name) < 1:
                raise Refusal(f"cohort.{name}", getattr(self, name), "give at least 1")
        if self.staleness not in (0, 1):
            raise Refusal("cohort.staleness", self.staleness, "give 0 or 1")

    @property
    def name(self) -> str:
        """The bounds that the accounting uses."""
        return (
            f"no sampling assumption, the first {self.size} that answer; at most {self.max_participations} participations, "
            f"separation {self.separation}"
        )

    @property
    def turns(self) -> Turns:
        """Bounds that the draw keeps, given the cohorts that answered."""
        return Turns(self.separation, self.max_participations, by_arrival=True, staleness=self.staleness)

    @property
    def invited(self) -> int:
        """Number of clients that a round invites."""
        return math.ceil(self.size * self.over_selection)

    def draw(self, population: Sequence[int], stream: Stream, earlier: Earlier = ()) -> list[int]:
        """Return the invited clients, each choice of them as likely as any other; fewer if fewer may take part."""
        resting = self.turns.resting(earlier)
        excluded = [index for index, client in enumerate(population) if client in resting]
        count = min(self.invited, len(population) - len(excluded))
        return [population[index] for index in subset(len(population), count, stream, excluded).tolist()]

    def expected_size(self, population: int) -> float:
        """Return `size`."""
        return float(self.size)


@dataclass(frozen=True)
class CyclicPoisson:
    """Clients have their turn every `groups` rounds, and then take part independently with probability `rate` * `groups`.

    The group of a client is a hash of its number, the same in every run and for any number of clients, so that a client
    that joins or leaves does not move another's turn. The groups may be public; the coins are secret.

    Attributes:
      rate: share of all clients that a round expects, in (0, 1].
      groups: rounds from one turn of a client to its next, at least 1; with 1 it is `Poisson`.
      name: what reports print; if empty, replaced by what the accounting relies on.
      secret: whether nobody but the server learns who took part.

    Raises:
      Refusal: a value is out of range, or a turn's probability is above 1.

    Example:
      >>> import fedveil as fv
      >>> fv.CyclicPoisson(rate=0.05, groups=4).name
      'poisson with probability 0.2, every 4 rounds'
    """

    rate: float
    groups: int
    name: str = ""
    secret: bool = True
    coin: None = field(default=None, init=False, repr=False)
    replaces: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise Refusal("cohort.groups", self.groups, "give at least 1")
        coin = self._coins.rate  # refuses a rate that is out of range
        if self.rate * self.groups > 1:
            remedy = f"with cohort.rate={self.rate:g} give at most {int(1 / self.rate)}"
            raise Refusal("cohort.groups", self.groups, remedy)
        often = "round" if self.groups == 1 else f"{self.groups} rounds"
        description = f"poisson with probability {coin:g}, every {often}"
        object.__setattr__(self, "name", self.name or description)

    @property
    def turns(self) -> Turns:
        """Bounds that the draw keeps: a client takes part at most every `groups` rounds."""
        return Turns(self.groups, None)

    @property
    def _coins(self) -> Poisson:
        """The draw of one turn."""
        return Poisson(min(1.0, self.rate * self.groups))

    def draw(self, population: Sequence[int], stream: Stream, earlier: Earlier = ()) -> list[int]:
        """Return each client of the group whose turn it is, by its coin; the result may be empty."""
        turn = len(earlier) % self.groups
        return [each for each in self._coins.draw(population, stream) if self._group(each) == turn]

    def _group(self, client: int) -> int:
        """Return the group of a client, from 0."""
        hashed = hashlib.blake2b(str(client).encode(), digest_size=8, person=b"cohort group")
        return int.from_bytes(hashed.digest(), "big") % self.groups

    def expected_size(self, population: int) -> float:
        """Return rate * population, over all groups."""
        return self.rate * population

    def event(self, mechanism: DpEvent) -> DpEvent:
        """Return the Poisson-sampled mechanism, of one turn."""
        return self._coins.event(mechanism) if self.secret else mechanism


@dataclass(frozen=True)
class OverSelected:
    """Cohort that invites more clients than a round needs, to compensate for dropouts.

    The amplification is that of the draw of the invited clients; the mean divides by the planned cohort, for any number
    of answers.

    Attributes:
      invited: cohort of the draw.
      planned: cohort that a round needs.
    """

    invited: Cohort
    planned: Cohort
    name: str = field(init=False, repr=False)
    coin: float | None = field(init=False, repr=False)
    secret: bool = field(init=False, repr=False)
    replaces: bool = field(init=False, repr=False)
    turns: Turns | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("name", "coin", "secret", "replaces", "turns"):
            object.__setattr__(self, name, getattr(self.invited, name))

    def draw(self, population: Sequence[int], stream: Stream, earlier: Earlier = ()) -> list[int]:
        """Return the invited clients; all of them if the population is smaller than the draw."""
        if self.invited.expected_size(len(population)) > len(population):
            return list(population)
        return self.invited.draw(population, stream, earlier)

    def expected_size(self, population: int) -> float:
        """Return the planned cohort's."""
        return self.planned.expected_size(population)

    def event(self, mechanism: DpEvent) -> DpEvent:
        """Return the event of a round for a client that may be invited."""
        return self.invited.event(mechanism)


def longest_rest(size: int, over_selection: float, population: int) -> int:
    """Return the largest separation, at least 1, with which `PRESENT` of the clients suffice for the invitations of each round.

    Arguments as of `First`, and the number of clients.
    """
    spare = int(PRESENT * population) - math.ceil(size * over_selection)
    return 1 + max(0, spare) // size


def cohort_of(name: str, numbers: Mapping[str, Any], population: int, num_rounds: int) -> Cohort:
    """Return the cohort of this name with a configuration's values.

    Args:
      name: poisson, fixed, min_separation, first, cyclic_poisson or all.
      numbers: the numbers of the configuration's group, in range; None for a value to choose here.
      population: number of clients; at least the cohort's size.
      num_rounds: of the run.
    """
    match name:
        case "poisson":
            return Poisson(numbers["rate"])
        case "fixed":
            return Fixed(numbers["size"])
        case "first":
            size, times = numbers["size"], numbers["over_selection"]
            separation = numbers["separation"] or longest_rest(size, times, population)
            limit = numbers["max_participations"] or -(-num_rounds // separation)
            return First(size, separation, limit, times, numbers["staleness"])
        case "min_separation":
            size = numbers["size"]
            limit = numbers["max_participations"] or min_participations(size, population, num_rounds)
            return MinSeparation(size, numbers["separation"] or population // size, limit)
        case "cyclic_poisson":
            return CyclicPoisson(numbers["rate"], numbers["groups"])
        case _:
            return All()


def with_label(cohort: Cohort, label: str) -> Cohort:
    """Return the cohort with a public draw, and a name for reports that says why the draw is public."""
    return replace(cast(Any, cohort), name=label, secret=False) if cohort.secret else cohort


def over_select(planned: Cohort, times: float, population: int) -> Cohort:
    """Return the cohort that invites more clients than a round needs; a rule without over-selection is unchanged.

    Args:
      planned: cohort that a round needs.
      times: invited over planned, at least 1.
      population: number of clients, the upper limit.
    """
    match planned:
        case Poisson() if times != 1:
            return OverSelected(replace(planned, rate=min(1.0, planned.rate * times)), planned)
        case Fixed() if times != 1:
            return OverSelected(Fixed(min(population, math.ceil(planned.size * times))), planned)
        case _:
            return planned


def _invited(cohort: Cohort) -> Cohort:
    """Return the cohort that is drawn, without over-selection."""
    match cohort:
        case OverSelected():
            return cohort.invited
        case First():
            return Fixed(cohort.invited)
        case _:
            return cohort


def invited_size(cohort: Cohort, population: int) -> float:
    """Return the expected number of invited clients of a round, over-selection included."""
    return min(float(population), _invited(cohort).expected_size(population))


def tossed_rate(cohort: Cohort) -> float:
    """Return the probability in (0, 1] with which a secret coin invites each client; 1 without amplification."""
    return cohort.coin if cohort.secret and cohort.coin is not None else 1.0


def canary_cohort(cohort: Cohort, clients: int, canaries: int) -> Cohort:
    """Return the cohort that draws an audit's canaries, by the same rule and at the same rate as `clients` real ones."""
    rule = _invited(cohort)
    if isinstance(rule, Fixed | MinSeparation):
        return replace(rule, size=min(canaries, max(1, rule.size * canaries // clients)))
    return rule


def in_arm(cohort: Cohort, arms: int) -> Cohort:
    """Return the cohort of one arm's clients: the same rule at the same rate.

    Args:
      cohort: cohort of all clients.
      arms: number of arms that the clients are dealt into, at least 1.
    """
    match cohort:
        case OverSelected():
            return OverSelected(in_arm(cohort.invited, arms), in_arm(cohort.planned, arms))
        case Fixed():
            return replace(cohort, size=max(1, cohort.size // arms))
        case _:
            return cohort


def likely_participations(cohort: Cohort, population: int, num_rounds: int) -> int:
    """Return the number of rounds, of `num_rounds`, for which a client's noise is planned: few clients are drawn for more.

    A client that is drawn more often finds its own budget spent and does not take part; its ledger enforces this, not
    this number.

    Args:
      cohort: any.
      population: how many clients there are.
      num_rounds: of the run.

    Returns:
      1 to `num_rounds`, and at most the cohort's own limit.
    """
    coins, rate = num_rounds, min(1.0, invited_size(cohort, population) / population)
    if (turns := cohort.turns) is not None:
        if turns.max_participations is not None:
            return min(num_rounds, turns.max_participations)
        coins, rate = -(-num_rounds // turns.separation), min(1.0, rate * turns.separation)  # one coin a turn
    spread = DEVIATIONS * math.sqrt(coins * rate * (1 - rate))
    return min(coins, max(1, math.ceil(coins * rate + spread)))
