"""Answers of a device to a server's instructions, each handled at most once, on any link.

Work on an instruction is recorded on disk before it begins. After a power cut the device therefore answers an
instruction that it had begun with an error: its cost stays spent, and it is neither executed nor charged a second time.
"""

import logging
import os
import random
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from flwr.app import Error, Message

from ..privacy.ledger.durable_files import replace_file
from ..privacy.refusal import disk_remedy
from ..strategies.wire import HANDLED_BEFORE, NO_BASE, NOT_ELIGIBLE, NOT_READY

MOST_BYTES = 1 << 30  # of an instruction
KEPT = 1024  # ids; a server repeats an instruction of its present exchange only
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 60.0
MOST_DOUBLINGS = 16
AWAY = "not connected"  # how a device says that it has lost its connection
RESTORED = "restored"  # line of a journal by which its owner says that the next unknown answer was missed
COPIED = (
    "this device was restored from a backup, or a copy of it has answered: the server has an answer of it that it does not "
    "know; stop the copy, then: fedveil client forget FOLDER --restored"
)

logger = logging.getLogger("fedveil.client")

Handle = Callable[[Message], Message]
Longest = Callable[[], float]


def usual_wait() -> float:
    """Return the longest wait between two connection attempts during a run, in seconds."""
    return LONGEST_WAIT_SECONDS


class Journal:
    """Journal of begun instructions: a text file with one id per line.

    Each entry starts with a line break, so that a truncated one does not corrupt the next. The file is written anew when
    it holds twice as many as are kept.

    Raises:
      OSError: the file cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        before = path.read_text("utf-8", "replace").split("\n") if path.exists() else []
        self._ids = OrderedDict.fromkeys([line for line in before if line][-KEPT:])
        self._path, self._end = path, 0  # before the last note
        self._file = self._written()

    def _written(self) -> TextIO:
        """Write the file anew with the ids that are kept, and return it, open for more."""
        replace_file(self._path, "".join(f"\n{each}" for each in self._ids).encode())
        self._lines = len(self._ids)
        return open(self._path, "a", encoding="utf-8")

    def __contains__(self, name: str) -> bool:
        """Return whether that instruction was begun."""
        return name in self._ids

    def knows(self, name: str) -> bool:
        """Return whether this device may have answered an instruction; after a restore its owner lets it adopt one.

        Raises:
          OSError: the file cannot be written.
        """
        if name not in self._ids and RESTORED in self._ids:
            del self._ids[RESTORED]
            self._ids[name] = None
            old, self._file = self._file, self._written()
            old.close()
        return name in self._ids

    def note(self, name: str) -> None:
        """Record durably that this instruction is begun."""
        if self._lines >= 2 * KEPT:
            full, self._file = self._file, self._written()
            full.close()
        self._end = os.fstat(self._file.fileno()).st_size
        self._file.write(f"\n{name}")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._ids[name] = None
        self._lines += 1
        while len(self._ids) > KEPT:
            self._ids.popitem(last=False)

    def take_back(self, name: str) -> None:
        """Remove the last entry, whose instruction was not begun.

        If a loss of power undoes this, the instruction counts as begun.
        """
        del self._ids[name]
        self._lines -= 1
        os.ftruncate(self._file.fileno(), self._end)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def handled_once(name: str, message: Message, handle: Handle, begun: Journal) -> Message:
    """Return the reply to an instruction, without executing it a second time.

    An instruction for which the device is not eligible, whose model it cannot restore, or that it cannot record, counts
    as not begun.
    """
    if name in begun:
        return Message(Error(HANDLED_BEFORE, "handled before"), reply_to=message)
    try:
        begun.note(name)
    except OSError as error:
        logger.error(
            "no instruction can be begun (%s); %s", error.strerror, disk_remedy(error) or "mend the disk"
        )
        return Message(Error(NOT_READY, "the client's disk fails"), reply_to=message)
    reply = handle(message)
    if reply.has_error() and reply.error.code in (NOT_ELIGIBLE, NO_BASE):
        begun.take_back(name)
    return reply


def back_off(failures: int, longest: float = LONGEST_WAIT_SECONDS) -> float:
    """Return how long to wait before connecting again, in seconds: exponential back-off with jitter.

    Args:
      failures: in a row, from 1.
      longest: wait, in seconds.
    """
    wait = min(longest, FIRST_WAIT_SECONDS * 2 ** min(failures - 1, MOST_DOUBLINGS))
    return wait * random.uniform(0.2, 1.0)


def away(seconds: float, why: str) -> str:
    """Return the log line of a device that has lost its connection.

    Args:
      seconds: until it tries again.
      why: the reason, in a few words.
    """
    return f"{AWAY}, trying again in {seconds:.0f} s: {why}"
