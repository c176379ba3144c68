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

_FACTOR = 32  # largest side of a matrix; as large a one is the fastest
_PRODUCT = 1 << 18  # multiplications of a matrix product above which OpenBLAS starts threads, which then spin
_ROOM = 1 << 15  # coordinates per call of numpy: they stay in a core's second cache


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
    """Undo `rotate` in place; arguments as of `rotate`."""
    size = block_of(vector.size)
    for start in reversed(_starts(vector.size)):
        block = vector[start : start + size]
        _transform(block)
        block *= _signs(size, start, seed)


def _starts(size: int) -> list[int]:
    """Return the first coordinates of the two transforms of a vector; one if it is a power of two long."""
    return sorted({0, size - block_of(size)})


def _signs(count: int, start: int, seed: bytes) -> NDArray[np.int8]:
    """Return the random signs, 1 or -1, of the `count` coordinates from `start`."""
    random = np.frombuffer(keyed_stream(seed, "rotation", start).bytes((count + 7) // 8), np.uint8)
    signs = np.unpackbits(random, count=count).view(np.int8)
    signs *= -2
    signs += 1
    return signs


def _transform(vector: Vector) -> None:
    """Apply the orthonormal Walsh-Hadamard transform, its own inverse, in place, to a vector whose size is a power of two.

    The transform is a Kronecker product of small Hadamard matrices. Each pass multiplies by one of them: it mixes
    `factor` coordinates that are `stride` apart, and a product of matrices does so for `width` such groups at once.
    """
    room, stride = np.empty(min(vector.size, _ROOM)), 1
    while stride < vector.size:
        factor = min(_FACTOR, vector.size // stride)
        matrix = _hadamard(factor)
        num_groups = stride if stride > 1 else vector.size // factor  # that lie side by side
        width = min(_PRODUCT // factor**2, _ROOM // factor, num_groups)
        if stride == 1:  # a group is a row of a matrix, later a column
            for part in _chunks(vector.reshape(-1, 1, width, factor)):
                part[...] = np.matmul(part, matrix, out=room[: part.size].reshape(part.shape))
        else:
            for part in _chunks(vector.reshape(-1, factor, stride // width, width).swapaxes(1, 2)):
                part[...] = np.matmul(matrix, part, out=room[: part.size].reshape(part.shape))
        stride *= factor


def _chunks(matrices: NDArray[np.float64]) -> Iterator[NDArray[np.float64]]:
    """Yield views of an array of matrices, shape (rows, columns, ., .), with at most `_ROOM` numbers each."""
    rows, columns, *size = matrices.shape
    max_matrices = _ROOM // math.prod(size)
    num_rows = max(max_matrices // columns, 1)
    for row in range(0, rows, num_rows):
        for column in range(0, columns, max_matrices):
            yield matrices[row : row + num_rows, column : column + max_matrices]


@lru_cache
def _hadamard(size: int) -> Vector:
    """Return the orthonormal Hadamard matrix of a power of two."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(size)
