"""Nodes that cheat in secure aggregation, each in one way: everything else they do as the protocol says."""

import os
import random
from dataclasses import replace

from fedveil.privacy.secagg import client
from fedveil.privacy.secagg.attempt import tag_reply
from fedveil.privacy.secagg.bindings import complaint_body, deal_body, deal_hash, reveal_body
from fedveil.privacy.secagg.client import Participant
from fedveil.privacy.secagg.complaint import PROOF_BYTES, disclose, on_curve
from fedveil.privacy.secagg.deal import (
    SEED_COMMITMENT_BYTES,
    Deal,
    challenge_of,
    deal,
    digest_of,
    label_of,
    mask_commitment,
    private_commitment,
    seed_commitment,
)
from fedveil.privacy.secagg.double_signature import sign_by
from fedveil.privacy.secagg.encrypted_shares import cut
from fedveil.privacy.secagg.evidence import AttemptEvidence
from fedveil.privacy.secagg.hybrid import _ESCROW, CIPHERTEXT_BYTES, kem_key
from fedveil.privacy.secagg.messages import (
    SEAL_BYTES,
    SEALED_BYTES,
    Advert,
    Checked,
    CohortAdverts,
    Complaints,
    Proposal,
    Revealed,
    SealedShares,
    read,
    write,
)
from fedveil.privacy.secagg.shamir import PRIME, new_secret, polynomial, values
from fedveil.privacy.secagg.suite import KEM_KEY_BYTES, key_from_seed, suite_of
from fedveil.privacy.secagg.transcript import Purpose


