"""Answers of a device to a server's instructions, each handled at most once, on any link.

Work on an instruction is recorded on disk before it begins. After a power cut the device therefore answers an
instruction that it had begun with an error: its cost stays spent, and it is neither executed nor charged a second time.
"""

import logging
import os
import random
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TextIO

from flwr.app import Error, Message

from ..base.durable_files import replace_file
from ..base.refusal import disk_remedy
from ..messages.wire import HANDLED_BEFORE, NO_BASE, NOT_ELIGIBLE, NOT_READY, WAITING

MAX_BYTES = 1 << 30  # of an instruction
JOURNAL_IDS = 1024  # ids that a journal keeps; a server repeats an instruction of its present exchange only
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 60.0
MAX_DOUBLINGS = 16  # of the wait, so that its power of two stays small
AWAY = "not connected"  # start of a device's state without a connection
# Lines in the journal of a restored device until its next greeting: its owner has paid, or has begun to pay, for answers
# that the server has and the device does not know. A backup of a device that went on has no such line.
PAID, UNPAID = "restored", "restoring"
COPIED = (
    "the server says that it has an answer of this device which the device does not know: it was restored from a backup, or a "
    "copy of it has answered, or the server is wrong; stop the copy, then: fedveil client forget FOLDER --restored"
)

logger = logging.getLogger("fedveil.client")

Handle = Callable[[Message], Message]  # function from an instruction to its reply
Longest = Callable[[], float]  # function that returns the longest wait between two connection attempts


def usual_wait() -> float:
    """Return the longest wait between two connection attempts during a run, in seconds."""
    return LONGEST_WAIT_SECONDS


class Journal:
    """Journal of begun instructions: a text file with one id per line.

    Each entry starts with a line break, so that a truncated one does not corrupt the next. The file is written anew when
    it holds twice as many as are kept.

    Attributes:
      restore: PAID or UNPAID after a restore, until the next greeting or instruction; None otherwise.

    Raises:
      OSError: the file cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        lines = path.read_text("utf-8", "replace").split("\n") if path.exists() else []
        self._ids = OrderedDict.fromkeys([line for line in lines if line][-JOURNAL_IDS:])
        self.restore = next((line for line in (PAID, UNPAID) if line in self._ids), None)
        self._path, self._end = path, 0  # size of the file before the last note
        self._file = self._rewrite(self._ids)

    def _rewrite(self, ids: Collection[str]) -> TextIO:
        """Write the file anew with these ids, and return it, open for more."""
        replace_file(self._path, "".join(f"\n{each}" for each in ids).encode())
        self._lines = len(ids)
        return open(self._path, "a", encoding="utf-8")

    def _replace(self, ids: OrderedDict[str, None]) -> None:
        """Continue in a new file with these ids."""
        old, self._file = self._file, self._rewrite(ids)
        old.close()
        self._ids = ids

    def __contains__(self, name: str) -> bool:
        """Return whether that instruction was begun."""
        return name in self._ids

    def unknown(self, names: Sequence[str], is_charged: Callable[[str], bool]) -> list[str]:
        """Return which instructions of a server's greeting this device has not answered.

        At the first greeting after its owner paid for a restore, the device adopts them all, and none is returned. A restore
        that is not paid yet ends if none is unknown.

        Args:
          names: ids of the instructions.
          is_charged: returns whether the device's ledgers hold a charge for an id.

        Raises:
          OSError: the file cannot be written.
        """
        missing = [name for name in names if name not in self._ids and not is_charged(name)]
        if self.restore == PAID:
            self._end_restore(missing)
            return []
        if self.restore is not None and not missing:
            self._end_restore([])
        return missing

    def _end_restore(self, adopted: Sequence[str]) -> None:
        """Remove the line of a restore from the file, and add these ids as those of begun instructions."""
        own = [each for each in self._ids if each not in (PAID, UNPAID)]
        self._replace(OrderedDict.fromkeys([*own, *adopted]))
        self.restore = None

    def note(self, name: str) -> None:
        """Record durably that this instruction is begun."""
        if self.restore is not None:  # on a link without greetings
            self._end_restore([])
        if self._lines >= 2 * JOURNAL_IDS:
            self._replace(self._ids)
        self._end = os.fstat(self._file.fileno()).st_size
        self._file.write(f"\n{name}")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._ids[name] = None
        self._lines += 1
        while len(self._ids) > JOURNAL_IDS:
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


def handle_once(name: str, message: Message, handle: Handle, journal: Journal) -> Message:
    """Return the reply to an instruction, without executing it a second time.

    The id is on disk before `handle` is called; otherwise nothing is handled. If the device is not eligible, waits for its
    owner, or cannot restore the model, the id is removed: the instruction was not begun, and may come again.
    """
    if name in journal:
        return Message(Error(HANDLED_BEFORE, "handled before"), reply_to=message)
    try:
        journal.note(name)
    except OSError as error:
        remedy = disk_remedy(error) or "mend the disk"
        logger.error("no instruction can be begun (%s); %s", error.strerror, remedy)
        return Message(Error(NOT_READY, "the client's disk fails"), reply_to=message)
    reply = handle(message)
    if reply.has_error() and reply.error.code in (NOT_ELIGIBLE, NO_BASE, WAITING):
        journal.take_back(name)
    return reply


def back_off(failures: int, longest: float = LONGEST_WAIT_SECONDS) -> float:
    """Return how long to wait before connecting again, in seconds: exponential back-off with jitter.

    Args:
      failures: number of failures in a row, from 1.
      longest: longest wait, in seconds.
    """
    wait = min(longest, FIRST_WAIT_SECONDS * 2 ** min(failures - 1, MAX_DOUBLINGS))
    return wait * random.uniform(0.2, 1.0)


def loss_line(seconds: float, reason: str) -> str:
    """Return the log line of a device that lost its connection for a reason, and tries again after these seconds."""
    return f"{AWAY}, trying again in {seconds:.0f} s: {reason}"
