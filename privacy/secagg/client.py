"""Node's half of secure aggregation: a pure state machine, message in, reply out; no clock, socket or file.

Double masking of Bonawitz et al. (CCS 2017), on the graphs of Bell et al. (CCS 2020), with one survivor set for the
whole cohort: a node opens nothing before a quorum has signed the same set, so that no two sets can have a quorum.
"""

from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, cast

import msgpack
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from . import messages as wire
from .attempt import (
    NodeAttempt,
    Stage,
    Work,
    check_adverts,
    masked,
    quorum,
    signers,
    tag_reply,
    unchecked_adverts,
)
from .bindings import (
    Agreement,
    attempt_context,
    complaint_body,
    deal_body,
    deal_hash,
    mask_sign,
    pair_mask_info,
    private_mask_key,
    reply_info,
    reveal_body,
)
from .complaint import PROOF_BYTES, disclose
from .deal import deal
from .double_signature import sign_by
from .encrypted_shares import EncryptedShares, acceptance, cut, encrypted_shares_of, index_of
from .hybrid import blocks, fits_commitment, mask_secret, mixed, offer, public_keys, share_secret
from .policy import Policy, check
from .refusal import Reason, Refused
from .roster import Roster
from .shamir import new_secret
from .suite import KEY_BYTES, SUITES, Suite, agree, derive, key_from_seed, public_of, seal, suite_of, unseal
from .transcript import HASH_BYTES, AttemptTerms, Profile, Purpose, frame, signs

ToNode = (
    wire.CohortAdverts | wire.NeighbourShares | wire.Disputed | wire.Inbox | wire.Survivors | wire.Confirmed
)
LIVE_ATTEMPTS = 2  # the one that is summed, and the next round's, whose keys are exchanged in advance
# In the place of an attempt's number: this node has opened the round's sum, and joins no more.
OVER = wire.NODES - 1


