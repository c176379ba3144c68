"""Evidence of an attempt: the signed messages by which anyone can check whom it blames, with public keys alone.

It holds what the blamed nodes signed, and of seeds that are not what their owner committed to the shares that were
revealed, by holder: the owner's signed commitments prove each of them. No honest node can be convicted by messages that
others made up or exchanged. Its deal, complaint and reveal are signed for the attempt; a complaint names the deal that
it is about, and a reveal all deals that its node accepted.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import islice
from typing import Any, cast

from . import messages as wire
from .bindings import (
    Agreement,
    attempt_context,
    complaint_body,
    deal_body,
    deal_hash,
    pair_mask_info,
    reveal_body,
    survivors_digest,
    void_pairs,
)
from .complaint import PROOF_BYTES
from .dealings import Dealings
from .encrypted_shares import check_lengths, cut
from .graph import colluders
from .hybrid import blocks_of, fits_commitment, fits_keys, mask_secret
from .messages import SHARE_BYTES
from .refusal import Fault, Reason, Refused
from .roster import Roster
from .shamir import combine
from .suite import KEY_BYTES, agree, key_from_seed
from .transcript import HASH_BYTES

_LONG_AGO = 0  # Unix second at which no key has expired: one that has since is still the one that signed
Convictions = Iterator[tuple[int, Fault]]


@dataclass(frozen=True)
class AttemptEvidence:
    """Messages of one attempt.

    Attributes:
      proposal: of the attempt.
      adverts: of its cohort.
      deals: by dealer, those that the faults are about.
      complaints: by holder.
      survivors: of the sum, and those who shared and are not in it; None if the attempt ended before.
      model_hash: of the round's model, 32 bytes; empty if the attempt ended before vectors were requested.
      shares: revealed shares of a seed, by its owner and by holder.
      reveals: by node.
      acceptance: by the same nodes, what each signed beside its reveal, see `reveal_body`.
    """

    proposal: wire.Proposal
    adverts: wire.CohortAdverts
    deals: Mapping[int, wire.SealedShares]
    complaints: Mapping[int, wire.Complaints] = field(default_factory=dict[int, wire.Complaints])
    survivors: wire.Survivors | None = None
    model_hash: bytes = b""
    shares: Mapping[int, Mapping[int, bytes]] = field(default_factory=dict[int, dict[int, bytes]])
    reveals: Mapping[int, wire.Revealed] = field(default_factory=dict[int, wire.Revealed])
    acceptance: Mapping[int, bytes] = field(default_factory=dict[int, bytes])

    def to_json(self) -> dict[str, Any]:
        """Return the messages in hexadecimal, by field."""
        return {each.name: _plain(getattr(self, each.name)) for each in fields(self)}


def evidence_from(row: Mapping[str, Any]) -> AttemptEvidence:
    """Return the evidence of `AttemptEvidence.to_json`, whose messages are read as strictly as those of a node.

    Raises:
      Refused: MALFORMED.
    """
    try:
        survivors = row["survivors"]
        return AttemptEvidence(
            _read(row["proposal"], wire.Proposal),
            _read(row["adverts"], wire.CohortAdverts),
            _by_node(row["deals"], wire.SealedShares),
            _by_node(row["complaints"], wire.Complaints),
            _read(survivors, wire.Survivors) if survivors is not None else None,
            bytes.fromhex(row["model_hash"]),
            {int(owner): _bytes(shares) for owner, shares in row["shares"].items()},
            _by_node(row["reveals"], wire.Revealed),
            _bytes(row["acceptance"]),
        )
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise Refused(Reason.MALFORMED, f"evidence cannot be read: {error}") from error


def convictions(evidence: AttemptEvidence, roster: Roster, collusion: float) -> frozenset[tuple[int, Fault]]:
    """Return the nodes that the messages convict, each with its faults.

    Args:
      evidence: unverified.
      roster: of the attempt, whose keys are known to be the members'.
      collusion: share of a cohort that may collude; as many cannot blame a dealer of a hybrid suite together.

    Raises:
      Refused: the messages are not of one attempt under this roster, or a node is not in it.
    """
    try:
        return frozenset(_Trial(evidence, roster, collusion).convictions())
    except (LookupError, ValueError) as error:
        raise Refused(Reason.MALFORMED, f"evidence lacks a message: {error}") from error


@dataclass(frozen=True)
class _Trial:
    """Check of evidence under a roster; fields as the arguments of `convictions`."""

    evidence: AttemptEvidence
    roster: Roster
    collusion: float

    def convictions(self) -> Convictions:
        """Yield the faults that follow from the deals, the complaints, the revealed seeds and the reveals."""
        agreed, deals = self._agreed, self.evidence.deals
        for dealer, message in deals.items():
            check_lengths(agreed, dealer, message)
            self._check_signature(dealer, agreed.cohort, deal_body(dealer, message), message.signature)
        yield from ((dealer, Fault.BAD_DEAL) for dealer in self._dealings.unproved())
        yield from self._of_complaints()
        mask_seeds: dict[int, bytes] = {}
        for owner in self.evidence.shares.keys() & deals.keys():
            yield from self._of_seed(owner, mask_seeds)
        for node, message in self.evidence.reveals.items():
            yield from self._of_reveal(node, message, mask_seeds)

    @cached_property
    def _agreed(self) -> Agreement:
        """Cohort of the evidence, which must be of the roster."""
        proposal, adverts = self.evidence.proposal, self.evidence.adverts
        terms = proposal.terms
        context = attempt_context(terms, proposal.candidates, proposal.server_key)
        agreed = Agreement(terms, context, proposal.candidates, adverts.adverts)
        agreed.check_keys()
        if terms.roster_hash != self.roster.hash or not set(agreed.nodes) <= set(proposal.candidates):
            raise Refused(Reason.WRONG_COHORT, "evidence of another roster or cohort")
        return agreed

    @cached_property
    def _dealings(self) -> Dealings:
        return Dealings(self._agreed, self.evidence.deals)

    @cached_property
    def _offered(self) -> dict[int, dict[int, bytes]]:
        """Hybrid blocks by dealer and holder."""
        return {
            dealer: blocks_of(self._agreed, dealer, deal.kem) for dealer, deal in self.evidence.deals.items()
        }

    def _check_signature(self, node: int, context: bytes, body: bytes, signature: bytes) -> None:
        self.roster.member(node, _LONG_AGO).check(self._agreed.suite, context, body, signature)

    def _of_complaints(self) -> Convictions:
        """Yield the cheater of each complaint; in a hybrid suite, each dealer with more accusers than may lie."""
        agreed, deals, accusers = self._agreed, self.evidence.deals, Counter[int]()
        for holder, complaints in self.evidence.complaints.items():
            signatures = cut(complaints.signatures, agreed.suite.signature_bytes)
            for dealer, proof, signature in zip(
                complaints.accused, cut(complaints.proofs, PROOF_BYTES), signatures, strict=True
            ):
                if dealer not in deals:
                    continue
                body = complaint_body(holder, dealer, deal_hash(dealer, deals[dealer]), proof)
                self._check_signature(holder, agreed.cohort, body, signature)
                if holder not in agreed.neighbours(dealer):
                    raise Refused(Reason.MALFORMED, "a complaint of a node that the dealer deals nothing to")
                if agreed.suite.hybrid:
                    accusers[dealer] += 1
                else:
                    yield self._dealings.verdict(holder, dealer, proof)
        max_accusers = colluders(agreed.terms.cohort_size, self.collusion)
        yield from ((dealer, Fault.BAD_DEAL) for dealer, count in accusers.items() if count > max_accusers)

    def _of_seed(self, owner: int, mask_seeds: dict[int, bytes]) -> Convictions:
        """Yield the faults that the seed of an owner's revealed shares shows; none if too few are valid.

        The seed of a survivor is its private seed. That of a dropout is its mask seed: if it fits the owner's keys it
        is added to `mask_seeds`, for the check of reveals.
        """
        agreed, deals, private = self._agreed, self._dealings, owner in self._living
        valid_shares = {
            agreed.points[holder]: share
            for holder, share in self.evidence.shares[owner].items()
            if holder in deals.commitments[owner]
            and deals.matches_deal(owner, holder, share, private=private)
        }
        threshold = agreed.terms.threshold
        if len(valid_shares) < threshold:
            return
        seed = combine(dict(islice(valid_shares.items(), threshold)), threshold)
        advert = agreed.by_node[owner]
        if private:
            if not deals.committed(owner, seed):
                yield owner, Fault.WRONG_COMMITMENT
        elif not fits_keys(seed, advert.mask_key, advert.kem_keys):
            yield owner, Fault.WRONG_SEED
        else:
            mask_seeds[owner] = seed
            yield from self._of_secrets(owner, seed)

    def _of_secrets(self, owner: int, mask_seed: bytes) -> Convictions:
        """Yield the dealers whose commitment to a mask secret is not what they sealed; none if there is no ML-KEM.

        The lower node of a pair makes and commits to its secret, so a mismatch convicts the lower one. `mask_seed` is
        the owner's, from which either node's secrets follow; it fits the owner's keys, as the caller has checked.
        """
        agreed, offered = self._agreed, self._offered
        if not agreed.suite.hybrid:
            return
        for peer in agreed.neighbours(owner):
            lower, higher = sorted((owner, peer))
            if higher not in offered.get(lower, {}):
                continue
            try:
                secret = mask_secret(agreed, mask_seed, owner, peer, offered)
                fits = fits_commitment(agreed, owner, peer, secret, offered)
            except Refused:
                fits = False
            if not fits:
                yield lower, Fault.WRONG_SECRET

    def _of_reveal(self, node: int, reveal: wire.Revealed, mask_seeds: Mapping[int, bytes]) -> Convictions:
        """Yield the faults of a node's reveal: shares that were not dealt to it, and wrong keys of masks with dropouts.

        `mask_seeds` has the seeds of dropouts, by node, that `_of_seed` found to fit their keys.
        """
        agreed, deals, living = self._agreed, self._dealings, self._living
        acceptance = self.evidence.acceptance[node]
        body = reveal_body(node, reveal, acceptance)
        self._check_signature(node, agreed.context, body, reveal.signature)
        context, sharers = self._round(agreed, reveal)
        peers = agreed.neighbours(node, sharers)
        rows = zip(peers, cut(reveal.shares, SHARE_BYTES), cut(acceptance, HASH_BYTES), strict=True)
        accepted: set[int] = set()  # dealers whose deal in the evidence is the one that the node accepted
        for peer, share, row in rows:
            block = self._offered.get(peer, {}).get(node, b"")
            if peer in deals.deals and row == deals.acceptance(peer, node, block):
                accepted.add(peer)
                if any(share) and not deals.matches_deal(peer, node, share, private=peer in living):
                    yield node, Fault.WRONG_SHARE
        dropouts = [peer for peer in peers if peer not in living]
        for peer, key in zip(dropouts, cut(reveal.mask_keys, KEY_BYTES), strict=True):
            if not any(key):
                continue
            is_wrong = False
            if agreed.suite.hybrid:
                # The lower node signed the commitment to the key; the higher one is bound by it if it accepted the deal.
                is_bound = node in deals.deals if node < peer else peer in accepted
                is_wrong = is_bound and not fits_commitment(agreed, node, peer, key, self._offered)
            elif peer in mask_seeds:
                mask_key = agreed.by_node[node].mask_key
                is_wrong = key != agree(key_from_seed(mask_seeds[peer]), mask_key, pair_mask_info(context))
            if is_wrong:
                yield node, Fault.WRONG_MASK

    def _round(self, agreed: Agreement, reveal: wire.Revealed) -> tuple[bytes, frozenset[int]]:
        """Return the context of the round and the nodes that shared; refuse a reveal for other survivors."""
        if self.evidence.survivors is None:
            raise Refused(Reason.MALFORMED, "a reveal without survivors")
        alive, dead = self.evidence.survivors.alive, self.evidence.survivors.dead
        sharers = frozenset((*alive, *dead))
        void = void_pairs(self.evidence.complaints, sharers)
        context = agreed.round(sorted(sharers), self.evidence.model_hash, void)
        if reveal.survivors != survivors_digest(context, alive, dead):
            raise Refused(Reason.SPLIT_VIEW, "a reveal for other survivors")
        return context, sharers

    @property
    def _living(self) -> frozenset[int]:
        return frozenset(self.evidence.survivors.alive if self.evidence.survivors else ())


def _plain(value: Any) -> Any:
    """Return a field of the evidence as JSON: messages and bytes in hexadecimal."""
    if value is None:
        return None
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Mapping):
        return {str(node): _plain(each) for node, each in cast(Mapping[int, Any], value).items()}
    return wire.write(value).hex()


def _read(text: str, kind: type[wire.M]) -> wire.M:
    return wire.read(bytes.fromhex(text), kind)


def _by_node(texts: Mapping[str, str], kind: type[wire.M]) -> dict[int, wire.M]:
    return {int(node): _read(text, kind) for node, text in texts.items()}


def _bytes(texts: Mapping[str, str]) -> dict[int, bytes]:
    return {int(node): bytes.fromhex(text) for node, text in texts.items()}
