"""Rotation, public and random, that spreads a vector's energy over all coordinates, so that a sum of many fits few bits.

One rotation is a random sign for every coordinate and then the Walsh-Hadamard transform of a power of two of them
(Suresh et al. 2017, arXiv:1611.00429, section 3). The vector is not padded, so the message does not grow: the first 2^m
coordinates are rotated, then, with fresh signs, the last 2^m, where 2^m is the largest power that fits. Both are
orthogonal. For a vector that does not depend on the seed, every coordinate of the result is a weighted sum
of random signs: sub-Gaussian with variance proxy |v|^2 / 2^m (Hoeffding), less than 2 |v|^2 / size.
"""

import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .randomness import keyed_stream

Vector = NDArray[np.float64]

_FACTOR = 32  # coordinates that one product with a matrix mixes: the fastest here
_PRODUCT = 1 << 18  # multiplications of a product, beyond which OpenBLAS starts threads, which then spin
_ROOM = 1 << 15  # coordinates of a call to numpy: they stay in a core's second cache


def block_of(size: int) -> int:
    """Return how many coordinates one transform mixes: the largest power of two up to `size`, which is at least 1."""
    return 1 << (size.bit_length() - 1)


def rotate(vector: Vector, seed: bytes) -> None:
    """Rotate the vector in place.

    Args:
      vector: changed, shape (d,), d at least 1.
      seed: public, of 32 bytes, fixed without a look at any update.
    """
    size = block_of(vector.size)
    for start in _starts(vector.size):
        block = vector[start : start + size]
        block *= _signs(size, start, seed)
        _transform(block)


def unrotate(vector: Vector, seed: bytes) -> None:
    """Undo `rotate` in place.

    Args:
      vector: changed, shape (d,).
      seed: that it was rotated with.
    """
    size = block_of(vector.size)
    for start in reversed(_starts(vector.size)):
        block = vector[start : start + size]
        _transform(block)
        block *= _signs(size, start, seed)


def _starts(size: int) -> list[int]:
    """Return where each pass begins."""
    return sorted({0, size - block_of(size)})


def _signs(count: int, start: int, seed: bytes) -> NDArray[np.int8]:
    random = np.frombuffer(keyed_stream(seed, "rotation", start).bytes((count + 7) // 8), np.uint8)
    signs = np.unpackbits(random, count=count).view(np.int8)
    signs *= -2
    signs += 1
    return signs


def _transform(vector: Vector) -> None:
    """Apply the orthonormal Walsh-Hadamard transform, its own inverse, in place, as products of small matrices."""
    room, stride = np.empty(min(vector.size, _ROOM)), 1
    while stride < vector.size:
        factor = min(_FACTOR, vector.size // stride)
        matrix = _hadamard(factor)
        wide = min(_PRODUCT // factor**2, _ROOM // factor, stride if stride > 1 else vector.size // factor)
        if stride == 1:
            products = vector.reshape(-1, 1, wide, factor)
        else:
            products = vector.reshape(-1, factor, stride // wide, wide).swapaxes(1, 2)
        for part in _parts(products):
            pair = (part, matrix) if stride == 1 else (matrix, part)
            part[...] = np.matmul(*pair, out=room[: part.size].reshape(part.shape))
        stride *= factor


def _parts(products: NDArray[np.float64]) -> Iterator[NDArray[np.float64]]:
    """Yield views of matrices, shape (rows, columns, ., .), of at most `_ROOM` numbers each."""
    rows, columns, *size = products.shape
    few = _ROOM // math.prod(size)
    high = max(few // columns, 1)
    for row in range(0, rows, high):
        for column in range(0, columns, few):
            yield products[row : row + high, column : column + few]


@lru_cache
def _hadamard(size: int) -> Vector:
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(size)
