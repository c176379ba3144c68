"""Lossless difference of two models, compressed.

An array is encoded by the integer numbers of steps that it moved, if both models lie on a grid of a power of two
(`strategies/shared_model.py`), or by the changed coordinates and their new values, whichever is shorter. Both are packed by
zlib, whose Huffman codes come close to the entropy. The reader uses the shapes of its held model. No message can make
it allocate more than a few times the size of that model.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[np.generic]]
Bytes = NDArray[np.uint8]

_HEAD = struct.Struct("<BhI")  # of an array: encoding, exponent of the step, length of the data in bytes
_SAME, _CHANGED, _MOVED = 0, 1, 16  # encodings; _MOVED + n: numbers of steps, in n bytes each
_LENGTH = struct.Struct("<I")  # of compressed bytes
_EXACT = 53  # bits of a float64's significand
_WIDEST = 4  # largest number of bytes for a number of steps
_BLOCK = 1 << 16  # coordinates at a time, so that no whole array is held in float64


class NoDifference(ValueError):
    """Bytes that are not a difference from the held model, or do not give the announced model."""


def hash_of(arrays: Arrays) -> str:
    """Return SHA-256 of a model's names, types, shapes and bits, in hexadecimal."""
    digest = hashlib.sha256()
    for name, value in arrays.items():
        digest.update(json.dumps([name, value.dtype.str, value.shape]).encode())
        digest.update(np.ascontiguousarray(value).view(np.uint8).data if value.size else b"")
    return digest.hexdigest()


def bytes_of(arrays: Arrays) -> int:
    """Return the bytes of a model's arrays."""
    return sum(value.nbytes for value in arrays.values())


def difference(old: Arrays, new: Arrays) -> bytes | None:
    """Return the difference between two models; None if it is no shorter than the whole model, or shapes or types differ.

    Args:
      old: model that the reader holds.
      new: model that `apply` makes of it.
    """
    layouts = [{name: (value.dtype, value.shape) for name, value in each.items()} for each in (old, new)]
    if layouts[0] != layouts[1] or list(old) != list(new):
        return None
    encoded = b"".join(_encode_array(old[name], value) for name, value in new.items())
    return encoded if len(encoded) < bytes_of(new) else None


def _encode_array(old: NDArray[np.generic], new: NDArray[np.generic]) -> bytes:
    """Return one array's head and data, in the shortest of its encodings."""
    before, after = _bytes(old), _bytes(new)
    differs = np.empty(new.size, np.bool_)
    for part in _blocks(new.size):
        np.any(before[part] != after[part], axis=1, out=differs[part])
    if not differs.any():
        return _HEAD.pack(_SAME, 0, 0)
    moves, value_bytes = _encode_steps(old, new), np.count_nonzero(differs) * new.dtype.itemsize
    if moves is not None and len(moves) <= value_bytes:  # compression seldom makes new values as short
        return moves
    changed = _compress(np.packbits(differs)) + _compress(after[differs].reshape(-1))
    encoded = _HEAD.pack(_CHANGED, 0, len(changed)) + changed
    return min(encoded, moves or encoded, key=len)


def _bytes(value: NDArray[np.generic]) -> Bytes:
    """Return the bytes of an array, a row for each coordinate."""
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8).reshape(value.size, value.dtype.itemsize)


def _blocks(size: int) -> Iterator[slice]:
    """Return the slices of an array of this size that are worked on at a time."""
    return (slice(start, min(start + _BLOCK, size)) for start in range(0, size, _BLOCK))


def _encode_steps(old: NDArray[np.generic], new: NDArray[np.generic]) -> bytes | None:
    """Return an array's head and its moves in whole steps of a power of two.

    None if it is no array of floats, if no step fits its moves, or if the moved array is not bit-identical to the new one.
    """
    before, after = np.ravel(old), np.ravel(new)
    step = _step_between(before, after) if new.dtype.kind == "f" else None
    if step is None:
        return None
    zigzag = np.empty(after.size, "<u4")  # 0, -1, 1, -2 ... as 0, 1, 2, 3 ...: small, whatever the signs
    for part in _blocks(after.size):
        numbers = np.ldexp(_differences(before[part], after[part]), -step).astype(np.int64)
        if not np.array_equal(_bytes(_moved(before[part], numbers, step)), _bytes(after[part])):
            return None
        zigzag[part] = (numbers << 1) ^ (numbers >> 63)
    width = max(1, (int(zigzag.max()).bit_length() + 7) // 8)
    # The first bytes of all numbers, then the second ones: Huffman codes of similar bytes are short.
    planes = zigzag.view(np.uint8).reshape(-1, _WIDEST)[:, :width].T
    packed = b"".join(_compress(np.ascontiguousarray(plane)) for plane in planes)
    return _HEAD.pack(_MOVED + width, step, len(packed)) + packed


def _differences(old: NDArray[np.generic], new: NDArray[np.generic]) -> NDArray[np.float64]:
    """Return new minus old; differences of infinite values are not numbers."""
    with np.errstate(invalid="ignore"):
        return np.subtract(new, old, dtype=np.float64)


def _step_between(old: NDArray[np.generic], new: NDArray[np.generic]) -> int | None:
    """Return the exponent of the largest power of two that divides all differences.

    None if there are no differences, if one is infinite, or if one is too many steps long for `_WIDEST` bytes.
    """
    step: int | None = None
    largest = 0.0
    for part in _blocks(new.size):
        moved = _differences(old[part], new[part])
        nonzero = moved[moved != 0]
        if not np.isfinite(nonzero).all():
            return None
        if not nonzero.size:
            continue
        # A difference is a whole number, its significand, times a power of two; the zero bits at its end count as steps.
        significands, exponents = np.frexp(nonzero)
        whole = np.abs(np.ldexp(significands, _EXACT)).astype(np.int64)
        trailing_zeros = np.frexp((whole & -whole).astype(np.float64))[1] - 1
        divisor = int(np.min(exponents - _EXACT + trailing_zeros))
        step = divisor if step is None else min(step, divisor)
        largest = max(largest, float(np.max(np.abs(nonzero))))
        if largest >= math.ldexp(1.0, min(step + 8 * _WIDEST - 2, 1000)):
            return None
    return step


def _compress(values: Bytes) -> bytes:
    """Return compressed bytes after their length, by Huffman codes with or without repetitions, whichever is shorter."""
    candidates: list[bytes] = []
    for strategy in (zlib.Z_HUFFMAN_ONLY, zlib.Z_DEFAULT_STRATEGY):
        packer = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, strategy)
        candidates.append(packer.compress(values.data) + packer.flush())
    shortest = min(candidates, key=len)
    return _LENGTH.pack(len(shortest)) + shortest


