"""Packing of whole numbers into as many bits as a bound on them needs, and back, bit for bit.

The width is public: it follows from the sum's spec and never from the numbers, so that the length of a message tells
nothing of them. Of b bits the lowest 8 floor(b / 8) lie as whole bytes, number by number; then the others, bit by bit.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .sum_spec import SumSpec

WORD = 32  # bits of what is packed

Bytes = NDArray[np.uint8]


def width_of(spec: SumSpec) -> int | None:
    """Return the bits of a coordinate of a vector on the lattice; None where it is not on one, or needs a whole word.

    The norm of a vector is at most `cells`, and so is each coordinate: it lies in [-cells, cells].
    """
    width = spec.cells.bit_length() + 1
    return None if spec.clipping_norm is None or width >= WORD else width


def packed_size(count: int, width: int) -> int:
    """Return the bytes of so many numbers of `width` bits."""
    return count * (width // 8) + (count * (width % 8) + 7) // 8


def pack(numbers: NDArray[np.int32], width: int) -> Bytes:
    """Return the bytes of the numbers, shape (packed_size,).

    Args:
      numbers: each in [-2^(width-1), 2^(width-1)), shape (count,).
      width: of a number in bits, 1 to 31.

    Raises:
      ValueError: one needs more bits.
    """
    words = (numbers.astype(np.int64) + (1 << (width - 1))).astype("<u4")
    if numbers.size and int(words.max()) >> width:
        raise ValueError(f"a number needs more than {width} bits")
    whole, rest = divmod(width, 8)
    low = np.ascontiguousarray(words.view(np.uint8).reshape(-1, 4)[:, :whole]).reshape(-1)
    if not rest:
        return low
    high = (words >> (8 * whole)).astype(np.uint8)
    bits = np.unpackbits(high[:, None], axis=1, count=rest, bitorder="little")
    return np.concatenate([low, np.packbits(bits.reshape(-1), bitorder="little")])


def unpack(packed: Bytes, count: int, width: int) -> NDArray[np.int32]:
    """Return the numbers that `pack` was given, shape (count,).

    Args:
      packed: shape (packed_size(count, width),).
      count: of the numbers.
      width: of a number in bits, 1 to 31.

    Raises:
      ValueError: there are not as many bytes.
    """
    if packed.shape != (packed_size(count, width),):
        raise ValueError(f"{packed.size} bytes are not {count} numbers of {width} bits")
    whole, rest = divmod(width, 8)
    words = np.zeros((count, 4), np.uint8)
    words[:, :whole] = packed[: count * whole].reshape(count, whole)
    if rest:
        bits = np.unpackbits(packed[count * whole :], count=count * rest, bitorder="little")
        words[:, whole] = np.packbits(bits.reshape(count, rest), axis=1, bitorder="little")[:, 0]
    numbers = words.reshape(-1).view("<u4").astype(np.int64) - (1 << (width - 1))
    return numbers.astype(np.int32)
