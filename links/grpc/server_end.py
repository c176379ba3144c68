"""Server's end of all streams: connected nodes, pending instructions, and byte counts.

Everything runs in one event loop. The key of a stream is looked up on the admission list before its first frame is
read, and then every second. At most one message of each client is buffered at a time, within a size limit that depends
on its instruction.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, cast

import grpc

from ...messages.flower_adapter import SERVER_NODE
from ...messages.frames import (
    PROTOCOL_VERSION,
    Ack,
    BadFrame,
    Begin,
    Chunk,
    Frame,
    Hello,
    MessageBuffer,
    frames_of,
    wire_bytes,
    write,
)
from ...messages.message_codec import Buffer
from ...messages.traffic import CONTROL, LOST, Cargo, Shares, Tally
from ..roster_watch import Admitted, fingerprint
from .event_loop import next_frame, until_one_ends

HELLO_SECONDS = 10.0  # for the first frame
CHECK_SECONDS = 1.0  # between two reads of the admission list; a restored or copied device refuses sooner
# Largest reply: a ratio to its instruction, since 8 bytes a coordinate answer a model of 4 (and as much to spare); and bytes.
REPLY_RATIO, REPLY_ROOM = 4, 1 << 20
MAX_UNREAD = 1000  # letters and frames that wait to be sent to a client
REMEMBERED = 4096  # answered ids, to distinguish a duplicate reply from a late one
# Bytes that a relay measured in addition to frames: a stream's beginning and end (handshake of TLS 1.3, settings and
# headers of HTTP/2), without certificates: each end sends one, and the server's two tickets contain the client's; the
# window updates that answer a message; and pings with their answers on a quiet stream.
OPENING_UP, OPENING_DOWN, CERTIFICATES_DOWN = 2025, 2280, 3
WINDOW_UPDATES = 2 * 13  # of the stream and of the connection (RFC 9113, section 6.9)
PINGS = 2 * (17 + 22)  # each end's, and its answer to the other's (section 6.7), in a record of TLS each
QUIET_SECONDS = 30.0  # after which both ends ping

Code = grpc.StatusCode


@dataclass(frozen=True)
class Letter:
    """Instruction that waits for its reply.

    Attributes:
      id: of the instruction and of its reply.
      node: number of the node that it goes to.
      parts: its bytes in pieces, shared with letters to other nodes.
      cargo: purpose of the bytes.
      deliver: called in the event loop with the reply's bytes.
      model_bytes: size of the whole model if the bytes are a difference.
    """

    id: str
    node: int
    parts: Sequence[Buffer]
    cargo: Cargo
    deliver: Callable[[Letter, bytearray], None]
    model_bytes: int = 0

    @property
    def reply_bytes(self) -> int:
        """Size of the largest reply that is accepted, in bytes."""
        return REPLY_RATIO * (self.model_bytes + sum(len(part) for part in self.parts)) + REPLY_ROOM


@dataclass
class Traffic:
    """Traffic between the server and one node, over all of its streams.

    Attributes:
      connected_since: Unix second at which the present stream began; 0 while the node is away, or may yet refuse.
      disconnected_at: Unix second at which the last stream ended; 0 before.
      streams: number of streams so far.
      last_frame: when the last frame went or a ping was due, by the monotonic clock.
    """

    connected_since: float = 0.0
    disconnected_at: float = 0.0
    streams: int = 0
    last_frame: float = 0.0


@dataclass(frozen=True, eq=False)
class _Peer:
    """One node's stream: what is to be sent on it, and an event that is set once the node is no longer admitted."""

    node: int
    key: str  # fingerprint of the node's TLS key
    context: Any  # gRPC's, of the stream
    traffic: Traffic
    began: float = field(default_factory=time.monotonic)
    outbox: asyncio.Queue[Letter | Begin | Ack] = field(default_factory=asyncio.Queue[Letter | Begin | Ack])
    revoked: asyncio.Event = field(default_factory=asyncio.Event)


def _size_received(peer: _Peer, frame: Frame) -> int:
    """Note the time of a frame that a node has sent, and return its bytes on the connection."""
    peer.traffic.last_frame = time.monotonic()
    return wire_bytes(1 + len(frame.data) if isinstance(frame, Chunk) else len(write(frame)))


