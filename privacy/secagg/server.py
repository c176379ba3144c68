"""Server's half of secure aggregation: replies in, messages out, one accumulator; no clock, socket or file.

It learns the survivors and their sum. See `client` for the protocol.
"""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from . import messages as wire
from .bindings import (
    Agreement,
    attempt_context,
    complaint_body,
    deal_body,
    deal_hash,
    reply_info,
    reveal_body,
    survivors_digest,
    void_pairs,
)
from .complaint import PROOF_BYTES
from .dealings import Dealings
from .encrypted_shares import check_lengths, cut
from .evidence import AttemptEvidence
from .hybrid import blocks_of, check_keys
from .masks import Vector, add_masks
from .refusal import Fault, Reason, Refused
from .reveals import Reveals, window
from .roster import Roster
from .suite import KEY_BYTES, agree, check_public, new_key, public_of, suite_of, unseal
from .transcript import HASH_BYTES, AttemptTerms, Profile, signs
from .unmask import Opening

Outgoing = dict[int, bytes]
_BY_SEED = (
    Fault.WRONG_COMMITMENT,
    Fault.WRONG_SEED,
    Fault.WRONG_SECRET,
)  # faults that a recovered seed proves


class Due(IntEnum):
    """Replies that the attempt waits for."""

    ADVERTS = 0
    SHARES = 1
    CHECKS = 2
    COMPLAINTS = 3
    VECTORS = 4
    CONFIRMATIONS = 5
    REVEALED = 6
    NOTHING = 7


@dataclass(frozen=True)
class OpenedSum:
    """Sum of the survivors' vectors, and the survivors.

    Attributes:
      total: modulo 2**bits, (d,).
      survivors: nodes in the sum, ascending.
      seeds: by survivor, what it opened of its vector's noise; none of those who did not answer in the end.
      further: by survivor, the parameter of its own noise, as it claims.
    """

    total: Vector
    survivors: tuple[int, ...]
    seeds: dict[int, bytes] = field(default_factory=dict[int, bytes])
    further: dict[int, int] = field(default_factory=dict[int, int])


@dataclass(frozen=True)
class Abandoned:
    """Attempt without a release, and the reason."""

    reason: Reason