class Cheat(Participant):
    """A node with one `way` to cheat, the name of a method below, and `hands` that choose at random where it matters."""

    way: str
    hands: random.Random
    friends: frozenset[int]  # who cheats with it, itself included

    def handle(self, message, now, work=None):
        reply = super().handle(message, now, work)
        return self.hands.randbytes(300) if self.way == "nonsense" and self.hands.random() < 0.4 else reply

    def _signed(self, attempt, context, body):
        return sign_by(suite_of(attempt.terms.suite), self.key, context, body)

    # --- adverts

    def _advertise(self, *args):
        advert = read(super()._advertise(*args), Advert)
        (attempt, *_) = [held for held in self.attempts.values() if held.adverts == (advert,)]
        changed = {
            "small share key": {"share_key": bytes(32)},
            "small mask key": {"mask_key": (1).to_bytes(32, "little")},
            "share key of the twist": {"share_key": _of_the_twist()},
            "mask key of the twist": {"mask_key": _of_the_twist()},
            "another mask key": {"mask_key": key_from_seed(new_secret()).public_key().public_bytes_raw()},
        }.get(self.way)
        if self.way == "another KEM key" and advert.kem_keys:
            other = kem_key(new_secret()).public_key().public_bytes_raw()
            changed = {"kem_keys": advert.kem_keys[: KEM_KEY_BYTES // 2] + other}
        if changed is None:
            return write(advert)
        advert = replace(advert, **changed)
        signature = self._signed(attempt, attempt.context, advert.body)
        advert = replace(advert, signature=signature)
        attempt.adverts = (advert,)
        return write(advert)

    # --- deals

    def _share(self, attempt, cohort, now):
        dealt, honest = {}, client.deal

        def deals(hash_, node, own_seed, mask_seed, threshold, points):
            dealt["shares"] = self._dealt(hash_, node, own_seed, mask_seed, threshold, points)
            return dealt["shares"]

        offers = client.offer
        client.deal = deals
        client.offer = lambda *given: self._offered(given[0], given[2], offers(*given))
        try:
            reply = super()._share(attempt, cohort, now)
        finally:
            client.deal, client.offer = honest, offers
        said = read(reply[:-SEAL_BYTES], SealedShares)
        changed = self._resealed(attempt, said)
        if changed is said:
            return reply
        if self.way != "unsigned deal":
            body = deal_body(self.node, changed)
            changed = replace(changed, signature=self._signed(attempt, attempt.agreed.cohort, body))
        attempt.dealt = deal_hash(self.node, changed)
        return tag_reply(attempt, write(changed))

    def _offered(self, agreed, receiver, made):
        """Return what a hybrid node makes for one neighbour, changed before it is sealed and signed."""
        if not made.mask_secret:
            return made
        block, end = made.block, len(made.block) - SEED_COMMITMENT_BYTES
        if self.way.startswith("another mask secret committed"):
            return replace(made, block=block[:end] + os.urandom(SEED_COMMITMENT_BYTES))
        if self.way == "another escrow":
            return replace(made, block=block[: _ESCROW.start] + os.urandom(60) + block[_ESCROW.stop :])
        few = not self.way.endswith("to one") or receiver == max(agreed.nodes)
        if self.way.startswith("another ciphertext") and few:
            at, other = slice(CIPHERTEXT_BYTES, 2 * CIPHERTEXT_BYTES), os.urandom(CIPHERTEXT_BYTES)
            return replace(made, block=block[: at.start] + other + block[at.stop :])
        return made

    def _dealt(self, cohort, node, own_seed, mask_seed, threshold, points):
        if self.way == "degree too high":
            return deal(cohort, node, own_seed, mask_seed, min(threshold + 1, len(points)), points)
        if self.way == "degree hidden":  # the proof is of some low degree, and not of these shares
            high = deal(cohort, node, own_seed, mask_seed, len(points), points)
            (claimed,) = values([polynomial(new_secret(), threshold)], points)
            return replace(high, proof=b"".join(v.to_bytes(32, "big") for v in claimed))
        if self.way in ("another mask seed", "another mask seed, then silence"):
            return deal(cohort, node, own_seed, new_secret(), threshold, points)
        made = deal(cohort, node, own_seed, mask_seed, threshold, points)
        if self.way in ("wrong shares", "a wrong share to some"):
            few = set(points) if self.way == "wrong shares" else set(self.hands.sample(points, 2))
            shares = [
                new_secret() + pair[32:] if point in few else pair
                for point, pair in zip(points, made.shares, strict=True)
            ]
            return replace(made, shares=tuple(shares))
        if self.way == "shares of two mask seeds":
            return _of_two_mask_seeds(cohort, node, own_seed, mask_seed, threshold, points)
        if self.way == "wrong shares of the mask":
            return replace(made, shares=tuple(pair[:32] + new_secret() for pair in made.shares))
        if self.way == "shares too large":
            large = PRIME.to_bytes(32, "big")
            return replace(made, shares=tuple(large + pair[32:] for pair in made.shares))
        return made

    def _resealed(self, attempt, said):
        peers = attempt.agreed.neighbours(self.node)
        honest = [place for place, peer in enumerate(peers) if peer not in self.friends]
        if self.way == "garbage seals":
            return replace(said, sealed=os.urandom(len(said.sealed)))
        if self.way in ("garbage to one", "unsigned deal"):
            at = SEALED_BYTES * self.hands.choice(honest)
            sealed = said.sealed[:at] + os.urandom(SEALED_BYTES) + said.sealed[at + SEALED_BYTES :]
            return replace(said, sealed=sealed, signature=os.urandom(len(said.signature)))
        if self.way == "garbage commitments":
            return replace(said, commitments=os.urandom(len(said.commitments)))
        if self.way == "garbage proof":
            return replace(said, proof=bytes(len(said.proof)))
        if self.way == "another seed committed":
            return replace(said, seed=os.urandom(len(said.seed)))
        if self.way == "proof cut":
            return replace(said, proof=said.proof[:-32])
        return said

    # --- complaints

    def _check(self, attempt, parcels):
        seed, keys = attempt.share_seed, attempt.pair_keys
        super()._check(attempt, parcels)
        if not self.way.startswith("false complaint"):  # friends do not accuse each other
            said = tuple(peer for peer in attempt.accused if peer not in self.friends)
            said = () if self.way == "another KEM key" else said
            attempt.accused = said
            return tag_reply(attempt, write(Checked(attempt.agreed.cohort, said)))
        attempt.share_seed, attempt.pair_keys = seed, keys
        peers = attempt.agreed.neighbours(self.node, set(parcels.sharers))
        honest = [peer for peer in peers if peer not in self.friends]
        few = sorted(self.hands.sample(honest, min(3, len(honest))))
        attempt.accused = tuple(honest if self.way.endswith("all") else few)
        return tag_reply(attempt, write(Checked(attempt.agreed.cohort, attempt.accused)))

    def _complain(self, attempt, disputed, now):
        if not self.way.startswith("false complaint"):
            return super()._complain(attempt, disputed, now)
        agreed, accused = attempt.agreed, disputed.accused
        secret = key_from_seed(attempt.share_seed, Purpose.SHARE_KEY)
        other = key_from_seed(new_secret(), Purpose.SHARE_KEY)
        made = {
            "false complaint with a proof": lambda peer: disclose(
                secret, agreed.by_node[peer].share_key, agreed.cohort
            ),
            "false complaint with another's proof": lambda peer: disclose(
                other, agreed.by_node[peer].share_key, agreed.cohort
            ),
        }.get(self.way, lambda peer: os.urandom(PROOF_BYTES))
        proofs = dict(zip(accused, map(made, accused), strict=True))
        if agreed.suite.hybrid:
            proofs = dict.fromkeys(accused, bytes(PROOF_BYTES))
        bodies = [
            complaint_body(self.node, peer, deal_hash(peer, dealt), proofs[peer])
            for peer, dealt in zip(accused, disputed.deals, strict=True)
        ]
        attempt.accused = attempt.complained = accused
        rows = zip(
            agreed.neighbours(self.node, set(attempt.sharers)), cut(attempt.acceptance, 32), strict=True
        )
        attempt.acceptance = b"".join(bytes(32) if peer in accused else row for peer, row in rows)
        signatures = b"".join(self._signed(attempt, agreed.cohort, body) for body in bodies)
        return tag_reply(
            attempt, write(Complaints(agreed.cohort, accused, b"".join(proofs.values()), signatures))
        )

    # --- reveals

    def _reveal(self, attempt):
        reply_key, suite = attempt.reply_key, attempt.agreed.suite
        reply = super()._reveal(attempt)
        said = read(reply[:-SEAL_BYTES], Revealed)
        changed = {
            "wrong reveal": {"shares": b"".join(new_secret() for _ in range(len(said.shares) // 32))},
            "wrong reveal of one": {"shares": new_secret() + said.shares[32:]},
            "reveal off by the prime": {
                "shares": b"".join(
                    (int.from_bytes(share, "big") + PRIME).to_bytes(32, "big")
                    for share in cut(said.shares, 32)
                )
            },
            "wrong mask keys": {"mask_keys": os.urandom(len(said.mask_keys))},
            "false complaint, then wrong mask keys": {"mask_keys": os.urandom(len(said.mask_keys))},
            "no mask keys": {"mask_keys": bytes(len(said.mask_keys))},
        }.get(self.way)
        if changed is None:
            return reply
        attempt.reply_key = reply_key
        said = replace(said, **changed)
        body = reveal_body(self.node, said, attempt.acceptance)
        return tag_reply(
            attempt, write(replace(said, signature=sign_by(suite, self.key, attempt.context, body)))
        )


def _of_two_mask_seeds(cohort, node, own_seed, mask_seed, threshold, points):
    """A deal whose first shares of the mask seed give it, and whose others do not; all fit their commitments."""
    own, mask, blinding = (polynomial(seed, threshold) for seed in (own_seed, mask_seed, new_secret()))
    label, shares, hashes = label_of(cohort, node), [], []
    rows = list(zip(points, *values([own, mask, blinding], points), strict=True))
    for place, (point, *of_holder) in enumerate(rows):
        of_holder[1] = (of_holder[1] + (place >= threshold)) % PRIME
        our, their, blind = (value.to_bytes(32, "big") for value in of_holder)
        shares.append(our + their)
        hashes += [private_commitment(label, point, our, blind), mask_commitment(label, point, their)]
    commitments = b"".join(hashes)
    challenge = challenge_of(cohort, node, digest_of(commitments))
    proof = b"".join(((blind + challenge * our) % PRIME).to_bytes(32, "big") for _, our, _, blind in rows)
    return Deal(tuple(shares), commitments, proof, seed_commitment(label, own_seed))


def until_checks(cohort, dimension):
    """Carry an attempt until all have dealt; return it, and by node the seed of its key for shares."""
    attempt, vectors = cohort.attempt(dimension), cohort.vectors(dimension)
    cohort.exchange(attempt, "advertise", attempt.proposal(), vectors)
    cohort.exchange(attempt, "share", attempt.advance(), vectors)
    return attempt, {node: each.attempts[attempt.context].share_seed for node, each in cohort.nodes.items()}


def accusation(attempt, victim, keys, proofs):
    """Return evidence of complaints about an honest deal, by holder, signed with these keys."""
    agreed, deal_of = attempt._agreed, attempt._deals[victim]
    said = {}
    for holder, key in keys.items():
        body = complaint_body(holder, victim, deal_hash(victim, deal_of), proofs[holder])
        signature = sign_by(agreed.suite, key, agreed.cohort, body)
        said[holder] = Complaints(agreed.cohort, (victim,), proofs[holder], signature)
    proposal = read(next(iter(attempt.proposal().values())), Proposal)
    return AttemptEvidence(proposal, CohortAdverts(agreed.context, agreed.adverts), {victim: deal_of}, said)


def _of_the_twist():
    while on_curve(key := bytes([*os.urandom(31), 0])):
        pass
    return key


WAYS = (
    "small share key",
    "small mask key",
    "share key of the twist",
    "mask key of the twist",
    "another mask key",
    "degree too high",
    "degree hidden",
    "another mask seed",
    "another mask seed, then silence",
    "wrong shares",
    "a wrong share to some",
    "wrong shares of the mask",
    "shares too large",
    "garbage seals",
    "garbage to one",
    "unsigned deal",
    "garbage commitments",
    "garbage proof",
    "another seed committed",
    "proof cut",
    "false complaint of all",
    "false complaint with a proof",
    "false complaint with another's proof",
    "wrong reveal",
    "wrong reveal of one",
    "reveal off by the prime",
    "wrong mask keys",
    "no mask keys",
    "false complaint, then wrong mask keys",
    "nonsense",
)
# Of a hybrid suite; in another one these nodes are honest.
HYBRID_WAYS = (
    "another KEM key",
    "another escrow",
    "another mask secret committed",
    "another ciphertext",
    "another ciphertext to one",
)
