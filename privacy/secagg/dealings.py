"""Deals of a cohort at the server: the message to each holder, the verdict in a dispute, the validity of reveals."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property

from .bindings import Agreement
from .complaint import on_curve, open_proof
from .deal import COMMITMENT_BYTES, Claim, claim_of, digest_of, fits, seed_commitment
from .encrypted_shares import acceptance, cut, encrypted_shares_of
from .messages import SEALED_BYTES, SHARE_BYTES, SealedShares
from .refusal import Fault, Refused
from .shamir import PRIME, Weights, codeword, parity, weights_at
from .suite import pair_key
from .transcript import HASH_BYTES

Parts = tuple[bytearray, bytearray, bytearray]  # `sealed`, `evidence` and `kem` of `NeighbourShares`


@dataclass(frozen=True)
class Dealings:
    """Deals of a cohort, not yet checked against any shares.

    Attributes:
      agreed: the cohort.
      deals: by dealer, of the lengths that the cohort requires.
      void: pairs of dealer and holder with no valid share and no mask between them; the fault is undecidable.
    """

    agreed: Agreement
    deals: Mapping[int, SealedShares]
    void: set[tuple[int, int]] = field(default_factory=set[tuple[int, int]])

    @cached_property
    def claims(self) -> dict[int, Claim]:
        """Claims by dealer."""
        cohort = self.agreed.cohort
        return {dealer: claim_of(cohort, dealer, digest) for dealer, digest in self.digests.items()}

    @cached_property
    def digests(self) -> dict[int, bytes]:
        """`digest_of` the commitments of each dealer."""
        return {dealer: digest_of(deal.commitments) for dealer, deal in self.deals.items()}

    @cached_property
    def commitments(self) -> dict[int, dict[int, bytes]]:
        """`COMMITMENT_BYTES` by dealer and holder."""
        return {n: self._by_holder(n, deal.commitments, COMMITMENT_BYTES) for n, deal in self.deals.items()}

    @cached_property
    def proofs(self) -> dict[int, dict[int, bytes]]:
        """Value of the dealer's proof at the holder's point, by dealer and holder."""
        return {n: self._by_holder(n, deal.proof, SHARE_BYTES) for n, deal in self.deals.items()}

    def _by_holder(self, dealer: int, data: bytes, size: int) -> dict[int, bytes]:
        return dict(zip(self.agreed.neighbours(dealer), cut(data, size), strict=True))

    def parts(self, offered: Mapping[int, Mapping[int, bytes]], sharers: frozenset[int]) -> dict[int, Parts]:
        """Return by sharer what its neighbours dealt to it, by ascending neighbour.

        Args:
          offered: hybrid blocks by dealer and holder; each dealer's are empty in a suite without ML-KEM.
          sharers: nodes that shared.
        """
        parts: dict[int, Parts] = {node: (bytearray(), bytearray(), bytearray()) for node in sorted(sharers)}
        for dealer in parts:
            deal, proof, blocks = self.deals[dealer], self.proofs[dealer], offered[dealer]
            digest = self.digests[dealer]
            sealed = cut(deal.sealed, SEALED_BYTES)
            for (holder, commitment), sealed_shares in zip(
                self.commitments[dealer].items(), sealed, strict=True
            ):
                if holder in parts:
                    shares, evidence, kem = parts[holder]
                    shares += sealed_shares
                    evidence += commitment + proof[holder] + digest
                    if blocks:
                        kem += blocks[holder]
        return parts

    def acceptance(self, dealer: int, holder: int, block: bytes) -> bytes:
        """Return the `encrypted_shares.acceptance` that a holder signs; zeros of a void pair, where it complained."""
        if (dealer, holder) in self.void:
            return bytes(HASH_BYTES)
        row = self.commitments[dealer][holder] + self.proofs[dealer][holder] + self.digests[dealer]
        return acceptance(row, block)

    def verdict(self, holder: int, dealer: int, proof: bytes) -> tuple[int, Fault]:
        """Return the cheater in a dispute, and its fault; the suite is one without ML-KEM.

        Args:
          holder: that complains.
          dealer: that is accused.
          proof: result of `complaint.disclose`; it opens the dealer's seal. If the shares in it are bad, the dealer
            cheated; if they are good, or the proof does not hold, the holder did.
        """
        holder_key, dealer_key = (self.agreed.by_node[node].share_key for node in (holder, dealer))
        if not on_curve(dealer_key):
            return dealer, Fault.BAD_DEAL
        try:
            secret = open_proof(proof, holder_key, dealer_key, self.agreed.cohort)
        except Refused:
            return holder, Fault.FALSE_COMPLAINT
        shares = encrypted_shares_of(self.agreed, dealer, holder, self.deals[dealer])
        try:
            shares.opened(self.agreed, pair_key(secret, holder_key, dealer_key, self.agreed.share_info))
        except Refused:
            return dealer, Fault.BAD_DEAL
        return holder, Fault.FALSE_COMPLAINT

    def holders(self, dealer: int, among: frozenset[int]) -> int:
        """Return how many of these nodes hold shares of the dealer's, with no complaint between the two."""
        peers = self.agreed.neighbours(dealer, among)
        if not self.void:  # as nearly always
            return len(peers)
        return sum(self.masked(dealer, peer) for peer in peers)

    def masked(self, node: int, peer: int) -> bool:
        """Return whether two neighbours have a mask: neither has complained of the other without a verdict."""
        return (node, peer) not in self.void and (peer, node) not in self.void

    def matches_deal(self, owner: int, holder: int, share: bytes, *, private: bool) -> bool:
        """Return whether a share is the one that was dealt to a holder.

        Args:
          owner: of the seed, which it dealt; a neighbour of the holder.
          holder: that reveals it.
          share: 32 bytes.
          private: whether it is of the private seed instead of the mask seed, whose deal has no proof.
        """
        value = int.from_bytes(self.proofs[owner][holder], "big") if private else None
        point = self.agreed.points[holder]
        return fits(self.claims[owner], point, share, value, self.commitments[owner][holder])

    def committed(self, owner: int, seed: bytes) -> bool:
        """Return whether a seed is the private seed that its owner committed to."""
        return seed_commitment(self.claims[owner].label, seed) == self.deals[owner].seed

    def unproved(self) -> Iterator[int]:
        """Yield the dealers whose proof is not on a polynomial of degree below the threshold; see `shamir.parity`."""
        agreed = self.agreed
        points = list(agreed.points.values())

        @cache
        def words(count: int) -> Mapping[int, int]:
            """Return a codeword that serves all sets of `count` points."""
            return codeword(points, count - agreed.terms.threshold - 1)

        common_weights = self._parity(agreed.nodes, words) if agreed.complete else None
        for dealer, proof in self.proofs.items():
            numbers = [int.from_bytes(value, "big") for value in proof.values()]
            holders = tuple(proof)
            # A dealer holds no share of its own: with its point as the x of `parity`, the value 0 does not count.
            index = bisect_left(holders, dealer)
            numbers.insert(index, 0)
            weights = common_weights or self._parity((*holders[:index], dealer, *holders[index:]), words)
            sum_of_values, sum_by_points = weights.sums(numbers)
            if (sum_by_points - sum_of_values * agreed.points[dealer]) % PRIME:
                yield dealer

    def _parity(self, nodes: Sequence[int], words: Callable[[int], Mapping[int, int]]) -> Weights:
        """Return the weights of `shamir.parity` at the points of these nodes, from the codeword for their number."""
        points = [self.agreed.points[node] for node in nodes]
        return weights_at(points, parity(points, words(len(points))))