@dataclass
class Participant:
    """One node: its identity, its policy, and its memory. Not thread-safe.

    Attributes:
      node: its number.
      key: its Ed25519 identity.
      policy: requirements on every attempt.
      roster: of the members.
      newest_attempts: by run and round, the highest attempt it was asked to join, or `OVER`; of the last two rounds.
      attempts: current attempts, by context.
      sign: as `double_signature.sign_by`; nodes that one process simulates may share `OwnSignatures`.
      agree: as `suite.agree`; they may share `PairKeys`.
    """

    node: int
    key: Ed25519PrivateKey = field(repr=False)
    policy: Policy
    roster: Roster
    newest_attempts: dict[int, dict[int, int]] = field(default_factory=dict[int, dict[int, int]])
    attempts: dict[bytes, NodeAttempt] = field(default_factory=dict[bytes, NodeAttempt], repr=False)
    sign: Callable[[Suite, Ed25519PrivateKey, bytes, bytes], bytes] = field(default=sign_by, repr=False)
    agree: Callable[[X25519PrivateKey, bytes, bytes, bytes], bytes] = field(default=agree, repr=False)

    def handle(self, message: bytes, now: int, work: Work | None = None) -> bytes:
        """Return the reply to one message of the server.

        A message out of order changes nothing; any other refused message ends its attempt. If the node may stop, store
        `write_state` before the reply is sent: a node that forgot its reply can be asked again, and two vectors under
        one mask reveal their difference.

        Args:
          message: unverified bytes.
          now: Unix seconds, against which members expire.
          work: the node's computation for the round, for the message with the model.

        Raises:
          Refused: with the reason by name. Only the reason may be sent: see `declined`.
        """
        read = wire.read_received(message)
        match read:
            case wire.Proposal():
                return self._join(read, now)
            case wire.CohortAdverts():
                return self._step(read, Stage.ADVERTISED, lambda attempt: self._share(attempt, read, now))
            case wire.NeighbourShares():
                return self._step(read, Stage.SHARED, lambda attempt: self._check(attempt, read))
            case wire.Disputed():
                return self._step(read, Stage.CHECKED, lambda attempt: self._complain(attempt, read, now))
            case wire.Inbox():
                return self._step(read, Stage.CHECKED, lambda attempt: self._mask(attempt, read, now, work))
            case wire.Survivors():
                return self._step(read, Stage.MASKED, lambda attempt: self._confirm(attempt, read))
            case wire.Confirmed():
                return self._step(read, Stage.CONFIRMED, lambda attempt: self._open(attempt, read, now))
            case _:
                raise Refused(Reason.OUT_OF_ORDER, "a node's message, sent to a node")

    def forget(self) -> None:
        """End every attempt, as after a timeout."""
        for context in list(self.attempts):
            self._end(context)

    def _end(self, context: bytes) -> None:
        self.attempts.pop(context).erase()

    def _step(self, message: ToNode, due: Stage, act: Callable[[NodeAttempt], bytes]) -> bytes:
        """Return what `act` replies, if the attempt is at the stage `due`; an error of `act` ends the attempt."""
        attempt = self.attempts.get(message.context)
        if attempt is None:
            raise Refused(Reason.ERASED, "an attempt that this node does not hold, or holds no more")
        if attempt.stage is not due:
            problem = f"this node has {attempt.stage.name.lower()} already, or not yet"
            raise Refused(Reason.OUT_OF_ORDER, problem)
        try:
            self._check_roster(attempt.terms)  # another may have come since the proposal
            return act(attempt)
        except BaseException:
            self._end(message.context)
            raise

    def _check_roster(self, terms: AttemptTerms) -> None:
        if (terms.roster_version, terms.roster_hash) != (self.roster.version, self.roster.hash):
            raise Refused(Reason.UNKNOWN_MEMBER, "the terms name another roster than this node's")

    def _require_enough(self, attempt: NodeAttempt, nodes: Sequence[int]) -> None:
        """Refuse a sum of too few nodes, or too few neighbours or owner's peers in no void pair with this node."""
        terms, hiding = attempt.terms, {*nodes} - attempt.bare(self.node)
        neighbours = attempt.agreed.neighbours(self.node, hiding)
        if len(nodes) < terms.minimum_survivors or len(neighbours) < terms.threshold:
            raise Refused(Reason.TOO_FEW, "too few nodes are left to hide this one among them")
        self._check_peers(hiding)

    def _check_peers(self, nodes: Collection[int]) -> list[int]:
        """Return the owner's peers among these nodes, none if its policy requires none; refuse too few."""
        min_peers = self.policy.peers_at_least
        peers = self.roster.holders(self.policy.peers, nodes) if min_peers else []
        peers = [node for node in peers if node != self.node]
        if len(peers) < min_peers:
            problem = f"peers_at_least={min_peers}: {len(peers)} of the owner's peers are left"
            raise Refused(Reason.POLICY, problem)
        return peers

    def _join(self, proposal: wire.Proposal, now: int) -> bytes:
        """0: check the terms against the policy, and make the keys of this attempt."""
        terms, candidates = proposal.terms, proposal.candidates
        check(self.policy, terms)
        self._check_roster(terms)
        if len(candidates) != terms.cohort_size or self.node not in candidates:
            raise Refused(Reason.WRONG_COHORT, "the cohort is not of the stated size, or without this node")
        self._check_peers(candidates)
        for node in candidates:
            self.roster.member(node, now)
        self._join_once(terms)
        return self._advertise(terms, candidates, proposal.server_key)

    def _join_once(self, terms: AttemptTerms) -> None:
        """Record an attempt; refuse it if it was recorded, or its round was opened, or comes before the last two."""
        rounds = self.newest_attempts.get(terms.run, {})
        if terms.attempt <= rounds.get(terms.round, -1) or terms.round < max(rounds, default=0) - 1:
            raise Refused(Reason.REPLAY, "this node was asked for this attempt, or a later one, before")
        newest = max([terms.round, *rounds])
        recent = {number: last for number, last in rounds.items() if number >= newest - 1}
        self.newest_attempts[terms.run] = recent | {terms.round: terms.attempt}

    def _advertise(self, terms: AttemptTerms, candidates: tuple[int, ...], server_key: bytes) -> bytes:
        """Begin an attempt with fresh keys, and return its advert; end others at the round, and the oldest of 3."""
        context = attempt_context(terms, candidates, server_key)
        mask_seed, private_seed, share_seed = new_secret(), new_secret(), new_secret()
        secret = key_from_seed(share_seed, Purpose.SHARE_KEY)
        reply_key = agree(secret, server_key, reply_info(context))
        kem_keys = public_keys(share_seed, mask_seed) if suite_of(terms.suite).hybrid else b""
        draft = wire.Advert(self.node, public_of(key_from_seed(mask_seed)), public_of(secret), b"", kem_keys)
        advert = replace(draft, signature=self.sign(suite_of(terms.suite), self.key, context, draft.body))
        for old_context, old in list(self.attempts.items()):
            if (old.terms.run, old.terms.round) == (terms.run, terms.round):
                self._end(old_context)
        while len(self.attempts) >= LIVE_ATTEMPTS:
            self._end(next(iter(self.attempts)))
        self.attempts[context] = NodeAttempt(
            terms, candidates, context, mask_seed, private_seed, share_seed, reply_key, (advert,)
        )
        return wire.write(advert)

    def _share(self, attempt: NodeAttempt, cohort: wire.CohortAdverts, now: int) -> bytes:
        """1: check the neighbours' keys, and give each a share of both seeds."""
        (advert,) = attempt.adverts
        if advert not in cohort.adverts or not {a.node for a in cohort.adverts} <= set(attempt.candidates):
            raise Refused(Reason.WRONG_COHORT, "this node's keys were changed, or a node was never proposed")
        attempt.adverts = cohort.adverts
        agreed = attempt.agreed
        agreed.check_keys()
        peers = agreed.neighbours(self.node)
        owners_peers = self._check_peers(agreed.nodes)  # counted only if they signed, not for their names
        check_adverts(self.roster, attempt, [agreed.by_node[peer] for peer in {*peers, *owners_peers}], now)
        self._require_enough(attempt, agreed.nodes)
        points = [agreed.points[peer] for peer in peers]
        threshold = attempt.terms.threshold
        ours = deal(agreed.cohort, self.node, attempt.own_seed, attempt.mask_seed, threshold, points)
        secret = key_from_seed(attempt.share_seed, Purpose.SHARE_KEY)
        keys = [
            self.agree(secret, agreed.by_node[peer].share_key, agreed.share_info, advert.share_key)
            for peer in peers
        ]
        attempt.pair_keys, kem = b"".join(keys), [b""] * len(peers)
        if agreed.suite.hybrid:
            offers = [offer(agreed, self.node, peer, attempt.mask_seed) for peer in peers]
            attempt.mask_secrets = b"".join(each.mask_secret for each in offers)
            keys = [
                mixed(key, each.share_secret, agreed.share_info)
                for key, each in zip(keys, offers, strict=True)
            ]
            kem = [each.block for each in offers]
        sealed = b"".join(
            seal(agreed.suite, key, shares, agreed.share_label(self.node, peer, block))
            for peer, key, shares, block in zip(peers, keys, ours.shares, kem, strict=True)
        )
        attempt.stage = Stage.SHARED
        unsigned = wire.SealedShares(
            agreed.cohort, sealed, ours.commitments, ours.proof, ours.seed, b"", b"".join(kem)
        )
        signature = self.sign(agreed.suite, self.key, agreed.cohort, deal_body(self.node, unsigned))
        attempt.dealt = deal_hash(self.node, unsigned)
        return tag_reply(attempt, wire.write(replace(unsigned, signature=signature)))

    def _check(self, attempt: NodeAttempt, message: wire.NeighbourShares) -> bytes:
        """2: open the neighbours' shares, verify each against its dealer's commitments, and report the invalid ones."""
        agreed = attempt.agreed
        if self.node not in message.sharers or not set(message.sharers) <= set(agreed.nodes):
            raise Refused(Reason.WRONG_COHORT, "who shared is not a part of who advertised, with this node")
        peers = agreed.neighbours(self.node, set(message.sharers))
        self._require_enough(attempt, message.sharers)
        # This node has made the mask secrets with its higher neighbours; those with lower ones are in their deals.
        higher = [peer for peer in agreed.neighbours(self.node) if peer > self.node]
        own_secrets = dict(zip(higher, cut(attempt.mask_secrets, KEY_BYTES), strict=False))
        no_secret = bytes(KEY_BYTES if agreed.suite.hybrid else 0)
        opened, accused = list[tuple[bytes, bytes, bytes]](), list[int]()
        for shares in _neighbour_shares(agreed, self.node, peers, message):
            secret = own_secrets.get(shares.dealer, no_secret)
            try:
                opened.append(self._open_shares(attempt, shares, secret))
            except Refused:
                opened.append((bytes(2 * wire.SHARE_BYTES), secret, bytes(HASH_BYTES)))
                accused.append(shares.dealer)
        columns = zip(*opened, strict=True)
        attempt.held, attempt.mask_secrets, attempt.acceptance = (b"".join(each) for each in columns)
        attempt.sharers, attempt.accused = message.sharers, tuple(accused)
        if not accused:  # a complaint would need them
            attempt.pair_keys = attempt.share_seed = b""
        attempt.stage = Stage.CHECKED
        return tag_reply(attempt, wire.write(wire.Checked(agreed.cohort, tuple(accused))))

    def _seal_key(self, attempt: NodeAttempt, shares: EncryptedShares) -> bytes:
        """Return the key under which a dealer sealed shares for this node, 32 bytes, from the stored `pair_keys`."""
        agreed, start = attempt.agreed, KEY_BYTES * index_of(attempt.agreed, self.node, shares.dealer)
        key = attempt.pair_keys[start : start + KEY_BYTES]
        if agreed.suite.hybrid:
            key = mixed(key, share_secret(attempt.share_seed, shares.block), agreed.share_info)
        return key

    def _open_shares(
        self, attempt: NodeAttempt, shares: EncryptedShares, secret: bytes
    ) -> tuple[bytes, bytes, bytes]:
        """Return the pair of decrypted shares, the hybrid secret of the masks with their dealer, and `acceptance` of both.

        Args:
          attempt: with the keys of its pairs.
          shares: to open.
          secret: hybrid secret of the masks if this node made it, otherwise zeros; empty in a suite without ML-KEM.

        Raises:
          Refused: BAD_SHARE where the dealer did not commit to both.
        """
        agreed, peer = attempt.agreed, shares.dealer
        pair = shares.opened(agreed, self._seal_key(attempt, shares))
        if agreed.suite.hybrid and peer < self.node:
            offered = {peer: {self.node: shares.block}}
            secret = mask_secret(agreed, attempt.mask_seed, self.node, peer, offered)
            if not fits_commitment(agreed, self.node, peer, secret, offered):
                raise Refused(Reason.BAD_SHARE, "a mask secret that its dealer did not commit to")
        return pair, secret, acceptance(shares.evidence, shares.block)

    def _complain(self, attempt: NodeAttempt, disputed: wire.Disputed, now: int) -> bytes:
        """2a: recheck the accused deals as a whole: accept the valid ones, disclose evidence against the others.

        A deal that its dealer did not sign ends the attempt. An honest node signs no invalid deal. So the adversary
        knows what is disclosed, the secret under which this pair sealed shares; masks have keys of their own.
        """
        agreed, cohort = attempt.agreed, attempt.agreed.cohort
        if not attempt.share_seed:  # erased once there is nothing left to dispute
            raise Refused(Reason.OUT_OF_ORDER, "nothing is disputed here")
        if len(disputed.deals) != len(disputed.accused):
            raise Refused(Reason.OUT_OF_ORDER, "not one deal for each accused dealer")
        if not set(disputed.accused) <= set(attempt.accused):
            raise Refused(Reason.WRONG_COHORT, "a deal that this node did not complain of")
        secret = key_from_seed(attempt.share_seed, Purpose.SHARE_KEY)
        proofs: dict[int, bytes] = {}
        signed: list[bytes] = []
        for peer, sealed_shares in zip(disputed.accused, disputed.deals, strict=True):
            member = self.roster.member(peer, now)
            member.check(agreed.suite, cohort, deal_body(peer, sealed_shares), sealed_shares.signature)
            try:
                self._withdraw_accusation(
                    attempt, encrypted_shares_of(agreed, peer, self.node, sealed_shares)
                )
            except Refused:
                key = agreed.by_node[peer].share_key
                # In a hybrid suite a proof of the X25519 half would decide nothing: the server counts accusers.
                proof = bytes(PROOF_BYTES) if agreed.suite.hybrid else disclose(secret, key, cohort)
                body = complaint_body(self.node, peer, deal_hash(peer, sealed_shares), proof)
                signed.append(self.sign(agreed.suite, self.key, cohort, body))
                proofs[peer] = proof
        attempt.pair_keys = attempt.share_seed = b""
        attempt.complained = tuple(proofs)
        signatures = b"".join(signed) if signs(attempt.terms) else b""
        complaints = wire.Complaints(cohort, tuple(proofs), b"".join(proofs.values()), signatures)
        return tag_reply(attempt, wire.write(complaints))

    def _withdraw_accusation(self, attempt: NodeAttempt, shares: EncryptedShares) -> None:
        """Store the shares of a dealer that was accused, and take the accusation back; raise Refused if they are bad."""
        peers = attempt.agreed.neighbours(self.node, set(attempt.sharers))
        index = bisect_left(peers, shares.dealer)
        initial_secret = attempt.mask_secrets[KEY_BYTES * index :][:KEY_BYTES]
        pair, secret, row = self._open_shares(attempt, shares, initial_secret)
        attempt.held = _replace_piece(attempt.held, index, pair)
        attempt.acceptance = _replace_piece(attempt.acceptance, index, row)
        attempt.mask_secrets = _replace_piece(attempt.mask_secrets, index, secret)
        attempt.accused = tuple(peer for peer in attempt.accused if peer != shares.dealer)

    def _mask(self, attempt: NodeAttempt, inbox: wire.Inbox, now: int, work: Work | None) -> bytes:
        """3: compute the vector, and return it under all masks; keep their keys, in case a dropout's seed is lost."""
        if work is None or work.model_hash != inbox.model_hash:
            raise Refused(Reason.WRONG_MODEL, "the model is not the one that the round is about")
        agreed, previous_sharers = attempt.agreed, set(attempt.sharers)
        if self.node not in inbox.sharers or not set(inbox.sharers) <= previous_sharers:
            raise Refused(Reason.WRONG_COHORT, "who stays is not a part of who shared, with this node")
        peers = agreed.neighbours(self.node, set(inbox.sharers))
        self._check_void(attempt, inbox, now)
        attempt.void = tuple((entry.holder, entry.dealer) for entry in inbox.void)
        unmasked = attempt.bare(self.node)
        self._require_enough(attempt, inbox.sharers)
        stays = [peer in set(peers) for peer in agreed.neighbours(self.node, previous_sharers)]
        attempt.held = _select_pieces(attempt.held, 2 * wire.SHARE_BYTES, stays)
        attempt.acceptance = _select_pieces(attempt.acceptance, HASH_BYTES, stays)
        attempt.sharers, attempt.model_hash = inbox.sharers, inbox.model_hash
        attempt.stage = Stage.MASKED
        context = agreed.round(inbox.sharers, inbox.model_hash, attempt.void)
        info = pair_mask_info(context)
        if agreed.suite.hybrid:
            secrets = cut(_select_pieces(attempt.mask_secrets, KEY_BYTES, stays), KEY_BYTES)
            keys = [derive(each, info) for each in secrets]
        else:
            secret = key_from_seed(attempt.mask_seed)
            public = agreed.by_node[self.node].mask_key
            keys = secrets = [
                self.agree(secret, agreed.by_node[peer].mask_key, info, public) for peer in peers
            ]
        attempt.mask_keys = b"".join(
            bytes(KEY_BYTES) if peer in unmasked else secret
            for secret, peer in zip(secrets, peers, strict=True)
        )
        attempt.mask_secrets = attempt.pair_keys = attempt.share_seed = b""
        masks = [(private_mask_key(attempt.own_seed, context), 1)]
        pairs = zip(keys, peers, strict=True)
        masks += [(key, mask_sign(self.node, peer)) for key, peer in pairs if peer not in unmasked]
        vector, attempt.openings = work.vector(attempt.terms)
        return masked(attempt, vector, masks, context, work.further(attempt.terms))

    def _check_void(self, attempt: NodeAttempt, inbox: wire.Inbox, now: int) -> None:
        """Refuse to leave out a mask without a complaint that this node signed, or that is about its own signed deal.

        Honest nodes complain only of deals that their dealers signed, and honest dealers sign no bad deal. So each mask
        between two honest nodes stays. Nor does a node continue with a mask that it shares with a dealer of bad shares:
        it could be blamed for what it cannot reveal.
        """
        agreed = attempt.agreed
        if inbox.void and not agreed.suite.hybrid:
            problem = "a mask left out by a suite in which every complaint has a verdict"
            raise Refused(Reason.WRONG_COHORT, problem)
        dealers = {entry.dealer for entry in inbox.void if entry.holder == self.node}
        if not dealers <= set(attempt.complained):
            raise Refused(Reason.BAD_SHARE, "a mask left out for a complaint that this node did not make")
        if set(attempt.accused) & set(inbox.sharers) - dealers:
            raise Refused(Reason.BAD_SHARE, "a node stays in the cohort whose share is not valid")
        for entry in inbox.void:
            if entry.dealer == self.node:
                body = complaint_body(entry.holder, self.node, attempt.dealt, bytes(PROOF_BYTES))
                member = self.roster.member(entry.holder, now)
                member.check(agreed.suite, agreed.cohort, body, entry.signature)

    def _confirm(self, attempt: NodeAttempt, sets: wire.Survivors) -> bytes:
        """4: check the survivors against this node's view, and sign them; for a semi-honest server reveal at once."""
        alive = set(sets.alive)
        if alive & set(sets.dead):
            problem = "a node is said to be alive and dead: both its seeds would open"
            raise Refused(Reason.ALIVE_AND_DEAD, problem)
        if alive | set(sets.dead) != set(attempt.sharers) or self.node not in alive:
            raise Refused(Reason.WRONG_COHORT, "alive and dead are not who shared, or this node is not alive")
        agreed = attempt.agreed
        self._require_enough(attempt, sets.alive)
        attempt.alive = sets.alive
        if attempt.terms.profile is Profile.SEMI_HONEST:
            return self._reveal(attempt)
        attempt.stage = Stage.CONFIRMED
        context, survivors_hash = attempt.view
        unsigned = wire.Confirmation(self.node, attempt.model_hash, context, survivors_hash, b"")
        signature = self.sign(agreed.suite, self.key, attempt.context, unsigned.body)
        return tag_reply(attempt, wire.write(replace(unsigned, signature=signature)))

    def _open(self, attempt: NodeAttempt, proof: wire.Confirmed, now: int) -> bytes:
        """5: reveal shares once a quorum has signed the same view, and every survivor is authentic."""
        needed = quorum(attempt.terms, self.policy.collusion)
        signed = signers(self.roster, attempt, proof.confirmations, needed, now)
        check_adverts(self.roster, attempt, unchecked_adverts(self.node, attempt, signed), now)
        return self._reveal(attempt)

    def _reveal(self, attempt: NodeAttempt) -> bytes:
        """Reveal shares, keys of masks with dropouts, and seeds of excess noise; the round is over for this node."""
        _, view = attempt.view
        alive, shares, keys = set(attempt.alive), bytearray(), bytearray()
        for index, peer in enumerate(attempt.agreed.neighbours(self.node, set(attempt.sharers))):
            # A pair holds a share of the private seed, then one of the mask seed.
            start = wire.SHARE_BYTES * (2 * index + (peer not in alive))
            shares += attempt.held[start : start + wire.SHARE_BYTES]
            if peer not in alive:
                keys += attempt.mask_keys[KEY_BYTES * index : KEY_BYTES * (index + 1)]
        seeds = b"".join(seed for min_survivors, seed in attempt.openings if len(alive) >= min_survivors)
        reveal = wire.Revealed(view, bytes(shares), bytes(keys), seeds)
        if signs(attempt.terms):
            body = reveal_body(self.node, reveal, attempt.acceptance)
            reveal = replace(
                reveal, signature=self.sign(attempt.agreed.suite, self.key, attempt.context, body)
            )
        reply = tag_reply(attempt, wire.write(reveal))
        self.newest_attempts.setdefault(attempt.terms.run, {})[attempt.terms.round] = OVER
        self._end(attempt.context)
        return reply


