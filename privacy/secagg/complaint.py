"""Complaint about a sealed share: the secret that its two nodes agree on, with a proof of its correctness.

With it any party can open the dealer's seal for the holder, and identify the cheater. The proof is Chaum and Pedersen's
of equal logarithms (Wallet databases with observers, CRYPTO 1992), made non-interactive by Fiat and Shamir, on the
curve of Ed25519 (RFC 8032), which is that of X25519 (RFC 7748) in other coordinates. It works in the subgroup of prime
order: an X25519 key is a multiple of 8, which takes any other part away.

A holder discloses a secret only against a dealer that has signed an invalid deal: then one of the two is the adversary,
and knows the secret already.

The library has no arithmetic of points, so it stands here, in Python's integers, and takes no constant time: `_times`
adds once for each bit of its scalar that is set, and a product or an inverse takes the longer the larger its numbers
are. That is harmless for these reasons. Two of all numbers here are secret: the holder's key for shares and the nonce
of a proof, and only `prove` handles them. Both are blinded by a fresh random multiple of the order before a point is
multiplied, so that the duration depends only on values that never repeat. The key lives for one attempt, signs at most
one proof for each dealer that it complains of, and is erased with the last one; under it nothing is sealed but shares
of this attempt. All other numbers, those of `open_proof`, `on_curve` and every point, are public.
"""

import os

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from .refusal import Reason, Refused
from .shamir import PRIME
from .suite import KEY_BYTES, public_of
from .transcript import Purpose, digest

