"""What both sides of an attempt must compute alike: contexts, neighbours, and what keys are derived for."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property

from .graph import Ring, ring
from .messages import Advert, Confirmation
from .refusal import Reason, Refused
from .suite import Suite, derive, suite_of
from .transcript import AttemptTerms, Purpose, digest, frame, round_context, setup_context


def attempt_context(terms: AttemptTerms, candidates: Sequence[int], server_key: bytes) -> bytes:
    """Return the context of adverts and replies: the terms, who was asked, and by whom."""
    return digest(Purpose.SETUP, setup_context(terms), server_key, *candidates)


def reply_info(context: bytes) -> bytes:
    """Return what the key that a node and the server share is derived for."""
    return frame(Purpose.REPLY, context)


def commitment(context: bytes, node: int, own_seed: bytes) -> bytes:
    """Return what binds a node to its private seed, and tells nothing about 255 random bits."""
    return digest(Purpose.COMMITMENT, context, node, own_seed)


def advert_body(advert: Advert) -> bytes:
    """Return what the signature of an advert is over, beside the attempt's context."""
    return frame(
        Purpose.ADVERT, advert.node, advert.mask_key, advert.share_key, advert.commitment, advert.kem_keys
    )


def confirmation_body(confirmation: Confirmation) -> bytes:
    """Return what the signature of a confirmation is over, beside the attempt's context."""
    said = confirmation
    return frame(Purpose.SURVIVORS, said.node, said.model_hash, said.round_context, said.survivors)


def survivors_digest(context: bytes, alive: Sequence[int], dead: Sequence[int]) -> bytes:
    """Return the hash of one view of a round: who is in the sum, and who is not."""
    return digest(Purpose.SURVIVORS, context, len(alive), *alive, *dead)


def own_mask_key(seed: bytes, context: bytes) -> bytes:
    """Return the key of a node's private mask in a round."""
    return derive(seed, frame(Purpose.OWN_MASK, context))


def pair_mask_info(context: bytes) -> bytes:
    """Return what the key of a pairwise mask is derived for, in a round."""
    return frame(Purpose.PAIR_MASK, context)


def mask_sign(node: int, peer: int) -> int:
    """Return the sign with which `node` adds the mask it has with `peer`: the two cancel."""
    return 1 if node < peer else -1


@dataclass(frozen=True)
class Agreement:
    """An attempt's cohort as its adverts fix it, by ascending node."""

    terms: AttemptTerms
    context: bytes
    candidates: tuple[int, ...]
    adverts: tuple[Advert, ...]

    @cached_property
    def suite(self) -> Suite:
        return suite_of(self.terms.suite)

    def check_keys(self) -> None:
        """Return if every advert has the keys that the suite asks for.

        Raises:
          Refused: MALFORMED.
        """
        if any(len(advert.kem_keys) != self.suite.kem_key_bytes for advert in self.adverts):
            raise Refused(Reason.MALFORMED, "an advert without the keys of its suite, or with others")

    @cached_property
    def nodes(self) -> tuple[int, ...]:
        return tuple(advert.node for advert in self.adverts)

    @cached_property
    def by_node(self) -> dict[int, Advert]:
        return {advert.node: advert for advert in self.adverts}

    @cached_property
    def points(self) -> dict[int, int]:
        """At which point of the polynomial each node's shares lie."""
        return {node: place for place, node in enumerate(self.nodes, 1)}

    @cached_property
    def cohort(self) -> bytes:
        """The hash of all adverts and of the attempt: the context of shares, and the seed of the graph."""
        parts = (part for advert in self.adverts for part in (advert_body(advert), advert.signature))
        return digest(Purpose.GRAPH, self.context, *parts)

    @cached_property
    def _ring(self) -> Ring:
        # Over all candidates: were it over those who advertised, a server that loses honest adverts would
        # raise the share of colluders among a node's neighbours above what its policy reckons with.
        return ring(self.candidates, self.terms.neighbours, self.cohort)

    @cached_property
    def _known(self) -> dict[int, tuple[int, ...]]:
        return {}

    def neighbours(self, node: int, among: AbstractSet[int] | None = None) -> tuple[int, ...]:
        """Return with whom of those who advertised, or of those `among` them, `node` shares masks, ascending."""
        if node not in self._known:
            complete = self.terms.neighbours == len(self.candidates) - 1
            peers = self.nodes if complete else self._ring.around(node)
            self._known[node] = tuple(peer for peer in peers if peer != node and peer in self.by_node)
        known = self._known[node]
        return known if among is None else tuple(peer for peer in known if peer in among)

    @cached_property
    def share_info(self) -> bytes:
        return frame(Purpose.SHARE, self.cohort)

    def share_label(self, sender: int, receiver: int, block: bytes = b"") -> bytes:
        """Return the associated data of a sealed pair of shares: with the hybrid block beside it, which it vouches for."""
        return frame(Purpose.SHARE, self.cohort, sender, receiver, *([block] if block else []))

    def round(self, sharers: Sequence[int], model_hash: bytes) -> bytes:
        """Return the context of masks and confirmations."""
        return round_context(self.cohort, sharers, model_hash)
