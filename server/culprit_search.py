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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from .query_rows import round_number

SPLIT_AFTER = 2  # untrue sums from which on cohorts are split
SUSPECTED = "is suspected of spoiling sums"
CALM = 3  # rounds in parts without an untrue sum after which cohorts are whole again, the first time
MAX_ATTACKERS = 3  # that take turns; more are not searched for
MAX_COMBINATIONS = 10_000  # of members, all of the attackers but one


@dataclass(frozen=True)
class WeighedSum:
    """One opened sum, compared with its bound.

    Attributes:
      nodes: of the vectors in it, ascending.
      norm: in clipping norms.
      bound: of the norm of a true sum, in clipping norms.
      violation: in words, why the sum is untrue or lost; empty if it may be true.
      is_lost: whether its members' own noise drowns it, so that the norm shows nothing.
    """

    nodes: tuple[int, ...]
    norm: float
    bound: float
    violation: str = ""
    is_lost: bool = False


@dataclass(frozen=True)
class Culprits:
    """Candidates for corrupting some sums, the certain ones among them, and the least number of attackers."""

    possible: frozenset[int] = frozenset()
    certain: frozenset[int] = frozenset()
    min_attackers: int = 1


@dataclass(frozen=True)
class Search:
    """State of the search in a run.

    Attributes:
      untrue: rounds with an untrue sum; those before cohorts were whole again count as one.
      untrue_sums: row and nodes of each untrue sum that no suspect explained.
      cleared: nodes that were in a true sum.
      suspected: by node, the reason.
      calm: consecutive rounds in parts without an untrue sum.
      patience: number of these after which cohorts are whole again.
      declined: size of the largest part that its members declined by their policies; parts are larger from then on.
    """

    untrue: int = 0
    untrue_sums: tuple[tuple[int, frozenset[int]], ...] = ()
    cleared: frozenset[int] = frozenset()
    suspected: Mapping[int, str] = field(default_factory=dict[int, str])
    calm: int = 0
    patience: int = CALM
    declined: int = 0

    @property
    def culprits(self) -> Culprits:
        """Candidates for the untrue sums that no suspect explains, for the fewest attackers that can explain them."""
        unexplained = [each for each in self.untrue_sums if self.suspected.keys().isdisjoint(each[1])]
        if not unexplained:
            return Culprits()
        sums = [nodes for _, nodes in unexplained]
        if (single := _explain(sums, 1)) is not None:
            return single
        sums_by_row = Counter(
            row for row, _ in unexplained
        )  # each of a row's sums has an attacker of its own
        several = Culprits(min_attackers=max(2, *sums_by_row.values()))
        uncleared = [nodes - self.cleared for nodes in sums]
        if all(uncleared):  # the attackers may corrupt every sum that they are in
            certain = frozenset(node for nodes in uncleared if len(nodes) == 1 for node in nodes)
            return replace(several, possible=frozenset.union(*uncleared), certain=certain)
        explanations = (_explain(sums, size) for size in range(2, MAX_ATTACKERS + 1))
        return next((each for each in explanations if each is not None), several)

    def parts(
        self, cohort: Sequence[int], sizes: Iterable[int], draw: np.random.Generator
    ) -> tuple[list[list[int]], str]:
        """Return the parts in which a cohort is summed, and in words why it is whole where the search needs parts.

        Suspects are in the first part, with as few others as a sum allows.

        Args:
          cohort: nodes of the round.
          sizes: numbers of nodes, ascending, that can form a sum and are fewer than the cohort.
          draw: an unpredictable random source.
        """
        if self.untrue < SPLIT_AFTER:
            return [list(cohort)], ""
        min_size = next((size for size in sizes if size > self.declined), 0)
        suspects = [node for node in cohort if node in self.suspected]
        others = [cohort[at] for at in draw.permutation(len(cohort)) if cohort[at] not in self.suspected]
        culprits = self.culprits
        others.sort(key=culprits.possible.__contains__)  # `_divide` spreads the candidates, which come last
        num_companions = max(min_size - len(suspects), 0) if suspects else 0
        companions, rest = others[:num_companions], others[num_companions:]
        # Without suspects, the rest is divided at least in two.
        needed = min_size if suspects else 2 * min_size
        if not min_size or len(rest) < needed:
            cap = f"members decline sums of {self.declined}" if self.declined else "secagg.collusion, dropout"
            reason = f"members that corrupt sums cannot be found: halves of {len(cohort)} members are too small ({cap})"
            return [list(cohort)], f"{reason}; enlarge the cohort"
        first_part = [sorted([*suspects, *companions])] if suspects else []
        count = 2 * culprits.min_attackers if culprits.possible or not suspects else 1
        return [*first_part, *_divide(rest, min(count, len(rest) // min_size))], ""

    def next_state(self, row: int, sums: Sequence[WeighedSum], in_parts: bool) -> Search:
        """Return the state after a round.

        Args:
          row: of the round's sum.
          sums: that the server weighed, whole cohorts or their parts.
          in_parts: whether the cohort was split.
        """
        untrue = [frozenset(each.nodes) for each in sums if each.violation]
        if not self.untrue and not untrue:
            return self
        in_true = frozenset(node for each in sums if not each.violation for node in each.nodes)
        state = replace(self, cleared=self.cleared | in_true)
        if untrue:
            return state._after_untrue_sums(row, untrue, in_true)
        return state._after_calm_round() if in_parts and sums else state

    def _after_calm_round(self) -> Search:
        """Return the state after a round in parts without an untrue sum; after enough of them cohorts are whole again."""
        if self.calm + 1 < self.patience:
            return replace(self, calm=self.calm + 1)
        return Search(SPLIT_AFTER - 1, self.untrue_sums, patience=2 * self.patience, declined=self.declined)

    def _after_untrue_sums(self, row: int, sums: Sequence[frozenset[int]], in_true: frozenset[int]) -> Search:
        """Return the state after a round with untrue sums of these nodes, and true ones of the nodes `in_true`."""
        state = replace(self, untrue=self.untrue + 1, calm=0)
        new_sums = tuple((row, nodes) for nodes in sums if self.suspected.keys().isdisjoint(nodes))
        if not new_sums:
            return state
        suspected = {node: reason for node, reason in self.suspected.items() if node not in in_true}
        state = replace(state, untrue_sums=self.untrue_sums + new_sums, suspected=suspected)
        if (
            not state.culprits.possible
        ):  # there are more attackers than assumed: forget the sums that nobody explains
            explained = (each for each in self.untrue_sums if not suspected.keys().isdisjoint(each[1]))
            state = replace(state, untrue_sums=(*explained, *new_sums), cleared=in_true)
        rounds = ", ".join(dict.fromkeys(str(round_number(row)) for row, _ in state.untrue_sums))
        reason = f"{SUSPECTED}: it is among the fewest members that explain those of rounds {rounds}"
        suspected |= dict.fromkeys(state.culprits.certain, reason)
        # A suspicion stays where a sum has no other suspect.
        explanations = [nodes & suspected.keys() for _, nodes in state.untrue_sums]
        needed = frozenset(node for nodes in explanations if len(nodes) == 1 for node in nodes)
        return replace(state, suspected={node: suspected[node] for node in suspected if node in needed})

    def for_members(self, members: frozenset[int]) -> Search:
        """Return the state for the remaining members: without sums that a removed member may have corrupted."""
        suspected = {node: reason for node, reason in self.suspected.items() if node in members}
        untrue_sums = tuple(each for each in self.untrue_sums if each[1] <= members)
        return replace(self, suspected=suspected, untrue_sums=untrue_sums, declined=0)


def _explain(sums: Sequence[frozenset[int]], size: int) -> Culprits | None:
    """Return the members of all sets of this size that hit each of these sums; None without one, or with too many.

    Args:
      sums: nodes of at least one untrue sum; no smaller set hits all of them.
      size: of a set, at least 1.
    """
    combinations = len(min(sums, key=len)) ** (size - 1)
    if combinations > MAX_COMBINATIONS or not (sets := list(_explanations(sums, size))):
        return None
    certain = (node_set | (last if len(last) == 1 else frozenset()) for node_set, last in sets)
    possible = frozenset.union(*(node_set | last for node_set, last in sets))
    return Culprits(possible, frozenset.intersection(*certain), size)


def _explanations(
    sums: Sequence[frozenset[int]], size: int
) -> Iterator[tuple[frozenset[int], frozenset[int]]]:
    """Yield all members but one of the sets that hit each of these sums, and the nodes that each complete the set."""
    if size == 1:
        if common := frozenset.intersection(*sums):
            yield frozenset(), common
        return
    for node in min(sums, key=len):
        for node_set, last in _explanations([nodes for nodes in sums if node not in nodes], size - 1):
            yield node_set | {node}, last


def _divide(nodes: Sequence[int], count: int) -> list[list[int]]:
    """Deal nodes into `count` parts of nearly equal size, from the last one on; each part gets some of the last ones."""
    parts: list[list[int]] = [[] for _ in range(count)]
    for index, node in enumerate(reversed(nodes)):
        parts[index % count].append(node)
    return [sorted(part) for part in parts]
