"""Source of secrets and noise: AES-256 in counter mode (NIST SP 800-38A, section 6.5).

On real data a stream is keyed by the operating system. Only a declared simulation derives its keys from the
run's seed, so that it repeats bit for bit; ledger and result then say ``rng: seeded``.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

KEY_BYTES = 32  # AES-256
_COUNTER_START = bytes(16)
_SEED_LABEL = b"fedveil seeded stream v1"
_KEY_LABEL = b"fedveil keyed stream v1"
_ZEROS = memoryview(bytes(1 << 16))  # what is encrypted for key stream; it stays in a core's cache
Word = TypeVar("Word", np.uint32, np.uint64)


class Stream:
    """An endless string of pseudo-random bytes under one key, never shared by two purposes.

    A process that was forked gets a fresh key of its own, unless the stream is seeded: two processes that
    drew the same noise would cancel it.
    """

    def __init__(self, key: bytes | None) -> None:
        self._seeded = key is not None
        self._rekey(key if key is not None else os.urandom(KEY_BYTES))

    def _rekey(self, key: bytes) -> None:
        self._process = os.getpid()
        self._encryptor = Cipher(algorithms.AES(key), modes.CTR(_COUNTER_START)).encryptor()

    def bytes(self, n: int) -> bytes:
        """Return the next `n` bytes of the stream."""
        self._check_process()
        return self._encryptor.update(bytes(n))

    def _check_process(self) -> None:
        if not self._seeded and self._process != os.getpid():
            self._rekey(os.urandom(KEY_BYTES))

    def uint64(self, n: int) -> NDArray[np.uint64]:
        """Return `n` independent uniform integers in [0, 2**64), shape (n,)."""
        return self._fill(np.empty(n, "<u8"))

    def uint32(self, n: int) -> NDArray[np.uint32]:
        """Return `n` independent uniform integers in [0, 2**32), shape (n,)."""
        return self._fill(np.empty(n, "<u4"))

    def _fill(self, out: NDArray[Word]) -> NDArray[Word]:
        self._check_process()
        space = out.view(np.uint8).data
        for start in range(0, out.nbytes, len(_ZEROS)):
            part = space[start : start + len(_ZEROS)]
            self._encryptor.update_into(_ZEROS[: len(part)], part)
        return out

    def generator(self) -> np.random.Generator:
        """Return a numpy generator seeded from the stream, for shuffles and data without security requirements."""
        return np.random.Generator(np.random.PCG64(int.from_bytes(self.bytes(32), "little")))


def keyed_stream(key: bytes, *purpose: str | int) -> Stream:
    """Return the stream for one purpose under a secret key of `KEY_BYTES`, the same bytes in every process."""
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
    def kind(self) -> str:
        """``"system"`` or ``"seeded"``, as ledger and result record it."""
        return "system" if self.seed is None else "seeded"

    def stream(self, *purpose: str | int) -> Stream:
        """Return the stream for one purpose, such as ``("noise", round)``.

        Distinct purposes give independent streams. When seeded, the same purpose gives the same bytes.
        """
        if self.seed is None:
            return Stream(None)
        return Stream(hashlib.sha256(_SEED_LABEL + f"{self.seed}|".encode() + _label(purpose)).digest())
