"""Frames of the stream between a client and the server: a hello each way, then messages in chunks.

A frame is one byte for its kind, then its fields in msgpack; a chunk is followed by its bytes as they are. A message is
announced by name and size, so that an end that does not want it never gathers it. The server acknowledges a reply once
it has all of it. HTTP/2's own pings find out whether the other end is still there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import lru_cache
from typing import Annotated, cast

import msgpack

from ..base.bounded_decoding import Bounds, Undecodable, build_listed, unpack
from ..base.refusal import Form, Range, Refusal
from .message_codec import Buffer

PROTOCOL_VERSION = 1
METHOD = "/fedveil.Link/Follow"
CHUNK_BYTES = 1 << 18  # of a message in one frame: what a client's stream holds in memory before it is sent
MAX_FRAME_BYTES = CHUNK_BYTES + 1024
MAX_ID_LENGTH = 256
ID = Form(f".{{1,{MAX_ID_LENGTH}}}", "must have 1 to 256 printable characters")
MAX_IDS = 8
MAX_HEAD_BYTES = MAX_IDS * 5 * MAX_ID_LENGTH  # a character takes at most 4 bytes
HEAD = Bounds(depth=2, width=MAX_IDS, items=2 * MAX_IDS)  # of a hello, the frame with the most fields
# Bytes that carry a frame beside its own: the prefix of gRPC ("gRPC over HTTP2", length-prefixed message), the header of
# HTTP/2's DATA frame (RFC 9113, sections 4.1 and 4.2), and of a record of TLS 1.3 its header, type and tag (RFC 8446,
# section 5.2; RFC 5116).
GRPC_PREFIX, DATA_HEADER, TLS_RECORD = 5, 9, 5 + 1 + 16
MAX_PAYLOAD = 1 << 14  # of a DATA frame, and of a record


class BadFrame(ValueError):
    """Bytes that are not a frame, or a frame in the wrong place."""


@dataclass(frozen=True)
class Hello:
    """First frame of each end: its protocol version, its node number, and ids of instructions.

    A client names those that it works on or has answered; the server names the last one that this key has answered, so
    that a restored or copied device, which does not know it, is noticed.
    """

    version: Annotated[int, Range(ge=0)]
    node: Annotated[int, Range(ge=0)]
    instruction_ids: list[str]


@dataclass(frozen=True)
class Begin:
    """Announcement of a message of `size` bytes: an instruction, or the reply to it, under the instruction's id.

    Size 0 is the server's reminder: the client has the instruction, and its reply is still wanted. From a client it says
    that it does not know the instruction of the server's hello.
    """

    id: Annotated[str, ID]
    size: Annotated[int, Range(ge=0)]


@dataclass(frozen=True)
class Ack:
    """Acknowledgement that the server has all of the reply to this instruction."""

    id: Annotated[str, ID]


@dataclass(frozen=True)
class Chunk:
    """Next bytes of the message that the last `Begin` announced."""

    data: Buffer


Frame = Hello | Begin | Ack | Chunk
_KINDS: dict[int, type[Hello | Begin | Ack]] = {1: Hello, 2: Begin, 3: Ack}
_CHUNK = 4
_NUMBERS = {kind: number for number, kind in _KINDS.items()}


def write(frame: Frame) -> bytes:
    """Return the frame's bytes."""
    if isinstance(frame, Chunk):
        return b"".join((bytes([_CHUNK]), frame.data))
    return bytes([_NUMBERS[type(frame)]]) + cast(bytes, msgpack.packb(astuple(frame)))


def read(data: bytes) -> Frame:
    """Return the frame that the bytes encode.

    Raises:
      BadFrame: they encode none.
    """
    if not data or len(data) > MAX_FRAME_BYTES:
        raise BadFrame("the frame is missing or too long")
    if data[0] == _CHUNK:
        return Chunk(memoryview(data)[1:])
    kind = _KINDS.get(data[0])
    if kind is None or len(data) > MAX_HEAD_BYTES:
        raise BadFrame("the frame is of an unknown kind")
    try:
        frame = build_listed(kind, unpack(data[1:], HEAD))
        for each in frame.instruction_ids if isinstance(frame, Hello) else ():
            ID.check(str, "known", each)
        return frame
    except (Undecodable, Refusal) as error:
        # A refusal's own text has the value, which another party chose.
        reason = f"{error.field} {error.remedy}" if isinstance(error, Refusal) else str(error)
        raise BadFrame(f"the frame has no readable fields: {reason}") from error


def frames_of(name: str, parts: Sequence[Buffer]) -> Iterator[bytes]:
    """Yield the frames of a message; each is created, and its bytes are copied, on demand.

    Args:
      name: id of the instruction.
      parts: bytes of the message in pieces, as `segments` returns them.
    """
    yield write(Begin(name, sum(len(part) for part in parts)))
    waiting: list[Buffer] = []  # pieces of the next chunk
    room = CHUNK_BYTES  # left in it
    for part in parts:
        rest = memoryview(part)
        while len(rest) >= room:
            yield bytes([_CHUNK]) + b"".join((*waiting, rest[:room]))
            rest, waiting, room = rest[room:], [], CHUNK_BYTES
        waiting.append(rest)
        room -= len(rest)
    if room < CHUNK_BYTES:
        yield bytes([_CHUNK]) + b"".join(waiting)


def wire_bytes(frame: int) -> int:
    """Return the approximate bytes on a connection of a frame of `frame` bytes."""
    message = GRPC_PREFIX + frame
    return message + -(-message // MAX_PAYLOAD) * (DATA_HEADER + TLS_RECORD)


@lru_cache(maxsize=64)  # messages of an exchange have one size, or a few
def message_bytes(name: str, size: int) -> int:
    """Return the approximate bytes on a connection of a message of `size` bytes under an instruction's id."""
    whole, rest = divmod(size, CHUNK_BYTES)
    chunks = whole * wire_bytes(1 + CHUNK_BYTES) + (wire_bytes(1 + rest) if rest else 0)
    return wire_bytes(len(write(Begin(name, size)))) + chunks


class MessageBuffer:
    """Bytes of one message as they arrive; memory grows with what has arrived, not with what was announced.

    Args:
      begin: announces the message.
      max_bytes: largest size that is accepted.
      keep_bytes: False discards the bytes as they arrive, and `data` stays empty.

    Raises:
      BadFrame: the message is announced empty or too large, or grows beyond its announced size.
    """

    def __init__(self, begin: Begin, max_bytes: int, keep_bytes: bool = True) -> None:
        if not 0 < begin.size <= max_bytes:
            raise BadFrame(f"a message of {begin.size} bytes; at most {max_bytes} are taken")
        self.id, self._missing, self._keeps_bytes = begin.id, begin.size, keep_bytes
        self.data = bytearray()

    def add(self, chunk: Chunk) -> bool:
        """Add a chunk that is neither empty nor longer than the rest, and return whether the message is complete."""
        if not 0 < len(chunk.data) <= self._missing:
            raise BadFrame("a chunk is empty, or exceeds the message")
        self._missing -= len(chunk.data)
        if self._keeps_bytes:
            self.data += chunk.data
        return not self._missing
