"""Masks: key streams added to a vector modulo 2**16 or 2**32; what two clients add and subtract cancels.

On the wire a mask is the key stream of the suite's cipher, read as little-endian words. Every `CHUNK_BYTES`
of it start anew, with the chunk's number as the 96-bit big-endian nonce N: AES-256 in counter mode from the
block N‖00000002 (NIST SP 800-38A; equally, GCM's ciphertext of zeros), or ChaCha20 from block 1 (RFC 8439). A
key masks one vector.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .suite import NONCE_BYTES, TAG_BYTES, Suite

CHUNK_BYTES = 2**18
_ZEROS = bytes(CHUNK_BYTES)

Vector = NDArray[np.uint16] | NDArray[np.uint32]


def add_masks(vector: Vector, masks: Sequence[tuple[bytes, int]], suite: Suite) -> None:
    """Add (sign 1) or subtract (sign -1) the mask of each 32-byte key, in place, modulo the width of a word.

    All masks go over a chunk of the vector while it is in the cache.

    Args:
      vector: words of 16 or 32 bits, shape (d,).
      masks: key and sign of each.
      suite: whose cipher.

    Raises:
      ValueError: for another type or shape of vector, or another sign.
    """
    if vector.dtype.kind != "u" or vector.itemsize not in (2, 4) or vector.ndim != 1:
        raise ValueError("masks are added to a vector of 16-bit or 32-bit unsigned words")
    if any(sign not in (1, -1) for _, sign in masks):
        raise ValueError("the sign of a mask is 1 or -1")
    streams = [(suite.stream(key), np.add if sign > 0 else np.subtract) for key, sign in masks]
    # Little-endian on every machine: numpy swaps the bytes where the machine's order is another.
    drawn = bytearray(CHUNK_BYTES + TAG_BYTES)
    words = np.frombuffer(drawn, f"<u{vector.itemsize}")
    for number, start in enumerate(range(0, vector.size, CHUNK_BYTES // vector.itemsize)):
        block = vector[start : start + CHUNK_BYTES // vector.itemsize]
        nonce = number.to_bytes(NONCE_BYTES, "big")
        zeros, room = memoryview(_ZEROS)[: block.nbytes], memoryview(drawn)[: block.nbytes + TAG_BYTES]
        mask = words[: block.size]
        for stream, combine in streams:
            stream(nonce, zeros, room)
            combine(block, mask, block)
