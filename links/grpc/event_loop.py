"""Event loop of a process's streams. There is only one, because gRPC's asyncio loses events with several."""

import asyncio
import threading
from collections.abc import Coroutine
from functools import cache
from typing import Any

import grpc.aio

from ...messages.frames import MAX_FRAME_BYTES, Frame, read

OPTIONS_OF_BOTH_ENDS = (
    ("grpc.max_receive_message_length", MAX_FRAME_BYTES),
    # Bytes of one stream that may wait unread: 5 MB/s at 100 ms, and no probing for more.
    ("grpc.http2.lookahead_bytes", 1 << 19),
    ("grpc.http2.bdp_probe", 0),
    # An end that vanishes is noticed within 40 s, and pings keep quiet connections through NAT (RFC 5382).
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
)

_lock = threading.Lock()


def stream_loop() -> asyncio.AbstractEventLoop:
    """Return the loop, which runs in a thread of its own until the process ends.

    gRPC stays initialised as long: its shutdown closes file descriptors that the loop may still read.
    """
    with _lock:
        return _running_loop()


@cache
def _running_loop() -> asyncio.AbstractEventLoop:
    grpc.aio.init_grpc_aio()  # pyright: ignore[reportAttributeAccessIssue] (in its `__all__`, and not in its stubs)
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="streams", daemon=True).start()
    return loop


async def next_frame(stream: Any) -> Frame:
    """Return the next frame from the other end of a gRPC stream.

    Raises:
      BadFrame: what was sent is no frame.
      EOFError: the other end has closed the stream.
    """
    data = await stream.read()
    if not data:
        raise EOFError("the other end has closed the stream")
    return read(data)


async def until_one_ends(*works: Coroutine[Any, Any, Any]) -> set[asyncio.Task[Any]]:
    """Run the coroutines at the same time until one ends, cancel the others and return the tasks that have ended."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        finished, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return finished
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
