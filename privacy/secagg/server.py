"""Server's half of secure aggregation: replies in, messages out, one accumulator; no clock, socket or file.

It learns the sum of the survivors and who they are. See `client` for the protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from .bindings import (
    Agreement,
    advert_body,
    attempt_context,
    commitment,
    confirmation_body,
    mask_sign,
    own_mask_key,
    pair_mask_info,
    reply_info,
    survivors_digest,
)
from .hybrid import Offered, blocks, mask_secret, mixed
from .masks import Vector, add_masks
from .messages import (
    DECLINED_BYTES,
    SEAL_BYTES,
    SEALED_BYTES,
    SHARE_BYTES,
    Advert,
    CohortAdverts,
    Confirmation,
    Confirmed,
    Declined,
    Inbox,
    Proposal,
    Revealed,
    SealedShares,
    Survivors,
    read,
    write,
)
from .refusal import Reason, Refused
from .roster import Roster
from .shamir import combine
from .suite import agree, key_from_seed, new_key, public_of, suite_of, unseal, verify
from .transcript import HASH_BYTES, AttemptTerms, Profile

Outgoing = dict[int, bytes]
Shares = dict[int, dict[int, bytes]]  # by owner, and by the point of who holds it


class Due(IntEnum):
    """Replies that the attempt waits for."""

    ADVERTS = 0
    SHARES = 1
    VECTORS = 2
    CONFIRMATIONS = 3
    REVEALED = 4
    NOTHING = 5


@dataclass(frozen=True)
class OpenedSum:
    """Sum of the survivors' vectors, and who they are.

    Attributes:
      total: modulo 2**bits, (d,).
      survivors: nodes in the sum, ascending.
      seeds: by survivor, what it opened of its vector's noise; none of those who did not answer in the end.
    """

    total: Vector
    survivors: tuple[int, ...]
    seeds: dict[int, bytes] = field(default_factory=dict[int, bytes])


@dataclass(frozen=True)
class Abandoned:
    """Attempt that releases nothing, and why."""

    reason: Reason


class ServerAttempt:
    """One attempt to sum one vector of every node in a cohort.

    Send what `proposal` and `advance` return, hand every reply to `take`, and call `advance` when `waiting` is empty
    or patience ends. A next attempt's messages may travel beside these: each is a message of its own.

    Attributes:
      declined: by node, why it stopped, where it said so.
    """

    def __init__(
        self, terms: AttemptTerms, roster: Roster, candidates: Sequence[int], dimension: int, now: int
    ) -> None:
        """Prepare an attempt.

        Args:
          terms: with `cohort_size` candidates, under this roster.
          roster: who may take part.
          candidates: nodes to ask.
          dimension: coordinates of the vector, d >= 1.
          now: Unix seconds, against which members expire.
        """
        self._terms, self._roster, self._now = terms, roster, now
        self._candidates = tuple(sorted(candidates))
        self._suite = suite_of(terms.suite)
        self._key = new_key()
        self.context = attempt_context(terms, self._candidates, public_of(self._key))
        self._total = np.zeros(dimension, f"<u{terms.bits // 8}")
        self._due, self._asked = Due.ADVERTS, frozenset(self._candidates)
        self._answered: set[int] = set()
        self.declined: dict[int, Reason] = {}
        self._adverts: dict[int, Advert] = {}
        self._reply_keys: dict[int, bytes] = {}
        self._sealed: dict[int, bytes] = {}
        self._offered: dict[int, dict[int, bytes]] = {}
        self._confirmations: dict[int, Confirmation] = {}
        self._revealed: dict[int, bytes] = {}
        self._seeds: dict[int, bytes] = {}
        self._agreed = Agreement(terms, self.context, self._candidates, ())
        self._sharers: tuple[int, ...] = ()
        self._sharing: frozenset[int] = frozenset()
        self._alive: tuple[int, ...] = ()
        self._dead: tuple[int, ...] = ()
        self._round = self._view = b""

    @property
    def waiting(self) -> frozenset[int]:
        """Nodes whose reply to the last message is still to come."""
        return self._asked - self._answered - self.declined.keys()

    @property
    def answered(self) -> int:
        """Number of nodes that have answered the last message well."""
        return len(self._answered)

    def proposal(self) -> Outgoing:
        """Return the first message of every node."""
        message = write(Proposal(self._terms, self._candidates, public_of(self._key)))
        return dict.fromkeys(self._candidates, message)

    def take(self, node: int, reply: bytes) -> None:
        """Take one node's reply. One that is refused changes nothing: the node may still answer well.

        Args:
          node: who replied.
          reply: the bytes as they came.

        Raises:
          Refused: with the reason by name.
        """
        if node not in self._asked or node in self.declined:
            raise Refused(Reason.OUT_OF_ORDER, "nothing is asked of this node")
        if len(reply) <= DECLINED_BYTES:
            self.declined[node] = Reason(read(reply, Declined).reason)
            return
        if node in self._answered:
            raise Refused(Reason.REPLAY, "this node has answered already")
        if self._due is Due.ADVERTS:
            self._take_advert(node, read(reply, Advert))
        elif self._due is Due.VECTORS:
            self._take_vector(node, reply)
        else:
            body = reply[:-SEAL_BYTES]
            self._opened(node, reply[-SEAL_BYTES:], memoryview(body))
            if self._due is Due.SHARES:
                self._take_shares(node, read(body, SealedShares))
            elif self._due is Due.CONFIRMATIONS:
                self._take_confirmation(node, read(body, Confirmation))
            else:
                self._take_revealed(node, read(body, Revealed))
        self._answered.add(node)

    def _opened(self, node: int, sealed: bytes, body: memoryview) -> bytes:
        """Return what the node sealed behind the body of its reply."""
        try:
            return unseal(self._suite, self._reply_keys[node], sealed, body)
        except Refused as refused:
            raise Refused(Reason.BAD_SIGNATURE, "not what this node sent in this attempt") from refused

    def _take_advert(self, node: int, advert: Advert) -> None:
        if advert.node != node:
            raise Refused(Reason.UNKNOWN_MEMBER, "an advert of another node")
        if len(advert.kem_keys) != self._suite.kem_key_bytes:
            raise Refused(Reason.MALFORMED, "an advert without the keys of its suite, or with others")
        public = self._roster.member(node, self._now).public
        verify(public, self.context, advert_body(advert), advert.signature)
        self._reply_keys[node] = agree(self._key, advert.share_key, reply_info(self.context))
        self._adverts[node] = advert

    def _take_shares(self, node: int, shares: SealedShares) -> None:
        if shares.cohort != self._agreed.cohort:
            raise Refused(Reason.WRONG_COHORT, "shares for other adverts than these")
        if len(shares.sealed) != SEALED_BYTES * len(self._agreed.neighbours(node)):
            raise Refused(Reason.MALFORMED, "not one sealed pair of shares for each neighbour")
        peers = self._agreed.neighbours(node) if self._suite.hybrid else ()
        made = blocks(shares.kem, [(node, peer) for peer in peers])
        self._offered[node] = dict(zip(peers, made, strict=True))
        self._sealed[node] = shares.sealed

    def _take_vector(self, node: int, frame: bytes) -> None:
        if len(frame) != self._total.nbytes + HASH_BYTES + SEAL_BYTES:
            raise Refused(Reason.MALFORMED, "a masked vector of another length")
        context = self._opened(node, frame[self._total.nbytes :], memoryview(frame)[: self._total.nbytes])
        if context != self._round:
            raise Refused(Reason.WRONG_COHORT, "masked for another round: other nodes, or another model")
        words = np.frombuffer(frame, self._total.dtype, self._total.size)
        np.add(self._total, words, out=self._total)

    def _take_confirmation(self, node: int, said: Confirmation) -> None:
        if said.node != node:
            raise Refused(Reason.UNKNOWN_MEMBER, "a confirmation of another node")
        verify(
            self._roster.member(node, self._now).public, self.context, confirmation_body(said), said.signature
        )
        if (said.round_context, said.survivors) != (self._round, self._view):
            raise Refused(Reason.SPLIT_VIEW, "a confirmation of another round or other survivors")
        self._confirmations[node] = said

    def _take_revealed(self, node: int, revealed: Revealed) -> None:
        if revealed.survivors != self._view:
            raise Refused(Reason.SPLIT_VIEW, "shares for other survivors")
        if len(revealed.shares) != SHARE_BYTES * len(self._agreed.neighbours(node, self._sharing)):
            raise Refused(Reason.MALFORMED, "not one share for each neighbour")
        self._revealed[node] = revealed.shares
        self._seeds[node] = revealed.seeds

    def advance(self, model_hash: bytes = b"") -> Outgoing | OpenedSum | Abandoned:
        """Close the exchange under way, and return the messages of the next one or how the attempt ended.

        Args:
          model_hash: 32 bytes; needed where shares end and the model goes out, and only there.
        """
        steps = {
            Due.ADVERTS: self._send_cohort,
            Due.VECTORS: self._send_survivors,
            Due.CONFIRMATIONS: self._send_confirmed,
            Due.REVEALED: self._unmask,
        }
        try:
            if self._due is Due.SHARES:
                return self._send_inboxes(model_hash)
            return steps[self._due]()
        except Refused as refused:
            self._end()
            return Abandoned(refused.reason)

    def _ask(self, due: Due, messages: Outgoing) -> Outgoing:
        self._due, self._asked, self._answered = due, frozenset(messages), set()
        return messages

    def _end(self) -> None:
        self._ask(Due.NOTHING, {})
        for kept in (self._reply_keys, self._sealed, self._offered, self._revealed, self._confirmations):
            kept.clear()

    def _send_cohort(self) -> Outgoing:
        adverts = tuple(self._adverts[node] for node in sorted(self._adverts))
        self._enough(len(adverts))
        self._agreed = Agreement(self._terms, self.context, self._candidates, adverts)
        return self._ask(
            Due.SHARES, dict.fromkeys(self._agreed.nodes, write(CohortAdverts(self.context, adverts)))
        )

    def _send_inboxes(self, model_hash: bytes) -> Outgoing:
        self._sharing = self._connected(frozenset(self._sealed))
        self._sharers = tuple(sorted(self._sharing))
        self._enough(len(self._sharers))
        self._round = self._agreed.round(self._sharers, model_hash)
        parcels = self._parcels()
        inboxes = {
            node: write(Inbox(self.context, model_hash, self._sharers, *map(bytes, parcels.pop(node))))
            for node in self._sharers
        }
        return self._ask(Due.VECTORS, inboxes)

    def _connected(self, sharers: frozenset[int]) -> frozenset[int]:
        """Return the sharers, less those of whose seeds too few others hold shares."""
        least = self._terms.threshold
        kept = frozenset(node for node in sharers if len(self._agreed.neighbours(node, sharers)) >= least)
        return kept if kept == sharers else self._connected(kept)

    def _parcels(self) -> dict[int, tuple[bytearray, bytearray]]:
        """Return by node its neighbours' sealed shares and blocks for it, by ascending neighbour."""
        parcels = {node: (bytearray(), bytearray()) for node in self._sharers}
        for peer in self._sharers:
            sealed, offered = self._sealed.pop(peer), self._offered[peer]
            for place, node in enumerate(self._agreed.neighbours(peer)):
                if node in self._sharing:
                    parcel, kem = parcels[node]
                    parcel += sealed[SEALED_BYTES * place : SEALED_BYTES * (place + 1)]
                    kem += offered.get(node, b"")
        self._sealed.clear()
        return parcels

    def _send_survivors(self) -> Outgoing:
        self._alive = tuple(sorted(self._answered))
        self._dead = tuple(node for node in self._sharers if node not in self._answered)
        self._enough(len(self._alive))
        self._view = survivors_digest(self._round, self._alive, self._dead)
        message = write(Survivors(self.context, self._alive, self._dead))
        confirms = self._terms.profile is Profile.MALICIOUS
        return self._ask(Due.CONFIRMATIONS if confirms else Due.REVEALED, dict.fromkeys(self._alive, message))

    def _send_confirmed(self) -> Outgoing:
        confirmations = tuple(self._confirmations[node] for node in sorted(self._confirmations))
        message = write(Confirmed(self.context, confirmations))
        return self._ask(Due.REVEALED, dict.fromkeys(sorted(self._confirmations), message))

    def _unmask(self) -> OpenedSum:
        shares = _by_owner(self._agreed, self._sharers, self._revealed)
        masks = list(
            remaining_masks(self._agreed, self._alive, self._dead, shares, self._round, self._offered)
        )
        add_masks(self._total, masks, self._suite)
        self._end()
        return OpenedSum(self._total, self._alive, self._seeds)

    def _enough(self, count: int) -> None:
        if count < self._terms.minimum_survivors:
            raise Refused(Reason.TOO_FEW, f"{count} nodes of the {self._terms.minimum_survivors} needed")


