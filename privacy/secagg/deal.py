"""Deal of a node: shares of its two seeds for its neighbours, which can be checked before anything depends on them.

The dealer commits to each holder's two shares by hashes. It proves that the shares of its private seed lie on one
polynomial b of degree t - 1 with a second, random polynomial r, to whose values it commits in the same hashes: a hash
over all commitments gives a challenge c, and the dealer publishes the values of h = r + c b at the holders' points
(Pedersen's blinding, CRYPTO 1991, with the challenge of Fiat and Shamir). The server checks that h is of degree t - 1.
A holder of b(x) computes r(x) = h(x) - c b(x) and compares the hash; so does the server, for every share that is
finally revealed. The polynomial h reveals nothing about b, since r is uniform.

The shares of the mask seed have commitments without a proof: no proof at this cost could show that they give the key of
the advert. If they do not, the survivors reveal their pairwise masks themselves.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from .refusal import Reason, Refused
from .shamir import PRIME, SECRET_BYTES, new_secret, number_of, polynomial, values
from .transcript import Purpose, digest

# A commitment is 24 bytes of SHA-256: two values with one commitment take 2**96 hashes, longer than an attempt lasts.
SEED_COMMITMENT_BYTES = 24
# Two commitments for each holder: to its share of the private seed, and to its share of the mask seed.
COMMITMENT_BYTES = 2 * SEED_COMMITMENT_BYTES

# Soundness. Where the honest holders' values of r or of b lie on no polynomial of degree t - 1, those of r + c b lie on
# one for at most one of the p challenges c: their distance from it is linear in c, and not zero. The challenge is a hash
# of all values. Each hash that a dealer tries passes with probability 1 / p, and 2**128 of them with 2**-126: one
# challenge is enough.
SOUNDNESS_BITS = 254


@dataclass(frozen=True)
class Deal:
    """Deal of a node to its holders.

    Attributes:
      shares: for each holder its share of the private seed, then of the mask seed, 64 bytes; secret.
      commitments: `COMMITMENT_BYTES` for each holder.
      proof: value of h at each holder's point, 32 bytes.
      seed: commitment to the private seed, `SEED_COMMITMENT_BYTES`.
    """

    shares: tuple[bytes, ...]
    commitments: bytes
    proof: bytes
    seed: bytes


@dataclass(frozen=True)
class Claim:
    """Values by which a dealer's shares are verified; they follow from its commitments.

    Attributes:
      label: hash of cohort and dealer with which every commitment begins, 32 bytes.
      challenge: c of the proof, below p.
    """

    label: bytes
    challenge: int


def deal(
    cohort: bytes, dealer: int, private_seed: bytes, mask_seed: bytes, threshold: int, points: Sequence[int]
) -> Deal:
    """Return shares of a node's seeds, with commitments and proof.

    Args:
      cohort: hash of the attempt's adverts, 32 bytes.
      dealer: the node.
      private_seed: its private seed, 32 bytes, below p.
      mask_seed: 32 bytes, below p.
      threshold: number of shares that give a seed, t.
      points: of the holders, ascending.
    """
    polynomials = [polynomial(seed, threshold) for seed in (private_seed, mask_seed, new_secret())]
    private_values, mask_values, blinding_values = values(polynomials, points)
    label = label_of(cohort, dealer)
    shares: list[bytes] = []
    hashes: list[bytes] = []
    for point, *row in zip(points, private_values, mask_values, blinding_values, strict=True):
        private, mask, blinding = (value.to_bytes(SECRET_BYTES, "big") for value in row)
        shares.append(private + mask)
        hashes += [private_commitment(label, point, private, blinding), mask_commitment(label, point, mask)]
    commitments = b"".join(hashes)
    challenge = challenge_of(cohort, dealer, digest_of(commitments))
    proof = b"".join(
        ((blinding + challenge * private) % PRIME).to_bytes(SECRET_BYTES, "big")
        for blinding, private in zip(blinding_values, private_values, strict=True)
    )
    return Deal(tuple(shares), commitments, proof, seed_commitment(label, private_seed))


def label_of(cohort: bytes, dealer: int) -> bytes:
    """Return the hash of cohort and dealer that every commitment begins with, 32 bytes."""
    return digest(Purpose.COMMITMENT, cohort, dealer)


def digest_of(commitments: bytes) -> bytes:
    """Return the hash of all commitments of a dealer, 32 bytes."""
    return hashlib.sha256(commitments).digest()


def challenge_of(cohort: bytes, dealer: int, commitments: bytes) -> int:
    """Return the challenge of a dealer's proof, below p; arguments as of `deal`, and the hash of all commitments."""
    return int.from_bytes(digest(Purpose.CHALLENGE, cohort, dealer, commitments), "big") % PRIME


