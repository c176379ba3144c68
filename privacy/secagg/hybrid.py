"""Hybrid keys of suite 2: beside each X25519 agreement one of ML-KEM-768 (FIPS 203); only both give the key.

Messages recorded today then stay secret if X25519 is broken later. ML-KEM agrees for one direction at a time. The
sender of shares encapsulates to the receiver's key for shares; the lower of two nodes encapsulates to the higher one's
key for masks. The latter secret must be recoverable from either node's mask seed, once that is opened: the higher one's
key is derived from its seed, and the lower one seals the secret under its own (`escrow`), which is public.

The lower node also commits to what both secrets give, in the deal that it signs. The higher one checks it before it
masks anything, so that afterwards anyone can tell the true secret from a false one, whichever of the two is lost.

Both secrets go into HKDF together, as in X-Wing (Barbosa et al., 2024), where ML-KEM's ciphertext need not be
bound again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey

from .bindings import Agreement
from .deal import SEED_COMMITMENT_BYTES, label_of, secret_commitment
from .refusal import Reason, Refused
from .suite import (
    KEM_KEY_BYTES,
    KEY_BYTES,
    NONCE_BYTES,
    TAG_BYTES,
    agree,
    derive,
    key_from_seed,
    public_of,
    seal,
    unseal,
)
from .transcript import Purpose, frame

CIPHERTEXT_BYTES = 1088
ESCROW_BYTES = KEY_BYTES + NONCE_BYTES + TAG_BYTES
# A block has a ciphertext for shares; from the lower node, then a ciphertext, escrow and commitment for masks.
_ESCROW = slice(2 * CIPHERTEXT_BYTES, 2 * CIPHERTEXT_BYTES + ESCROW_BYTES)
_MASK_BYTES = CIPHERTEXT_BYTES + ESCROW_BYTES + SEED_COMMITMENT_BYTES

Offered = Mapping[int, Mapping[int, bytes]]  # blocks by sender and receiver


@dataclass(frozen=True)
class Offer:
    """Material that a node makes for one neighbour: a block that travels, and secrets of 32 bytes.

    Attributes:
      block: ciphertext for shares; from the lower to the higher node also ciphertext, escrow and commitment for masks.
      share_secret: of the shares that the node seals for this neighbour.
      mask_secret: of the pair's masks, as `mask_secret` returns it; empty where the neighbour makes it.
    """

    block: bytes
    share_secret: bytes
    mask_secret: bytes


def kem_key(seed: bytes) -> MLKEM768PrivateKey:
    """Return the ML-KEM key that a 32-byte seed stands for."""
    return MLKEM768PrivateKey.from_seed_bytes(
        b"".join(derive(seed, frame(Purpose.KEM, half)) for half in (0, 1))
    )


def public_keys(share_seed: bytes, mask_seed: bytes) -> bytes:
    """Return a node's ML-KEM public keys for shares and for masks, of `KEM_KEY_BYTES` together."""
    return b"".join(kem_key(seed).public_key().public_bytes_raw() for seed in (share_seed, mask_seed))


