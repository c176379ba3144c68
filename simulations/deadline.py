"""Deadline of one client, kept by an alarm in the process that runs it; as a mod, it works on any engine."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

from flwr.app import Context, Error, Message
from flwr.clientapp.typing import ClientAppCallable, Mod

from ..strategies.wire import LATE


class PastDeadline(BaseException):
    """A client exceeded its deadline. Not an `Exception`, so that no client code swallows it."""


@contextmanager
def limited_to(seconds: float) -> Generator[None]:
    """Raise `PastDeadline` in the block when the time is up; never in other threads, where alarms cannot arrive."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_alarm(number: int, frame: FrameType | None) -> None:
        raise PastDeadline

    before = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def within(seconds: float) -> Mod:
    """Return the mod that answers with an error for a client past its deadline; it must be the outermost."""

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        try:
            with limited_to(seconds):
                return call_next(message, context)
        except PastDeadline:
            return Message(Error(LATE, "late"), reply_to=message)

    return mod
