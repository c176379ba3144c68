"""Secret sharing of Shamir over the integers modulo p = 2**255 - 19 (How to share a secret, CACM 1979).

A secret and a share are numbers below p in 32 big-endian bytes. Python's integers take no constant time:
shares are made and joined on machines that their owners do not share with the adversary.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import prod
from operator import mul

import numpy as np

from .refusal import Reason, Refused

PRIME = 2**255 - 19
SECRET_BYTES = 32
_SMALL = 62  # bits that a machine's word holds beside a sign
_ONE = (1).to_bytes(SECRET_BYTES, "big")


def new_secret() -> bytes:
    """Return a uniform secret below p: 255 random bits, drawn again in the rare case that they are too large."""
    while True:
        number = int.from_bytes(os.urandom(SECRET_BYTES), "big") >> 1
        if number < PRIME:
            return number.to_bytes(SECRET_BYTES, "big")


def polynomial(secret: bytes, threshold: int) -> list[int]:
    """Return a random polynomial that is the secret at zero: `threshold` coefficients below p, the constant first.

    They are those of the falling powers 1, x, x (x - 1), x (x - 1) (x - 2), ...

    Args:
      secret: 32 bytes, below p, as `new_secret` draws them.
      threshold: number of its values that give the secret, at least 1.

    Raises:
      ValueError: for arguments out of these ranges.
    """
    number = int.from_bytes(secret, "big")
    if len(secret) != SECRET_BYTES or number >= PRIME:
        raise ValueError("a secret is 32 bytes, below 2**255 - 19")
    if threshold < 1:
        raise ValueError("a threshold is 1 or more")
    return [number, *(int.from_bytes(new_secret(), "big") for _ in range(threshold - 1))]


def values(polynomials: Sequence[Sequence[int]], points: Sequence[int]) -> list[list[int]]:
    """Return the value of each polynomial at each point, modulo p.

    All polynomials lie side by side in one integer, so that one step serves them all; it is reduced once at the end, since
    points are small.

    Args:
      polynomials: coefficients of falling powers as of `polynomial`, of one length.
      points: from 1 to p - 1.
    """
    most, length = max(points), len(polynomials[0])
    # Before its reduction, a value is below p times the sum of the point's powers.
    factors, bits, evaluate = [1] * length, most.bit_length() * length, _horner
    if most <= 2 * len(points):
        # A value is a sum of at most 2^most differences, of which that of order k is coefficient k times k!.
        factors, bits, evaluate = _factorials(length), most, _sums
    width = (255 + bits) // 8 + 1
    packed = [
        int.from_bytes(
            b"".join([(factor * each % PRIME).to_bytes(width, "little") for each in row]), "little"
        )
        for factor, row in zip(factors, zip(*polynomials, strict=True), strict=True)
    ]
    rows = [value.to_bytes(width * len(polynomials), "little") for value in evaluate(packed, points)]
    return [
        [int.from_bytes(row[start : start + width], "little") % PRIME for row in rows]
        for start in range(0, width * len(polynomials), width)
    ]


def _sums(differences: Sequence[int], points: Sequence[int]) -> list[int]:
    """Return the values at these points of the polynomial with these differences at 0, from order 0 on."""
    row = [0] * (max(points) + 1)
    for first in reversed(differences):
        row = list(accumulate(row[:-1], initial=first))
    return [row[point] for point in points]


def _horner(coefficients: Sequence[int], points: Sequence[int]) -> list[int]:
    """Return the values at these points of the polynomial with these coefficients of falling powers."""
    results: list[int] = []
    for point in points:
        last, value = min(len(coefficients) - 1, point), 0  # further falling powers are zero at this point
        for factor, coefficient in zip(range(point - last, point + 1), coefficients[last::-1], strict=True):
            value = value * factor + coefficient
        results.append(value)
    return results


@lru_cache(maxsize=8)
def _factorials(count: int) -> list[int]:
    """Return so many factorials modulo p, from that of 0 on."""
    return list(accumulate(range(1, count), lambda product, number: product * number % PRIME, initial=1))


def combine(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """Return the secret of these shares.

    A wrong share gives a wrong secret, not an error: compare the result with an earlier public key or commitment.

    Args:
      shares: 32 bytes each, by point; excess shares are ignored.
      threshold: number that gives the secret.

    Raises:
      Refused: TOO_FEW, or BAD_SHARE when a share is no 32-byte number below p.
    """
    if len(shares) < threshold:
        raise Refused(Reason.TOO_FEW, f"{len(shares)} shares of the {threshold} needed")
    points = tuple(sorted(shares)[:threshold])
    weights = _weights(points)
    total = sum(weight * number_of(shares[point]) for weight, point in zip(weights, points, strict=True))
    return (total % PRIME).to_bytes(SECRET_BYTES, "big")


@dataclass(frozen=True)
class Weights:
    """Weights w of the values of a polynomial at points x: `plain` has w, and `by_points` w x modulo p."""

    plain: Sequence[int]
    by_points: Sequence[int]

    def sums(self, numbers: Sequence[int]) -> tuple[int, int]:
        """Return the sums of w f and of w x f over the points for the values f, not reduced modulo p."""
        return sum(map(mul, self.plain, numbers)), sum(map(mul, self.by_points, numbers))


def weights_at(points: Sequence[int], plain: Sequence[int]) -> Weights:
    """Return the weights of these points, one for each."""
    return Weights(plain, [weight * point % PRIME for weight, point in zip(plain, points, strict=True)])


def opener(points: tuple[int, ...], threshold: int) -> list[int]:
    """Return random weights w with which the values of a polynomial f of degree below `threshold` give f(0).

    For any number `own` other than 0, the sum over the points x of w(x) (1 - x / own) f(x) is f(0) modulo p. If `own`
    is one of the points, its value does not count. w is Lagrange's weight at zero times the value of a random polynomial
    q which is 1 at zero: the points are enough for the degree of f q (1 - x / own).

    Args:
      points: distinct, from 1 to p - 1, more than `threshold`.
      threshold: of values that give the secret.
    """
    (spread,) = values([polynomial(_ONE, len(points) - threshold)], points)
    return [weight * factor % PRIME for weight, factor in zip(_weights(points), spread, strict=True)]


def codeword(points: Sequence[int], coefficients: int) -> dict[int, int]:
    """Return the value of a random polynomial at each point; zeros if it has no coefficients.

    Args:
      points: from 1 to p - 1.
      coefficients: how many.
    """
    (evaluations,) = values([polynomial(new_secret(), coefficients) if coefficients > 0 else [0]], points)
    return dict(zip(points, evaluations, strict=True))


def parity(points: Sequence[int], words: Mapping[int, int]) -> list[int]:
    """Return a random weight for each point, with which a polynomial of too high a degree is detected.

    For a polynomial of degree below a threshold t, the sum of weight times (point - x) times value is zero modulo p,
    whatever x is: x may therefore be a point whose value is unknown. For any other values the sum is zero with
    probability 1 / p (Cascudo and David, SCRAPE, ACNS 2017, section 2.1).

    Args:
      points: distinct, from 1 to p - 1.
      words: of `codeword`, with t + 1 coefficients fewer than there are points; drawn after the values are fixed, it
        may serve many sets of points.
    """
    return [words[at] * each % PRIME for at, each in zip(points, inverses(_spans(points)), strict=True)]


def number_of(share: bytes) -> int:
    """Return a share as a number.

    Raises:
      Refused: BAD_SHARE when it is no 32-byte number below p.
    """
    number = int.from_bytes(share, "big")
    if len(share) != SECRET_BYTES or number >= PRIME:
        raise Refused(Reason.BAD_SHARE, "a share is 32 bytes, below 2**255 - 19")
    return number


@lru_cache(maxsize=64)  # a complete graph uses the same points for many secrets
def _weights(points: tuple[int, ...]) -> tuple[int, ...]:
    """Return Lagrange's weights at zero."""
    numerator = prod(points) * (-1) ** (len(points) - 1) % PRIME
    denominators = [at * span % PRIME for at, span in zip(points, _spans(points), strict=True)]
    return tuple(numerator * inverse % PRIME for inverse in inverses(denominators))


def _spans(points: Sequence[int]) -> list[int]:
    """Return for each point the product of its differences to the others, modulo p."""
    max_point = max(points)
    at = np.array(points, np.int64 if max_point < 1 << _SMALL else object)
    differences = at[:, None] - at
    np.fill_diagonal(differences, 1)
    # Number of differences whose product a machine's word holds.
    group = _SMALL // max_point.bit_length() or 1
    products = np.multiply.reduceat(differences, range(0, len(points), group), axis=1)
    return [prod(row) % PRIME for row in products.tolist()]


def inverses(numbers: Sequence[int]) -> list[int]:
    """Return the inverse of each number modulo p, all by one inversion (Montgomery, Math. Comp. 48, 1987, 10.3.1)."""
    before = list(
        accumulate(numbers, lambda product, number: product * number % PRIME, initial=1)
    )  # products
    inverse = pow(before.pop(), -1, PRIME)
    reciprocals: list[int] = []
    for factor, product in zip(reversed(numbers), reversed(before), strict=True):
        reciprocals.append(inverse * product % PRIME)
        inverse = inverse * factor % PRIME
    return reciprocals[::-1]
