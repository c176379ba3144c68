"""Unbiased rounding to integers with a known bound on the norm of the result.

It is conditional stochastic rounding (Kairouz, Liu and Steinke 2021, arXiv:2102.06387, section 4).

Every coordinate is rounded up or down at random so that its mean is preserved. The whole vector is rounded again until
its norm is within `limit_for`. A try succeeds with probability at least 1 - exp(-1/2), and with nearly 1 unless all
fractions are near 1/2.

A sum of several records is rounded once (`round_once`), as floor(x + u) with u uniform in [0, 1) in each coordinate.
Take x' = x + v, where v is a record's part, and the same u for both. In each coordinate x + u is uniform modulo 1, so
that floor(x' + u) - floor(x + u) is itself a stochastic rounding of v, independent of that of the others. The change
due to a record is therefore a rounding of v, independent of the rest of the sum: `moved_squared` bounds it. The
distribution of a noised sum is a mixture over u, and the divergence of a mixture is at most that of its worst pair (the
hockey-stick divergence is jointly convex).
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .private_sum import squared_norm
from .randomness import Stream

_MAX_TRIES = 100  # all of which fail with a probability below 2^-72; the vector is then rounded towards zero
EXCEEDED = 2.0**-160  # of a round: times 10^5 rounds and e^30, it is below the last bit of a float of 1e-12
BLOCK = 1 << 15  # coordinates at a time: they stay in a core's second cache, and Python is called seldom
_WORD = 2.0**-32  # of a uniform 32-bit word, a number in [0, 1)
_EXACT = 2.0**53  # sums of squares of whole numbers below this are exact in float64, in any order


@dataclass(frozen=True)
class Blocks:
    """Vector that is computed block by block on each reading, so that it is never in memory as a whole.

    Attributes:
      size: number of its coordinates.
      read: yields its blocks in order, float64, of at most `BLOCK` coordinates; each may be overwritten by the next.
    """

    size: int
    read: Callable[[], Iterable[NDArray[np.float64]]]

    def joined(self) -> NDArray[np.float64]:
        """Return the vector as a whole, shape (size,)."""
        out, offset = np.empty(self.size), 0
        for block in self.read():
            out[offset : offset + block.size] = block
            offset += block.size
        return out


def blocks_of(vector: NDArray[np.float64]) -> Blocks:
    """Return views of a vector that is in memory as a whole, as `Blocks`."""
    return Blocks(
        vector.size, lambda: (vector[start : start + BLOCK] for start in range(0, vector.size, BLOCK))
    )


def limit_for(cells: int, coordinates: int) -> int:
    """Return the largest squared norm after rounding of a vector whose norm is at most `cells` before it.

    The bound c^2 + d/4 + sqrt(2 log(1/beta)) (c + sqrt(d)/2) at beta = exp(-1/2), which is always less than the
    paper's other one, (c + sqrt(d))^2; as the norm is whole, so is the limit.

    Args:
      cells: the norm before, in grid units.
      coordinates: of the vector.
    """
    return cells * cells + cells + (coordinates + math.isqrt(4 * coordinates)) // 4


def moved_squared(norm: float, coordinates: int) -> float:
    """Return a bound that the squared norm of a rounded vector exceeds with a probability of at most `EXCEEDED`.

    The squares of the coordinates are independent, have mean v^2 + f (1 - f) with f the fraction, at most v^2 + 1/4,
    and two values at most 2 |v| + 1 apart. So their sum is above c^2 + d/4 + sqrt(2 log(1/beta)) (c + sqrt(d)/2) with a
    probability of at most beta (Hoeffding). Nor does rounding ever move a coordinate by more than one, so that (c +
    sqrt(d))^2 is a bound too.

    Args:
      norm: of the vector before, c, in grid units.
      coordinates: of the vector, d.
    """
    root = math.sqrt(coordinates)
    likely = norm**2 + coordinates / 4 + math.sqrt(-2 * math.log(EXCEEDED)) * (norm + root / 2)
    # Coins of 32 bits have means off by up to 2^-32, and what they multiply adds up to at most 2 sqrt(d) c + d.
    return min(likely + (2 * root * norm + coordinates) * _WORD, (norm + root) ** 2)


def round_once(vector: Blocks, stream: Stream) -> NDArray[np.int32]:
    """Return integers with mean `vector`, each less than one away from it; arguments as of `round_within`."""
    out = np.empty(vector.size, np.int32)
    _round(out, vector, stream)
    return out


def round_within(vector: Blocks, limit: int, stream: Stream) -> NDArray[np.int32]:
    """Return integers with mean `vector`, each at most one away from it, with a squared norm of at most `limit`.

    Args:
      vector: finite, of a norm of at most the `cells` that `limit_for` was given.
      limit: of `limit_for`.
      stream: a secret stream that serves this client and round.
    """
    out = np.empty(vector.size, np.int32)
    for _ in range(_MAX_TRIES):
        if _round(out, vector, stream) <= limit:
            return out
    return np.trunc(vector.joined()).astype(np.int32)


def _round(out: NDArray[np.int32], vector: Blocks, stream: Stream) -> int:
    """Round each coordinate up or down at random into `out`, and return the exact squared norm of the result."""
    squared, offset, room = 0, 0, np.empty(min(vector.size, BLOCK))
    for part in vector.read():
        block = room[: part.size]
        # Converted first, then in place: faster than both at once.
        np.copyto(block, stream.uint32(part.size), casting="unsafe")
        block *= _WORD
        block += part
        np.floor(block, out=block)
        squared += _squared(block)
        np.copyto(out[offset : offset + part.size], block, casting="unsafe")
        offset += part.size
    return squared


def _squared(block: NDArray[np.float64]) -> int:
    """Return the exact squared norm of whole numbers."""
    squared = squared_norm(block)
    if squared < _EXACT:
        return int(squared)
    whole = block.astype(np.int64)
    return int(np.dot(whole, whole))