def fits_keys(mask_seed: bytes, mask_key: bytes, kem_keys: bytes) -> bool:
    """Return whether a node's public keys for masks, of X25519 and of ML-KEM if it has any, are those of a mask seed."""
    fits_mask_key = public_of(key_from_seed(mask_seed)) == mask_key
    half = kem_keys[KEM_KEY_BYTES // 2 :]
    return fits_mask_key and (not half or kem_key(mask_seed).public_key().public_bytes_raw() == half)


def check_keys(keys: bytes) -> None:
    """Check that a node's ML-KEM public keys can be used.

    Raises:
      Refused: MALFORMED.
    """
    for at in (0, KEM_KEY_BYTES // 2):
        _public(keys[at : at + KEM_KEY_BYTES // 2])


def mixed(key: bytes, secret: bytes, info: bytes) -> bytes:
    """Return the key that is derived from both an X25519 key and an ML-KEM secret, 32 bytes."""
    return derive(key + secret, frame(Purpose.HYBRID, info))


def offer(agreed: Agreement, sender: int, receiver: int, mask_seed: bytes) -> Offer:
    """Make fresh secrets for a neighbour, and the block that brings them to it.

    Args:
      agreed: the cohort.
      sender: this node.
      receiver: the neighbour.
      mask_seed: this node's, 32 bytes, under which the escrow is sealed.

    Raises:
      Refused: MALFORMED if the neighbour's keys are invalid.
    """
    keys = agreed.by_node[receiver].kem_keys
    for_shares, for_masks = keys[: KEM_KEY_BYTES // 2], keys[KEM_KEY_BYTES // 2 :]
    share_secret, block = _public(for_shares).encapsulate()
    if sender > receiver:
        return Offer(block, share_secret, b"")
    kem_secret, ciphertext = _public(for_masks).encapsulate()
    escrow = seal(agreed.suite, _escrow_key(agreed, mask_seed, receiver), kem_secret, b"")
    secret = _mix(agreed, mask_seed, receiver, kem_secret)
    commitment = _commitment(agreed, sender, receiver, secret)
    return Offer(block + ciphertext + escrow + commitment, share_secret, secret)


def blocks(data: bytes, pairs: Sequence[tuple[int, int]]) -> list[bytes]:
    """Split concatenated blocks.

    Args:
      data: the blocks of all pairs.
      pairs: sender and receiver of each block, in their order.

    Raises:
      Refused: MALFORMED for another length.
    """
    pieces: list[bytes] = []
    offset = 0
    for sender, receiver in pairs:
        size = CIPHERTEXT_BYTES + (_MASK_BYTES if sender < receiver else 0)
        pieces.append(data[offset : offset + size])
        offset += size
    if offset != len(data):
        raise Refused(Reason.MALFORMED, "not one block of keys for each neighbour")
    return pieces


def blocks_of(agreed: Agreement, dealer: int, data: bytes) -> dict[int, bytes]:
    """Return the blocks of a deal by receiver; {} in a suite without ML-KEM.

    Raises:
      Refused: MALFORMED for another length.
    """
    peers = agreed.neighbours(dealer) if agreed.suite.hybrid else ()
    return dict(zip(peers, blocks(data, [(dealer, peer) for peer in peers]), strict=True))


def share_secret(share_seed: bytes, block: bytes) -> bytes:
    """Return the secret of the shares that a neighbour sealed, from its block."""
    return kem_key(share_seed).decapsulate(block[:CIPHERTEXT_BYTES])


def mask_secret(agreed: Agreement, mask_seed: bytes, node: int, peer: int, offered: Offered) -> bytes:
    """Return the secret of a pair's masks, of X25519 and of ML-KEM, from the mask seed of `node`, 32 bytes.

    Either node's seed gives the same. `offered` has the lower node's block; other arguments as of `offer`.

    Raises:
      Refused: BAD_SHARE if `node` is the lower one and its escrow does not open.
    """
    if peer < node:
        ciphertext = offered[peer][node][CIPHERTEXT_BYTES : 2 * CIPHERTEXT_BYTES]
        kem_secret = kem_key(mask_seed).decapsulate(ciphertext)
    else:
        key, escrow = _escrow_key(agreed, mask_seed, peer), offered[node][peer][_ESCROW]
        kem_secret = unseal(agreed.suite, key, escrow, b"")
    return _mix(agreed, mask_seed, peer, kem_secret)


def fits_commitment(agreed: Agreement, node: int, peer: int, secret: bytes, offered: Offered) -> bool:
    """Return whether the lower node of a pair committed to this secret of their masks, in its block in `offered`."""
    lower, higher = sorted((node, peer))
    commitment = offered[lower][higher][-SEED_COMMITMENT_BYTES:]
    return _commitment(agreed, lower, higher, secret) == commitment


def _commitment(agreed: Agreement, lower: int, higher: int, secret: bytes) -> bytes:
    return secret_commitment(label_of(agreed.cohort, lower), agreed.points[higher], secret)


def _mix(agreed: Agreement, mask_seed: bytes, peer: int, kem_secret: bytes) -> bytes:
    """Return the secret of a pair's masks from one node's mask seed and the pair's ML-KEM secret."""
    info = agreed.mask_info
    return mixed(agree(key_from_seed(mask_seed), agreed.by_node[peer].mask_key, info), kem_secret, info)


def _escrow_key(agreed: Agreement, mask_seed: bytes, peer: int) -> bytes:
    """Return the key under which a node seals for itself the ML-KEM secret of its masks with a peer."""
    return derive(mask_seed, frame(Purpose.ESCROW, agreed.cohort, peer))


def _public(key: bytes) -> MLKEM768PublicKey:
    try:
        return MLKEM768PublicKey.from_public_bytes(key)
    except ValueError as error:
        raise Refused(Reason.MALFORMED, "not a usable ML-KEM-768 public key") from error
