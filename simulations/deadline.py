"""Deadline of one client, kept by an alarm in the process that runs it; as a mod, it works on any engine."""

from __future__ import annotations

import inspect
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

from flwr.app import Context, Error, Message
from flwr.clientapp.typing import ClientAppCallable, Mod

from ..messages.wire import LATE

AGAIN_SECONDS = 0.02  # after which an alarm that came during an import is repeated
IMPORT_SYSTEM = "<frozen importlib._bootstrap>"  # co_filename of its functions


class PastDeadline(BaseException):
    """A client exceeded its deadline. Not an `Exception`, so that no client code swallows it."""


@contextmanager
def limited_to(seconds: float) -> Generator[None]:
    """Raise `PastDeadline` in the block when the time is up; never in other threads, where alarms cannot arrive.

    An import that begins in the block is finished first: half of a module would stay, and ruin this process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    outside = _imports(inspect.currentframe())

    def on_alarm(number: int, frame: FrameType | None) -> None:
        if _imports(frame) > outside:
            signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)
            return
        raise PastDeadline

    before = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _imports(frame: FrameType | None) -> int:
    """Return the number of the import system's frames among a frame and its callers; 0 for None."""
    count = 0
    while frame is not None:
        count += frame.f_code.co_filename == IMPORT_SYSTEM
        frame = frame.f_back
    return count


def within(seconds: float) -> Mod:
    """Return the mod that answers with an error for a client past its deadline; it must be the outermost."""

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        try:
            with limited_to(seconds):
                return call_next(message, context)
        except PastDeadline:
            return Message(Error(LATE, "late"), reply_to=message)

    return mod
