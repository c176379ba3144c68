"""Search for members that corrupt encrypted sums: after the second untrue sum each cohort is summed in random parts.

An untrue sum violates the norm bound, so at least one of its members corrupted it. The candidates are divided over the
parts. A single attacker is in all untrue sums, and after log2 n of them no other member is. If no member is in all of
them, there are several attackers. If these always attack, they are the only members of an untrue sum that were in no
true one; otherwise a member is suspected that is in every pair, or triple, with a member in each untrue sum. Suspects
are summed with as few others as a sum allows, so that they corrupt only these. After `CALM` rounds without an untrue
sum cohorts are whole again. The evidence is kept: the next untrue sum divides them at once, for twice as long, so that
an attacker that corrupts only whole cohorts is not found, but corrupts few.

A suspicion is no proof. A single attacker cannot draw it on another member; several that take turns can. It ends with a
true sum of the suspect in a round with an untrue sum that no suspect explains, and when cohorts are whole again.

Each member is in one part, and its vector in one sum: its cost of a round does not depend on the number of parts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from .query_rows import FIRST_ROW

FIRST = 2  # untrue sums from which on cohorts are split
SUSPECTED = "is suspected of spoiling sums"
CALM = 3  # rounds in parts without an untrue sum after which cohorts are whole again, the first time
TOGETHER = 3  # who take turns are searched for up to so many, all of whom but one are from at most
TRIED = 10_000  # combinations of members


@dataclass(frozen=True)
class WeighedSum:
    """One opened sum, compared with its bound.

    Attributes:
      nodes: of the vectors in it, ascending.
      norm: in clipping norms.
      most: the bound, in clipping norms.
      why: it is untrue or lost, in words; empty if it may be true.
      lost: whether its members' own noise drowns it, so that the norm shows nothing.
    """

    nodes: tuple[int, ...]
    norm: float
    most: float
    why: str = ""
    lost: bool = False


@dataclass(frozen=True)
class Culprits:
    """Candidates for corrupting some sums, the certain ones among them, and the least number of attackers."""

    possible: frozenset[int] = frozenset()
    certain: frozenset[int] = frozenset()
    together: int = 1


@dataclass(frozen=True)
class Search:
    """State of the search in a run.

    Attributes:
      untrue: rounds with an untrue sum; those before cohorts were whole again count as one.
      spoilt: row and nodes of each untrue sum that no suspect explained.
      cleared: nodes that were in a true sum.
      suspected: by node, the reason.
      calm: consecutive rounds in parts without an untrue sum.
      patience: number of these after which cohorts are whole again.
      declined: the largest part that its members declined by their policies.
    """

    untrue: int = 0
    spoilt: tuple[tuple[int, frozenset[int]], ...] = ()
    cleared: frozenset[int] = frozenset()
    suspected: Mapping[int, str] = field(default_factory=dict[int, str])
    calm: int = 0
    patience: int = CALM
    declined: int = 0

    @property
    def sought(self) -> Culprits:
        """Candidates for the untrue sums that no suspect explains."""
        left = [each for each in self.spoilt if self.suspected.keys().isdisjoint(each[1])]
        sums, at_once = [nodes for _, nodes in left], max(Counter(row for row, _ in left).values(), default=1)
        if (alone := _explained(sums, 1) if sums else Culprits()) is not None:
            return alone
        several = Culprits(together=max(at_once, 2))
        spoiling = [nodes - self.cleared for nodes in sums]
        if all(spoiling):  # as if they always did
            certain = frozenset.union(frozenset(), *(nodes for nodes in spoiling if len(nodes) == 1))
            return replace(several, possible=frozenset.union(*spoiling), certain=certain)
        found = (_explained(sums, size) for size in range(2, TOGETHER + 1))
        return next((each for each in found if each is not None), several)

    def parts(
        self, cohort: Sequence[int], possible: Callable[[int], bool], draw: np.random.Generator
    ) -> tuple[list[list[int]], str]:
        """Return the parts in which a cohort is summed, and why there is one where the search needs two, in words.

        Args:
          cohort: nodes of the round.
          possible: whether this many nodes can form a sum.
          draw: an unpredictable random source.
        """
        if self.untrue < FIRST:
            return [list(cohort)], ""
        least = next((size for size in range(2, len(cohort)) if size > self.declined and possible(size)), 0)
        known = [node for node in cohort if node in self.suspected]
        drawn = [cohort[at] for at in draw.permutation(len(cohort)) if cohort[at] not in self.suspected]
        sought = self.sought
        rest = [node for node in drawn if node not in sought.possible]
        rest += [node for node in drawn if node in sought.possible]
        aside = max(least - len(known), 0) if known else 0
        if not least or len(rest) - aside < least or (not known and len(rest) < 2 * least):
            limit = (
                f"members decline sums of {self.declined}" if self.declined else "secagg.collusion, dropout"
            )
            why = f"members that corrupt sums cannot be found: halves of {len(cohort)} members are too small"
            return [list(cohort)], f"{why} ({limit}); enlarge the cohort"
        apart, rest = [sorted([*known, *rest[:aside]])] if known else [], rest[aside:]
        count = 2 * sought.together if sought.possible or not known else 1
        return [*apart, *_divided(rest, min(count, len(rest) // least))], ""

    def after(self, row: int, sums: Sequence[WeighedSum], in_parts: bool) -> Search:
        """Return the state after a round."""
        if not self.untrue and not any(each.why for each in sums):
            return self
        true = frozenset(node for each in sums if not each.why for node in each.nodes)
        now = replace(self, cleared=self.cleared | true)
        untrue = [frozenset(each.nodes) for each in sums if each.why]
        if not untrue:
            now = replace(now, calm=self.calm + (in_parts and bool(sums)))
            whole = Search(FIRST - 1, self.spoilt, patience=2 * self.patience, declined=self.declined)
            return now if now.calm < self.patience else whole
        now = replace(now, untrue=self.untrue + 1, calm=0)
        new = tuple((row, nodes) for nodes in untrue if self.suspected.keys().isdisjoint(nodes))
        if not new:
            return now
        suspected = {node: why for node, why in self.suspected.items() if node not in true}
        now = replace(now, spoilt=self.spoilt + new, suspected=suspected)
        if not now.sought.possible:  # too many take turns
            explained = (each for each in self.spoilt if not suspected.keys().isdisjoint(each[1]))
            now = replace(now, spoilt=(*explained, *new), cleared=true)
        told = ", ".join(dict.fromkeys(str(row % FIRST_ROW) for row, _ in now.spoilt))
        why = f"{SUSPECTED}: it is among the fewest members that explain those of rounds {told}"
        suspected |= dict.fromkeys(now.sought.certain, why)
        explaining = [nodes & suspected.keys() for _, nodes in now.spoilt]
        needed = frozenset(node for nodes in explaining if len(nodes) == 1 for node in nodes)
        return replace(now, suspected={node: suspected[node] for node in suspected if node in needed})

    def of(self, members: frozenset[int]) -> Search:
        """Return the state for the remaining members: without sums that a removed member may have corrupted."""
        suspected = {node: why for node, why in self.suspected.items() if node in members}
        spoilt = tuple(each for each in self.spoilt if each[1] <= members)
        return replace(self, suspected=suspected, spoilt=spoilt, declined=0)


def _explained(sums: Sequence[frozenset[int]], size: int) -> Culprits | None:
    """Return the members of all sets of this size that hit each of these sums; None if there is no such set.

    Args:
      sums: at least one, of which no smaller set explains all.
      size: at least 1.
    """
    tried = len(min(sums, key=len)) ** (size - 1)
    if tried > TRIED or not (found := list(_explanations(sums, size))):
        return None
    certain = (those | (last if len(last) == 1 else frozenset()) for those, last in found)
    possible = frozenset.union(*(those | last for those, last in found))
    return Culprits(possible, frozenset.intersection(*certain), size)


def _explanations(
    sums: Sequence[frozenset[int]], size: int
) -> Iterator[tuple[frozenset[int], frozenset[int]]]:
    """Yield sets of members: all of a set but one, and the candidates for that one; arguments as of `_explained`."""
    if size == 1:
        if common := frozenset.intersection(*sums):
            yield frozenset(), common
        return
    for node in min(sums, key=len):
        for those, last in _explanations([nodes for nodes in sums if node not in nodes], size - 1):
            yield those | {node}, last


def _divided(nodes: Sequence[int], count: int) -> list[list[int]]:
    """Return `count` parts of nodes in random order, of nearly equal size, each with an equal share of the last ones."""
    parts: list[list[int]] = [[] for _ in range(count)]
    for place, node in enumerate(reversed(nodes)):
        parts[place % count].append(node)
    return [sorted(part) for part in parts]
