"""File of a log, which loses lines on a full disk and disturbs nobody: what ends the run says so itself."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager, suppress
from logging import Handler, Logger, LogRecord
from logging.handlers import RotatingFileHandler


class LogFile(RotatingFileHandler):
    """Handler that writes lines into a file while the disk has room; logging's own prints a traceback for each lost line."""

    def handleError(self, record: LogRecord) -> None:
        """Lose the line."""

    def close(self) -> None:
        """Close the file; lines that have no room are lost."""
        with suppress(OSError):
            super().close()


@contextmanager
def written_by(logger: Logger, handler: Handler) -> Generator[None]:
    """Let a logger write to this handler alone, which is closed after the block."""
    before, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.propagate = before
        logger.removeHandler(handler)
        handler.close()
