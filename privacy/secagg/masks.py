"""Masks: key streams added to a vector modulo 2**16 or 2**32; the masks of two clients cancel.

On the wire a mask is the key stream of the suite's cipher, read as little-endian words. Every `CHUNK_BYTES` of it start
anew, with the chunk's number as the 96-bit big-endian nonce N: AES-256 in counter mode from the block N‖00000002 (NIST
SP 800-38A; equally, GCM's ciphertext of zeros), or ChaCha20 from block 1 (RFC 8439). A key masks one vector.

The package `fedveil_compiled`, which `compiled/` builds, adds the same words of AES while it makes them.
"""

import sys
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from .suite import KEY_BYTES, NONCE_BYTES, SUITES, TAG_BYTES, Suite

try:
    from fedveil_compiled import add_masks as _add_compiled  # pyright: ignore[reportMissingModuleSource]
except ImportError:  # not installed, or not for this processor
    _add_compiled = None

CHUNK_BYTES = 2**18
_ZEROS = bytes(CHUNK_BYTES)

Vector = NDArray[np.uint16] | NDArray[np.uint32]
Compiled = Callable[[Vector, int, bytes, bytes], None]  # vector, bytes of a word, all keys, 1 for each to add


def add_masks(vector: Vector, masks: Sequence[tuple[bytes, int]], suite: Suite) -> None:
    """Add (sign 1) or subtract (sign -1) the mask of each 32-byte key, in place, modulo the width of a word.

    Each chunk of the vector gets all masks while it is in the cache.

    Args:
      vector: words of 16 or 32 bits, shape (d,).
      masks: key and sign of each.
      suite: whose cipher.

    Raises:
      ValueError: for another type or shape of vector, or another length of key or sign.
    """
    if vector.dtype.kind != "u" or vector.itemsize not in (2, 4) or vector.ndim != 1:
        raise ValueError("masks are added to a vector of 16-bit or 32-bit unsigned words")
    if any(sign not in (1, -1) or len(key) != KEY_BYTES for key, sign in masks):
        raise ValueError("a mask has a key of 32 bytes, and a sign of 1 or -1")
    add = compiled() if suite.stream is SUITES[1].stream else None
    if add is not None and vector.dtype.isnative and vector.flags.c_contiguous:
        _add_by(add, vector, masks)
    else:
        _add_streams(vector, masks, suite)


@cache
def compiled() -> Compiled | None:
    """Return the compiled addition if it adds the same words as Python on examples; otherwise None."""
    if _add_compiled is None or sys.byteorder != "little":
        return None
    # A wrong mask could reveal a vector.
    masks = [(bytes(range(KEY_BYTES)), 1), (bytes(KEY_BYTES), -1)]
    for width in (2, 4):
        actual, expected = np.zeros((2, CHUNK_BYTES // width + 1), f"u{width}")
        _add_by(_add_compiled, actual, masks)
        _add_streams(expected, masks, SUITES[1])
        if not np.array_equal(actual, expected):
            return None
    return _add_compiled


def _add_by(add: Compiled, vector: Vector, masks: Sequence[tuple[bytes, int]]) -> None:
    """Add masks by the compiled addition, which takes all keys in one string."""
    add(vector, vector.itemsize, b"".join(key for key, _ in masks), bytes(sign > 0 for _, sign in masks))


def _add_streams(vector: Vector, masks: Sequence[tuple[bytes, int]], suite: Suite) -> None:
    """Add masks by the key streams of `cryptography`."""
    streams = [(suite.stream(key), np.add if sign > 0 else np.subtract) for key, sign in masks]
    # The dtype is little-endian: on a machine of the other order numpy swaps the bytes.
    buffer = bytearray(CHUNK_BYTES + TAG_BYTES)
    words = np.frombuffer(buffer, f"<u{vector.itemsize}")
    for number, start in enumerate(range(0, vector.size, CHUNK_BYTES // vector.itemsize)):
        block = vector[start : start + CHUNK_BYTES // vector.itemsize]
        nonce = number.to_bytes(NONCE_BYTES, "big")
        zeros, room = memoryview(_ZEROS)[: block.nbytes], memoryview(buffer)[: block.nbytes + TAG_BYTES]
        mask = words[: block.size]
        for stream, combine in streams:
            stream(nonce, zeros, room)
            combine(block, mask, block)
