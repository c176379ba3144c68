"""Which instructions this device has begun to handle, on disk before it does: power may fail, and none is done twice."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path

from ..privacy.ledger.durable_files import replace_file

KEPT = 1024  # ids; a server repeats an instruction of its present exchange only


class Journal:
    """A text file with an id a line; each starts with the line's end, so that one cut short does not spoil the next.

    Raises:
      OSError: the file cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        before = path.read_text("utf-8", "replace").split("\n") if path.exists() else []
        self._ids = OrderedDict.fromkeys([line for line in before if line][-KEPT:])
        replace_file(path, "".join(f"\n{each}" for each in self._ids).encode())
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (as long as the journal)
        self._end = 0  # before the last note

    def __contains__(self, name: str) -> bool:
        """Whether that instruction was begun."""
        return name in self._ids

    def note(self, name: str) -> None:
        """Write down, durably, that this instruction is begun."""
        self._end = os.fstat(self._file.fileno()).st_size
        self._file.write(f"\n{name}")
        self._sync()
        self._ids[name] = None
        while len(self._ids) > KEPT:
            self._ids.popitem(last=False)

    def take_back(self, name: str) -> None:
        """Cross out the instruction that was noted last: nothing of it was begun.

        Where a power cut undoes this, it counts as begun.
        """
        del self._ids[name]
        os.ftruncate(self._file.fileno(), self._end)

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()
