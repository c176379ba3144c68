"""Search for who spoils encrypted sums: from the second untrue one on each cohort is summed in parts, drawn at random.

A sum that cannot be true has a member that spoilt it. Those who may have are divided over the parts: one that spoils every
sum that it is in is left after log2 n rounds as the only member of all untrue sums, and is suspected. Where several sums
of a round are untrue there is more than one of them; then a member is suspected that alone in an untrue sum was in no true
one. From then on suspects are summed with as few others as a sum takes, so that they spoil no more than these.

A suspicion is no proof. One that works alone can draw it on nobody else, whenever it spoils; several that take turns can.
It ends with the first true sum of the suspect's.

Each member is in one part, and its vector in one sum: what a round costs it does not depend on how many parts there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

FIRST = 2  # untrue sums from which on cohorts are split
SUSPECTED = "is suspected of spoiling sums"
CALM = 3  # rounds in parts without an untrue sum after which cohorts are whole again


@dataclass(frozen=True)
class WeighedSum:
    """One opened sum, held against its bound.

    Attributes:
      nodes: whose vectors are in it, ascending.
      norm: in clipping norms.
      most: that a true one has, in clipping norms.
      why: it cannot be true, or is lost, in words; empty if it may be true.
      lost: in the noise that its members added of their own, of which no norm tells anything.
    """

    nodes: tuple[int, ...]
    norm: float
    most: float
    why: str = ""
    lost: bool = False


@dataclass(frozen=True)
class Search:
    """What is known of who spoils a run's sums.

    Attributes:
      untrue: rounds with an untrue sum so far.
      spoilt: row and nodes of each untrue sum that no suspect explains.
      cleared: nodes that were in a true sum.
      several: untrue sums in one round that no suspect explains, at most so far; at least 1.
      suspected: by node, why.
      calm: rounds in parts in a row without an untrue sum.
      declined: the largest part that its members declined by their policies.
    """

    untrue: int = 0
    spoilt: tuple[tuple[int, frozenset[int]], ...] = ()
    cleared: frozenset[int] = frozenset()
    several: int = 1
    suspected: Mapping[int, str] = field(default_factory=dict[int, str])
    calm: int = 0
    declined: int = 0

    @property
    def sought(self) -> frozenset[int]:
        """Nodes that may have spoilt what no suspect explains."""
        sums = [nodes for _, nodes in self.spoilt]
        if not sums:
            return frozenset()
        if self.several == 1:
            return frozenset.intersection(*sums)
        return frozenset.union(*sums) - self.cleared

    def parts(
        self, cohort: Sequence[int], possible: Callable[[int], bool], draw: np.random.Generator
    ) -> tuple[list[list[int]], str]:
        """Return the parts in which a cohort is summed, and in words why it is one where the search needs two.

        Args:
          cohort: nodes of the round.
          possible: whether so many nodes make a sum.
          draw: nobody may guess it.
        """
        if self.untrue < FIRST:
            return [list(cohort)], ""
        least = next((size for size in range(2, len(cohort)) if size > self.declined and possible(size)), 0)
        known = [node for node in cohort if node in self.suspected]
        drawn = [cohort[at] for at in draw.permutation(len(cohort)) if cohort[at] not in self.suspected]
        sought = self.sought
        rest = [*(node for node in drawn if node not in sought), *(node for node in drawn if node in sought)]
        aside = max(least - len(known), 0) if known else 0
        if not least or len(rest) - aside < least or (not known and len(rest) < 2 * least):
            return [list(cohort)], _why_whole(len(cohort), self.declined)
        apart, rest = [sorted([*known, *rest[:aside]])] if known else [], rest[aside:]
        count = 2 * self.several if self.spoilt or not known else 1
        return [*apart, *_divided(rest, min(count, len(rest) // least))], ""

    def after(self, row: int, sums: Sequence[WeighedSum], in_parts: bool) -> Search:
        """Return what is known after a round."""
        if not self.untrue and not any(each.why for each in sums):
            return self
        true = frozenset(node for each in sums if not each.why for node in each.nodes)
        suspected = {node: why for node, why in self.suspected.items() if node not in true}
        now = replace(self, suspected=suspected, cleared=self.cleared | true)
        if not any(each.why for each in sums):
            now = replace(now, calm=self.calm + (in_parts and bool(sums)))
            return now if now.calm < CALM else Search(declined=self.declined)
        untrue = [frozenset(each.nodes) for each in sums if each.why]
        new = [nodes for nodes in untrue if suspected.keys().isdisjoint(nodes)]
        now = replace(now, untrue=self.untrue + 1, calm=0, several=max(self.several, len(new)))
        return now._with(row, new) if new else now

    def _with(self, row: int, new: Sequence[frozenset[int]]) -> Search:
        """Return the search after untrue sums that no suspect explains."""
        spoilt, cleared = (*self.spoilt, *((row, nodes) for nodes in new)), self.cleared
        if any(nodes <= cleared for nodes in new):  # who was in a true sum has spoilt one since
            spoilt, cleared = tuple((row, nodes) for nodes in new), frozenset[int]()
        now = replace(self, spoilt=spoilt, cleared=cleared)
        if not now.sought and self.several == 1:
            now = replace(now, several=2)
        found = now._found()
        left = tuple(each for each in spoilt if found.keys().isdisjoint(each[1]))
        several = now.several if left else 1
        return replace(now, spoilt=left, several=several, suspected={**self.suspected, **found})

    def _found(self) -> dict[int, str]:
        if self.several == 1:
            told = ", ".join(str(row) for row, _ in self.spoilt)
            why = f"{SUSPECTED}: no other member is in all of the sums that cannot be true, of rounds {told}"
            return dict.fromkeys(self.sought, why) if len(self.sought) == 1 else {}
        return {
            node: f"{SUSPECTED}: every other member of its sum of round {row} was in sums that can be true"
            for row, nodes in self.spoilt
            if len(nodes - self.cleared) == 1
            for node in nodes - self.cleared
        }

    def of(self, members: frozenset[int]) -> Search:
        """Return what is known of these members: not of sums which somebody else may have spoilt, who is gone."""
        suspected = {node: why for node, why in self.suspected.items() if node in members}
        spoilt = tuple(each for each in self.spoilt if each[1] <= members)
        return replace(self, suspected=suspected, spoilt=spoilt, declined=0)


def _divided(nodes: Sequence[int], count: int) -> list[list[int]]:
    """Return parts of equal size, as far as may be, each with an equal share of those who are sought.

    Args:
      nodes: in a random order, those who are sought last.
      count: of parts, at least 1.
    """
    parts: list[list[int]] = [[] for _ in range(count)]
    for place, node in enumerate(reversed(nodes)):
        parts[place % count].append(node)
    return [sorted(part) for part in parts]


def _why_whole(size: int, declined: int) -> str:
    limit = f"members decline sums of {declined}" if declined else "secagg.collusion and dropout ask for more"
    return (
        f"who spoils sums cannot be searched for: halves of {size} members are too small ({limit}); "
        "enlarge the cohort"
    )
