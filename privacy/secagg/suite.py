"""Cipher suites, by number: key agreement, key derivation, authenticated encryption and signatures.

X25519 (RFC 7748), HKDF-SHA256 (RFC 5869), Ed25519 (RFC 8032), AES-256-GCM (NIST SP 800-38D) and ChaCha20-Poly1305 (RFC
8439), all from `cryptography`. Suites differ in the cipher, which encrypts shares and generates masks; in whether keys
depend on ML-KEM-768 (FIPS 203) too, see `hybrid`; and in whether ML-DSA-65 (FIPS 204) signs in addition to Ed25519, see
`double_signature`.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from .refusal import Reason, Refused
from .transcript import Purpose, frame, framed

KEY_BYTES = 32
KEM_KEY_BYTES = 2 * 1184  # a public key of ML-KEM-768 for shares, and one for masks
NONCE_BYTES = 12
TAG_BYTES = 16
SIGNATURE_BYTES = 64
ML_DSA_SIGNATURE_BYTES = 3309  # FIPS 204, table 2

# Arguments: a 12-byte nonce, n zeros, and a buffer of n + TAG_BYTES bytes, the first n of which receive the key stream.
KeyStream = Callable[[bytes, memoryview, memoryview], object]


def _aes_stream(key: bytes) -> KeyStream:
    # GCM's own counter starts at block 2 of its nonce, and on wide processors it runs twice as fast as CTR.
    cipher = AESGCM(key)
    return lambda nonce, zeros, room: cipher.encrypt_into(nonce, zeros, None, room)


def _chacha_stream(key: bytes) -> KeyStream:
    first = (1).to_bytes(4, "little")
    cipher = Cipher(ChaCha20(key, bytes(16)), None).encryptor()

    def stream(nonce: bytes, zeros: memoryview, room: memoryview) -> None:
        cipher.reset_nonce(first + nonce)
        cipher.update_into(zeros, room)

    return stream


@dataclass(frozen=True)
class Suite:
    """Cipher suite, which the terms of an attempt choose by its number.

    Attributes:
      number: number in the terms.
      name: names of the primitives, for display.
      aead: function of a 32-byte key that returns the authenticated cipher.
      stream: function of a 32-byte key that returns the key stream of masks.
      hybrid: whether keys depend on ML-KEM-768 in addition to X25519.
      doubly_signed: whether ML-DSA-65 signs in addition to Ed25519, see `double_signature`.
    """

    number: int
    name: str
    aead: Callable[[bytes], AESGCM | ChaCha20Poly1305] = field(repr=False)
    stream: Callable[[bytes], KeyStream] = field(repr=False)
    hybrid: bool = False
    doubly_signed: bool = False

    @property
    def kem_key_bytes(self) -> int:
        """Length of a node's public ML-KEM keys in bytes; 0 without ML-KEM."""
        return KEM_KEY_BYTES if self.hybrid else 0

    @property
    def signature_bytes(self) -> int:
        """Length of a node's signature in bytes."""
        return SIGNATURE_BYTES + (ML_DSA_SIGNATURE_BYTES if self.doubly_signed else 0)


SUITES = {
    suite.number: suite
    for suite in (
        Suite(1, "X25519, HKDF-SHA256, AES-256-GCM, Ed25519", AESGCM, _aes_stream),
        # Against an adversary that records messages today and has a quantum computer later.
        Suite(
            2, "X25519 and ML-KEM-768, HKDF-SHA256, AES-256-GCM, Ed25519", AESGCM, _aes_stream, hybrid=True
        ),
        # Against an adversary that has a quantum computer while a federation runs.
        Suite(
            3,
            "X25519 and ML-KEM-768, HKDF-SHA256, AES-256-GCM, Ed25519 and ML-DSA-65",
            AESGCM,
            _aes_stream,
            hybrid=True,
            doubly_signed=True,
        ),
        # For processors without AES instructions.
        Suite(4, "X25519, HKDF-SHA256, ChaCha20-Poly1305, Ed25519", ChaCha20Poly1305, _chacha_stream),
    )
}


def suite_of(number: int) -> Suite:
    """Return the suite with this number.

    Raises:
      Refused: POLICY if this version has no such suite.
    """
    if number not in SUITES:
        raise Refused(Reason.POLICY, f"suite {number} is not known; known are {sorted(SUITES)}")
    return SUITES[number]


def new_key() -> X25519PrivateKey:
    """Return a new, random private key for key agreement."""
    return X25519PrivateKey.generate()


def key_from_seed(seed: bytes, purpose: Purpose = Purpose.MASK_KEY) -> X25519PrivateKey:
    """Derive a private key for key agreement from a uniform 32-byte seed; the key reveals nothing about the seed."""
    return X25519PrivateKey.from_private_bytes(derive(seed, frame(purpose)))


