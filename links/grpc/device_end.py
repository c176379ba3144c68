"""Device's end of the gRPC link: one stream that the device opens itself, and one instruction at a time.

The stream is kept up for days. An instruction that comes again is answered from memory.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from flwr.app import Error, Message

from ...configs.bundle_files import Credentials
from ...messages.frames import (
    MAX_IDS,
    METHOD,
    PROTOCOL_VERSION,
    Ack,
    BadFrame,
    Begin,
    Chunk,
    Hello,
    MessageBuffer,
    frames_of,
    write,
)
from ...messages.message_codec import Buffer, MalformedMessage, pack_body, segments, unpack
from ...messages.wire import FAILED
from ..device_answers import (
    COPIED,
    MAX_BYTES,
    Handle,
    Journal,
    Longest,
    back_off,
    handle_once,
    loss_line,
    usual_wait,
)
from .event_loop import OPTIONS_OF_BOTH_ENDS, next_frame, stream_loop, until_one_ends

logger = logging.getLogger("fedveil.client")

GREETING_SECONDS = 30.0  # to connect, and to be greeted
LINGER_SECONDS = 10.0  # for a last reply to arrive, once the device is to stop
POLL_SECONDS = 0.5  # between two checks of the stop event

OPTIONS = (
    *OPTIONS_OF_BOTH_ENDS,
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_http_proxy", 0),
)

UNTRUSTED = (
    "the handshake failed: the server there is not this federation's, a certificate has expired, or the authority was "
    "replaced: ask its holder for rollovers.json, then: fedveil client authority FOLDER --rollover rollovers.json"
)

Parts = Sequence[Buffer]  # bytes of a message in pieces


@dataclass(frozen=True)
class Endpoint:
    """Address of the server, and identity of this device.

    Attributes:
      server: host and port; the server's certificate must name that host.
      node: this device's number.
      credentials: returns those of the device's end of mutual TLS; called for every connection.
    """

    server: str
    node: int
    credentials: Callable[[], Credentials]


def follow(
    endpoint: Endpoint,
    handle: Handle,
    journal: Path,
    stop: threading.Event,
    notify: Callable[[str], None] = logger.info,
    longest: Longest = usual_wait,
    is_charged: Callable[[str], bool] = frozenset[str]().__contains__,
) -> None:
    """Follow the server's instructions until `stop` is set; no failure of server or network ends it.

    Args:
      endpoint: the server's address and this device's identity.
      handle: called in this thread with one instruction at a time; what it raises is logged and stays here.
      journal: file of the instructions that were begun.
      stop: once set, the present instruction is finished, its reply is sent, and the function returns.
      notify: called from another thread with a line of text when the link comes up, goes down or waits.
      longest: returns the longest wait between two attempts to connect, in seconds.
      is_charged: returns whether the device's ledgers hold a charge for the instruction with an id; asked for old ones,
        which the journal has forgotten.

    Raises:
      OSError: the journal cannot be opened.
    """
    instructions = Journal(journal)
    inbox: Inbox = queue.SimpleQueue()
    unknown = partial(instructions.unknown, is_charged=is_charged)
    stream = DeviceStream(endpoint, inbox, notify, longest, unknown)
    connection = asyncio.run_coroutine_threadsafe(stream.keep(), stream_loop())
    try:
        while not stop.is_set():
            answer_one(inbox, handle, lambda _: instructions)
    finally:
        stream.hang_up()
        connection.result()
        instructions.close()


def _describe(error: grpc.aio.AioRpcError) -> str:
    """Return why a stream ended, for the device's owner."""
    details = str(error.details())
    if error.code() is grpc.StatusCode.PERMISSION_DENIED:
        return f"the server turns this device away, which was revoked or has new keys: {details}"
    if "handshake failed" in details.lower():
        return UNTRUSTED
    reason = details.rpartition(": ")[2] if error.code() is grpc.StatusCode.UNAVAILABLE else details
    return f"{error.code().name.lower()}: {reason}"


