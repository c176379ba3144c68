"""Status of a run that has ended."""

from enum import StrEnum


class Status(StrEnum):
    """How a run ended."""

    COMPLETED = "completed"
    EXHAUSTED = "exhausted"
    ALARMED = "alarmed"
    PAUSED = "paused"
    INTERRUPTED = "interrupted"
    FAILED = "failed"


OVER = (Status.COMPLETED, Status.EXHAUSTED)  # after which no server needs to run
