"""Files that are whole on disk or not there: written beside their place, flushed, and renamed into it."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

PUBLIC = 0o644  # mode of what everybody on the machine may read


def replace_file(path: Path, data: bytes, mode: int = 0o600, *, flush: bool = True) -> None:
    """Replace a file; the new one is on disk when this returns, or the old one stays.

    Args:
      path: of the file.
      data: its new content.
      mode: its permissions, whatever the umask.
      flush: False where a power cut may leave neither file: for what is written again soon.

    Raises:
      OSError: it cannot be written.
    """
    replace_files(path.parent, {path.name: data}, mode, flush=flush)


def replace_files(folder: Path, files: Mapping[str, bytes], mode: int = 0o600, *, flush: bool = True) -> None:
    """Replace files of one folder, each for itself and in their order, with one flush of the folder.

    Args:
      folder: where they lie.
      files: contents by name.
      mode: their permissions, whatever the umask.
      flush: as in `replace_file`.

    Raises:
      OSError: one cannot be written.
    """
    for name, data in files.items():
        fresh = folder / f".{name}.new"
        fresh.unlink(missing_ok=True)
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with open(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)  # whatever the umask
            file.write(data)
            if flush:
                file.flush()
                os.fsync(descriptor)
        os.replace(fresh, folder / name)
    if flush:
        sync_folder(folder)


def open_for_owner(path: Path) -> BinaryIO:
    """Open a file to append to it; nobody but its owner may read it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.fchmod(descriptor, 0o600)  # whoever made it
    return open(descriptor, "ab")


def sync_folder(folder: Path) -> None:
    """Return once the names in a folder are on disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
