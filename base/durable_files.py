"""Atomic file replacement: a temporary file is written beside the target, flushed, and renamed."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

from .refusal import refusing

Part = bytes | bytearray | memoryview
Content = bytes | Iterable[Part]  # whole, or part by part, so that a large one is not in memory twice

ROOM = 1 << 16  # bytes that a folder takes before what it must store is charged
PUBLIC = 0o644  # mode of what everybody on the machine may read


def replace_file(path: Path, data: Content, mode: int | None = 0o600, *, flush: bool = True) -> None:
    """Replace a file; the new one is on disk when this returns, or the old one stays.

    Args:
      path: of the file.
      data: its new content.
      mode: its permissions, independent of the umask; None uses the umask.
      flush: False if a power cut may lose both files, as for a file that is soon written again.

    Raises:
      OSError: it cannot be written.
    """
    replace_files(path.parent, {path.name: data}, mode, flush=flush)


def replace_files(
    folder: Path, files: Mapping[str, Content], mode: int | None = 0o600, *, flush: bool = True
) -> None:
    """Replace files of one folder, each atomically and in their order, with one flush of the folder.

    Args:
      folder: of the files.
      files: contents by name.
      mode: as in `replace_file`.
      flush: as in `replace_file`.

    Raises:
      OSError: one cannot be written.
    """
    for name, data in files.items():
        parts = [data] if isinstance(data, bytes) else data
        os.replace(write_aside(folder / name, parts, mode, flush=flush), folder / name)
    if flush:
        sync_folder(folder)


def write_aside(path: Path, parts: Iterable[Part], mode: int | None = 0o600, *, flush: bool = True) -> Path:
    """Write a file's new content, part by part, to a temporary file beside it, and return its path.

    A temporary file that cannot be written completely is removed, to free the disk. Arguments as of `replace_file`.
    """
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    descriptor = os.open(fresh, flags, 0o666 if mode is None else mode)
    try:
        with open(descriptor, "wb") as file:
            if mode is not None:
                os.fchmod(descriptor, mode)  # whatever the umask
            file.writelines(parts)
            if flush:
                file.flush()
                os.fsync(descriptor)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    return fresh


def open_for_owner(path: Path) -> BinaryIO:
    """Open a file for appending; only its owner may read it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.fchmod(descriptor, 0o600)  # whoever made it
    return open(descriptor, "ab")


def append_line(path: Path, fields: Mapping[str, Any]) -> None:
    """Append a line of JSON to a file that only its owner may read; it is on disk when this returns.

    Args:
      path: of the file.
      fields: of the line.

    Raises:
      OSError: it cannot be written.
    """
    with open_for_owner(path) as file:
        cut = file.tell() > 0 and not path.read_bytes().endswith(b"\n")  # a line that a crash cut short
        file.write((cut * "\n" + json.dumps(fields) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def write_at(path: Path, size: int, data: bytes, mode: int = 0o600) -> None:
    """Write after the first `size` bytes of a file, over any remains of a crash or a full disk.

    Args:
      path: of the file; created if missing.
      size: of the part to keep, in bytes.
      data: on disk when this returns.
      mode: of a created file.

    Raises:
      OSError: it cannot be written.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, mode)
    with open(descriptor, "wb") as file:
        file.seek(size)
        file.truncate()
        file.write(data)
        file.flush()
        os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """Return once the names in a folder are on disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(key: str, folder: Path) -> None:
    """Make a folder, one of ledgers for its owner alone, and write to it before answers that it must store are charged.

    Raises:
      Refusal: it cannot be made, or has no room.
    """
    with refusing(key, folder, "cannot be made or written"):
        folder.mkdir(mode=0o700 if key == "ledger.dir" else 0o777, parents=True, exist_ok=True)
        with TemporaryFile(dir=folder) as file:
            file.write(bytes(ROOM))
