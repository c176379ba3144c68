"""Messages of an enrolment, each prefixed by its length: one question and one answer."""

from __future__ import annotations

import socket
import struct
import time
from dataclasses import astuple, dataclass
from typing import TypeVar, cast

import msgpack

from ...base.bounded_decoding import Bounds, Undecodable, build_listed, unpack
from ...configs.bundle_files import LARGEST_FILE

# Bytes of messages, and of the request in a question, which has about 4 800 (an ML-DSA key takes 3 900).
MAX_ASK, MAX_REPLY, MAX_REQUEST = 1 << 14, 2 * LARGEST_FILE, 1 << 13
_LENGTH = struct.Struct(">I")
_BOUNDS = Bounds(depth=1, width=8, items=9)

T = TypeVar("T", "Ask", "Reply")


@dataclass(frozen=True)
class Ask:
    """Question of a device.

    Attributes:
      name: of the client; empty asks for the authority, and the rest is then empty too.
      port_key: the token's key to the port.
      request: the bytes of request.toml.
      seal: of the request, under a key that the server does not have.
    """

    name: str
    port_key: bytes
    request: bytes
    seal: bytes


@dataclass(frozen=True)
class Reply:
    """Answer of the port.

    Attributes:
      state: "authority", "waits", "admitted", or why not: "unknown", "ended", "used".
      ca, authority: of "authority": its certificate in PEM, and its public key.
      answer, roster: of "admitted": what the authority signed for this device, and the newest roster.
    """

    state: str
    ca: bytes = b""
    authority: bytes = b""
    answer: bytes = b""
    roster: bytes = b""


def send(stream: socket.socket, message: Ask | Reply, end: float) -> None:
    """Send a message. OSError at the latest when the monotonic clock reaches `end`."""
    body = cast(bytes, msgpack.packb(astuple(message)))
    stream.settimeout(_seconds_until(end))
    stream.sendall(_LENGTH.pack(len(body)) + body)


def receive(stream: socket.socket, kind: type[T], max_bytes: int, end: float) -> T:
    """Return the next message.

    Args:
      stream: over TLS.
      kind: of the message.
      max_bytes: largest size that is accepted.
      end: second of the monotonic clock by which it must have come.

    Raises:
      OSError: it does not come in time, or not whole.
      Undecodable: the bytes are no message of this kind.
    """
    (size,) = _LENGTH.unpack(_read(stream, _LENGTH.size, end))
    if size > max_bytes:
        raise Undecodable(f"a message of {size} bytes; at most {max_bytes} are taken")
    return decode(kind, _read(stream, size, end))


def decode(kind: type[T], data: bytes) -> T:
    """Return the message in the bytes, or raise Undecodable."""
    return build_listed(kind, unpack(data, _BOUNDS))


def _read(stream: socket.socket, size: int, end: float) -> bytes:
    """Return the next `size` bytes; OSError if they do not come before the monotonic clock reaches `end`."""
    data = bytearray()
    while len(data) < size:
        stream.settimeout(_seconds_until(end))
        if not (part := stream.recv(min(size - len(data), 1 << 16))):
            raise ConnectionError("the other end has closed the connection")
        data += part
    return bytes(data)


def _seconds_until(end: float) -> float:
    """Return the seconds until a second of the monotonic clock, or raise TimeoutError if it has passed."""
    seconds = end - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("it took too long")
    return seconds
