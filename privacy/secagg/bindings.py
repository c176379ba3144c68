"""Bindings that both sides of an attempt compute alike: contexts, neighbours, and key derivation labels."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property, lru_cache

from .graph import Ring, ring
from .messages import Advert, Complaints, Revealed, SealedShares
from .refusal import Reason, Refused
from .suite import Suite, derive, suite_of
from .transcript import AttemptTerms, Purpose, digest, frame, framed, round_context, setup_context


def attempt_context(terms: AttemptTerms, candidates: Sequence[int], server_key: bytes) -> bytes:
    """Return the hash of terms, candidates and server key in which adverts and replies count, 32 bytes."""
    return digest(Purpose.SETUP, setup_context(terms), server_key, *candidates)


def reply_info(context: bytes) -> bytes:
    """Return the derivation label of the key between a node and the server."""
    return frame(Purpose.REPLY, context)


def deal_body(node: int, shares: SealedShares) -> bytes:
    """Return the bytes of a deal that its dealer signs in the context of the cohort."""
    fields = shares.commitments, shares.proof, shares.seed
    return frame(Purpose.DEAL, node, shares.sealed, shares.kem, *fields)


def complaint_body(holder: int, dealer: int, deal_digest: bytes, proof: bytes) -> bytes:
    """Return the bytes of a complaint that its holder signs; arguments as of `Dealings.verdict` and `deal_hash`."""
    return frame(Purpose.DISPUTE, holder, dealer, deal_digest, proof)


def deal_hash(dealer: int, shares: SealedShares) -> bytes:
    """Return the hash of the signed bytes of a deal, 32 bytes, by which a complaint names the deal."""
    return hashlib.sha256(deal_body(dealer, shares)).digest()


def reveal_body(node: int, revealed: Revealed, acceptance: bytes) -> bytes:
    """Return the bytes of a reveal that its node signs in the attempt's context.

    Args:
      node: that reveals.
      revealed: its shares and keys.
      acceptance: `encrypted_shares.acceptance` of each neighbour that shared, ascending; zeros where the node accepted none.
    """
    fields = revealed.survivors, revealed.shares, revealed.mask_keys, revealed.seeds
    return frame(Purpose.REVEAL, node, *fields, acceptance)


@lru_cache(maxsize=16)  # every node of a process computes it of its own view, several times
def survivors_digest(context: bytes, alive: tuple[int, ...], dead: tuple[int, ...]) -> bytes:
    """Return the hash of one view of a round, 32 bytes.

    Args:
      context: of the round, 32 bytes.
      alive: nodes in the sum, ascending.
      dead: nodes that shared and are not in it, ascending.
    """
    return digest(Purpose.SURVIVORS, context, len(alive), *alive, *dead)


def void_pairs(
    complaints: Mapping[int, Complaints], sharers: AbstractSet[int]
) -> tuple[tuple[int, int], ...]:
    """Return the pairs of holder and dealer that add no mask together, as no complaint between them has a verdict.

    Args:
      complaints: by holder.
      sharers: nodes that stay. A complaint with a verdict has excluded one of its two, so this leaves its pair out.
    """
    pairs = ((holder, dealer) for holder, complaint in complaints.items() for dealer in complaint.accused)
    return tuple(sorted(pair for pair in pairs if {*pair} <= sharers))


def private_mask_key(seed: bytes, context: bytes) -> bytes:
    """Return the key of a node's private mask in the round of this context, 32 bytes."""
    return derive(seed, frame(Purpose.OWN_MASK, context))


def pair_mask_info(context: bytes) -> bytes:
    """Return the derivation label of a pairwise mask's key in a round."""
    return frame(Purpose.PAIR_MASK, context)


def mask_sign(node: int, peer: int) -> int:
    """Return the sign with which `node` adds the mask it has with `peer`, who adds it with the other sign."""
    return 1 if node < peer else -1