def declined(refused: Refused) -> bytes:
    """Return the message that tells the server of a refusal: the reason without the detail."""
    return wire.write(wire.Declined(refused.reason.value))


def _neighbour_shares(
    agreed: Agreement, node: int, peers: Sequence[int], message: wire.NeighbourShares
) -> list[EncryptedShares]:
    """Return the encrypted shares of a node's neighbours from a message.

    Raises:
      Refused: MALFORMED, where there is not one for each.
    """
    sealed, evidence = cut(message.sealed, wire.SEALED_BYTES), cut(message.evidence, wire.EVIDENCE_BYTES)
    if not len(sealed) == len(evidence) == len(peers):
        raise Refused(Reason.MALFORMED, "not one sealed pair for each neighbour")
    pairs = [(peer, node) for peer in peers] if agreed.suite.hybrid else []
    kem_blocks = blocks(message.kem, pairs) or [b""] * len(peers)
    rows = zip(peers, sealed, evidence, kem_blocks, strict=True)
    return [EncryptedShares(peer, node, *row) for peer, *row in rows]


def _replace_piece(row: bytes, index: int, piece: bytes) -> bytes:
    """Return a row of pieces of equal size with another piece at an index."""
    return row[: len(piece) * index] + piece + row[len(piece) * (index + 1) :]


