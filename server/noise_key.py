"""Key of a run's correlated noise on real data: 32 bytes of the system's generator, in a file of its own.

A later row cancels parts of earlier ones, so these must be recomputable after a crash. The key is enough to remove the
noise from all releases of the run: only its owner may read the file, and the last round removes it.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..base.durable_files import replace_file, sync_folder
from ..base.refusal import Refusal
from ..privacy.mechanisms.randomness import KEY_BYTES

NAME = "noise.key"


def make(folder: Path, name: str = NAME) -> bytes:
    """Write a fresh key durably and return it; a key that it replaces is of a start that released nothing."""
    key = os.urandom(KEY_BYTES)
    replace_file(folder / name, key)
    return key


def read(folder: Path, name: str = NAME) -> bytes:
    """Return the key of a resumed run.

    Raises:
      Refusal: the key cannot be read, and without it the run's noise cannot be continued.
    """
    path = folder / name
    try:
        key = path.read_bytes()
    except OSError as problem:
        remedy = f"the run's noise cannot be continued without it ({problem.strerror}); start a new run"
        raise Refusal("resume", str(path), remedy) from problem
    if len(key) != KEY_BYTES:
        raise Refusal("resume", str(path), "is not a complete key; start a new run")
    if path.stat().st_mode & 0o077:
        remedy = "may have been read by other users, who then know the noise; start a new run"
        raise Refusal("resume", str(path), remedy)
    return key


def erase(folder: Path, name: str = NAME) -> None:
    """Remove the key; afterwards the run cannot be resumed."""
    if (folder / name).exists():
        (folder / name).unlink()
        sync_folder(folder)