def together(*attempts: Mapping[int, bytes]) -> dict[int, tuple[bytes, ...]]:
    """Return by node the messages that travel to it in one exchange, in order of the attempts they belong to.

    With the next attempt's proposal beside the inboxes, and its cohort beside the last message, a steady round takes
    three exchanges, or two if `SEMI_HONEST`. Once its keys are out the next attempt also stands in for one that was
    abandoned: a node joins none before it.
    """
    nodes = sorted({node for messages in attempts for node in messages})
    return {node: tuple(messages[node] for messages in attempts if node in messages) for node in nodes}


# --- masks that are left on the sum


def _by_owner(agreed: Agreement, sharers: Sequence[int], revealed: Mapping[int, bytes]) -> Shares:
    """Return each sharer's shares by the holder's point, from what every node revealed."""
    owners: Shares = {node: {} for node in sharers}
    for node, shares in revealed.items():
        for place, owner in enumerate(agreed.neighbours(node, owners.keys())):
            owners[owner][agreed.points[node]] = shares[SHARE_BYTES * place : SHARE_BYTES * (place + 1)]
    return owners


def remaining_masks(
    agreed: Agreement,
    alive: Sequence[int],
    dead: Sequence[int],
    shares: Shares,
    context: bytes,
    offered: Offered,
) -> Iterator[tuple[bytes, int]]:
    """Yield key and sign of every mask to add so that the sum of the living is bare.

    Args:
      agreed: the cohort.
      alive: survivors, ascending.
      dead: nodes that shared and are not in the sum, ascending.
      shares: by owner, and by the holder's point.
      context: of the round, 32 bytes.
      offered: hybrid blocks by sender and receiver.

    Raises:
      Refused: TOO_FEW shares of a seed, or BAD_SHARE where they do not give what its owner committed to.
    """
    revealed = {point for holders in shares.values() for point in holders}

    def seed(node: int, fits: Callable[[bytes], bool]) -> bytes:
        own = agreed.points[node]
        return _seed(shares[node], own if own in revealed else None, agreed.terms.threshold, fits)

    for node in alive:
        bound = agreed.by_node[node].commitment
        own_seed = seed(node, lambda s, n=node, b=bound: commitment(agreed.context, n, s) == b)
        yield own_mask_key(own_seed, context), -1
    info, living = pair_mask_info(context), set(alive)
    for node in dead:
        public = agreed.by_node[node].mask_key
        mask_seed = seed(node, lambda s, p=public: public_of(key_from_seed(s)) == p)
        secret = key_from_seed(mask_seed)
        for peer in agreed.neighbours(node, living):
            key = agree(secret, agreed.by_node[peer].mask_key, info)
            if agreed.suite.hybrid:
                key = mixed(key, mask_secret(agreed, mask_seed, node, peer, offered), info)
            yield key, mask_sign(node, peer)