def _select_pieces(row: bytes, size: int, selection: Sequence[bool]) -> bytes:
    """Return the selected pieces of a row of pieces of this size."""
    if all(selection):
        return row
    return b"".join(piece for piece, stays in zip(cut(row, size), selection, strict=True) if stays)


# --- what a node remembers between two messages, sealed under a key of its own

_STATE_FORMAT = 4
_OLD_FORMATS = (2, 3)  # of earlier versions: `newest_attempts` is read, and attempts are over
_STATE_SUITE = SUITES[1]  # whatever suite an attempt uses
_NODE_FIELDS = ("candidates", "sharers", "accused", "complained", "alive")  # msgpack reads them as lists


def write_state(participant: Participant, node_key: bytes) -> bytes:
    """Return the node's memory, sealed. Keep it durably before the reply it belongs to leaves.

    Args:
      participant: the node.
      node_key: 32 bytes that never leave the node: of a TPM, of the system's key ring, or of a file of mode 0600.
    """
    newest = [[run, *pair] for run, rounds in participant.newest_attempts.items() for pair in rounds.items()]
    attempts = [_plain(attempt) for attempt in participant.attempts.values()]
    body = cast(bytes, msgpack.packb([_STATE_FORMAT, newest, attempts]))
    return seal(_STATE_SUITE, node_key, body, frame(Purpose.STATE, participant.node))


