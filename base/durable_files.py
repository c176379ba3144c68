"""Atomic file replacement: a temporary file in the target's folder is written, flushed and renamed."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

from .refusal import refusing

Part = bytes | bytearray | memoryview
Content = bytes | Iterable[Part]  # parts in order, so that large content is not in memory twice

ROOM = 1 << 16  # bytes of the trial file that shows that a folder has room
PUBLIC = 0o644  # permissions of a file that every user of the machine may read


def replace_file(path: Path, data: Content, mode: int | None = 0o600, *, flush: bool = True) -> None:
    """Replace or create a file atomically: on return the new content is on disk, on an error the old file is intact.

    Args:
      path: file in an existing folder.
      data: new content, bytes or their parts in order.
      mode: permissions, whatever the umask; None applies the umask.
      flush: False if a power cut may lose both versions, as for a file that is soon written again.

    Raises:
      OSError: the file cannot be written.
    """
    replace_files(path.parent, {path.name: data}, mode, flush=flush)


def replace_files(
    folder: Path, files: Mapping[str, Content], mode: int | None = 0o600, *, flush: bool = True
) -> None:
    """Replace files of one folder in order, each atomically; the folder is flushed once.

    `files` is the new content by file name; the other arguments as of `replace_file`.

    Raises:
      OSError: a file cannot be written; those before it are replaced.
    """
    for name, data in files.items():
        parts = [data] if isinstance(data, bytes) else data
        os.replace(write_aside(folder / name, parts, mode, flush=flush), folder / name)
    if flush:
        sync_folder(folder)


def write_aside(path: Path, parts: Iterable[Part], mode: int | None = 0o600, *, flush: bool = True) -> Path:
    """Write new content to a temporary file in the folder of `path`, and return the temporary file's path.

    The caller renames it. On an error it is removed, to free the disk. `mode` and `flush` as of `replace_file`.
    """
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)  # a crash may have left one
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
    """Open or create a file for appending; only its owner may read or write it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.fchmod(descriptor, 0o600)  # also of an existing file
    return open(descriptor, "ab")


def append_line(path: Path, fields: Mapping[str, Any]) -> None:
    """Append an object of JSON as a line to a file for its owner alone, created if missing; on return it is on disk."""
    with open_for_owner(path) as file:
        if file.tell() > 0 and not path.read_bytes().endswith(b"\n"):  # a crash cut the last line short
            file.write(b"\n")
        file.write(json.dumps(fields).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def write_at(path: Path, size: int, data: bytes, mode: int = 0o600) -> None:
    """Append data to the valid part of a file; on return it is on disk.

    Args:
      path: the file, created if missing; `sync_folder` then flushes its name.
      size: length of the valid content in bytes; what a crash has left behind it is cut off.
      data: bytes to append.
      mode: permissions of a new file.

    Raises:
      OSError: the data cannot be written.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, mode)
    with open(descriptor, "wb") as file:
        file.seek(size)
        file.truncate()
        file.write(data)
        file.flush()
        os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """Flush a folder to disk, and with it the names of its new and renamed files."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(key: str, folder: Path) -> None:
    """Create the folder that a key names; that of `ledger.dir` is for its owner alone.

    A trial file of `ROOM` bytes shows a full disk now, and not after a release was charged.

    Raises:
      Refusal: the folder cannot be created, or has no room.
    """
    with refusing(key, folder, "cannot be made or written"):
        folder.mkdir(mode=0o700 if key == "ledger.dir" else 0o777, parents=True, exist_ok=True)
        with TemporaryFile(dir=folder) as file:
            file.write(bytes(ROOM))