class ServerAttempt:
    """One attempt to sum one vector of every node in a cohort.

    Send what `proposal` and `advance` return, pass every reply to `take`, and call `advance` when `waiting` is empty or
    time is up. A next attempt's messages may be sent together with these, each as a separate message.

    Attributes:
      due: the replies that it waits for.
      declined: by node, its reason to stop, if given.
      blamed: by node, its provable violation of the protocol.
    """

    def __init__(
        self,
        terms: AttemptTerms,
        roster: Roster,
        candidates: Sequence[int],
        dimension: int,
        now: int,
        colluders: int = 0,
    ) -> None:
        """Prepare an attempt.

        Args:
          terms: with `cohort_size` candidates, under this roster.
          roster: of the members.
          candidates: nodes to ask.
          dimension: coordinates of the vector, d >= 1.
          now: Unix seconds, against which members expire.
          colluders: most nodes assumed to lie together. In a hybrid suite, which proves no complaint, more accusers
            than these convict a dealer; of shares that are combined at once as many may be wrong.
        """
        self._colluders = colluders
        self._terms, self._roster, self._now = terms, roster, now
        self._candidates = tuple(sorted(candidates))
        self._suite = suite_of(terms.suite)
        self._key = new_key()
        self.context = attempt_context(terms, self._candidates, public_of(self._key))
        self._total = np.zeros(dimension, f"<u{terms.bits // 8}")  # of the masked vectors so far
        self.due, self._awaited = Due.ADVERTS, frozenset(self._candidates)
        self._answered: set[int] = set()  # those awaited whose valid reply has come
        self.declined: dict[int, Reason] = {}
        self.blamed: dict[int, Fault] = {}
        self._evidence: AttemptEvidence | None = None  # kept when the messages are freed
        self._about: dict[int, int] = {}  # by blamed node, the owner of the seed that proves its fault
        self._revealed: dict[int, wire.Revealed] = {}  # whole, for the evidence
        self._model_hash = b""  # empty until the inboxes are sent
        # Replies by node, in the order of the exchanges, and what is taken from them.
        self._adverts: dict[int, wire.Advert] = {}
        self._reply_keys: dict[int, bytes] = {}  # each shared with its node
        self._deals: dict[int, wire.SealedShares] = {}
        self._accused: dict[int, tuple[int, ...]] = {}  # dealers by holder
        self._complaints: dict[int, wire.Complaints] = {}
        self._offered: dict[int, dict[int, bytes]] = {}  # hybrid blocks by dealer and holder
        self._confirmations: dict[int, wire.Confirmation] = {}
        self._shares: dict[int, dict[int, bytes]] = {}  # revealed, by holder and owner
        self._mask_keys: dict[int, dict[int, bytes]] = {}  # revealed, by dropout and survivor
        self._seeds: dict[int, bytes] = {}  # of excess noise, by survivor
        self._further: dict[int, int] = {}  # by node, the parameter of its own noise, as it claims
        # The cohort as it is fixed, first by the adverts: who shared and stays, whose vectors came, who dropped out.
        self._agreed = Agreement(terms, self.context, self._candidates, ())
        self._dealings = Dealings(self._agreed, {})
        self._sharers: tuple[int, ...] = ()
        self._sharer_set: frozenset[int] = frozenset()  # `_sharers` as a set
        self._alive: tuple[int, ...] = ()
        self._alive_set: frozenset[int] = frozenset()  # `_alive` as a set
        self._dead: tuple[int, ...] = ()
        self._round = self._view = b""  # context of the round, digest of its survivors

    @property
    def waiting(self) -> frozenset[int]:
        """Nodes whose reply to the last message is still to come."""
        return self._awaited - self._answered - self.declined.keys()

    @property
    def alive(self) -> tuple[int, ...]:
        """Nodes whose vectors are in the sum, ascending; none before the vectors are complete."""
        return self._alive

    def has(self, count: int) -> bool:
        """Return whether `count` nodes have answered validly; of the reveals, first drop those with wrong shares."""
        if self.due is Due.REVEALED and len(self._answered) >= count:
            self._open_seeds()  # drops answers with wrong shares
        return len(self._answered) >= count

    def proposal(self) -> Outgoing:
        """Return the first message of every node."""
        message = wire.write(wire.Proposal(self._terms, self._candidates, public_of(self._key)))
        return dict.fromkeys(self._candidates, message)

    def take(self, node: int, reply: bytes) -> None:
        """Process one node's reply. A refused reply changes nothing: the node may still send a valid one.

        Args:
          node: that replied.
          reply: unverified bytes.

        Raises:
          Refused: with the reason by name.
        """
        if node not in self._awaited or node in self.declined:
            raise Refused(Reason.OUT_OF_ORDER, "nothing is asked of this node")
        if len(reply) <= wire.DECLINED_BYTES:
            self.declined[node] = Reason(wire.read(reply, wire.Declined).reason)
            return
        if node in self._answered:
            raise Refused(Reason.REPLAY, "this node has answered already")
        if self.due is Due.ADVERTS:
            self._take_advert(node, wire.read(reply, wire.Advert))
        elif self.due is Due.VECTORS:
            self._take_vector(node, reply)
        else:
            body = reply[: -wire.SEAL_BYTES]
            self._unseal(node, reply[-wire.SEAL_BYTES :], memoryview(body))
            self._take_tagged(node, body)
        self._answered.add(node)

    def _take_tagged(self, node: int, body: bytes) -> None:
        """Process a reply whose tag is valid."""
        if self.due is Due.SHARES:
            self._take_shares(node, wire.read(body, wire.SealedShares))
        elif self.due is Due.CHECKS:
            self._take_check(node, wire.read(body, wire.Checked))
        elif self.due is Due.COMPLAINTS:
            self._take_complaints(node, wire.read(body, wire.Complaints))
        elif self.due is Due.CONFIRMATIONS:
            self._take_confirmation(node, wire.read(body, wire.Confirmation))
        else:
            self._take_revealed(node, wire.read(body, wire.Revealed))

    def _unseal(self, node: int, sealed: bytes, body: memoryview) -> bytes:
        """Check the tag that ends a node's reply, and return what it encrypts; `body` is the rest of the reply."""
        try:
            return unseal(self._suite, self._reply_keys[node], sealed, body)
        except Refused as refused:
            raise Refused(Reason.BAD_SIGNATURE, "not what this node sent in this attempt") from refused

    def _require_signed(self, node: int, context: bytes, body: bytes, signature: bytes) -> None:
        self._roster.member(node, self._now).check(self._suite, context, body, signature)

    def _take_advert(self, node: int, advert: wire.Advert) -> None:
        if advert.node != node:
            raise Refused(Reason.UNKNOWN_MEMBER, "an advert of another node")
        if len(advert.kem_keys) != self._suite.kem_key_bytes:
            raise Refused(Reason.MALFORMED, "an advert without the keys of its suite, or with others")
        # A key with which no key can be agreed would stop every honest neighbour.
        check_public(advert.mask_key)
        check_public(advert.share_key)
        if self._suite.hybrid:
            check_keys(advert.kem_keys)
        self._require_signed(node, self.context, advert.body, advert.signature)
        self._reply_keys[node] = agree(self._key, advert.share_key, reply_info(self.context))
        self._adverts[node] = advert

    def _take_shares(self, node: int, shares: wire.SealedShares) -> None:
        if shares.cohort != self._agreed.cohort:
            raise Refused(Reason.WRONG_COHORT, "shares for other adverts than these")
        check_lengths(self._agreed, node, shares)
        # Blame for a deal, or for a complaint about it, rests on the dealer's signature.
        self._require_signed(node, self._agreed.cohort, deal_body(node, shares), shares.signature)
        self._offered[node] = blocks_of(self._agreed, node, shares.kem)
        self._deals[node] = shares

    def _take_check(self, node: int, reply: wire.Checked) -> None:
        dealers = self._agreed.neighbours(node, self._sharer_set)
        if reply.cohort != self._agreed.cohort or not set(reply.accused) <= set(dealers):
            raise Refused(Reason.WRONG_COHORT, "a check of other shares than these")
        if reply.accused:
            self._accused[node] = reply.accused

    def _take_complaints(self, node: int, reply: wire.Complaints) -> None:
        if reply.cohort != self._agreed.cohort or not set(reply.accused) <= set(self._accused[node]):
            raise Refused(Reason.WRONG_COHORT, "a complaint of another deal")
        if len(reply.proofs) != PROOF_BYTES * len(reply.accused):
            raise Refused(Reason.MALFORMED, "not one proof for each complaint")
        signatures = cut(reply.signatures, self._suite.signature_bytes)
        if len(signatures) != len(reply.accused):
            raise Refused(Reason.MALFORMED, "not one signature for each complaint")
        proofs = cut(reply.proofs, PROOF_BYTES)
        for dealer, proof, signature in zip(reply.accused, proofs, signatures, strict=True):
            body = complaint_body(node, dealer, deal_hash(dealer, self._deals[dealer]), proof)
            self._require_signed(node, self._agreed.cohort, body, signature)
        self._complaints[node] = reply

    def _take_vector(self, node: int, frame: bytes) -> None:
        if len(frame) != self._total.nbytes + HASH_BYTES + wire.FURTHER_BYTES + wire.SEAL_BYTES:
            raise Refused(Reason.MALFORMED, "a masked vector of another length")
        trailer = self._unseal(node, frame[self._total.nbytes :], memoryview(frame)[: self._total.nbytes])
        if trailer[:HASH_BYTES] != self._round:
            raise Refused(Reason.WRONG_COHORT, "masked for another round: other nodes, or another model")
        words = np.frombuffer(frame, self._total.dtype, self._total.size)
        np.add(self._total, words, out=self._total)
        self._further[node] = int.from_bytes(trailer[HASH_BYTES:], "big")

    def _take_confirmation(self, node: int, reply: wire.Confirmation) -> None:
        if reply.node != node:
            raise Refused(Reason.UNKNOWN_MEMBER, "a confirmation of another node")
        self._require_signed(node, self.context, reply.body, reply.signature)
        if (reply.round_context, reply.survivors) != (self._round, self._view):
            raise Refused(Reason.SPLIT_VIEW, "a confirmation of another round or other survivors")
        self._confirmations[node] = reply

    def _take_revealed(self, node: int, revealed: wire.Revealed) -> None:
        if revealed.survivors != self._view:
            raise Refused(Reason.SPLIT_VIEW, "shares for other survivors")
        peers = self._agreed.neighbours(node, self._sharer_set)
        dead = [peer for peer in peers if peer not in self._alive_set]
        due = wire.SHARE_BYTES * len(peers), KEY_BYTES * len(dead)
        if (len(revealed.shares), len(revealed.mask_keys)) != due:
            raise Refused(Reason.MALFORMED, "not one share for each neighbour, and one key for each dead one")
        if signs(self._terms):  # else nobody could be named for it
            body = reveal_body(node, revealed, self._acceptance(node))
            self._require_signed(node, self.context, body, revealed.signature)
        if self.blamed.get(node) is Fault.WRONG_SHARE:
            raise Refused(Reason.BAD_SHARE, "this node has revealed wrong shares before")
        shares = dict(zip(peers, cut(revealed.shares, wire.SHARE_BYTES), strict=True))
        valid = {peer: share for peer, share in shares.items() if (peer, node) not in self._dealings.void}
        if not all(map(any, valid.values())):  # zeros stand for a share that the node does not have
            raise Refused(Reason.BAD_SHARE, "no share of a node whose deal it accepted")
        # Mask keys stay even if the node's shares are wrong: if a dropout dealt another seed, no other node knows them.
        for peer, key in zip(dead, cut(revealed.mask_keys, KEY_BYTES), strict=True):
            self._mask_keys[peer][node] = key
        self._shares[node], self._revealed[node] = valid, revealed
        self._seeds[node] = revealed.seeds

    def _open_seeds(self) -> dict[int, bytes]:
        """Return the seeds that the reveals open, by owner; drop the reveals of nodes with a wrong share, and blame these."""
        seeds, blamed = Reveals(self._dealings, self._alive_set, self._shares, self._colluders).opened()
        for node, fault in blamed.items():
            wrong = fault is Fault.WRONG_SHARE
            self._blame(node, fault, self._wrong_owner(node) if wrong else node)
            if wrong:
                self._answered.discard(node)
                del self._shares[node], self._seeds[node]
        return seeds

    def _wrong_owner(self, holder: int) -> int:
        """Return the owner of the first wrong share of a holder's reveal, which is known to have one."""

        def good(owner: int, share: bytes) -> bool:
            return self._dealings.matches_deal(owner, holder, share, private=owner in self._alive_set)

        return next(owner for owner, share in self._shares[holder].items() if not good(owner, share))

    def _blame(self, node: int, fault: Fault, about: int) -> None:
        """Blame a node for a fault that the seed of `about` proves; a blame for wrong shares stays, as it bars the node."""
        if self.blamed.get(node) is not Fault.WRONG_SHARE:
            self.blamed[node], self._about[node] = fault, about

    def _acceptance(self, node: int) -> bytes:
        """Return the `acceptance` that a node's reveal must be signed with, as `reveal_body` says."""
        peers = self._agreed.neighbours(node, self._sharer_set)
        return b"".join(
            self._dealings.acceptance(peer, node, self._offered[peer].get(node, b"")) for peer in peers
        )

    @property
    def evidence(self) -> AttemptEvidence | None:
        """Messages that prove the faults of the blamed nodes to anyone; None if nobody is blamed."""
        if not self.blamed or self._evidence is not None:
            return self._evidence
        by_seed = _BY_SEED if self._suite.hybrid else (*_BY_SEED, Fault.WRONG_MASK)
        owners = {self._about[node] for node, fault in self.blamed.items() if fault in by_seed}
        signers = [
            node for node, fault in self.blamed.items() if fault in (Fault.WRONG_SHARE, Fault.WRONG_MASK)
        ]
        accused = {dealer for complaint in self._complaints.values() for dealer in complaint.accused}
        dealers = (self.blamed.keys() | accused | owners | set(self._about.values())) & self._deals.keys()
        return AttemptEvidence(
            wire.Proposal(self._terms, self._candidates, public_of(self._key)),
            wire.CohortAdverts(self.context, self._agreed.adverts),
            {node: self._deals[node] for node in sorted(dealers)},
            self._complaints,
            wire.Survivors(self.context, self._alive, self._dead) if self._alive else None,
            self._model_hash,
            {owner: self._good_shares(owner) for owner in sorted(owners)},
            {node: self._revealed[node] for node in signers},
            {node: self._acceptance(node) for node in signers},
        )

    def _good_shares(self, owner: int) -> dict[int, bytes]:
        """Return the shares that gave a seed, by holder, each as it was dealt; other subsets may give another mask seed."""
        by_holder = {holder: shares[owner] for holder, shares in self._shares.items() if owner in shares}
        private, needed = owner in self._alive_set, self._terms.threshold
        good = [
            holder
            for holder in sorted(by_holder)
            if self._dealings.matches_deal(owner, holder, by_holder[holder], private=private)
        ]
        revealer = owner if owner in self._shares else None
        subset = window(good, revealer, needed) if len(good) >= needed else ()
        return {holder: by_holder[holder] for holder in subset}

    def advance(self, model_hash: bytes = b"") -> Outgoing | OpenedSum | Abandoned:
        """Close the exchange under way, and return the messages of the next one or how the attempt ended.

        Args:
          model_hash: of the round's model, 32 bytes; used in the step that sends the inboxes.
        """
        steps = {
            Due.ADVERTS: self._send_cohort,
            Due.SHARES: self._send_neighbour_shares,
            Due.CHECKS: lambda: self._settle(model_hash),
            Due.COMPLAINTS: lambda: self._judge(model_hash),
            Due.VECTORS: self._send_survivors,
            Due.CONFIRMATIONS: self._send_confirmed,
            Due.REVEALED: self._unmask,
        }
        try:
            return steps[self.due]()
        except Refused as refused:
            self._end()
            return Abandoned(refused.reason)

    def _ask(self, due: Due, messages: Outgoing) -> Outgoing:
        """Begin an exchange: return its messages, and wait for these replies to them."""
        self.due, self._awaited, self._answered = due, frozenset(messages), set()
        return messages

    def _end(self) -> None:
        """Keep the evidence, and free the memory of keys, deals and reveals."""
        self._evidence = self.evidence
        self._ask(Due.NOTHING, {})
        for store in (self._reply_keys, self._deals, self._offered, self._confirmations):
            store.clear()
        for store in (self._shares, self._mask_keys, self._revealed):
            store.clear()
        self._dealings = Dealings(self._agreed, {})

    def _send_cohort(self) -> Outgoing:
        adverts = tuple(self._adverts[node] for node in sorted(self._adverts))
        self._enough(len(adverts))
        self._agreed = Agreement(self._terms, self.context, self._candidates, adverts)
        message = wire.write(wire.CohortAdverts(self.context, adverts))
        return self._ask(Due.SHARES, dict.fromkeys(self._agreed.nodes, message))

    def _send_neighbour_shares(self) -> Outgoing:
        self._dealings = Dealings(self._agreed, dict(self._deals))
        self.blamed.update(dict.fromkeys(self._dealings.unproved(), Fault.BAD_DEAL))
        self._continue_with(self._deals.keys() - self.blamed.keys())
        parts = self._dealings.parts(self._offered, self._sharer_set)
        messages = {
            node: wire.write(wire.NeighbourShares(self.context, self._sharers, *map(bytes, parts.pop(node))))
            for node in self._sharers
        }
        return self._ask(Due.CHECKS, messages)

    def _continue_with(self, sharers: AbstractSet[int]) -> None:
        """Continue with these nodes, except those with too few holders of their seeds' shares."""
        self._sharer_set = self._connected(frozenset(sharers))
        self._sharers = tuple(sorted(self._sharer_set))
        self._enough(len(self._sharers))

    def _connected(self, sharers: frozenset[int]) -> frozenset[int]:
        """Return the largest subset in which a threshold of nodes holds shares of each node."""
        threshold = self._terms.threshold
        connected = frozenset(node for node in sharers if self._dealings.holders(node, sharers) >= threshold)
        return connected if connected == sharers else self._connected(connected)

    def _settle(self, model_hash: bytes) -> Outgoing:
        """Go on with the nodes that answered: request evidence for what is disputed or, if nothing is, vectors."""
        self._continue_with(self._answered)
        disputed = {node: self._disputes(node) for node in self._accused if node in self._sharer_set}
        messages = {
            node: wire.write(
                wire.Disputed(self.context, accused, tuple(self._deals[dealer] for dealer in accused))
            )
            for node, accused in disputed.items()
            if accused
        }
        return self._ask(Due.COMPLAINTS, messages) if messages else self._send_inboxes(model_hash)

    def _disputes(self, node: int) -> tuple[int, ...]:
        """Return the dealers that a node accuses and that are not blamed yet."""
        return tuple(dealer for dealer in self._accused[node] if dealer not in self.blamed)

    def _count_complaints(self) -> None:
        """In a hybrid suite blame dealers with more accusers than may lie; void the masks of all pairs in dispute."""
        pairs = [(dealer, node) for node, claim in self._complaints.items() for dealer in claim.accused]
        for dealer, _ in pairs:
            if sum(each == dealer for each, _ in pairs) > self._colluders:
                self.blamed[dealer] = Fault.BAD_DEAL
        self._dealings.void.update(pairs)

    def _judge(self, model_hash: bytes) -> Outgoing:
        """Exclude the cheaters in disputes, and the nodes that did not answer in one."""
        if self._suite.hybrid:
            self._count_complaints()
        for node, complaints in () if self._suite.hybrid else self._complaints.items():
            for dealer, proof in zip(complaints.accused, cut(complaints.proofs, PROOF_BYTES), strict=True):
                if node not in self.blamed and dealer not in self.blamed:
                    liar, fault = self._dealings.verdict(node, dealer, proof)
                    self.blamed[liar] = fault
        self._sharer_set -= self._awaited - self._answered
        return self._send_inboxes(model_hash)

    def _send_inboxes(self, model_hash: bytes) -> Outgoing:
        self._continue_with(self._sharer_set - self.blamed.keys())
        void = void_pairs(self._complaints, self._sharer_set)
        self._round, self._model_hash = self._agreed.round(self._sharers, model_hash, void), model_hash
        void_entries = tuple(wire.Void(*pair, self._complaint(*pair)) for pair in void)
        message = wire.write(wire.Inbox(self.context, model_hash, self._sharers, void_entries))
        return self._ask(Due.VECTORS, dict.fromkeys(self._sharers, message))

    def _complaint(self, holder: int, dealer: int) -> bytes:
        """Return a holder's signature of its complaint about a dealer."""
        complaints = self._complaints[holder]
        return cut(complaints.signatures, self._suite.signature_bytes)[complaints.accused.index(dealer)]

    def _send_survivors(self) -> Outgoing:
        self._alive = tuple(sorted(self._answered))
        self._dead = tuple(node for node in self._sharers if node not in self._answered)
        self._alive_set = frozenset(self._alive)
        self._mask_keys = {node: {} for node in self._dead}
        self._enough(len(self._alive))
        self._view = survivors_digest(self._round, self._alive, self._dead)
        message = wire.write(wire.Survivors(self.context, self._alive, self._dead))
        confirms = self._terms.profile is Profile.MALICIOUS
        return self._ask(Due.CONFIRMATIONS if confirms else Due.REVEALED, dict.fromkeys(self._alive, message))

    def _send_confirmed(self) -> Outgoing:
        confirmations = tuple(self._confirmations[node] for node in sorted(self._confirmations))
        message = wire.write(wire.Confirmed(self.context, confirmations))
        return self._ask(Due.REVEALED, dict.fromkeys(sorted(self._confirmations), message))

    def _unmask(self) -> OpenedSum:
        """Recover the remaining masks, and return the sum without them; blame nodes even if this fails."""
        seeds, keys = self._open_seeds(), self._mask_keys
        opening = Opening(self._dealings, self._round, self._alive, self._dead, seeds, keys, self._offered)
        try:
            masks = list(opening.remaining_masks())
        finally:
            for node, fault in opening.blamed.items():
                self._blame(node, fault, opening.about[node])
        add_masks(self._total, masks, self._suite)
        self._end()
        return OpenedSum(self._total, self._alive, self._seeds, self._further)

    def _enough(self, count: int) -> None:
        if count < self._terms.minimum_survivors:
            raise Refused(Reason.TOO_FEW, f"{count} nodes of the {self._terms.minimum_survivors} needed")


def together(*attempts: Mapping[int, bytes]) -> dict[int, tuple[bytes, ...]]:
    """Return by node the messages that travel to it in one exchange, in order of the attempts they belong to.

    With the next attempt's proposal sent with the inboxes, and its cohort with the last message, a steady round takes
    three exchanges, or two if `SEMI_HONEST`. Once the keys of the next attempt are sent, it also replaces an abandoned
    one: a node joins no attempt before it.
    """
    nodes = sorted({node for messages in attempts for node in messages})
    return {node: tuple(messages[node] for messages in attempts if node in messages) for node in nodes}
