"""Patience of tests: what comes about on a fast machine does so on a slow one."""

import time
from collections.abc import Callable
from typing import Any

SECONDS = 240.0


def until(holds: Callable[[], Any], why: Callable[[], str] = str) -> Any:
    """Wait until it holds, and return what it returned; `why` says what there is to see when it never does."""
    end = time.monotonic() + SECONDS
    while not (found := holds()):
        assert time.monotonic() < end, f"waited in vain: {why()}"
        time.sleep(0.005)
    return found
