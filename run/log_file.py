"""File of a log, which drops lines on a full disk without an error: other code reports what ends the run."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager, suppress
from logging import Handler, Logger, LogRecord
from logging.handlers import RotatingFileHandler


class LogFile(RotatingFileHandler):
    """Handler that drops lines when the disk is full; logging's own prints a traceback for each lost line."""

    def handleError(self, record: LogRecord) -> None:
        """Lose the line."""

    def close(self) -> None:
        """Close the file; lines that do not fit on the disk are lost."""
        with suppress(OSError):
            super().close()


@contextmanager
def written_by(logger: Logger, handler: Handler) -> Generator[None]:
    """Write the logger's lines to this handler in the block, and to none of the parents'; then close the handler."""
    before, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.propagate = before
        logger.removeHandler(handler)
        handler.close()
