"""Encrypted shares of one dealer for one holder, with their verification by the holder and in a dispute."""

import hashlib
from bisect import bisect_left
from typing import NamedTuple

from .bindings import Agreement
from .deal import COMMITMENT_BYTES, check_share, claim_of, digest_of
from .hybrid import blocks_of
from .messages import SEALED_BYTES, SHARE_BYTES, SealedShares
from .refusal import Reason, Refused
from .suite import unseal


class EncryptedShares(NamedTuple):
    """Sealed shares of a dealer for a holder, and the values to verify them.

    Attributes:
      dealer: of the shares.
      holder: that may open them.
      sealed: of `SEALED_BYTES`.
      evidence: the dealer's commitments to the shares, the value of its proof, and the hash of all its commitments,
        `EVIDENCE_BYTES`.
      block: hybrid block that is sent with them; empty in a suite without ML-KEM.
    """

    dealer: int
    holder: int
    sealed: bytes
    evidence: bytes
    block: bytes = b""

    def opened(self, agreed: Agreement, key: bytes) -> bytes:
        """Return the holder's shares of the private seed and of the mask seed, 64 bytes.

        Args:
          agreed: the cohort.
          key: common key of dealer and holder, 32 bytes.

        Raises:
          Refused: BAD_SHARE where they do not open, or are not what the dealer committed to.
        """
        pair = unseal(
            agreed.suite, key, self.sealed, agreed.share_label(self.dealer, self.holder, self.block)
        )
        if len(pair) != 2 * SHARE_BYTES:
            raise Refused(Reason.BAD_SHARE, "a sealed pair of another length")
        commitments, value = self.evidence[:COMMITMENT_BYTES], self.evidence[COMMITMENT_BYTES:][:SHARE_BYTES]
        digest = self.evidence[COMMITMENT_BYTES + SHARE_BYTES :]
        claim = claim_of(agreed.cohort, self.dealer, digest)
        point = agreed.points[self.holder]
        check_share(claim, point, pair, int.from_bytes(value, "big"), commitments)
        return pair


def acceptance(evidence: bytes, block: bytes) -> bytes:
    """Return the hash of what a dealer committed to, 32 bytes; a holder signs it, so that no other deal convicts it.

    Args:
      evidence: as `EncryptedShares` has it, `EVIDENCE_BYTES`.
      block: hybrid block of the same shares; empty in a suite without ML-KEM.
    """
    return hashlib.sha256(evidence + block).digest()


def encrypted_shares_of(agreed: Agreement, dealer: int, holder: int, signed: SealedShares) -> EncryptedShares:
    """Return a holder's encrypted shares from its dealer's whole deal.

    Raises:
      Refused: MALFORMED, where the deal is not of one share for each neighbour.
    """
    check_lengths(agreed, dealer, signed)
    index = index_of(agreed, dealer, holder)
    block = blocks_of(agreed, dealer, signed.kem).get(holder, b"")
    commitments = cut(signed.commitments, COMMITMENT_BYTES)[index]
    row = b"".join((commitments, cut(signed.proof, SHARE_BYTES)[index], digest_of(signed.commitments)))
    return EncryptedShares(dealer, holder, cut(signed.sealed, SEALED_BYTES)[index], row, block)


def check_lengths(agreed: Agreement, dealer: int, signed: SealedShares) -> None:
    """Check that a deal has a share, its commitments and a value of the proof for each neighbour.

    Raises:
      Refused: MALFORMED.
    """
    count, lengths = len(agreed.neighbours(dealer)), (SEALED_BYTES, COMMITMENT_BYTES, SHARE_BYTES)
    sizes = len(signed.sealed), len(signed.commitments), len(signed.proof)
    if sizes != tuple(count * length for length in lengths):
        raise Refused(Reason.MALFORMED, "not one sealed pair of shares for each neighbour, with its proof")


def index_of(agreed: Agreement, dealer: int, holder: int) -> int:
    """Return the index of a holder among a dealer's neighbours.

    Raises:
      Refused: MALFORMED, where it is none of them.
    """
    peers = agreed.neighbours(dealer)
    index = bisect_left(peers, holder)
    if peers[index : index + 1] != (holder,):
        raise Refused(Reason.MALFORMED, "a holder that the dealer deals nothing to")
    return index


def cut(data: bytes, size: int) -> list[bytes]:
    """Return the pieces of equal size that bytes consist of."""
    return [data[at : at + size] for at in range(0, len(data), size)]