def apply(old: Arrays, difference: bytes) -> dict[str, NDArray[np.generic]]:
    """Return the new model.

    Args:
      old: the held model.
      difference: as `difference` returns it; untrusted.

    Raises:
      NoDifference: it is not a difference from a model of these shapes; no other exception is raised, for any bytes.
    """
    try:
        reader, new = _Reader(difference), dict[str, NDArray[np.generic]]()
        for name, value in old.items():
            new[name] = _decode_array(value, reader)
        reader.end()
        return new
    except NoDifference:
        raise
    except Exception as error:  # of struct, zlib and numpy, which document no closed set
        raise NoDifference(f"no difference: {type(error).__name__}") from error


class _Reader:
    """Reader of untrusted bytes from front to back; it raises NoDifference, or errors of struct and zlib."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._remaining = memoryview(data)

    def take(self, count: int) -> memoryview:
        """Return the next `count` bytes."""
        if count > len(self._remaining):
            raise NoDifference("it ends too early")
        data, self._remaining = self._remaining[:count], self._remaining[count:]
        return data

    def decompress(self, count: int) -> Bytes:
        """Return `count` bytes that `_compress` compressed."""
        (length,) = _LENGTH.unpack(self.take(_LENGTH.size))
        unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
        values = unpacker.decompress(self.take(length), count + 1)  # one byte more shows that it is too long
        if len(values) != count or not unpacker.eof or unpacker.unused_data:
            raise NoDifference("an array has another size")
        return np.frombuffer(values, np.uint8)

    def end(self) -> None:
        """Check that no bytes are left."""
        if len(self._remaining):
            raise NoDifference("it has trailing bytes")


def _decode_array(old: NDArray[np.generic], reader: _Reader) -> NDArray[np.generic]:
    """Return the new array from the old one and the next head and data, as `_encode_array` wrote them."""
    kind, step, length = _HEAD.unpack(reader.take(_HEAD.size))
    part = _Reader(reader.take(length))
    if kind == _SAME:
        new = old.copy()
    elif kind == _CHANGED:
        new = _decode_changes(old, part)
    elif _MOVED < kind <= _MOVED + _WIDEST and old.dtype.kind == "f":
        new = _add_steps(old, [part.decompress(old.size) for _ in range(kind - _MOVED)], step)
    else:
        raise NoDifference(f"an array has an unknown encoding ({kind})")
    part.end()
    return new


def _decode_changes(old: NDArray[np.generic], part: _Reader) -> NDArray[np.generic]:
    """Return an array with new values, where a bit for each coordinate says whether it has one."""
    bits = part.decompress((old.size + 7) // 8)
    differs = np.unpackbits(bits, count=old.size).astype(bool)
    rows, width = _bytes(old).copy(), old.dtype.itemsize
    rows[differs] = part.decompress(int(differs.sum()) * width).reshape(-1, width)
    return rows.reshape(-1).view(old.dtype).reshape(old.shape)


def _add_steps(old: NDArray[np.generic], planes: Sequence[Bytes], step: int) -> NDArray[np.generic]:
    """Return an array moved by whole steps, whose counts are stored as byte planes."""
    before, new = np.ravel(old), np.empty(old.size, old.dtype)
    for part in _blocks(old.size):
        words = np.zeros((part.stop - part.start, 8), np.uint8)
        for index, plane in enumerate(planes):
            words[:, index] = plane[part]
        zigzag = words.reshape(-1).view("<u8")
        numbers = (zigzag >> np.uint64(1)).astype(np.int64) ^ -(zigzag & np.uint64(1)).astype(np.int64)
        new[part] = _moved(before[part], numbers, step)
    return new.reshape(old.shape)


def _moved(old: NDArray[np.generic], numbers: NDArray[np.int64], step: int) -> NDArray[np.generic]:
    """Return values moved by these numbers of steps of 2 ** step; writer and reader compute them alike, bit for bit."""
    distances = np.ldexp(numbers.astype(np.float64), step)
    with np.errstate(over="ignore", invalid="ignore"):
        return (old.astype(np.float64) + distances).astype(old.dtype)