@dataclass(frozen=True)
class Agreement:
    """Cohort of an attempt, fixed by its adverts.

    Attributes:
      terms: of the attempt.
      context: of adverts and replies, 32 bytes.
      candidates: nodes that were asked, ascending.
      adverts: by ascending node.
    """

    terms: AttemptTerms
    context: bytes
    candidates: tuple[int, ...]
    adverts: tuple[Advert, ...]

    @cached_property
    def suite(self) -> Suite:
        """Primitives of the attempt."""
        return suite_of(self.terms.suite)

    def check_keys(self) -> None:
        """Check that every advert has the keys that the suite requires.

        Raises:
          Refused: MALFORMED.
        """
        if any(len(advert.kem_keys) != self.suite.kem_key_bytes for advert in self.adverts):
            raise Refused(Reason.MALFORMED, "an advert without the keys of its suite, or with others")

    @cached_property
    def nodes(self) -> tuple[int, ...]:
        """Nodes that advertised, ascending."""
        return tuple(advert.node for advert in self.adverts)

    @cached_property
    def by_node(self) -> dict[int, Advert]:
        """Adverts by node."""
        return {advert.node: advert for advert in self.adverts}

    @cached_property
    def points(self) -> dict[int, int]:
        """Point at which the shares of each node are values of the dealers' polynomials."""
        return {node: point for point, node in enumerate(self.nodes, 1)}

    @property
    def complete(self) -> bool:
        """Whether all nodes are neighbours of each other."""
        return self.terms.neighbours == len(self.candidates) - 1

    @cached_property
    def cohort(self) -> bytes:
        """Hash of all adverts and of the attempt: the context of shares, and the seed of the graph."""
        parts = (part for advert in self.adverts for part in (advert.body, advert.signature))
        return digest(Purpose.GRAPH, self.context, *parts)

    @cached_property
    def _ring(self) -> Ring:
        # Over all candidates: over those who advertised, a server could drop honest adverts and so raise the share
        # of colluders among a node's neighbours above what its policy assumes.
        return ring(self.candidates, self.terms.neighbours, self.cohort)

    @cached_property
    def _neighbours(self) -> dict[int, tuple[int, ...]]:
        """Cache of `neighbours` among all that advertised, by node."""
        return {}

    def neighbours(self, node: int, among: AbstractSet[int] | None = None) -> tuple[int, ...]:
        """Return the nodes that share masks with a node, ascending.

        Args:
          node: that advertised.
          among: restricts the result to these; None for all that advertised.
        """
        if node not in self._neighbours:
            peers = self.nodes if self.complete else self._ring.around(node)
            self._neighbours[node] = tuple(peer for peer in peers if peer != node and peer in self.by_node)
        full = self._neighbours[node]
        return full if among is None else tuple(peer for peer in full if peer in among)

    @cached_property
    def share_info(self) -> bytes:
        """Context that the keys of shares are derived for."""
        return frame(Purpose.SHARE, self.cohort)

    @cached_property
    def mask_info(self) -> bytes:
        """Context that the hybrid secrets of masks are derived for."""
        return frame(Purpose.PAIR_MASK, self.cohort)

    def share_label(self, sender: int, receiver: int, block: bytes = b"") -> bytes:
        """Return the associated data of a sealed pair of shares.

        Args:
          sender: dealer of the shares.
          receiver: holder of the shares.
          block: hybrid block sent with them, which the label authenticates; empty for none.
        """
        nodes = self._framed_nodes  # as `frame` has them
        return self.share_info + nodes[sender] + nodes[receiver] + (framed(block) if block else b"")

    @cached_property
    def _framed_nodes(self) -> dict[int, bytes]:
        return {node: framed(node) for node in self.nodes}

    def round(self, sharers: Sequence[int], model_hash: bytes, void: Iterable[tuple[int, int]] = ()) -> bytes:
        """Return the context of masks and confirmations, 32 bytes; arguments as of `transcript.round_context`."""
        return round_context(self.cohort, tuple(sharers), model_hash, tuple(void))


@dataclass(frozen=True, eq=False)
class _Adverts:
    """Adverts that are compared as objects, since to hash each of them would cost as much as to read them."""

    adverts: tuple[Advert, ...]

    def __hash__(self) -> int:
        return id(self.adverts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Adverts) and other.adverts is self.adverts


def agreement(
    terms: AttemptTerms, context: bytes, candidates: tuple[int, ...], adverts: tuple[Advert, ...]
) -> Agreement:
    """Return the cohort of an attempt, the same object for the same adverts; arguments as of `Agreement`."""
    return _agreement(terms, context, candidates, _Adverts(adverts))


@lru_cache(maxsize=4)  # a node has two attempts at most
def _agreement(
    terms: AttemptTerms, context: bytes, candidates: tuple[int, ...], adverts: _Adverts
) -> Agreement:
    return Agreement(terms, context, candidates, adverts.adverts)
