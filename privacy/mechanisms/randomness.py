"""Source of secrets and noise: AES-256 in counter mode (NIST SP 800-38A, section 6.5).

On real data a stream has a random key from the operating system. Only a declared simulation derives its keys from the
run's seed, so that it repeats bit for bit; ledger and result then record ``rng: seeded``.

The optional package `fedveil_compiled`, built in `compiled/`, generates the same bytes faster.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

try:
    from fedveil_compiled import key_stream as _key_stream  # pyright: ignore[reportMissingModuleSource]
except ImportError:  # not installed, or not for this processor
    _key_stream = None

KEY_BYTES = 32  # AES-256
_BLOCK_BYTES = 16
_SEED_LABEL = b"fedveil seeded stream v1"
_KEY_LABEL = b"fedveil keyed stream v1"
_ZEROS = memoryview(bytes(1 << 16))  # plaintext, whose encryption is the key stream; fits into a core's cache
Word = TypeVar("Word", np.uint8, np.uint32, np.uint64)


class Stream:
    """Endless stream of pseudo-random bytes under one key, for a single purpose.

    Without a key (None) it draws a random one, and another in every forked process, because equal noise of two
    processes would cancel in the difference of their results.
    """

    def __init__(self, key: bytes | None) -> None:
        self._seeded = key is not None
        self._rekey(key if key is not None else os.urandom(KEY_BYTES))

    def _rekey(self, key: bytes) -> None:
        self._process = os.getpid()
        self._key, self._position, self._compiled = key, 0, compiled()
        # An encryptor cannot be copied, and so the stream cannot.
        self._encryptor = Cipher(algorithms.AES(key), modes.CTR(bytes(_BLOCK_BYTES))).encryptor()

    def bytes(self, n: int) -> bytes:
        """Return the next `n` bytes of the stream."""
        return self._fill(np.empty(n, np.uint8)).tobytes()

    def uint64(self, n: int) -> NDArray[np.uint64]:
        """Return `n` independent uniform integers in [0, 2**64), shape (n,)."""
        return self._fill(np.empty(n, "<u8"))

    def uint32(self, n: int) -> NDArray[np.uint32]:
        """Return `n` independent uniform integers in [0, 2**32), shape (n,)."""
        return self._fill(np.empty(n, "<u4"))

    def _fill(self, out: NDArray[Word]) -> NDArray[Word]:
        if not self._seeded and self._process != os.getpid():
            self._rekey(os.urandom(KEY_BYTES))
        space = out.view(np.uint8).data
        if self._compiled is not None:
            # Advanced first, so that another thread gets the bytes that follow.
            position, self._position = self._position, self._position + out.nbytes
            self._compiled(space, self._key, position)
            return out
        for start in range(0, out.nbytes, len(_ZEROS)):
            part = space[start : start + len(_ZEROS)]
            self._encryptor.update_into(_ZEROS[: len(part)], part)
        return out

    def generator(self) -> np.random.Generator:
        """Return a NumPy generator seeded from the stream, for shuffles and synthetic data but never for noise."""
        return np.random.Generator(np.random.PCG64(int.from_bytes(self.bytes(32), "little")))


class Streams:
    """Streams side by side: each draw has the next numbers of all, one stream's after the other's."""

    def __init__(self, streams: Sequence[Stream], counts: Sequence[int]) -> None:
        """Take the streams, and how many numbers of each a draw has."""
        self._streams, self._counts = streams, counts

    def uint32(self, n: int) -> NDArray[np.uint32]:
        """Return the next numbers of all streams, of which there are `n`, as `Stream.uint32` does."""
        return np.concatenate(
            [stream.uint32(count) for stream, count in zip(self._streams, self._counts, strict=True)]
        )

    def uint64(self, n: int) -> NDArray[np.uint64]:
        """Return the next numbers of all streams, of which there are `n`, as `Stream.uint64` does."""
        return np.concatenate(
            [stream.uint64(count) for stream, count in zip(self._streams, self._counts, strict=True)]
        )

    def at(self, index: int) -> Stream:
        """Return the stream from which the number `index` of a draw came."""
        return self._streams[int(np.searchsorted(np.cumsum(self._counts), index, side="right"))]


@cache
def compiled() -> Callable[[Any, bytes, int], None] | None:
    """Return the compiled key stream; None if it is not installed, or differs from AES-CTR of `cryptography`."""
    if _key_stream is None:
        return None
    # A wrong key stream would be noise without privacy. Compared from inside a block, and across block 2^32.
    key, output = bytes(range(KEY_BYTES)), bytearray(2**12 + 5)
    for position in (0, 2**36 - 1021):
        block = (position // _BLOCK_BYTES).to_bytes(_BLOCK_BYTES, "big")
        encryptor = Cipher(algorithms.AES(key), modes.CTR(block)).encryptor()
        encryptor.update(bytes(position % _BLOCK_BYTES))
        _key_stream(output, key, position)
        if bytes(output) != encryptor.update(bytes(len(output))):
            return None
    return _key_stream


def keyed_stream(key: bytes, *purpose: str | int) -> Stream:
    """Return the stream of one purpose under a secret key of `KEY_BYTES` bytes; it is the same in every process."""
    return Stream(hashlib.sha256(_KEY_LABEL + key + _label(purpose)).digest())


def _label(purpose: tuple[str | int, ...]) -> bytes:
    return "\x1f".join(f"{type(part).__name__}:{part}" for part in purpose).encode()


@dataclass(frozen=True)
class Randomness:
    """Source of every random stream of a run: the operating system, or the seed of a declared simulation.

    Attributes:
      seed: None on real data; an integer only if the task declares its data simulated.
    """

    seed: int | None = None

    @property
    def seeded(self) -> bool:
        """Whether every stream is derived from a seed."""
        return self.seed is not None

    @property
    def kind(self) -> str:
        """Word for the source in ledgers and results, ``"system"`` or ``"seeded"``."""
        return "seeded" if self.seeded else "system"

    def stream(self, *purpose: str | int) -> Stream:
        """Return a stream for one purpose, such as ``("noise", round)``.

        Streams of different purposes are independent. With a seed, the same purpose always has the same bytes.
        """
        if self.seed is None:
            return Stream(None)
        return Stream(hashlib.sha256(_SEED_LABEL + f"{self.seed}|".encode() + _label(purpose)).digest())
