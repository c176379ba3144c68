"""Node's half of secure aggregation: a pure state machine, message in, reply out; no clock, socket or file.

Double masking of Bonawitz et al. (CCS 2017), on the graphs of Bell et al. (CCS 2020), with one survivor set
for the whole cohort: a node opens nothing before more nodes signed the same set than could sign two.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, cast

import msgpack
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from .attempt import NodeAttempt, Stage, Work, check_adverts, masked, quorum, signers, tagged, unwitnessed
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
)
from .hybrid import blocks, mask_secret, mixed, offer, public_keys, share_secret
from .messages import (
    NODES,
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
    read_any,
    read_terms,
    unpack,
    write,
    write_terms,
)
from .policy import Policy, check
from .refusal import Reason, Refused
from .roster import Roster
from .shamir import new_secret, split
from .suite import KEY_BYTES, SUITES, agree, key_from_seed, public_of, seal, sign, suite_of, unseal
from .transcript import AttemptTerms, Profile, Purpose, frame

ToNode = CohortAdverts | Inbox | Survivors | Confirmed
LIVE_ATTEMPTS = 2  # the one that is summed, and the one whose keys travel ahead
OVER = NODES - 1  # at least any attempt's number; marks a round in which this node has opened a sum


@dataclass
class Participant:
    """One node: its identity, its policy, and what it remembers. Not for two threads at once.

    Attributes:
      node: its number.
      key: its Ed25519 identity.
      policy: what it asks of every attempt.
      roster: who may take part.
      seen: by run and round, the highest attempt it was asked to join, or `OVER`; of the last two rounds.
      attempts: those under way, by context.
    """

    node: int
    key: Ed25519PrivateKey = field(repr=False)
    policy: Policy
    roster: Roster
    seen: dict[int, dict[int, int]] = field(default_factory=dict[int, dict[int, int]])
    attempts: dict[bytes, NodeAttempt] = field(default_factory=dict[bytes, NodeAttempt], repr=False)

    def handle(self, message: bytes, now: int, work: Work | None = None) -> bytes:
        """Return the reply to one message of the server.

        A message out of its order changes nothing; any other that is refused ends its attempt. Where the node
        may stop, keep `write_state` before the reply leaves: one that forgot what it sent can be
        asked again, and two vectors under one mask give away their difference.

        Args:
          message: bytes as they came.
          now: Unix seconds, against which members expire.
          work: the node's share of the round, for the message that brings the model.

        Raises:
          Refused: with the reason by name. Only the reason may leave: see `declined`.
        """
        said = read_any(message)
        match said:
            case Proposal():
                return self._join(said, now)
            case CohortAdverts():
                return self._step(said, Stage.ADVERTISED, lambda attempt: self._share(attempt, said, now))
            case Inbox():
                return self._step(said, Stage.SHARED, lambda attempt: self._mask(attempt, said, work))
            case Survivors():
                return self._step(said, Stage.MASKED, lambda attempt: self._confirm(attempt, said))
            case Confirmed():
                return self._step(said, Stage.CONFIRMED, lambda attempt: self._open(attempt, said, now))
            case _:
                raise Refused(Reason.OUT_OF_ORDER, "a node's message, sent to a node")

    def forget(self) -> None:
        """End every attempt, as after a timeout."""
        for context in list(self.attempts):
            self._end(context)

    def _end(self, context: bytes) -> None:
        self.attempts.pop(context).erase()

    def _step(self, said: ToNode, due: Stage, act: Callable[[NodeAttempt], bytes]) -> bytes:
        attempt = self.attempts.get(said.context)
        if attempt is None:
            raise Refused(Reason.ERASED, "an attempt that this node does not hold, or holds no more")
        if attempt.stage is not due:
            raise Refused(
                Reason.OUT_OF_ORDER, f"this node has {attempt.stage.name.lower()} already, or not yet"
            )
        try:
            return act(attempt)
        except BaseException:
            self._end(said.context)
            raise

    def _join(self, proposal: Proposal, now: int) -> bytes:
        """0: hold the terms against the policy, and make the keys of this attempt."""
        terms, candidates = proposal.terms, proposal.candidates
        check(self.policy, terms)
        if (terms.roster_version, terms.roster_hash) != (self.roster.version, self.roster.hash):
            raise Refused(Reason.UNKNOWN_MEMBER, "the terms name another roster than this node's")
        if len(candidates) != terms.cohort_size or self.node not in candidates:
            raise Refused(Reason.WRONG_COHORT, "the cohort is not of the stated size, or without this node")
        for node in candidates:
            self.roster.member(node, now)
        self._once(terms)
        return self._advertise(terms, candidates, proposal.server_key)

    def _once(self, terms: AttemptTerms) -> None:
        """Let a node join each attempt once, no round that it opened, and none before the last round but one."""
        seen = self.seen.get(terms.run, {})
        if terms.attempt <= seen.get(terms.round, -1) or terms.round < max(seen, default=0) - 1:
            raise Refused(Reason.REPLAY, "this node was asked for this attempt, or a later one, before")
        newest = max([terms.round, *seen])
        kept = {number: last for number, last in seen.items() if number >= newest - 1}
        self.seen[terms.run] = kept | {terms.round: terms.attempt}

    def _advertise(self, terms: AttemptTerms, candidates: tuple[int, ...], server_key: bytes) -> bytes:
        context = attempt_context(terms, candidates, server_key)
        mask_seed, own_seed, share_seed = new_secret(), new_secret(), new_secret()
        secret = key_from_seed(share_seed, Purpose.SHARE_KEY)
        reply_key = agree(secret, server_key, reply_info(context))
        bound = commitment(context, self.node, own_seed)
        kem_keys = public_keys(share_seed, mask_seed) if suite_of(terms.suite).hybrid else b""
        unsigned = Advert(
            self.node, public_of(key_from_seed(mask_seed)), public_of(secret), bound, b"", kem_keys
        )
        advert = replace(unsigned, signature=sign(self.key, context, advert_body(unsigned)))
        for held, old in list(self.attempts.items()):
            if (old.terms.run, old.terms.round) == (terms.run, terms.round):
                self._end(held)
        while len(self.attempts) >= LIVE_ATTEMPTS:
            self._end(next(iter(self.attempts)))
        self.attempts[context] = NodeAttempt(
            terms, candidates, context, mask_seed, own_seed, share_seed, reply_key, (advert,)
        )
        return write(advert)

    def _share(self, attempt: NodeAttempt, cohort: CohortAdverts, now: int) -> bytes:
        """1: check the neighbours' keys, and give each a share of both seeds."""
        (own,) = attempt.adverts
        if own not in cohort.adverts or not {a.node for a in cohort.adverts} <= set(attempt.candidates):
            raise Refused(Reason.WRONG_COHORT, "this node's keys were changed, or a node was never proposed")
        attempt.adverts = cohort.adverts
        agreed = attempt.agreed
        agreed.check_keys()
        peers = agreed.neighbours(self.node)
        check_adverts(self.roster, attempt.context, [agreed.by_node[peer] for peer in peers], now)
        _enough(attempt.terms, agreed.nodes, peers)
        points = [agreed.points[peer] for peer in peers]
        threshold = attempt.terms.threshold
        pairs = zip(
            split(attempt.own_seed, threshold, points),
            split(attempt.mask_seed, threshold, points),
            strict=True,
        )
        secret = key_from_seed(attempt.share_seed, Purpose.SHARE_KEY)
        keys = [agree(secret, agreed.by_node[peer].share_key, agreed.share_info) for peer in peers]
        attempt.pair_keys, made = b"".join(keys), [b""] * len(peers)
        if agreed.suite.hybrid:
            offers = [offer(agreed, self.node, peer, attempt.mask_seed) for peer in peers]
            attempt.mask_secrets = b"".join(each.mask_secret for each in offers)
            keys = [
                mixed(key, each.share_secret, agreed.share_info)
                for key, each in zip(keys, offers, strict=True)
            ]
            made = [each.block for each in offers]
        sealed = bytearray()
        for peer, key, shares, block in zip(peers, keys, pairs, made, strict=True):
            sealed += seal(agreed.suite, key, b"".join(shares), agreed.share_label(self.node, peer, block))
        attempt.stage = Stage.SHARED
        return tagged(attempt, write(SealedShares(agreed.cohort, bytes(sealed), b"".join(made))))

    def _mask(self, attempt: NodeAttempt, inbox: Inbox, work: Work | None) -> bytes:
        """2: open the neighbours' shares, compute, and send the vector under all masks."""
        if work is None or work.model_hash != inbox.model_hash:
            raise Refused(Reason.WRONG_MODEL, "the model is not the one that the round is about")
        agreed = attempt.agreed
        if self.node not in inbox.sharers or not set(inbox.sharers) <= set(agreed.nodes):
            raise Refused(Reason.WRONG_COHORT, "who shared is not a part of who advertised, with this node")
        peers = agreed.neighbours(self.node, set(inbox.sharers))
        _enough(attempt.terms, inbox.sharers, peers)
        pairs = [(peer, self.node) for peer in peers] if agreed.suite.hybrid else []
        offered = dict(zip(peers, blocks(inbox.kem, pairs), strict=False))
        attempt.held = self._open_shares(attempt, agreed, peers, inbox.sealed, offered)
        attempt.sharers, attempt.model_hash = inbox.sharers, inbox.model_hash
        attempt.stage = Stage.MASKED
        context = agreed.round(inbox.sharers, inbox.model_hash)
        secret, info = key_from_seed(attempt.mask_seed), pair_mask_info(context)
        masks = [(own_mask_key(attempt.own_seed, context), 1)]
        for peer in peers:
            key = agree(secret, agreed.by_node[peer].mask_key, info)
            if agreed.suite.hybrid:
                key = mixed(key, self._mask_secret(attempt, agreed, peer, offered), info)
            masks.append((key, mask_sign(self.node, peer)))
        attempt.mask_secrets = b""
        vector, attempt.openings = work.vector(attempt.terms)
        return masked(attempt, vector, masks, context)

    def _mask_secret(
        self, attempt: NodeAttempt, agreed: Agreement, peer: int, offered: Mapping[int, bytes]
    ) -> bytes:
        if peer < self.node:
            return mask_secret(agreed, attempt.mask_seed, self.node, peer, {peer: {self.node: offered[peer]}})
        higher = [other for other in agreed.neighbours(self.node) if other > self.node]
        start = KEY_BYTES * bisect_left(higher, peer)
        return attempt.mask_secrets[start : start + KEY_BYTES]

    def _open_shares(
        self,
        attempt: NodeAttempt,
        agreed: Agreement,
        peers: Sequence[int],
        sealed: bytes,
        offered: Mapping[int, bytes],
    ) -> bytes:
        if len(sealed) != SEALED_BYTES * len(peers):
            raise Refused(Reason.MALFORMED, "not one sealed pair of shares for each neighbour")
        sealed_for, held = agreed.neighbours(self.node), bytearray()
        for place, peer in enumerate(peers):
            start = KEY_BYTES * bisect_left(sealed_for, peer)
            key = attempt.pair_keys[start : start + KEY_BYTES]
            if agreed.suite.hybrid:
                secret = share_secret(attempt.share_seed, offered[peer])
                key = mixed(key, secret, agreed.share_info)
            one = sealed[SEALED_BYTES * place : SEALED_BYTES * (place + 1)]
            label = agreed.share_label(peer, self.node, offered.get(peer, b""))
            held += unseal(agreed.suite, key, one, label)
        if len(held) != 2 * SHARE_BYTES * len(peers):
            raise Refused(Reason.BAD_SHARE, "a sealed pair of another length")
        attempt.pair_keys = attempt.share_seed = b""
        return bytes(held)

    def _confirm(self, attempt: NodeAttempt, sets: Survivors) -> bytes:
        """3a: hold the survivors against what this node knows, and sign them."""
        alive = set(sets.alive)
        if alive & set(sets.dead):
            raise Refused(
                Reason.ALIVE_AND_DEAD, "a node is said to be alive and dead: both its seeds would open"
            )
        if alive | set(sets.dead) != set(attempt.sharers) or self.node not in alive:
            raise Refused(Reason.WRONG_COHORT, "alive and dead are not who shared, or this node is not alive")
        agreed = attempt.agreed
        _enough(attempt.terms, sets.alive, agreed.neighbours(self.node, alive))
        attempt.alive = sets.alive
        if attempt.terms.profile is Profile.SEMI_HONEST:
            return self._reveal(attempt)
        attempt.stage = Stage.CONFIRMED
        context, seen = attempt.view
        unsigned = Confirmation(self.node, attempt.model_hash, context, seen, b"")
        signature = sign(self.key, attempt.context, confirmation_body(unsigned))
        return tagged(attempt, write(replace(unsigned, signature=signature)))

    def _open(self, attempt: NodeAttempt, proof: Confirmed, now: int) -> bytes:
        """3b: reveal shares once a quorum has signed what this node signed, and every survivor is who it says."""
        needed = quorum(attempt.terms, self.policy.collusion)
        signed = signers(self.roster, attempt, proof.confirmations, needed, now)
        check_adverts(self.roster, attempt.context, unwitnessed(self.node, attempt, signed), now)
        return self._reveal(attempt)

    def _reveal(self, attempt: NodeAttempt) -> bytes:
        _, view = attempt.view
        alive, shares = set(attempt.alive), bytearray()
        for place, peer in enumerate(attempt.agreed.neighbours(self.node, set(attempt.sharers))):
            start = SHARE_BYTES * (
                2 * place + (peer not in alive)
            )  # a pair holds a share of the own seed, then one of the mask seed
            shares += attempt.held[start : start + SHARE_BYTES]
        seeds = b"".join(seed for least, seed in attempt.openings if len(alive) >= least)
        reply = tagged(attempt, write(Revealed(view, bytes(shares), seeds)))
        self.seen.setdefault(attempt.terms.run, {})[attempt.terms.round] = OVER
        self._end(attempt.context)
        return reply


