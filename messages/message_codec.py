"""Codec between Flower messages and bytes: a small header in msgpack, then every array and byte string as it is.

Layout: the header's length, 4 bytes little-endian; the header; then the blobs in the header's order. The header and
each blob are padded to 8 bytes, so that arrays are read in place. No memory is allocated from a header's claims: an
array is a view, and its dtype and shape must fit the actual bytes. An error is sent as its code, without text.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import msgpack
import numpy as np
from flwr.app import (
    DEFAULT_TTL,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    Metadata,
    MetricRecord,
    RecordDict,
)
from numpy.typing import NDArray

from ..base import bounded_decoding
from ..base.bounded_decoding import Bounds
from .flower_adapter import delivered_message, records_of
from .wire import SPEC_RECORD, VOUCHING, memory_arrays, view, without_encoding

Buffer = bytes | bytearray | memoryview
Record = ArrayRecord | MetricRecord | ConfigRecord

FORMAT = 1
PREFIX_BYTES = 4
ALIGNMENT = 8  # of the largest dtype
MAX_HEADER_BYTES = 1 << 20  # names and shapes of as many arrays as a list may hold
MAX_ITEMS = 1 << 13  # of any list in the header
MAX_DIMENSIONS = 32  # numpy 1 had no more
# Depth: message, records, record, entries, entry, value, sides of an array. Items: 16 for each of the longest list.
HEADER = Bounds(depth=7, width=MAX_ITEMS, items=16 * MAX_ITEMS)
DTYPES = frozenset(("|b1", "|i1", "|u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", "<f2", "<f4", "<f8"))
_THREE = b"\x93"  # msgpack: a list of three follows: format, addresses, and the body's header
BYTES = "bytes"  # key of the header's mapping {"bytes": length}, in the place of a byte string that lies among the blobs
RUN_LABEL_LENGTH = 64  # characters of a run's name in an id; the digest covers all of it
KINDS: dict[str, type[Record]] = {"a": ArrayRecord, "m": MetricRecord, "c": ConfigRecord}


class MalformedMessage(ValueError):
    """Bytes that are not a message, or a message that cannot be encoded; the text names the fault and no value."""


@dataclass(frozen=True)
class Body:
    """Content of a message without its addresses, packed once for all nodes that it goes to.

    Attributes:
      header: msgpack of the records' names, values and shapes, or of the error's code.
      blobs: arrays and byte strings in the header's order, shared with the message.
      stable: the same content without what may differ when a question is repeated: the server's statements about itself,
        and the encoding of a model. None if the content has neither.
    """

    header: bytes
    blobs: tuple[Buffer, ...]
    stable: Body | None = None

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what the content asks, in hexadecimal: the same whenever a question is repeated."""
        if self.stable is not None:
            return self.stable.digest
        digest = hashlib.sha256(self.header)
        for blob in self.blobs:
            digest.update(blob)
        return digest.hexdigest()


def pack(message: Message) -> bytes:
    """Return the message as bytes.

    Raises:
      MalformedMessage: an array's dtype is not in `DTYPES`, or the header is too long.
    """
    return b"".join(segments(message.metadata, pack_body(message)))


def pack_body(message: Message) -> Body:
    """Return the message's content, packed, without its addresses.

    Raises:
      MalformedMessage: an array's dtype is not in `DTYPES`.
    """
    if message.has_error():
        return Body(_packed(message.error.code), ())
    content = bare = message.content
    if any(name in content for name in VOUCHING):
        bare = RecordDict({name: each for name, each in content.items() if name not in VOUCHING})
    if (stable := without_encoding(bare)) is content:
        return _body(content)
    return replace(_body(content), stable=_body(stable))


def _body(content: RecordDict) -> Body:
    """Return records, packed as they are."""
    blobs: list[Buffer] = []
    return Body(_packed(_packed_records(content, blobs)), tuple(blobs))


