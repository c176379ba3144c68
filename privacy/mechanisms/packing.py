"""Packing of integers into the number of bits that their bound needs, and exact unpacking.

The width is public: it follows from the sum's spec and never from the numbers, so the length of a message reveals
nothing about them. The lowest 8 floor(width / 8) bits of each number come first, as whole bytes; then the high bits of
all numbers, without gaps.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .sum_spec import SumSpec

WORD = 32  # bits of a number before it is packed
BLOCK = 1 << 15  # numbers per block, a multiple of 8, so that the high bits of each block end with a byte

Bytes = NDArray[np.uint8]


def width_of(spec: SumSpec) -> int | None:
    """Return the bits of a coordinate of a vector on the lattice; None without a lattice, or if it needs a whole word.

    The norm of a vector is at most `cells`, and so is each coordinate: it lies in [-cells, cells].
    """
    width = spec.cells.bit_length() + 1
    return None if not spec.private or width >= WORD else width


def packed_size(count: int, width: int) -> int:
    """Return the bytes that `count` numbers of `width` bits take."""
    return count * (width // 8) + (count * (width % 8) + 7) // 8


def pack(numbers: NDArray[np.int32], width: int) -> Bytes:
    """Return the bytes of the numbers, shape (packed_size,).

    Args:
      numbers: each in [-2^(width-1), 2^(width-1)), shape (count,).
      width: of a number in bits, 1 to 31.

    Raises:
      ValueError: one needs more bits.
    """
    num_bytes, num_bits = divmod(width, 8)
    out = np.empty(packed_size(numbers.size, width), np.uint8)
    low, high = (
        out[: numbers.size * num_bytes].reshape(numbers.size, num_bytes),
        out[numbers.size * num_bytes :],
    )
    for start in range(0, numbers.size, BLOCK):
        words = numbers[start : start + BLOCK].astype(np.int32, casting="safe").view(np.uint32)
        words += np.uint32(
            1 << (width - 1)
        )  # modulo 2^32: exactly the numbers in range become less than 2^width
        if int(words.max()) >> width:
            raise ValueError(f"a number needs more than {width} bits")
        for index in range(num_bytes):
            low[start : start + words.size, index] = words >> np.uint32(8 * index)
        if num_bits:
            packed = _pack_bits(words >> np.uint32(8 * num_bytes), num_bits)
            high[start * num_bits // 8 :][: packed.size] = packed
    return out


def _pack_bits(words: NDArray[np.uint32], width: int) -> Bytes:
    """Pack words of `width` < 8 bits without gaps: a group of eight words is one 64-bit word, and takes `width` bytes."""
    groups = np.zeros(-(-words.size // 8), "<u8")
    for index in range(8):
        column = words[index::8]
        groups[: column.size] |= column.astype(np.uint64) << np.uint64(index * width)
    return groups.view(np.uint8).reshape(-1, 8)[:, :width].reshape(-1)[: packed_size(words.size, width)]


def _unpack_bits(packed: Bytes, count: int, width: int) -> NDArray[np.uint32]:
    """Return the `count` words that `_pack_bits` packed."""
    groups = np.zeros((-(-count // 8), 8), np.uint8)
    padded = np.zeros(len(groups) * width, np.uint8)
    padded[: packed.size] = packed
    groups[:, :width] = padded.reshape(-1, width)
    words = np.empty((len(groups), 8), np.uint32)
    for index in range(8):
        words[:, index] = (groups.view("<u8")[:, 0] >> np.uint64(index * width)) & np.uint64((1 << width) - 1)
    return words.reshape(-1)[:count]


@dataclass(frozen=True)
class Packed:
    """Numbers in as many bits as they need.

    Attributes:
      data: as `pack` returns it, shape (packed_size(count, width),).
      count: of the numbers.
      width: of a number in bits, 1 to 31.
    """

    data: Bytes
    count: int
    width: int

    def blocks(self) -> Iterator[tuple[int, NDArray[np.int32]]]:
        """Yield the start of each block of the numbers, and the block, in order.

        Raises:
          ValueError: the number of bytes is wrong; nothing was yielded.
        """
        if self.data.shape != (packed_size(self.count, self.width),):
            raise ValueError(f"{self.data.size} bytes are not {self.count} numbers of {self.width} bits")
        num_bytes, num_bits = divmod(self.width, 8)
        low = self.data[: self.count * num_bytes].reshape(self.count, num_bytes)
        high = self.data[self.count * num_bytes :]
        for start in range(0, self.count, BLOCK):
            size = min(BLOCK, self.count - start)
            words = np.zeros(size, np.uint32)
            if num_bits:
                bits = high[start * num_bits // 8 :][: packed_size(size, num_bits)]
                words = _unpack_bits(bits, size, num_bits) << (8 * num_bytes)
            for index in range(num_bytes):
                words |= low[start : start + size, index].astype(np.uint32) << (8 * index)
            yield start, words.view(np.int32) - np.int32(1 << (self.width - 1))

    def numbers(self) -> NDArray[np.int32]:
        """Return the numbers, shape (count,); raises as `blocks` does."""
        return np.concatenate([np.empty(0, np.int32), *(block for _, block in self.blocks())])
