"""Proxy on the loopback address that admits only this user's processes, in front of a Unix socket.

Flower's SuperLink has no password for its operator: access to it allows running code. It therefore listens on a socket
in a folder that only this user may enter. Flower's own commands, which need a port, connect through this proxy.
"""

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from ..grpc.event_loop import stream_loop, until_one_ends

logger = logging.getLogger("fedveil.server")

CONNECTIONS = Path("/proc/net/tcp")  # proc(5): addresses, state and owner of each connection's ends
OPEN = "01"  # an end that is already closed is listed as root's
CHUNK_BYTES = 1 << 18
Address = tuple[str, int]


@contextmanager
def open_door(path: Path) -> Generator[str]:
    """Forward connections to the socket at `path` for the duration of the context, and yield the proxy's address."""
    loop = stream_loop()
    begun = asyncio.start_server(partial(_pass_on, path), "127.0.0.1", 0)
    door = asyncio.run_coroutine_threadsafe(begun, loop).result()
    host, port = door.sockets[0].getsockname()
    try:
        yield f"{host}:{port}"
    finally:
        loop.call_soon_threadsafe(door.close)


async def _pass_on(path: Path, caller: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
    theirs, ours = (back.get_extra_info(end) for end in ("peername", "sockname"))
    with suppress(OSError):  # nobody is behind the door yet, or one of the two has gone
        try:
            if (user := owner_of(theirs, ours)) != os.geteuid():
                logger.warning("a call of the operator's by user %s was turned away", user)
                return
            answers, on = await asyncio.open_unix_connection(path)
            try:
                await until_one_ends(_copy(caller, on), _copy(answers, back))
            finally:
                on.close()
        finally:
            back.close()


def owner_of(end: Address, other: Address) -> int | None:
    """Return the user who owns an end of a connection on this machine; None if that end is not open."""
    wanted = [_written(*end), _written(*other), OPEN]
    for line in CONNECTIONS.read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1:4] == wanted:
            return int(fields[7])
    return None


def _written(host: str, port: int) -> str:
    return f"{int.from_bytes(socket.inet_aton(host), sys.byteorder):08X}:{port:04X}"


async def _copy(source: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
    while data := await source.read(CHUNK_BYTES):
        to.write(data)
        await to.drain()