def segments(head: Metadata, body: Body) -> list[Buffer]:
    """Return a message's bytes in pieces; those of its arrays are not copied.

    Args:
      head: ids, nodes and type of the message.
      body: content of the message, as `pack_body` returns it.

    Raises:
      MalformedMessage: names and settings take more than `MAX_HEADER_BYTES`.
    """
    addresses = [head.run_id, head.message_id, head.reply_to_message_id, head.src_node_id, head.dst_node_id]
    addresses += [head.group_id, head.message_type]
    header = _THREE + _packed(FORMAT) + _packed(addresses) + body.header
    if len(header) > MAX_HEADER_BYTES:
        raise MalformedMessage(f"names and settings take {len(header)} bytes, over {MAX_HEADER_BYTES}")
    return list(_padded([len(header).to_bytes(PREFIX_BYTES, "little") + header, *body.blobs]))


def _packed(value: Any) -> bytes:
    return cast(bytes, msgpack.packb(value))


def _padded(parts: list[Buffer]) -> Iterator[Buffer]:
    """Yield each part, and behind it the zeros up to a multiple of `ALIGNMENT`."""
    for part in parts:
        yield part
        if (excess := len(part) % ALIGNMENT) > 0:
            yield bytes(ALIGNMENT - excess)


def _packed_records(content: RecordDict, blobs: list[Buffer]) -> list[Any]:
    """Return the header's entries of records: name, kind in `KINDS`, and values; append byte strings and arrays to `blobs`."""
    records: list[Any] = []
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            entries = [[key, _packed_array(view(array), blobs)] for key, array in record.items()]
            records.append([name, "a", entries])
        else:
            kind = "m" if isinstance(record, MetricRecord) else "c"
            records.append([name, kind, [[key, _packed_value(v, blobs)] for key, v in record.items()]])
    return records


def _packed_array(array: NDArray[Any], blobs: list[Buffer]) -> list[Any]:
    """Return the header's entry of an array, dtype and shape, and append its bytes to `blobs`."""
    little = np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")
    if little.dtype.str not in DTYPES:
        raise MalformedMessage(f"arrays of {array.dtype} cannot be encoded")
    blobs.append(little.reshape(-1).view(np.uint8).data)
    return [little.dtype.str, list(little.shape)]


def _packed_value(value: Any, blobs: list[Buffer]) -> Any:
    """Return the header's entry of a value in a configuration or metric record; byte strings are appended to `blobs`."""
    if isinstance(value, bytes):
        blobs.append(value)
        return {BYTES: len(value)}
    if isinstance(value, list):
        return [_packed_value(item, blobs) for item in cast(list[Any], value)]
    return value


def question_id(message: Message, body: Body, node: int) -> str | None:
    """Return the id of a question to a node: run, round, attempt, exchange, node and a digest of its content.

    Two messages have the same id if and only if they ask the same of the same node, on any link.

    Returns:
      The id, or None for a message that belongs to no run.
    """
    record = records_of(message.content, ConfigRecord).get(SPEC_RECORD)
    if record is None:
        return None
    run, *position = (str(record.get(name, 0)) for name in ("run", "round", "attempt", "exchange"))
    digest = hashlib.sha256(f"{run}|{node}|{message.metadata.message_type}|{body.digest}".encode())
    label = run[:RUN_LABEL_LENGTH] if run.isprintable() else "run"
    return "/".join([label, *position, str(node), digest.hexdigest()[:32]])


def unpack(data: Buffer) -> Message:
    """Return the message that the bytes encode; its arrays lie in `data`, writable where that is a bytearray.

    The message's age counts from now, by this machine's clock.

    Raises:
      MalformedMessage: the bytes are not a message; no other exception is raised, for any bytes.
    """
    try:
        return _unpacked(memoryview(data).cast("B"))
    except MalformedMessage:
        raise
    except Exception as error:  # of Flower's records and numpy's arrays, which document no closed set
        raise MalformedMessage(f"not a message: {type(error).__name__}") from error


