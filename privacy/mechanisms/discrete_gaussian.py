"""Exact discrete Gaussian noise on the integers, a million coordinates in about a tenth of a second.

The law is that of Canonne, Kamath and Steinke, "The Discrete Gaussian for Differential Privacy"
(arXiv:2004.00010), Definition 1: P[X = x] proportional to exp(-x^2 / (2 sigma^2)) for every integer x. The
sampler is Karney's ("Sampling exactly from the normal distribution", arXiv:1303.6257, section 3) on whole words:

1. |X| = stride * A + B, with A from P[A = a] proportional to exp(-(stride a)^2 / (2 sigma^2)), by inversion of a
   table, and B uniform in [0, stride);
2. keep it with probability exp(-(2 stride A B + B^2) / (2 sigma^2)), else start again;
3. a random sign; zero with a minus sign starts again.

Every comparison of a uniform real number with a threshold is first made on its leading 64 (table) or 53 (keep)
bits. Where these cannot decide, which happens less often than once in 2^45, more bits are drawn and the
comparison is finished in `PRECISION` decimal digits. So no float rounding ever shapes the law, and attacks on
floating-point noise (Mironov 2012) have nothing to hold. What remains is the cut of the table at `TAIL` standard
deviations, a statistical distance below 2^-128 for each coordinate.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Context, Decimal
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .randomness import Stream

PRECISION = 80  # decimal digits: 2^-265
TAIL = 14  # standard deviations: exp(-14^2 / 2) < 2^-141, below 2^-128 also after the sum over the tail
STRIDES_PER_SIGMA = 32  # keeps 98 of 100 proposals, with a table of about 450 to 900 rows
MAX_SIGMA = 2**40  # 2 * stride * A + B stays below 2^53, so float64 holds it exactly
_WORD = 2**64
_GUIDE_BITS = 16  # a word's first bits, which tell the row of 99 words in 100 without a search
_MANTISSA = 2.0**-53
_FLOAT_ERROR = 2.0**-46  # relative; exp, one product and one quotient of exact integers err by under 2^-50
_SPARE = 1.06  # proposals per wanted number: kept 98 of 100, and half of the zeros
_digits = Context(prec=PRECISION)


def sample(sigma: int, count: int, stream: Stream) -> NDArray[np.int64]:
    """Return `count` independent draws of the discrete Gaussian of parameter `sigma`.

    Args:
      sigma: scale in grid units, a whole number from 1 to 2**40.
      count: how many numbers, at least 0.
      stream: a cryptographic stream that serves nothing else.
    """
    if not 1 <= sigma <= MAX_SIGMA:
        raise ValueError(f"sigma={sigma} must lie in [1, 2**40]")
    table = _table(sigma)
    kept = [np.empty(0, np.int64)]
    missing = count
    while missing > 0:
        kept.append(_propose(table, int(missing * _SPARE) + 16, stream)[:missing])
        missing -= len(kept[-1])
    return np.concatenate(kept)


def largest(sigma: int) -> int:
    """Return a bound that no draw of parameter `sigma` exceeds in absolute value, little above `TAIL` sigma."""
    stride = _stride(sigma)
    return (TAIL * sigma // stride + 2) * stride - 1


def _stride(sigma: int) -> int:
    return 1 << max(0, (sigma // STRIDES_PER_SIGMA).bit_length() - 1)


@dataclass(frozen=True)
class _Table:
    sigma: int
    stride: int
    words: NDArray[np.uint64]  # leading 64 bits of P[A <= a]
    exact: tuple[Decimal, ...]  # the same to PRECISION digits
    guide: NDArray[
        np.int64
    ]  # for each value of a word's first bits: how many rows' words lie below that bucket


@lru_cache(maxsize=16)
def _table(sigma: int) -> _Table:
    stride = _stride(sigma)
    rows = TAIL * sigma // stride + 2
    twice_variance = Decimal(2 * sigma * sigma)
    weights = [
        _digits.exp(_digits.divide(Decimal(-((stride * a) ** 2)), twice_variance)) for a in range(rows)
    ]
    total = Decimal(0)
    cumulative: list[Decimal] = []
    for weight in weights:
        total = _digits.add(total, weight)
        cumulative.append(total)
    exact = tuple(_digits.divide(value, total) for value in cumulative)
    words = np.array(
        [min(int(_digits.multiply(value, Decimal(_WORD))), _WORD - 1) for value in exact], np.uint64
    )
    starts = np.array([bucket << (64 - _GUIDE_BITS) for bucket in range(1 << _GUIDE_BITS)], np.uint64)
    guide = np.append(np.searchsorted(words, starts, side="left"), len(words)).astype(np.int64)
    return _Table(sigma, stride, words, exact, guide)


def _propose(table: _Table, n: int, stream: Stream) -> NDArray[np.int64]:
    coarse = _invert(table, n, stream)
    bits = stream.uint64(n)
    fine = (bits & np.uint64(table.stride - 1)).astype(np.int64)
    negative = (bits >> np.uint64(63)).astype(bool)
    size = coarse * table.stride + fine
    keep = _keep(table, coarse, fine, stream) & ~(negative & (size == 0))
    return np.where(negative, -size, size)[keep]


def _invert(table: _Table, n: int, stream: Stream) -> NDArray[np.int64]:
    """Return A for `n` uniform reals: the first row whose cumulative probability exceeds the real."""
    words = stream.uint64(n)
    bucket = (words >> np.uint64(64 - _GUIDE_BITS)).astype(np.int64)
    rows = table.guide[bucket]
    # Only in a bucket that holds a row's bound does the bucket not tell the row.
    open_ = np.flatnonzero(table.guide[bucket + 1] != rows)
    rows[open_] = np.searchsorted(table.words, words[open_], side="right")
    # A word equal to a row's leading bits does not tell on which side of that row the real number lies.
    equal = table.words[np.maximum(rows[open_] - 1, 0)] == words[open_]
    for index in open_[equal]:
        real = _lengthen(int(words[index]), _WORD, stream)
        rows[index] = next(row for row, bound in enumerate(table.exact) if real < bound)
    return rows


def _keep(
    table: _Table, coarse: NDArray[np.int64], fine: NDArray[np.int64], stream: Stream
) -> NDArray[np.bool_]:
    if table.stride == 1:
        return np.ones(len(fine), bool)
    # (2 stride a + b) * b / (2 sigma^2): the factors are exact in float64, the product errs once.
    exponent = (2.0 * table.stride * coarse + fine) * fine / (2.0 * float(table.sigma) ** 2)
    chance = np.exp(-exponent)
    high = (stream.uint64(len(fine)) >> np.uint64(11)).astype(np.float64)
    keep = (high + 1) * _MANTISSA <= chance * (1 - _FLOAT_ERROR)
    unsure = ~keep & (high * _MANTISSA < chance * (1 + _FLOAT_ERROR))
    for index in np.flatnonzero(unsure):
        real = _lengthen(int(high[index]), 2**53, stream)
        product = (2 * table.stride * int(coarse[index]) + int(fine[index])) * int(fine[index])
        keep[index] = real < _digits.exp(_digits.divide(Decimal(-product), Decimal(2 * table.sigma**2)))
    return keep


def _lengthen(leading: int, scale: int, stream: Stream) -> Decimal:
    """Return the uniform real in [0, 1) whose leading bits are `leading / scale`, with 256 bits more."""
    more = int.from_bytes(stream.bytes(32), "little")
    return _digits.divide(Decimal((leading << 256) + more), Decimal(scale << 256))
