"""Files that are whole on disk or not there: what is written beside them is flushed, then renamed over them."""

import os
from collections.abc import Mapping
from pathlib import Path


def replace_file(path: Path, data: bytes, mode: int = 0o600, *, flush: bool = True) -> None:
    """Put `data` in the place of the file, with this mode; on disk when this returns, or the old file stays.

    Without `flush` readers still see the old file or the new one, but a power cut may leave neither: for what is
    written again soon, and nobody relies on.

    Raises:
      OSError: it cannot be written.
    """
    replace_files(path.parent, {path.name: data}, mode, flush=flush)


def replace_files(folder: Path, files: Mapping[str, bytes], mode: int = 0o600, *, flush: bool = True) -> None:
    """The same for several files of one folder, each for itself and in their order: one flush of the folder for all."""
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


def sync_folder(folder: Path) -> None:
    """Returns once the names in `folder` are on disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