def declined(refused: Refused) -> bytes:
    """Return the only thing that leaves of a refusal: its reason."""
    return write(Declined(refused.reason.value))


def _enough(terms: AttemptTerms, nodes: Sequence[int], peers: Sequence[int]) -> None:
    if len(nodes) < terms.minimum_survivors or len(peers) < terms.threshold:
        raise Refused(Reason.TOO_FEW, "too few nodes are left to hide this one among them")


# --- what a node remembers between two messages, sealed under a key of its own

_STATE_FORMAT = 2
_STATE_SUITE = SUITES[1]  # whatever suite an attempt uses
_NODE_FIELDS = ("candidates", "sharers", "alive")


def write_state(participant: Participant, node_key: bytes) -> bytes:
    """Return the node's memory, sealed. Keep it durably before the reply it belongs to leaves.

    Args:
      participant: the node.
      node_key: 32 bytes that never leave the node: of a TPM, of the system's key ring, or of a file of mode 0600.
    """
    seen = [[run, *pair] for run, rounds in participant.seen.items() for pair in rounds.items()]
    attempts = [_plain(attempt) for attempt in participant.attempts.values()]
    body = cast(bytes, msgpack.packb([_STATE_FORMAT, seen, attempts]))
    return seal(_STATE_SUITE, node_key, body, frame(Purpose.STATE, participant.node))


