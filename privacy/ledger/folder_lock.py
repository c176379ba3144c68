"""Lock of a bundle's folder, which one server or one agent holds as long as it runs."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from ...base.refusal import Refusal
from .hash_chain import Lock

STATUS_SECONDS = 2.0  # `status` holds the lock for a moment


@contextmanager
def exclusive_lock(path: Path, field: str) -> Generator[None]:
    """Hold the lock within the context.

    Args:
      path: of the lock, without its suffix.
      field: what a refusal calls the process.

    Raises:
      Refusal: another process holds it.
    """
    try:
        lock = Lock(path, STATUS_SECONDS)
    except Refusal as refusal:
        raise Refusal(field, str(path.parent), refusal.remedy) from refusal
    with lock:
        yield


def lock_holder(path: Path) -> int | None:
    """Return the id of the process that holds the lock at `path`, or None."""
    file = path.with_name(f"{path.name}.lock")
    if not file.exists():
        return None
    try:
        Lock(path, 0.0).release()
        return None
    except Refusal:
        text = file.read_text()
        return int(text) if text.isdigit() else None
