"""Disk that is full from one write on, for a while: of all that Python opens, flushes and renames below one folder.

A ledger's pages are written by SQLite and pass by this; `disk.c` fails those.
"""

import builtins
import errno
import io
import os
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Disk:
    """Counts the writes below a folder; those with these numbers fail as on a full disk."""

    def __init__(self, folder: Path, full: Container[int] = ()) -> None:
        self.folder, self.full, self.writes = str(folder), full, 0
        self.names: list[str] = []

    def note(self, path: Any) -> None:
        name = os.fspath(path) if isinstance(path, str | os.PathLike) else ""
        if not str(name).startswith(self.folder):
            return
        self.writes += 1
        self.names.append(Path(name).name)
        if self.writes in self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(name))

    def name_of(self, descriptor: int) -> str:
        try:
            return os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:
            return ""


@contextmanager
def failing(folder: Path, full: Container[int] = ()) -> Iterator[Disk]:
    """Let the writes with these numbers below a folder fail, as long as the block lasts; without any, only count."""
    disk = Disk(folder, full)
    true = builtins.open, os.open, os.fsync, os.replace

    def opened(file: Any, mode: str = "r", *more: Any, **options: Any) -> Any:
        if set(mode) & set("wax+"):
            disk.note(disk.name_of(file) if isinstance(file, int) else file)
        return true[0](file, mode, *more, **options)

    def os_opened(path: Any, flags: int, *more: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR) and flags & os.O_CREAT:
            disk.note(path)
        return true[1](path, flags, *more, **options)

    def synced(descriptor: int) -> None:
        disk.note(disk.name_of(descriptor))
        true[2](descriptor)

    def replaced(source: Any, target: Any, **options: Any) -> None:
        disk.note(target)
        true[3](source, target, **options)

    builtins.open = io.open = opened
    os.open, os.fsync, os.replace = os_opened, synced, replaced
    try:
        yield disk
    finally:
        builtins.open = io.open = true[0]
        os.open, os.fsync, os.replace = true[1:]