def read_state(participant: Participant, data: bytes, node_key: bytes) -> None:
    """Give a fresh participant the memory that `write_state` sealed.

    Args:
      participant: the same node as then.
      data: what `write_state` returned.
      node_key: the key it was sealed with, 32 bytes.

    Raises:
      Refused: BAD_SHARE if it does not open under this key for this node; MALFORMED if another version
        wrote it.
    """
    row = unpack(unseal(_STATE_SUITE, node_key, data, frame(Purpose.STATE, participant.node)))
    try:
        written, seen, attempts = row
        rounds = [(int(run), int(number), int(attempt)) for run, number, attempt in seen]
        restored = [_attempt(fields_) for fields_ in attempts]
    except (TypeError, ValueError, KeyError) as error:
        raise Refused(Reason.MALFORMED, "a node's state of another version") from error
    if written != _STATE_FORMAT:
        raise Refused(Reason.MALFORMED, f"a node's state of format {written}")
    participant.seen = {}
    for run, number, attempt in rounds:
        participant.seen.setdefault(run, {})[number] = attempt
    participant.attempts = {attempt.context: attempt for attempt in restored}


def _plain(attempt: NodeAttempt) -> dict[str, Any]:
    row = {field.name: getattr(attempt, field.name) for field in fields(attempt)}
    row["terms"] = write_terms(attempt.terms)
    row["adverts"] = write(CohortAdverts(attempt.context, attempt.adverts))
    row["stage"] = int(attempt.stage)
    return row


def _attempt(row: dict[str, Any]) -> NodeAttempt:
    row["terms"] = read_terms(row["terms"])
    row["adverts"] = read(row["adverts"], CohortAdverts).adverts
    row["stage"] = Stage(row["stage"])
    row["openings"] = tuple((int(least), bytes(seed)) for least, seed in row["openings"])
    row |= {name: tuple(row[name]) for name in _NODE_FIELDS}
    return NodeAttempt(**row)
