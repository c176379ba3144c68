"""A relay between clients and a server that counts the bytes of their connections, and changes none."""

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

CHUNK = 1 << 16


@dataclass
class Relayed:
    """What went through: the port to connect to, and bytes from the server (down) and to it (up)."""

    port: int = 0
    bytes: Counter[str] = field(default_factory=Counter[str])
    connections: int = 0


@contextmanager
def counting_relay(to: int, listen: int = 0) -> Iterator[Relayed]:
    """Pass connections on to a port of this machine as long as the context lasts."""
    found, loop = Relayed(), asyncio.new_event_loop()

    async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter, direction: str) -> None:
        try:
            while data := await source.read(CHUNK):
                found.bytes[direction] += len(data)
                sink.write(data)
                await sink.drain()
        except OSError:  # an end has gone
            pass
        finally:
            sink.close()

    async def passed(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            answers, on = await asyncio.open_connection("127.0.0.1", to)
        except OSError:  # the server is not there yet
            writer.close()
            return
        found.connections += 1
        with suppress(asyncio.CancelledError):  # at the end, and asyncio would tell of it
            await asyncio.gather(copy(reader, on, "up"), copy(answers, writer, "down"))

    async def begin() -> asyncio.Server:
        return await asyncio.start_server(passed, "127.0.0.1", listen)

    async def end() -> None:
        server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for each in others:
            each.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(begin(), loop).result()
    found.port = server.sockets[0].getsockname()[1]
    try:
        yield found
    finally:
        asyncio.run_coroutine_threadsafe(end(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
