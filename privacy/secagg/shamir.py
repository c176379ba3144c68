"""Secret sharing of Shamir over the integers modulo p = 2**255 - 19 (How to share a secret, CACM 1979).

A secret and a share are numbers below p in 32 big-endian bytes. Python's integers take no constant time:
shares are made and joined on machines that their owners do not share with the adversary.
"""

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from math import prod

from .refusal import Reason, Refused

PRIME = 2**255 - 19
SECRET_BYTES = 32


def new_secret() -> bytes:
    """Return a uniform secret below p: 255 random bits, drawn again in the rare case that they are too large."""
    while True:
        number = int.from_bytes(os.urandom(SECRET_BYTES), "big") >> 1
        if number < PRIME:
            return number.to_bytes(SECRET_BYTES, "big")


def split(secret: bytes, threshold: int, points: Sequence[int]) -> list[bytes]:
    """Return one share for each point, of which any `threshold` give the secret and fewer say nothing of it.

    Args:
      secret: 32 bytes, below p, as `new_secret` draws them.
      threshold: from 1 to the number of points.
      points: distinct, from 1 to p - 1, known to everybody.

    Raises:
      ValueError: for arguments out of these ranges.
    """
    number = int.from_bytes(secret, "big")
    if len(secret) != SECRET_BYTES or number >= PRIME:
        raise ValueError("a secret is 32 bytes, below 2**255 - 19")
    if not 1 <= threshold <= len(points) or len(set(points)) != len(points):
        raise ValueError("points must be distinct, and no fewer than the threshold")
    if not all(0 < point < PRIME for point in points):
        raise ValueError("points lie between 0 and 2**255 - 19, without the ends")
    coefficients = [int.from_bytes(new_secret(), "big") for _ in range(threshold - 1)]
    return [_value(number, coefficients, point).to_bytes(SECRET_BYTES, "big") for point in points]


def combine(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """Return the secret that shares stand for.

    A wrong share gives a wrong secret, not an error: compare the result with a key or commitment made public
    before.

    Args:
      shares: 32 bytes each, by point; those in excess are not looked at.
      threshold: how many give the secret.

    Raises:
      Refused: TOO_FEW, or BAD_SHARE when a share is no 32-byte number below p.
    """
    if len(shares) < threshold:
        raise Refused(Reason.TOO_FEW, f"{len(shares)} shares of the {threshold} needed")
    points = tuple(sorted(shares)[:threshold])
    weights = _weights(points)
    total = sum(weight * _number(shares[point]) for weight, point in zip(weights, points, strict=True))
    return (total % PRIME).to_bytes(SECRET_BYTES, "big")


def _value(secret: int, coefficients: Sequence[int], point: int) -> int:
    """Return secret + c1 x + c2 x**2 + ... at a point, by Horner."""
    value = 0
    for coefficient in reversed(coefficients):
        value = (value + coefficient) * point % PRIME
    return (value + secret) % PRIME


def _number(share: bytes) -> int:
    number = int.from_bytes(share, "big")
    if len(share) != SECRET_BYTES or number >= PRIME:
        raise Refused(Reason.BAD_SHARE, "a share is 32 bytes, below 2**255 - 19")
    return number


# On a complete graph the same points serve for many secrets.
@lru_cache(maxsize=64)
def _weights(points: tuple[int, ...]) -> tuple[int, ...]:
    """Return Lagrange's weights at zero, of one inversion (Montgomery, Math. Comp. 48, 1987, section 10.3.1)."""
    every = prod(points) % PRIME
    below = [at * prod(other - at for other in points if other != at) % PRIME for at in points]
    before = list(accumulate(below, lambda left, right: left * right % PRIME, initial=1))
    inverse = pow(before.pop(), -1, PRIME)
    weights: list[int] = []
    for factor, product in zip(reversed(below), reversed(before), strict=True):
        weights.append(every * inverse * product % PRIME)
        inverse = inverse * factor % PRIME
    return tuple(reversed(weights))