def _der_bytes(pem: bytes) -> int:
    """Return the approximate bytes of a PEM certificate in TLS."""
    return sum(3 * len(line) // 4 for line in pem.splitlines() if not line.startswith(b"-"))


class Switchboard:
    """Server's end of all streams. Call its methods in its event loop, except `traffic`, `counts` and `acknowledge`.

    Args:
      admitted: returns the nodes that may connect, by the fingerprints of their TLS keys.
      max_reply_bytes: size of the largest reply to any instruction.
      acknowledged: id of the last instruction that each key has answered, by its fingerprint.

    Attributes:
      tally: of all bytes between the server and its nodes.
      acknowledged: as above, and what was answered since.
      restored: nodes that did not know an instruction that their key had answered, and the Unix second at which they said
        so.
    """

    def __init__(self, admitted: Admitted, max_reply_bytes: int, acknowledged: Mapping[str, str]) -> None:
        self._admitted, self._max_reply_bytes = admitted, max_reply_bytes
        self.acknowledged, self.restored = dict(acknowledged), dict[int, float]()
        self.tally = Tally()
        self._peers: dict[int, _Peer] = {}  # connected nodes
        self._keys: dict[int, str] = {}  # fingerprints of the keys of nodes that ever connected
        self._waiting: dict[int, dict[str, Letter]] = {}  # by node and id
        self._answered: deque[str] = deque(maxlen=REMEMBERED)
        self._traffic: dict[int, Traffic] = {}
        self._counts: Counter[str] = Counter()

    def traffic(self) -> dict[int, Traffic]:
        """Return the traffic between the server and each node that ever connected."""
        return {node: replace(passed) for node, passed in self._traffic.copy().items()}

    def counts(self) -> dict[str, int]:
        """Return the number of rejected streams and replies, by reason."""
        return dict(self._counts)

    def post(self, letters: Iterable[Letter]) -> None:
        """Send each letter once its node is connected, and again whenever the node comes back without an answer."""
        for letter in letters:
            self._waiting.setdefault(letter.node, {})[letter.id] = letter
            if letter.node in self._peers:
                self._peers[letter.node].outbox.put_nowait(letter)

    def withdraw(self, letters: Iterable[Letter]) -> None:
        """Stop waiting; replies from now on are late."""
        for letter in letters:
            waiting = self._waiting.get(letter.node, {})
            if waiting.get(letter.id) is letter:  # and not the same question of a later exchange
                del waiting[letter.id]

    def acknowledge(self, node: int, name: str) -> None:
        """Record that a node has answered the instruction with this id, of a run; it no longer counts as restored."""
        self.acknowledged[self._keys[node]] = name
        self.restored.pop(node, None)

    async def watch(self) -> None:
        """Each second, until cancelled: end streams of nodes that are no longer admitted, and update what `traffic` says."""
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            admitted = self._admitted()
            for peer in self._peers.values():
                if admitted.get(peer.key) != peer.node:
                    peer.revoked.set()
                # A device that was restored or copied would have refused by now.
                if not peer.traffic.connected_since and time.monotonic() - peer.began >= CHECK_SECONDS:
                    peer.traffic.connected_since = time.time()
                if time.monotonic() - peer.traffic.last_frame >= QUIET_SECONDS:
                    self.tally.add("up", CONTROL, PINGS)
                    self.tally.add("down", CONTROL, PINGS)
                    peer.traffic.last_frame = time.monotonic()

    async def follow(self, requests: object, context: Any) -> None:
        """Serve one stream to its end, as gRPC's handler.

        Args:
          requests: unused; they are read from the context when there is room for them.
          context: gRPC's, of this stream.
        """
        certificate = cast(bytes, context.auth_context()["x509_pem_cert"][0])
        key = fingerprint(certificate)
        node = self._admitted().get(key)
        if node is None:
            await self._refuse(context, Code.PERMISSION_DENIED, f"the key {key} is not admitted")
        hello = await self._greet(context, node)
        peer = _Peer(node, key, context, self._traffic.setdefault(node, Traffic()))
        self._peers[node] = peer  # no await between the check of connected nodes and this
        self._keys[node] = key
        if node not in self.restored:  # a restored node may refuse; it counts as connected later, see `watch`
            peer.traffic.connected_since = time.time()
        peer.traffic.streams += 1
        last_ids = [self.acknowledged[key]] if key in self.acknowledged else []
        greeting, size = write(Hello(PROTOCOL_VERSION, SERVER_NODE, last_ids)), _der_bytes(certificate)
        self.tally.add("up", CONTROL, OPENING_UP + size + _size_received(peer, hello))
        self.tally.add("down", CONTROL, OPENING_DOWN + CERTIFICATES_DOWN * size)
        for letter in self._waiting.get(node, {}).values():
            peer.outbox.put_nowait(Begin(letter.id, 0) if letter.id in hello.instruction_ids else letter)
        try:
            await context.write(greeting)
            self._count_sent(peer, CONTROL, len(greeting))
            ended = await self._exchange(peer)
        finally:
            del self._peers[node]
            peer.traffic.connected_since, peer.traffic.disconnected_at = 0.0, time.time()
        if ended is not None:  # after the node is forgotten: a client that does not read may never hear of it
            await self._refuse(context, *ended)

    async def _refuse(self, context: Any, code: Any, reason: str) -> NoReturn:
        """Count and end a stream with an error of gRPC's."""
        self._counts[code.name.lower()] += 1
        await context.abort(code, reason)
        raise AssertionError("abort raises")

    async def _greet(self, context: Any, node: int) -> Hello:
        """Return the hello of a node, or refuse the stream."""
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                frame = await next_frame(context)
        except (TimeoutError, BadFrame, EOFError):
            await self._refuse(context, Code.INVALID_ARGUMENT, "a stream begins with a hello")
        if not isinstance(frame, Hello) or frame.node != node:
            await self._refuse(context, Code.INVALID_ARGUMENT, f"this key is that of node {node}")
        if frame.version != PROTOCOL_VERSION:
            reason = f"the server speaks protocol {PROTOCOL_VERSION}, the client {frame.version}"
            await self._refuse(context, Code.FAILED_PRECONDITION, reason)
        if node in self._peers:
            await self._refuse(context, Code.ALREADY_EXISTS, f"node {node} is connected already")
        return frame

    async def _exchange(self, peer: _Peer) -> tuple[Any, str] | None:
        """Send and receive until a side ends or the node is revoked; return the error that ends the stream, if any."""
        finished = await until_one_ends(self._receive(peer), self._send(peer), peer.revoked.wait())
        if peer.revoked.is_set():
            return Code.PERMISSION_DENIED, f"the key {peer.key} was revoked"
        for task in finished:
            if isinstance(error := task.exception(), BadFrame):
                return Code.INVALID_ARGUMENT, str(error)
        return None

    async def _send(self, peer: _Peer) -> None:
        """Send what comes into the outbox, except letters that were answered or withdrawn meanwhile."""
        while True:
            item = await peer.outbox.get()
            if isinstance(item, Letter) and item.id not in self._waiting.get(peer.node, {}):
                continue
            if isinstance(item, Letter):
                frames, shares = frames_of(item.id, item.parts), item.cargo.down
            else:
                frames, shares = iter([write(item)]), CONTROL
            for frame in frames:
                await peer.context.write(frame)
                self._count_sent(peer, shares, len(frame))
            if isinstance(item, Letter):
                self.tally.add("up", CONTROL, WINDOW_UPDATES)

    def _count_sent(self, peer: _Peer, shares: Shares, frame: int) -> None:
        """Count the bytes of a frame by purpose."""
        peer.traffic.last_frame = time.monotonic()
        self.tally.add("down", shares, wire_bytes(frame))

    async def _receive(self, peer: _Peer) -> None:
        """Receive replies, and deliver those that are waited for."""
        gathering: MessageBuffer | None = None
        arrived = 0  # bytes of its frames, whose purpose is known after the last one
        try:
            while True:
                frame = await next_frame(peer.context)
                arrived += _size_received(peer, frame)
                if isinstance(frame, Begin) and gathering is None:
                    gathering = self._begin(peer, frame)
                elif isinstance(frame, Chunk) and gathering is not None:
                    if gathering.add(frame):
                        self._finish(peer, gathering, arrived)
                        gathering, arrived = None, 0
                else:
                    raise BadFrame("a frame is out of order")
        finally:
            self.tally.add("up", LOST, arrived)

    def _begin(self, peer: _Peer, begin: Begin) -> MessageBuffer:
        """Return the buffer for an announced reply; one that nobody waits for is read and discarded.

        Size 0 says that the device lacks an answer of its key: it is noted in `restored`, and BadFrame ends the stream.
        """
        if begin.size == 0 and begin.id == self.acknowledged.get(peer.key):
            self.restored[peer.node] = time.time()
            raise BadFrame("the key has answered more than this device knows: it was restored or copied")
        letter = self._waiting.get(peer.node, {}).get(begin.id)
        if letter is None:
            self._counts["duplicate" if begin.id in self._answered else "late"] += 1
            return MessageBuffer(begin, self._max_reply_bytes, keep_bytes=False)
        return MessageBuffer(begin, min(self._max_reply_bytes, letter.reply_bytes))

    def _finish(self, peer: _Peer, gathering: MessageBuffer, arrived: int) -> None:
        """Count, deliver if it is still waited for, and acknowledge a reply, which `arrived` in this many bytes."""
        letter = self._waiting.get(peer.node, {}).pop(gathering.id, None) if gathering.data else None
        self.tally.add("up", LOST if letter is None else letter.cargo.up(arrived), arrived)
        self.tally.add("down", CONTROL, WINDOW_UPDATES)
        if letter is not None:
            self._answered.append(letter.id)
            letter.deliver(letter, gathering.data)
        elif gathering.data:  # the exchange ended after the reply began
            self._counts["late"] += 1
        if peer.outbox.qsize() > MAX_UNREAD:
            raise BadFrame("too many replies while acknowledgements are unread")
        peer.outbox.put_nowait(Ack(gathering.id))
