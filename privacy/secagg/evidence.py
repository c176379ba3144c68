"""Evidence of an attempt: the signed messages by which anyone can check whom it blames, with public keys alone.

It holds what the blamed nodes signed, and of seeds that are not what their owner committed to the shares that were
revealed, by holder: the owner's signed commitments prove each of them. No honest node can be convicted by messages that
others made up or exchanged. Its deal, complaint and reveal are signed for the attempt; a complaint names the deal that
it is about, and a reveal all deals that its node accepted.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
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
from .dealings import Dealings, dealings
from .encrypted_shares import check_lengths, cut
from .graph import colluders
from .hybrid import blocks_of, fits_commitment, fits_keys, mask_secret
from .messages import SHARE_BYTES
from .refusal import Fault, Reason, Refused
from .roster import Roster
from .shamir import combine
from .suite import KEY_BYTES, agree, key_from_seed
from .transcript import HASH_BYTES

NOWHEN = 0  # a key that has expired since is still the one that signed
Convictions = Iterator[tuple[int, Fault]]


@dataclass(frozen=True)
class AttemptEvidence:
    """Messages of one attempt.

    Attributes:
      proposal: of the attempt.
      adverts: of its cohort.
      deals: by dealer, those that somebody is blamed about.
      complaints: by holder.
      survivors: of the sum, and those who shared and are not in it; None if it was never asked for.
      model_hash: of the round's model, 32 bytes; empty if it was never asked for.
      shares: by owner of a seed and holder.
      reveals: by node.
      acceptance: by the same nodes, as `reveal_body` says.
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
    """Evidence under a roster, with what follows from it."""

    evidence: AttemptEvidence
    roster: Roster
    collusion: float

    def convictions(self) -> Convictions:
        agreed, deals = self._agreed(), self.evidence.deals
        for dealer, message in deals.items():
            check_lengths(agreed, dealer, message)
            self._signed(agreed, dealer, agreed.cohort, deal_body(dealer, message), message.signature)
        derived = dealings(agreed, deals)
        yield from ((dealer, Fault.BAD_DEAL) for dealer in derived.unproved())
        yield from self._of_complaints(derived)
        seeds: dict[int, bytes] = {}
        offered = {dealer: blocks_of(agreed, dealer, message.kem) for dealer, message in deals.items()}
        for owner in self.evidence.shares.keys() & deals.keys():
            yield from self._of_seed(derived, owner, seeds, offered)
        for node, message in self.evidence.reveals.items():
            yield from self._of_reveal(derived, node, message, seeds, offered)

    def _agreed(self) -> Agreement:
        proposal, adverts = self.evidence.proposal, self.evidence.adverts
        terms = proposal.terms
        context = attempt_context(terms, proposal.candidates, proposal.server_key)
        agreed = Agreement(terms, context, proposal.candidates, adverts.adverts)
        agreed.check_keys()
        if terms.roster_hash != self.roster.hash or not set(agreed.nodes) <= set(proposal.candidates):
            raise Refused(Reason.WRONG_COHORT, "evidence of another roster or cohort")
        return agreed

    def _signed(self, agreed: Agreement, node: int, context: bytes, body: bytes, signature: bytes) -> None:
        self.roster.member(node, NOWHEN).check(agreed.suite, context, body, signature)

    def _of_complaints(self, deals: Dealings) -> Convictions:
        agreed, accused = deals.agreed, Counter[int]()
        for holder, complaints in self.evidence.complaints.items():
            signatures = cut(complaints.signatures, agreed.suite.signature_bytes)
            for dealer, proof, signature in zip(
                complaints.accused, cut(complaints.proofs, PROOF_BYTES), signatures, strict=True
            ):
                if dealer not in deals.deals:
                    continue
                body = complaint_body(holder, dealer, deal_hash(dealer, deals.deals[dealer]), proof)
                self._signed(agreed, holder, agreed.cohort, body, signature)
                if holder not in agreed.neighbours(dealer):
                    raise Refused(Reason.MALFORMED, "a complaint of a node that the dealer deals nothing to")
                if agreed.suite.hybrid:
                    accused[dealer] += 1
                else:
                    yield deals.verdict(holder, dealer, proof)
        max_accusers = colluders(agreed.terms.cohort_size, self.collusion)
        yield from ((dealer, Fault.BAD_DEAL) for dealer, count in accused.items() if count > max_accusers)

    def _of_seed(
        self, deals: Dealings, owner: int, seeds: dict[int, bytes], offered: Mapping[int, dict[int, bytes]]
    ) -> Convictions:
        """Yield who is convicted by a seed, and keep it if it is that of its owner's keys."""
        agreed, private = deals.agreed, owner in self._living
        valid_shares = {
            agreed.points[holder]: share
            for holder, share in self.evidence.shares[owner].items()
            if holder in deals.commitments[owner]
            and deals.matches_deal(owner, holder, share, private=private)
        }
        if len(valid_shares) < agreed.terms.threshold:
            return
        seed = combine(dict(list(valid_shares.items())[: agreed.terms.threshold]), agreed.terms.threshold)
        advert = agreed.by_node[owner]
        if private:
            if not deals.committed(owner, seed):
                yield owner, Fault.WRONG_COMMITMENT
        elif not fits_keys(seed, advert.mask_key, advert.kem_keys):
            yield owner, Fault.WRONG_SEED
        else:
            seeds[owner] = seed
            yield from _of_secrets(agreed, owner, seed, offered)

    def _of_reveal(
        self,
        deals: Dealings,
        node: int,
        reveal: wire.Revealed,
        seeds: Mapping[int, bytes],
        offered: Mapping[int, dict[int, bytes]],
    ) -> Convictions:
        agreed, living, acceptance = deals.agreed, self._living, self.evidence.acceptance[node]
        self._signed(agreed, node, agreed.context, reveal_body(node, reveal, acceptance), reveal.signature)
        context, sharers = self._round(agreed, reveal)
        peers = agreed.neighbours(node, sharers)
        rows = zip(peers, cut(reveal.shares, SHARE_BYTES), cut(acceptance, HASH_BYTES), strict=True)
        took: set[int] = set()
        for peer, share, row in rows:
            if peer in deals.deals and row == deals.acceptance(peer, node, offered[peer].get(node, b"")):
                took.add(peer)
                if any(share) and not deals.matches_deal(peer, node, share, private=peer in living):
                    yield node, Fault.WRONG_SHARE
        lost = [peer for peer in peers if peer not in living]
        for peer, key in zip(lost, cut(reveal.mask_keys, KEY_BYTES), strict=True):
            if not any(key):
                continue
            if agreed.suite.hybrid:
                bound = node in deals.deals if node < peer else peer in took
                wrong = bound and not fits_commitment(agreed, node, peer, key, offered)
            else:
                mask_key = agreed.by_node[node].mask_key
                wrong = peer in seeds and key != agree(
                    key_from_seed(seeds[peer]), mask_key, pair_mask_info(context)
                )
            if wrong:
                yield node, Fault.WRONG_MASK

    def _round(self, agreed: Agreement, reveal: wire.Revealed) -> tuple[bytes, frozenset[int]]:
        """Return the context of the round that a reveal is of, and the nodes that shared."""
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