def answer_one(inbox: Inbox, handle: Handle, journal_of: Callable[[DeviceStream], Journal]) -> None:
    """Answer the next instruction in the queue, if one comes within `POLL_SECONDS`, and release its memory.

    Args:
      inbox: queue of instructions.
      handle: returns the reply to an instruction.
      journal_of: returns the journal of the device that has a stream.
    """
    with suppress(queue.Empty):
        stream, name, data = inbox.get(timeout=POLL_SECONDS)
        stream.answer(name, answer_instruction(name, data, handle, journal_of(stream)))


def answer_instruction(name: str, data: bytearray, handle: Handle, journal: Journal) -> Parts:
    """Return the reply to one instruction, its bytes in pieces; empty if it is no message. A failure becomes an error.

    Args:
      name: id of the instruction.
      data: bytes of the instruction.
      handle: returns the reply, if the instruction was not begun before.
      journal: instructions that were begun.
    """
    try:
        message = unpack(data)
    except MalformedMessage as error:
        logger.error("an instruction cannot be read: %s", error)
        return ()
    try:
        reply = handle_once(name, message, handle, journal)
        return segments(reply.metadata, pack_body(reply))
    except Exception:
        # The error may depend on the data: only the owner's log has it.
        logger.exception("an instruction failed at this client")
    reply = Message(Error(FAILED, "the client failed"), reply_to=message)
    return segments(reply.metadata, pack_body(reply))