PROOF_BYTES = 3 * 32  # the secret's point, the challenge and the answer
ORDER = 2**252 + 27742317777372353535851937790883648493  # of the base point, RFC 8032, section 5.1
_D = -121665 * pow(121666, -1, PRIME) % PRIME  # of the curve's equation, below
_ROOT = pow(2, (PRIME - 1) // 4, PRIME)  # of -1
_COFACTOR = 8
_NONCE_BYTES = 64  # uniform modulo the order, but for 2**-259
_BLINDING_BITS = 128  # of the random multiple of the order, see `_blinded`

Point = tuple[int, int, int, int]  # extended coordinates X, Y, Z, T of RFC 8032, section 5.1.4
_NEUTRAL: Point = (0, 1, 1, 0)


def prove(key: X25519PrivateKey, peer: bytes, context: bytes) -> bytes:
    """Return the secret that a key and its peer's agree on, with the proof, `PROOF_BYTES`.

    Args:
      key: the holder's own.
      peer: public key of the dealer, 32 bytes.
      context: in which the proof counts, 32 bytes.

    Raises:
      Refused: MALFORMED where the peer's key is no point of the curve.
    """
    holder, base = _lifted(public_of(key)), _times(_COFACTOR, _BASE)
    theirs = _times(_COFACTOR, _lifted(peer))
    scalar = bytearray(key.private_bytes_raw())
    scalar[0] &= 248  # clamping, RFC 7748, section 5
    scalar[31] = scalar[31] & 127 | 64
    exponent = int.from_bytes(scalar, "little") // _COFACTOR % ORDER
    # An X25519 key stands for two points, of which `_lifted` takes one: the exponent of the other has the other sign.
    if _packed(_times(_blinded(exponent), base)) != _packed(holder):
        exponent = ORDER - exponent
    secret = _times(_blinded(exponent), theirs)
    nonce = int.from_bytes(os.urandom(_NONCE_BYTES), "big") % ORDER
    first, second = (_times(_blinded(nonce), point) for point in (base, theirs))
    challenge = _challenge(context, holder, theirs, secret, first, second)
    answer = (nonce + challenge * exponent) % ORDER
    return b"".join((_packed(secret), challenge.to_bytes(32, "little"), answer.to_bytes(32, "little")))


def open_proof(proof: bytes, holder_key: bytes, peer: bytes, context: bytes) -> bytes:
    """Return the secret that a proof of `prove` discloses, as X25519 gives it, 32 bytes.

    Arguments as of `prove`; `holder_key` is the holder's public key, 32 bytes.

    Raises:
      Refused: BAD_SIGNATURE where the proof does not hold.
    """
    packed, challenge_bytes, answer = (proof[at : at + 32] for at in (0, 32, 64))
    try:
        holder, secret = _lifted(holder_key), _unpacked(packed)
        theirs, base = _times(_COFACTOR, _lifted(peer)), _times(_COFACTOR, _BASE)
    except Refused as refused:
        raise Refused(Reason.BAD_SIGNATURE, "a proof about what is no point of the curve") from refused
    challenge, scalar = int.from_bytes(challenge_bytes, "little"), int.from_bytes(answer, "little")
    first = _plus(_times(scalar, base), _minus(_times(challenge, holder)))
    second = _plus(_times(scalar, theirs), _minus(_times(challenge, secret)))
    is_malformed = len(proof) != PROOF_BYTES or max(challenge, scalar) >= ORDER
    is_outside = _packed(_times(ORDER, secret)) != _packed(_NEUTRAL)  # of the subgroup of prime order
    if is_malformed or is_outside or _challenge(context, holder, theirs, secret, first, second) != challenge:
        raise Refused(Reason.BAD_SIGNATURE, "not a proof of these two keys in this context")
    return _montgomery(secret)


def disclose(key: X25519PrivateKey, peer: bytes, context: bytes) -> bytes:
    """Return the result of `prove`, or zeros for a key off the curve, itself evidence; arguments as of `prove`."""
    return prove(key, peer, context) if on_curve(peer) else bytes(PROOF_BYTES)


def on_curve(public: bytes) -> bool:
    """Return whether an X25519 public key is a point of the curve, as every one that is made from a private key is."""
    try:
        _lifted(public)
    except Refused:
        return False
    return True


def _blinded(scalar: int) -> int:
    """Return a random scalar of fixed length in bits with the same multiples of points in the subgroup of prime order."""
    factor = int.from_bytes(os.urandom(_BLINDING_BITS // 8), "big") | 3 << _BLINDING_BITS
    return scalar % ORDER + factor * ORDER


def _challenge(context: bytes, *points: Point) -> int:
    return int.from_bytes(digest(Purpose.COMPLAINT, context, *map(_packed, points)), "big") % ORDER


# --- the curve -x^2 + y^2 = 1 + d x^2 y^2, after RFC 8032, section 5.1.4


def _plus(p: Point, q: Point) -> Point:
    """Return the sum of two points; letters as in the RFC."""
    a = (p[1] - p[0]) * (q[1] - q[0])
    b = (p[1] + p[0]) * (q[1] + q[0])
    c = 2 * p[3] * q[3] * _D % PRIME
    d = 2 * p[2] * q[2]
    e, f, g, h = (b - a) % PRIME, (d - c) % PRIME, (d + c) % PRIME, (b + a) % PRIME
    return e * f % PRIME, g * h % PRIME, f * g % PRIME, e * h % PRIME


def _minus(point: Point) -> Point:
    return -point[0] % PRIME, point[1], point[2], -point[3] % PRIME


def _times(scalar: int, point: Point) -> Point:
    total = _NEUTRAL
    for bit in f"{scalar:b}":
        total = _plus(total, total)
        if bit == "1":
            total = _plus(total, point)
    return total


def _packed(point: Point) -> bytes:
    """Return the encoding of a point, 32 bytes: y, and the lowest bit of x in the highest bit."""
    inverse = pow(point[2], -1, PRIME)
    x, y = point[0] * inverse % PRIME, point[1] * inverse % PRIME
    return (y | (x & 1) << 255).to_bytes(32, "little")


def _unpacked(packed: bytes) -> Point:
    number = int.from_bytes(packed, "little")
    point = _with_y(number & (1 << 255) - 1)
    return point if point[0] & 1 == number >> 255 else _minus(point)


def _with_y(y: int) -> Point:
    """Return the point with this y and an even x.

    Raises:
      Refused: MALFORMED if there is none.
    """
    square = (y * y - 1) * pow(_D * y * y + 1, -1, PRIME) % PRIME
    x = pow(square, (PRIME + 3) // 8, PRIME)
    if x * x % PRIME != square:
        x = x * _ROOT % PRIME
    if x * x % PRIME != square:
        raise Refused(Reason.MALFORMED, "no point of the curve")
    x = PRIME - x if x & 1 else x
    return x, y % PRIME, 1, x * y % PRIME


def _lifted(public: bytes) -> Point:
    """Return the point with an even x, of the two of an X25519 key u: y = (u - 1) / (u + 1)."""
    u = int.from_bytes(public[:KEY_BYTES], "little") & (1 << 255) - 1
    if (u + 1) % PRIME == 0:
        raise Refused(Reason.MALFORMED, "no point of the curve")
    return _with_y((u - 1) * pow(u + 1, -1, PRIME) % PRIME)


def _montgomery(point: Point) -> bytes:
    """Return the u of a point, u = (1 + y) / (1 - y)."""
    above, below = point[2] + point[1], (point[2] - point[1]) % PRIME
    u = above * pow(below, -1, PRIME) % PRIME if below else 0  # as X25519 has it for the neutral point
    return u.to_bytes(KEY_BYTES, "little")


_BASE = _with_y(4 * pow(5, -1, PRIME) % PRIME)