def _unpacked(data: memoryview) -> Message:
    """Return the message; whatever a malformed part raises, `unpack` turns into MalformedMessage."""
    length = int.from_bytes(data[:PREFIX_BYTES], "little")
    end = PREFIX_BYTES + length
    if length > MAX_HEADER_BYTES or end > len(data):
        raise MalformedMessage("the header is longer than the message or the limit")
    number, addresses, body = bounded_decoding.unpack(data[PREFIX_BYTES:end], HEADER)
    if number != FORMAT:
        raise MalformedMessage(f"format {number!r} is unknown; this side reads {FORMAT}")
    blobs = _Blobs(data, end + -end % ALIGNMENT)  # behind the header's padding
    payload = Error(body) if type(body) is int else _records(body, blobs)
    if blobs.at != len(data):
        raise MalformedMessage("bytes are left over")
    return delivered_message(payload, _metadata(addresses))


def _metadata(addresses: list[Any]) -> Metadata:
    """Return the metadata of a message that arrived now, from its addresses in the order of `segments`."""
    run, message, reply_to, source, target, group, message_type = addresses
    if {type(text) for text in (message, reply_to, group, message_type)} != {str}:
        raise MalformedMessage("an id is not text")
    if {type(number) for number in (run, source, target)} != {int}:
        raise MalformedMessage("a node is not a number")
    return Metadata(run, message, source, target, reply_to, group, time.time(), DEFAULT_TTL, message_type)


def _records(body: Any, blobs: _Blobs) -> RecordDict:
    """Return the records of a header's entries, as `_packed_records` wrote them."""
    return RecordDict(_unique([(name, _record(kind, entries, blobs)) for name, kind, entries in body]))


def _record(kind: str, entries: list[Any], blobs: _Blobs) -> Record:
    if KINDS[kind] is ArrayRecord:
        return memory_arrays(_unique([(_text(key), blobs.array(*value)) for key, value in entries]))
    values = _unique([(_text(key), _value(value, blobs)) for key, value in entries])
    return MetricRecord(values) if KINDS[kind] is MetricRecord else ConfigRecord(values)


def _text(key: Any) -> str:
    if type(key) is not str:
        raise MalformedMessage("a name is not text")
    return key


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the pairs as a dictionary, or refuse a repeated name."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise MalformedMessage("a name occurs twice")
    return values


def _value(value: Any, blobs: _Blobs) -> Any:
    if isinstance(value, dict):
        return bytes(blobs.take(cast(dict[str, int], value)[BYTES]))
    if isinstance(value, list):
        return [_value(item, blobs) for item in cast(list[Any], value)]
    return value


class _Blobs:
    """Reader of the byte strings and arrays in a message, in order; `at` is the position of the next one."""

    def __init__(self, data: memoryview, at: int) -> None:
        self._data, self.at = data, at

    def take(self, length: Any) -> memoryview:
        """Return the next `length` bytes, in place, and go on behind their padding."""
        if type(length) is not int or not 0 <= length <= len(self._data) - self.at:
            raise MalformedMessage("an array is longer than the message")
        blob = self._data[self.at : self.at + length]
        self.at += length + -length % ALIGNMENT
        return blob

    def array(self, dtype: Any, shape: Any) -> NDArray[Any]:
        """Return the next array, in place."""
        if dtype not in DTYPES:
            raise MalformedMessage("an array has an unsupported dtype")
        if type(shape) is not list or len(cast(list[Any], shape)) > MAX_DIMENSIONS:
            raise MalformedMessage("a shape has too many dimensions")
        sides = cast(list[Any], shape)
        if any(type(side) is not int or side < 0 for side in sides):
            raise MalformedMessage("a shape is invalid")
        kind = np.dtype(dtype)
        return np.frombuffer(self.take(math.prod(sides) * kind.itemsize), kind).reshape(sides)