class DeviceStream:
    """One device's stream, and the replies that the server has not acknowledged.

    It runs in the loop of streams. It puts instructions into a queue, and another thread hands in the replies.

    Args:
      endpoint: the server's address and this device's identity.
      inbox: takes this stream, an instruction's id, and its bytes.
      notify, longest: as in `follow`.
      unknown: returns which instructions, of those in the server's hello, this device has not answered.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        inbox: Inbox,
        notify: Callable[[str], None],
        longest: Longest = usual_wait,
        unknown: Callable[[Sequence[str]], Sequence[str]] = lambda _: (),
    ) -> None:
        self._unknown = unknown
        self._endpoint, self._inbox, self._notify, self._longest = endpoint, inbox, notify, longest
        self._unanswered: set[str] = set()  # ids of instructions in the queue or at work
        self._replies: dict[str, Parts] = {}  # oldest first; the last one stays, for a server that restarts
        self._unacknowledged: set[str] = set()  # ids of replies that the server still wants
        self._outbox: asyncio.Queue[str] | None = None  # ids of replies to send; None without a connection
        self._failures = 0  # to connect, since the last success
        self._ending, self._settled = asyncio.Event(), asyncio.Event()
        self._settled.set()

    # --- from other threads -----------------------------------------------------------------------------------------

    def answer(self, name: str, parts: Parts) -> None:
        """Send the reply to the instruction with this id, now or after a reconnection; empty parts are not sent."""
        stream_loop().call_soon_threadsafe(self._answer, name, parts)

    def hang_up(self) -> None:
        """End `keep` once a connected server has acknowledged all replies, or after `LINGER_SECONDS`."""
        stream_loop().call_soon_threadsafe(self._ending.set)

    # --- in the event loop ------------------------------------------------------------------------------------------

    async def keep(self) -> None:
        """Connect, and connect again, until `hang_up` is called."""
        connecting = asyncio.ensure_future(self._reconnect())
        await self._ending.wait()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._settled.wait(), LINGER_SECONDS)
        connecting.cancel()
        await asyncio.gather(connecting, return_exceptions=True)

    async def _reconnect(self) -> None:
        """Open one stream after another, with longer and longer pauses while that fails."""
        while True:
            try:
                reason = await self._session()
            except Exception as error:
                logger.exception("the link failed")
                reason = type(error).__name__
            self._failures += 1
            seconds = back_off(self._failures, self._longest())
            self._notify(loss_line(seconds, reason))
            await asyncio.sleep(seconds)

    async def _session(self) -> str:
        """Serve one stream until it ends and return the reason."""
        server, pems = self._endpoint.server, self._endpoint.credentials()
        credentials = grpc.ssl_channel_credentials(pems.ca, pems.key, pems.certificate)
        async with grpc.aio.secure_channel(server, credentials, OPTIONS) as channel:
            call: Any = channel.stream_stream(METHOD)()
            try:
                await self._greet(call)
                self._notify(f"connected to {server}")
                await self._exchange(call)
            except grpc.aio.AioRpcError as error:
                return _describe(error)
            except (BadFrame, TimeoutError, EOFError, asyncio.InvalidStateError) as error:
                return str(error) or type(error).__name__
            finally:
                self._outbox = None
                self._settle()
                call.cancel()
        return "the server ended the stream"

    async def _greet(self, call: Any) -> None:
        """Exchange hellos; if the server names an instruction that this device has not answered, tell it and raise BadFrame."""
        async with asyncio.timeout(GREETING_SECONDS):
            ids = [*self._unanswered, *reversed(self._replies)][:MAX_IDS]
            await call.write(write(Hello(PROTOCOL_VERSION, self._endpoint.node, ids)))
            frame = await next_frame(call)
        if not isinstance(frame, Hello) or frame.version != PROTOCOL_VERSION:
            raise BadFrame(f"this client speaks protocol {PROTOCOL_VERSION}; the server said {frame}")
        for name in self._unknown(frame.instruction_ids):
            await call.write(write(Begin(name, 0)))
            with suppress(grpc.aio.AioRpcError, EOFError, TimeoutError):  # the server ends the stream
                async with asyncio.timeout(GREETING_SECONDS):
                    await next_frame(call)
            raise BadFrame(COPIED)
        self._failures = 0

    async def _exchange(self, call: Any) -> None:
        """Receive instructions and send replies until the stream ends; raise why it ended."""
        self._outbox = asyncio.Queue()
        self._unacknowledged.clear()  # the server reminds of what it still wants
        for task in await until_one_ends(self._receive(call), self._send(call, self._outbox)):
            task.result()

    async def _receive(self, call: Any) -> None:
        """Take instructions, reminders and acknowledgements as they come."""
        gathering: MessageBuffer | None = None
        while True:
            frame = await next_frame(call)
            if isinstance(frame, Ack):
                self._unacknowledged.discard(frame.id)
                self._settle()
            elif isinstance(frame, Begin) and gathering is None:
                if frame.size == 0:
                    self._send_again(frame.id)
                else:
                    gathering = MessageBuffer(frame, MAX_BYTES)
            elif isinstance(frame, Chunk) and gathering is not None:
                if gathering.add(frame):
                    self._take(gathering)
                    gathering = None
            else:
                raise BadFrame("a frame is out of order")

    def _send_again(self, name: str) -> None:
        """Send the reply to an instruction, if there is one and the server is connected."""
        if name in self._replies and self._outbox is not None:
            self._unacknowledged.add(name)
            self._outbox.put_nowait(name)

    def _take(self, gathering: MessageBuffer) -> None:
        """Put an instruction that has arrived into the queue, unless it is there, or answered already."""
        name = gathering.id
        if name in self._replies:
            return self._send_again(name)
        if name not in self._unanswered:
            if len(self._unanswered) == MAX_IDS:
                raise BadFrame("too many instructions for one device")
            self._unanswered.add(name)
            self._inbox.put((self, name, gathering.data))

    def _answer(self, name: str, parts: Parts) -> None:
        self._unanswered.discard(name)
        if parts:
            self._replies[name] = parts
            self._unacknowledged.add(name)
            self._send_again(name)
            self._settle()

    async def _send(self, call: Any, outbox: asyncio.Queue[str]) -> None:
        """Send the replies whose ids come into the outbox."""
        while True:
            name = await outbox.get()
            if (parts := self._replies.get(name)) is not None:
                for frame in frames_of(name, parts):
                    await call.write(frame)

    def _settle(self) -> None:
        """Drop acknowledged replies, except for the last, and note whether a connected server still wants one."""
        for name in list(self._replies)[:-1]:
            if name not in self._unacknowledged or len(self._replies) > MAX_IDS:
                del self._replies[name]
        if self._unacknowledged and self._outbox is not None:
            self._settled.clear()
        else:
            self._settled.set()


# Queue of instructions: the stream on which to answer, the instruction's id, and its bytes.
Inbox = queue.SimpleQueue[tuple[DeviceStream, str, bytearray]]
