"""Packed tables: one CSV file in .gz or .zip, unpacked in blocks while it is read."""

from __future__ import annotations

import gzip
import io
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

from ..base.refusal import Refusal
from ..tasks.table_files import TEXTS, OpenTable, text_table

# A table that unpacks to more than both is taken for a bomb. Deflate reaches 1032 : 1, sparse tables about 100 : 1.
LARGEST_RATIO = 200
LARGEST_BYTES = 1 << 30


def open_gzip(file: Path, encoding: str | None) -> OpenTable:
    """Open a CSV file that gzip has packed, such as north.csv.gz; refuse another content by its name."""
    inner = PurePosixPath(file.name).with_suffix("").suffix.lower()
    if inner not in TEXTS:
        remedy = f"holds no CSV file by its name; call it .csv{file.suffix}, or unpack it, or move it away"
        raise Refusal("table", str(file), remedy)
    return text_table(file, partial(_content, partial(gzip.open, file), file.stat().st_size), encoding)


def open_zip(file: Path, encoding: str | None) -> OpenTable:
    """Open the CSV file of a ZIP archive; refuse an archive with other files, several tables, or a password."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = [each for each in archive.infolist() if not _is_metadata(each)]
    except zipfile.BadZipFile as error:
        raise Refusal("table", str(file), f"is no ZIP archive ({error}); pack it again") from None
    if len(entries) != 1:
        remedy = f"holds {len(entries)} files; pack each table into an archive of its own, or unpack it"
        raise Refusal("table", str(file), remedy)
    (entry,) = entries
    inner = f"{file}: {entry.filename}"
    if PurePosixPath(entry.filename).suffix.lower() not in TEXTS:
        raise Refusal("table", inner, "is no CSV file; unpack the archive")
    if entry.flag_bits & 1:
        raise Refusal("table", inner, "is encrypted; unpack the archive")

    def unpacked() -> Any:
        return zipfile.ZipFile(file).open(entry)

    return text_table(Path(inner), partial(_content, unpacked, entry.compress_size), encoding)


def _is_metadata(entry: zipfile.ZipInfo) -> bool:
    """Return whether an entry of an archive is a folder, or a hidden file such as those that macOS adds."""
    path = PurePosixPath(entry.filename)
    return entry.is_dir() or path.parts[0] == "__MACOSX" or path.name.startswith(".")


def _content(unpacked: Callable[[], Any], packed_bytes: int) -> Any:
    """Return the unpacked content as an Arrow file; `packed_bytes` is its size before."""
    limit = max(LARGEST_BYTES, LARGEST_RATIO * packed_bytes)
    return import_module("pyarrow").PythonFile(io.BufferedReader(_Unpacked(unpacked(), limit)), mode="r")


class _Unpacked(io.RawIOBase):
    """Content of a packed file; a damaged one, or one of more than `limit` bytes, is an OSError."""

    def __init__(self, content: Any, limit: int) -> None:
        self._content, self._rest = content, limit

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            part: bytes = self._content.read(len(buffer))
        except (EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError) as error:
            raise OSError(f"it is damaged, {error}; pack it again") from None
        self._rest -= len(part)
        if self._rest < 0:
            remedy = (
                f"it unpacks to more than {LARGEST_RATIO} times its size; unpack it yourself if you trust it"
            )
            raise OSError(remedy)
        buffer[: len(part)] = part
        return len(part)

    def close(self) -> None:
        self._content.close()
        super().close()
