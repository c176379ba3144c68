"""Double signatures of suite 3: Ed25519 and, beside it, ML-DSA-65 (FIPS 204) over the same bytes; both must hold.

The ML-DSA key is derived by HKDF from the seed of the Ed25519 key, so that an identity stays one secret file. An
attacker that breaks Ed25519 learns the scalar, a half of SHA-512 of the seed, and not the seed.
"""

import hashlib
from functools import lru_cache

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PrivateKey, MLDSA65PublicKey

from .refusal import Reason, Refused
from .suite import KEY_BYTES, ML_DSA_SIGNATURE_BYTES, SIGNATURE_BYTES, Suite, derive, public_of, sign, verify
from .transcript import HASH_BYTES, Purpose, frame

ML_DSA_KEY_BYTES = 1952  # a public key, FIPS 204, table 2
BOTH_BYTES = KEY_BYTES + HASH_BYTES  # an Ed25519 public key and the hash of its ML-DSA key
AUTHORITY_BYTES = SIGNATURE_BYTES + ML_DSA_SIGNATURE_BYTES + ML_DSA_KEY_BYTES  # its double signature


def post_quantum_public(identity: Ed25519PrivateKey) -> bytes:
    """Return the public half of an identity's ML-DSA-65 key, `ML_DSA_KEY_BYTES`."""
    return _key(identity.private_bytes_raw()).public_key().public_bytes_raw()


def both_of(identity: Ed25519PrivateKey) -> bytes:
    """Return an identity's Ed25519 public key and the hash of its ML-DSA key, `BOTH_BYTES`."""
    return public_of(identity) + hashlib.sha256(post_quantum_public(identity)).digest()


def sign_by(suite: Suite, identity: Ed25519PrivateKey, context: bytes, body: bytes) -> bytes:
    """Return the signature of a body as the suite has it; arguments as of `suite.sign`."""
    first = sign(identity, context, body)
    return first + _sign_second(identity, context, body) if suite.doubly_signed else first


def _sign_second(identity: Ed25519PrivateKey, context: bytes, body: bytes) -> bytes:
    """Return the ML-DSA-65 signature of a body, `ML_DSA_SIGNATURE_BYTES`."""
    return _key(identity.private_bytes_raw()).sign(frame(Purpose.SIGNATURE, context, body))


def verify_second(public: bytes, context: bytes, body: bytes, signature: bytes) -> None:
    """Check that an ML-DSA-65 signature holds; arguments as of `suite.verify`, with a key of `ML_DSA_KEY_BYTES`.

    Raises:
      Refused: BAD_SIGNATURE.
    """
    try:
        key = MLDSA65PublicKey.from_public_bytes(public)
        key.verify(signature, frame(Purpose.SIGNATURE, context, body))
    except (InvalidSignature, ValueError) as error:
        raise Refused(Reason.BAD_SIGNATURE, "not signed by this ML-DSA key in this context") from error


def verify_by(
    suite: Suite, public: bytes, post_quantum: bytes, context: bytes, body: bytes, signature: bytes
) -> None:
    """Check a signature of `sign_by`: in suite 3 both halves must hold, other suites have one.

    Arguments as of `sign_by`, and the signer's Ed25519 and ML-DSA keys; the latter is empty in a suite without it.

    Raises:
      Refused: BAD_SIGNATURE.
    """
    if len(signature) != suite.signature_bytes:
        raise Refused(Reason.BAD_SIGNATURE, "not as many signatures as the suite has")
    verify(public, context, body, signature[:SIGNATURE_BYTES])
    if suite.doubly_signed:
        verify_second(post_quantum, context, body, signature[SIGNATURE_BYTES:])


def sign_as_authority(
    authority: Ed25519PrivateKey, context: bytes, body: bytes, *, doubly: bool = False
) -> bytes:
    """Return an authority's signature of a body, `SIGNATURE_BYTES`, or `AUTHORITY_BYTES` if it signs doubly.

    Args:
      authority: its key.
      context: in which the signature counts, 32 bytes.
      body: the bytes to sign.
      doubly: whether its ML-DSA key signs as well, and is part of the signature.
    """
    first = sign(authority, context, body)
    if not doubly:
        return first
    return first + _sign_second(authority, context, body) + post_quantum_public(authority)


def verify_authority(public: bytes, context: bytes, body: bytes, signature: bytes) -> None:
    """Check that an authority made a signature by `sign_as_authority`.

    Arguments as of `sign_as_authority`, and the authority's Ed25519 key; with the hash of its ML-DSA key after it both
    must have signed.

    Raises:
      Refused: MALFORMED, or BAD_SIGNATURE.
    """
    if len(signature) not in (SIGNATURE_BYTES, AUTHORITY_BYTES):
        raise Refused(Reason.MALFORMED, f"a signature of {len(signature)} bytes")
    verify(public[:KEY_BYTES], context, body, signature[:SIGNATURE_BYTES])
    if len(public) == BOTH_BYTES:
        second = signature[-ML_DSA_KEY_BYTES:]
        if hashlib.sha256(second).digest() != public[KEY_BYTES:]:
            raise Refused(Reason.BAD_SIGNATURE, "the authority's ML-DSA key did not sign")
        verify_second(second, context, body, signature[SIGNATURE_BYTES:-ML_DSA_KEY_BYTES])


@lru_cache(maxsize=1 << 10)  # simulated nodes in one process sign again and again
def _key(seed: bytes) -> MLDSA65PrivateKey:
    return MLDSA65PrivateKey.from_seed_bytes(derive(seed, frame(Purpose.ML_DSA)))