def _of_secrets(
    agreed: Agreement, owner: int, seed: bytes, offered: Mapping[int, dict[int, bytes]]
) -> Convictions:
    """Yield the dealers whose commitment to a mask secret is not what they sealed, as one node's seed shows."""
    for peer in agreed.neighbours(owner) if agreed.suite.hybrid else ():
        lower, higher = sorted((owner, peer))
        if higher not in offered.get(lower, {}):
            continue
        try:
            good = fits_commitment(
                agreed, owner, peer, mask_secret(agreed, seed, owner, peer, offered), offered
            )
        except Refused:
            good = False
        if not good:
            yield lower, Fault.WRONG_SECRET


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bytes):
        return None if value is None else value.hex()
    if isinstance(value, Mapping):
        return {str(node): _plain(each) for node, each in cast(Mapping[int, Any], value).items()}
    return wire.write(value).hex()


def _read(text: str, kind: type[wire.M]) -> wire.M:
    return wire.read(bytes.fromhex(text), kind)


def _by_node(texts: Mapping[str, str], kind: type[wire.M]) -> dict[int, wire.M]:
    return {int(node): _read(text, kind) for node, text in texts.items()}


def _bytes(texts: Mapping[str, str]) -> dict[int, bytes]:
    return {int(node): bytes.fromhex(text) for node, text in texts.items()}