def public_of(key: X25519PrivateKey | Ed25519PrivateKey) -> bytes:
    """Return the public key of a private key, 32 bytes."""
    return key.public_key().public_bytes_raw()


def derive(secret: bytes, info: bytes) -> bytes:
    """Derive a 32-byte key from a uniform secret of at least 32 bytes by HKDF-SHA256 without salt.

    Args:
      secret: uniform.
      info: purpose and context of the key, from `transcript.frame`.
    """
    return HKDF(SHA256(), KEY_BYTES, None, info).derive(secret)


def agree(key: X25519PrivateKey, peer: bytes, info: bytes, public: bytes = b"") -> bytes:
    """Return the common 32-byte key of two parties, derived from X25519 and both public keys in sorted order.

    Args:
      key: private key of one party.
      peer: public key of the other party, 32 bytes.
      info: purpose and context of the derived key.
      public: public key of `key`, if known; empty computes it.

    Raises:
      Refused: MALFORMED if `peer` is not a public key, or has low order, so that everybody knows the secret.
    """
    try:
        secret = key.exchange(_public(peer))
    except ValueError as error:
        raise Refused(Reason.MALFORMED, "not a usable X25519 public key") from error
    return pair_key(secret, public or public_of(key), peer, info)


def pair_key(secret: bytes, public: bytes, peer: bytes, info: bytes) -> bytes:
    """Return the common 32-byte key of two parties from their X25519 secret; see `agree`."""
    return derive(secret, _pair_opening(info) + b"".join(map(_framed_public, sorted((public, peer)))))


@lru_cache(maxsize=1 << 10)  # simulated nodes in one process agree with the same neighbours
def _public(key: bytes) -> X25519PublicKey:
    return X25519PublicKey.from_public_bytes(key)


_framed_public = lru_cache(maxsize=1 << 10)(framed)


@lru_cache(maxsize=16)  # a node derives the keys of all its pairs in one context
def _pair_opening(info: bytes) -> bytes:
    """Return how `frame` begins in `pair_key`, before both public keys."""
    return frame(Purpose.PAIR, info)


# Public keys with which X25519 gives everybody the same secret, RFC 7748, section 7: the points of order 1 to 8 of the
# curve and of its twist.
_PRIME = 2**255 - 19
_SMALL = {
    0,
    1,
    _PRIME - 1,
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
}


def check_public(public: bytes) -> None:
    """Check that an X25519 public key is in canonical form and not of low order.

    Raises:
      Refused: MALFORMED if the check fails.
    """
    number = int.from_bytes(public, "little")
    if number >= _PRIME or number in _SMALL:
        raise Refused(Reason.MALFORMED, "not a usable X25519 public key")


def seal(suite: Suite, key: bytes, plaintext: bytes, associated: bytes | memoryview) -> bytes:
    """Encrypt and authenticate; return a random nonce, the ciphertext and the tag, 28 bytes more than the plaintext.

    Args:
      suite: suite with the cipher.
      key: secret key, 32 bytes.
      plaintext: bytes to encrypt.
      associated: associated data, which are authenticated but not included in the result.
    """
    nonce = os.urandom(NONCE_BYTES)
    return nonce + suite.aead(key).encrypt(nonce, plaintext, associated)


def unseal(suite: Suite, key: bytes, sealed: bytes, associated: bytes | memoryview) -> bytes:
    """Return the plaintext of `sealed`, the result of `seal`; other arguments as of `seal`.

    Raises:
      Refused: BAD_SHARE if the ciphertext, the key or the associated data are not those of `seal`.
    """
    try:
        return suite.aead(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], associated)
    except (InvalidTag, ValueError) as error:
        raise Refused(Reason.BAD_SHARE, "does not open under this key and context") from error


def sign(key: Ed25519PrivateKey, context: bytes, body: bytes) -> bytes:
    """Return the 64-byte Ed25519 signature of a body.

    Args:
      key: private key of the signer.
      context: context in which the signature is valid, 32 bytes.
      body: bytes to sign.
    """
    return key.sign(frame(Purpose.SIGNATURE, context, body))


@lru_cache(maxsize=1 << 12)  # simulated nodes in one process check the same signatures
def verify(public: bytes, context: bytes, body: bytes, signature: bytes) -> None:
    """Check a signature of `sign` by the signer's public key; other arguments as of `sign`.

    Raises:
      Refused: BAD_SIGNATURE if the signature is invalid.
    """
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, frame(Purpose.SIGNATURE, context, body))
    except (InvalidSignature, ValueError) as error:
        raise Refused(Reason.BAD_SIGNATURE, "not signed by this key in this context") from error
