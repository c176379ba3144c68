"""The one event loop in which all of a process's streams live: gRPC's asyncio loses events where there are several."""

from __future__ import annotations

import asyncio
import threading
from functools import cache

_lock = threading.Lock()


def stream_loop() -> asyncio.AbstractEventLoop:
    """Return the loop; it runs in a thread of its own until the process ends."""
    with _lock:
        return _running_loop()


@cache
def _running_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="streams", daemon=True).start()
    return loop