def read_state(participant: Participant, data: bytes, node_key: bytes) -> None:
    """Restore a fresh participant's memory from the output of `write_state`; other arguments as of `write_state`.

    Raises:
      Refused: BAD_SHARE if it does not open under this key for this node; MALFORMED if another version wrote it.
    """
    row = wire.unpack(unseal(_STATE_SUITE, node_key, data, frame(Purpose.STATE, participant.node)))
    try:
        written, newest, attempts = row
        rounds = [(int(run), int(number), int(attempt)) for run, number, attempt in newest]
        restored = [_attempt(fields_) for fields_ in attempts if written == _STATE_FORMAT]
        by_context = {attempt.context: attempt for attempt in restored}
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise Refused(Reason.MALFORMED, "a node's state of another version") from error
    if written not in (_STATE_FORMAT, *_OLD_FORMATS):
        raise Refused(Reason.MALFORMED, f"a node's state of format {written}")
    participant.newest_attempts = {}
    for run, number, attempt in rounds:
        participant.newest_attempts.setdefault(run, {})[number] = attempt
    participant.attempts = by_context


def _plain(attempt: NodeAttempt) -> dict[str, Any]:
    """Return an attempt as plain data for msgpack."""
    row = {field.name: getattr(attempt, field.name) for field in fields(attempt)}
    row["terms"] = wire.write_terms(attempt.terms)
    row["adverts"] = wire.write(wire.CohortAdverts(attempt.context, attempt.adverts))
    row["stage"] = int(attempt.stage)
    return row


def _attempt(row: dict[str, Any]) -> NodeAttempt:
    """Return the attempt that `_plain` wrote."""
    row["terms"] = wire.read_terms(row["terms"])
    row["adverts"] = wire.expect(wire.read_received(row["adverts"]), wire.CohortAdverts).adverts
    row["stage"] = Stage(row["stage"])
    row["openings"] = tuple((int(min_survivors), bytes(seed)) for min_survivors, seed in row["openings"])
    row["void"] = tuple((int(holder), int(dealer)) for holder, dealer in row["void"])
    row |= {name: tuple(row[name]) for name in _NODE_FIELDS}
    return NodeAttempt(**row)
