"""Reveals of a round: the recovered seeds, and the nodes that revealed wrong shares.

All shares of a seed are combined at once, with weights that are drawn after the shares arrived and that map every
polynomial of the threshold's degree to its value at zero (`shamir.opener`). If the result is the seed that its owner
committed to, or that of its mask key, every share of it is correct. Wrong ones would have to differ from the correct
ones by a polynomial of that degree which is zero at zero and at each honest holder's point, but it has fewer roots. For
any other wrong shares the result is the seed with probability at most 1 / p.

If the result differs, or so few have revealed that cheaters could fit a polynomial between the others, each share of
that seed is checked against its dealer's commitment. A node that revealed a wrong share is named, and the shares of the
others give the seed.
"""

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from .dealings import Dealings
from .refusal import Fault
from .shamir import PRIME, SECRET_BYTES, Weights, combine, inverses, opener, weights_at
from .suite import key_from_seed, public_of


@dataclass(frozen=True)
class Reveals:
    """Shares that survivors revealed, not yet verified.

    Attributes:
      dealings: of the cohort.
      living: nodes whose vectors are in the sum.
      shares: by holder and owner, 32 bytes: of the private seed of the living, of the mask seed of others.
      liars: most holders assumed to lie together; without a threshold of others each share is checked by itself.
    """

    dealings: Dealings
    living: frozenset[int]
    shares: Mapping[int, Mapping[int, bytes]]
    liars: int
    _weights: dict[tuple[int, ...], Weights] = field(
        default_factory=dict[tuple[int, ...], Weights], init=False, repr=False
    )

    def opened(self) -> tuple[dict[int, bytes], dict[int, Fault]]:
        """Return the seeds by owner, where enough correct shares arrived, and the faults by node.

        The seed of a dropout is that of the shares it dealt: whether its mask key is of that seed, `Opening` checks.
        """
        seeds = dict[int, bytes]()
        if self.dealings.agreed.complete:  # on a ring each owner's weights would cost more than they save
            combined = {owner: self._combine_all(owner) for owner in self._by_owner}
            seeds = {owner: seed for owner, seed in combined.items() if seed is not None}
        doubtful = [owner for owner in self._by_owner if owner not in seeds]
        wrong = self._wrong(doubtful)
        blamed = dict.fromkeys(wrong, Fault.WRONG_SHARE)
        for owner in doubtful:
            right = {holder: share for holder, share in self._by_owner[owner].items() if holder not in wrong}
            if len(right) < self._threshold:
                continue
            seeds[owner] = self._combine_verified(owner, right)
            if owner in self.living and not self._fits(owner, seeds[owner]):
                blamed.setdefault(owner, Fault.WRONG_COMMITMENT)
        return seeds, blamed

    @property
    def _threshold(self) -> int:
        return self.dealings.agreed.terms.threshold

    @cached_property
    def _by_owner(self) -> dict[int, dict[int, bytes]]:
        """Shares by owner and ascending holder."""
        by_owner: dict[int, dict[int, bytes]] = {}
        for holder in sorted(self.shares):
            for owner, share in self.shares[holder].items():
                by_owner.setdefault(owner, {})[holder] = share
        return by_owner

    @cached_property
    def _inverse(self) -> dict[int, int]:
        """Inverse modulo p of each point."""
        points = list(self.dealings.agreed.points.values())
        return dict(zip(points, inverses(points), strict=True))

    def _combine_all(self, owner: int) -> bytes | None:
        """Return the seed of all its shares together; None if this does not prove them correct, see the module."""
        shares, by_node = self._by_owner[owner], self.dealings.agreed.points
        points, owner_point = [by_node[holder] for holder in shares], by_node[owner]
        numbers = [int.from_bytes(share, "big") for share in shares.values()]
        # An owner holds no share of its own. With its point, whose value `opener` ignores, all that revealed have the
        # same points, and so the same weights.
        if owner in self.shares:
            index = bisect_left(points, owner_point)
            points.insert(index, owner_point)
            numbers.insert(index, 0)
        if min(len(shares) - self.liars, len(points) - 1) < self._threshold or max(numbers) >= PRIME:
            return None
        sum_of_values, sum_by_points = self._weights_of(tuple(points)).sums(numbers)
        number = (sum_of_values - sum_by_points * self._inverse[owner_point]) % PRIME
        seed = number.to_bytes(SECRET_BYTES, "big")
        return seed if self._fits(owner, seed) else None

    def _weights_of(self, points: tuple[int, ...]) -> Weights:
        """Return random weights that open a seed from shares at these points; drawn once."""
        if points not in self._weights:
            self._weights[points] = weights_at(points, opener(points, self._threshold))
        return self._weights[points]

    def _fits(self, owner: int, seed: bytes) -> bool:
        """Return whether a seed is the one that its owner committed to or, of a dropout, that of its mask key."""
        if owner in self.living:
            return self.dealings.committed(owner, seed)
        return public_of(key_from_seed(seed)) == self.dealings.agreed.by_node[owner].mask_key

    def _wrong(self, owners: Iterable[int]) -> set[int]:
        """Return the nodes that revealed a share of these owners' seeds that was not dealt to them."""
        return {
            holder
            for owner in owners
            for holder, share in self._by_owner[owner].items()
            if not self.dealings.matches_deal(owner, holder, share, private=owner in self.living)
        }

    def _combine_verified(self, owner: int, shares: Mapping[int, bytes]) -> bytes:
        """Return the seed from individually verified shares, by holder, at least as many as the threshold."""
        points = self.dealings.agreed.points
        chosen = window(sorted(shares), owner if owner in self.shares else None, self._threshold)
        return combine({points[holder]: shares[holder] for holder in chosen}, self._threshold)


def window(holders: Sequence[int], owner: int | None, threshold: int) -> Sequence[int]:
    """Choose `threshold` holders whose shares give a seed; few different choices serve all owners of a complete graph.

    An owner holds no share of its own. So all nodes that revealed are cut into blocks as long as there are more of them
    than needed, and the block with the owner is left out.

    Args:
      holders: of a seed's shares, ascending.
      owner: the seed's owner, if it revealed shares itself.
      threshold: number of shares that give a seed.
    """
    if owner is None:
        return holders[-threshold:]
    revealers = sorted([*holders, owner])
    spare = len(revealers) - threshold
    first = revealers.index(owner) // spare * spare
    return [*revealers[:first], *revealers[first + spare :]][:threshold]