@lru_cache(maxsize=1 << 12)  # the holders of a dealer's shares in one process
def claim_of(cohort: bytes, dealer: int, commitments: bytes) -> Claim:
    """Return the claim of a dealer; arguments as of `challenge_of`."""
    return Claim(label_of(cohort, dealer), challenge_of(cohort, dealer, commitments))


# The label and fields of fixed length are hashed without `frame`: this takes a microsecond, and a server makes n k of them.


def private_commitment(label: bytes, point: int, share: bytes, blinding: bytes) -> bytes:
    """Return the commitment to a holder's share of the private seed, and to the blinding polynomial there."""
    return hashlib.sha256(label + b"\0" + point.to_bytes(8, "big") + share + blinding).digest()[
        :SEED_COMMITMENT_BYTES
    ]


def mask_commitment(label: bytes, point: int, share: bytes) -> bytes:
    """Return the commitment to a holder's share of the mask seed."""
    return hashlib.sha256(label + b"\1" + point.to_bytes(8, "big") + share).digest()[:SEED_COMMITMENT_BYTES]


def seed_commitment(label: bytes, seed: bytes) -> bytes:
    """Return the commitment to a private seed, by which all of its shares are checked at once when they are revealed."""
    return hashlib.sha256(label + b"\2" + seed).digest()[:SEED_COMMITMENT_BYTES]


def secret_commitment(label: bytes, point: int, secret: bytes) -> bytes:
    """Return the commitment to the secret of the masks with a holder, which a hybrid dealer makes for the two."""
    return hashlib.sha256(label + b"\3" + point.to_bytes(8, "big") + secret).digest()[:SEED_COMMITMENT_BYTES]


def fits(claim: Claim, point: int, share: bytes, value: int | None, commitments: bytes) -> bool:
    """Return whether a share matches its dealer's commitment and, for a private seed, the dealer's polynomial.

    Args:
      claim: of the dealer.
      point: of the holder.
      share: 32 bytes.
      value: of the dealer's proof at this point; None for a share of a mask seed.
      commitments: of the dealer to this holder's shares, `COMMITMENT_BYTES`.
    """
    if value is None:
        return mask_commitment(claim.label, point, share) == commitments[SEED_COMMITMENT_BYTES:]
    blinding = (value - claim.challenge * int.from_bytes(share, "big")) % PRIME
    commitment = private_commitment(claim.label, point, share, blinding.to_bytes(SECRET_BYTES, "big"))
    return commitment == commitments[:SEED_COMMITMENT_BYTES]


def check_share(claim: Claim, point: int, pair: bytes, value: int, commitments: bytes) -> None:
    """Check that a pair, a holder's two shares of 64 bytes, is what its dealer committed to; arguments as of `fits`.

    Raises:
      Refused: BAD_SHARE.
    """
    private, mask = pair[:SECRET_BYTES], pair[SECRET_BYTES:]
    for share in (private, mask):
        number_of(share)  # refuses one that is not below p
    if not fits(claim, point, private, value, commitments) or not fits(claim, point, mask, None, commitments):
        raise Refused(Reason.BAD_SHARE, "a share that its dealer did not commit to, or on no polynomial")
