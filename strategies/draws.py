"""Draws of few among many, in time proportional to the number drawn and not to the population.

Positions are drawn instead of clients, so that a population can be a range. If many are drawn, or there are few, each
has its own coin or key. The distribution is the same: every probability is exact to within 2^-64.
"""

from __future__ import annotations

from collections.abc import Collection
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ..privacy.mechanisms.randomness import Stream

BLOCK = 1 << 16  # positions whose heads are counted at once; 16 bits index one of them
SPARSE = 64  # positions per drawn one, above which counting heads is cheaper than a coin for each
# A block without heads has probability 2^-1490 at one in `SPARSE`: it must stay exact for 64 bits and more.
_BITS = 2048

Positions = NDArray[np.int64]


def coins(count: int, rate: float, stream: Stream) -> Positions:
    """Return the positions whose coins came up, each independently of the others, ascending.

    Args:
      count: number of positions.
      rate: probability of each, in (0, 1).
      stream: random words of the draw.
    """
    if count <= BLOCK or rate * SPARSE > 1:
        return np.flatnonzero(stream.uint64(count) < np.uint64(int(rate * 2**64)))
    blocks = -(-count // BLOCK)
    # The number of heads in each block, and then as many different positions in it.
    heads = np.searchsorted(_heads(rate), stream.uint64(blocks), side="right")
    positions = np.empty(0, np.int64)
    while (missing := heads - np.bincount(positions // BLOCK, minlength=blocks)).any():
        words = stream.uint32(int(missing.sum())).astype(np.int64) % BLOCK
        positions = np.union1d(positions, np.repeat(np.arange(blocks), missing) * BLOCK + words)
    return positions[positions < count]


def subset(count: int, size: int, stream: Stream, excluded: Collection[int] = ()) -> Positions:
    """Return `size` different positions that are not excluded, each subset as likely as any other, ascending.

    Args:
      count: number of all positions.
      size: number of positions to draw, at most those that are not excluded.
      stream: random words of the draw.
      excluded: positions that are never drawn.
    """
    if (size + len(excluded)) * SPARSE > count:
        free = np.setdiff1d(np.arange(count), np.fromiter(excluded, np.int64, len(excluded)))
        return np.sort(free[np.argsort(stream.uint64(len(free)), kind="stable")[:size]])
    last_unbiased = np.uint64(2**64 - 2**64 % count - 1)  # larger words would prefer the first positions
    positions, out = np.empty(0, np.int64), np.fromiter(excluded, np.int64, len(excluded))
    while len(positions) < size:
        words = stream.uint64(size - len(positions))
        candidates = (words[words <= last_unbiased] % np.uint64(count)).astype(np.int64)
        positions = np.setdiff1d(np.union1d(positions, candidates), out)
    return positions


@lru_cache(maxsize=16)
def _heads(rate: float) -> NDArray[np.uint64]:
    """Return the probabilities of at most 0, 1, ... heads among `BLOCK` coins, in units of 2^-64, rounded down."""
    heads, tails = Fraction(rate).numerator, Fraction(1 - Fraction(rate)).numerator
    term = (tails << _BITS) // Fraction(rate).denominator
    for _ in range(BLOCK.bit_length() - 1):
        term = term * term >> _BITS  # no heads at all, by squaring
    below, table = 0, list[int]()
    while not table or table[-1] < 2**64 - 1:
        below += term
        table.append(below >> (_BITS - 64))
        term = term * (BLOCK - len(table) + 1) * heads // (len(table) * tails)
    return np.array(table, np.uint64)