def _seed(
    shares: Mapping[int, bytes], own: int | None, threshold: int, fits: Callable[[bytes], bool]
) -> bytes:
    """Return the seed that fits its owner's commitment; `own` is the owner's point, if it revealed shares itself."""
    if len(shares) < threshold:
        raise Refused(Reason.TOO_FEW, f"{len(shares)} shares of a seed, of the {threshold} needed")
    for window in _windows(sorted(shares), own, threshold):
        try:
            seed = combine({point: shares[point] for point in window}, threshold)
        except Refused:  # a share out of range
            continue
        if fits(seed):
            return seed
    raise Refused(Reason.BAD_SHARE, "the shares do not give what their owner committed to")


def _windows(points: Sequence[int], own: int | None, threshold: int) -> Iterator[Sequence[int]]:
    """Yield choices of `threshold` points, the first such that few choices serve all the owners of a complete graph.

    Nobody holds a share of itself: from the circle of everybody who revealed, its owner's block is left out. Any
    single wrong share is left out by one of the windows that follow.
    """
    circle = points if own is None else sorted([*points, own])
    spare = len(circle) - threshold
    first = circle.index(own) // spare * spare if own is not None else 0
    yield [*circle[:first], *circle[first + spare :]][:threshold]
    for start in range(0, len(points), max(1, len(points) - threshold)):
        yield [*points[start:], *points[:start]][:threshold]
