"""Traffic between a server and its clients, in bytes by direction and purpose.

Purposes follow from a message's content, so that each link, and a simulation of one, divides its bytes in the same way.
Sizes are those of the gRPC link. Names and specs are public, and honest vectors of a round have equal length, so a size
reveals nothing about a client.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from ..base.bounded_decoding import build, read_json
from ..privacy.mechanisms.packing import packed_size, width_of
from ..privacy.mechanisms.sum_spec import SumSpec
from . import wire
from .flower_adapter import config_of, records_of
from .frames import message_bytes
from .message_codec import MalformedMessage, pack_body, segments

NUMBER_BYTES = 8  # of a number in a record, about
ID_BYTES = 64  # of an instruction's id, about: run, round, attempt, exchange, node and a digest of 32

Direction = Literal["down", "up"]


class TrafficPurpose(StrEnum):
    """Purpose of bytes.

    Models and updates are `training`, a released model's examination by clients is `evaluation`, statistics are
    `questions`; `keys` are those of secure aggregation, with shares and confirmations. `control` is the rest:
    connections, rosters, certificates, logs, polls, acknowledgements. What came too late or broke off is `lost`.
    """

    TRAINING = "training"
    EVALUATION = "evaluation"
    QUESTIONS = "questions"
    KEYS = "keys"
    CONTROL = "control"
    LOST = "lost"


Shares = Mapping[TrafficPurpose, float]  # parts of some bytes by purpose, in any unit
CONTROL: Shares = {TrafficPurpose.CONTROL: 1.0}
LOST: Shares = {TrafficPurpose.LOST: 1.0}


@dataclass(frozen=True)
class Carried:
    """Bytes by purpose.

    Attributes:
      down: from the server to its clients; a purpose without any is left out.
      up: from the clients.
    """

    down: Mapping[str, int] = field(default_factory=dict[str, int])
    up: Mapping[str, int] = field(default_factory=dict[str, int])

    def minus(self, earlier: Carried) -> Carried:
        """Return the traffic since an earlier count."""
        down, up = Counter(self.down) - Counter(earlier.down), Counter(self.up) - Counter(earlier.up)
        return Carried(dict(down), dict(up))

    def __add__(self, other: Carried) -> Carried:
        """Return the sum of both."""
        down, up = Counter(self.down) + Counter(other.down), Counter(self.up) + Counter(other.up)
        return Carried(dict(down), dict(up))

    def to_json(self) -> dict[str, dict[str, int]]:
        """Return the counts as plain data."""
        return {"down": dict(self.down), "up": dict(self.up)}


NOTHING = Carried()


class Tally:
    """Tally of a link's bytes; several threads may add to it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes: dict[Direction, Counter[TrafficPurpose]] = {"down": Counter(), "up": Counter()}

    def add(self, direction: Direction, shares: Shares, size: float) -> None:
        """Add bytes, divided between purposes in the ratio of their shares.

        Args:
          direction: in which they went.
          shares: of the purposes, in any unit.
          size: number of bytes.
        """
        whole = sum(shares.values())
        with self._lock:
            sizes: Any = self._bytes[direction]  # fractions of a byte are rounded only in a total
            for purpose, part in shares.items():
                sizes[purpose] += size * part / whole

    def total(self) -> Carried:
        """Return the total so far, in whole bytes; each purpose is rounded by itself."""
        with self._lock:
            return Carried(_rounded(self._bytes["down"]), _rounded(self._bytes["up"]))


def _rounded(sizes: Mapping[TrafficPurpose, float]) -> dict[str, int]:
    return {str(purpose): round(sizes[purpose]) for purpose in TrafficPurpose if round(sizes[purpose])}


@dataclass(frozen=True)
class Cargo:
    """Purposes of an instruction's bytes and of those of its reply.

    Attributes:
      down: bytes of the instruction's records, by purpose; at least one.
      purpose: of the reply.
      vector: bytes of a reply that have this purpose; in an encrypted sum, those above this number are keys.
    """

    down: Shares
    purpose: TrafficPurpose
    vector: float = math.inf

    def up(self, size: float) -> Shares:
        """Return the purposes of a reply of this many bytes."""
        if size <= self.vector:
            return {self.purpose: 1.0}
        return {self.purpose: self.vector, TrafficPurpose.KEYS: size - self.vector}


def cargo_of(message: Message) -> Cargo:
    """Return the purposes of an instruction's bytes, and of those of its reply."""
    content = message.content
    main = purpose_of(content)
    down: Counter[TrafficPurpose] = Counter()
    for name, record in content.items():
        down[_purpose_of_record(name, main)] += _size(record)
    shares = {purpose: float(size) for purpose, size in down.items() if size} or {main: 1.0}
    if wire.OVER in content:
        return Cargo(shares, TrafficPurpose.CONTROL)  # the reply is a receipt
    if wire.SECURE_RECORD not in content or main is TrafficPurpose.KEYS:
        return Cargo(shares, main)
    return Cargo(shares, main, _vector_bytes(str(config_of(content, wire.SPEC_RECORD)["spec"])))


def purpose_of(content: RecordDict) -> TrafficPurpose:
    """Return the purpose of an instruction and its reply; of secure aggregation's exchanges only INBOX carries vectors."""
    if wire.RENEWAL in content:
        return TrafficPurpose.CONTROL
    records = records_of(content, ConfigRecord)
    if wire.SECURE_RECORD in content and records[wire.SPEC_RECORD]["exchange"] != wire.Exchange.INBOX:
        return TrafficPurpose.KEYS
    keys = {key for record in records.values() for key in record}
    if wire.EVALUATION_KEY in keys:
        return TrafficPurpose.EVALUATION
    return TrafficPurpose.QUESTIONS if wire.QUESTION_KEY in keys else TrafficPurpose.TRAINING


def _purpose_of_record(name: str, main: TrafficPurpose) -> TrafficPurpose:
    """Return the purpose of the record with this name in an instruction of the purpose `main`."""
    if name == wire.SECURE_RECORD:
        return TrafficPurpose.KEYS
    return TrafficPurpose.CONTROL if name in (wire.ROSTER_RECORD, *wire.VOUCHING) else main


def _size(record: Any) -> int:
    """Return the approximate bytes of an array, metric or configuration record."""
    if isinstance(record, ArrayRecord):
        return sum(math.prod(array.shape) * np.dtype(array.dtype).itemsize for array in record.values())
    return sum(len(name) + _size_of_value(value) for name, value in record.items())


def _size_of_value(value: Any) -> int:
    if isinstance(value, bytes | str):
        return len(value)
    return sum(map(_size_of_value, value)) if isinstance(value, list) else NUMBER_BYTES


@dataclass(frozen=True)
class NodeTraffic:
    """Traffic of Flower's link, which carries parts of messages: a part's purpose is that of its node's pending message.

    Attributes:
      tally: of all bytes.
      cargo: purposes of the pending message to a node, and of its reply.
    """

    tally: Tally = field(default_factory=Tally)
    cargo: dict[int, Cargo] = field(default_factory=dict[int, Cargo])


@lru_cache(maxsize=16)  # each message of a round carries the same
def _vector_bytes(spec: str) -> int:
    """Return the bytes of a masked vector under a `ShareSpec` in JSON."""
    from ..privacy.mechanisms.sizing import ShareSpec  # slow to import; only encrypted sums need it

    share = build(ShareSpec, read_json(spec))
    return share.size * share.bits // 8


def carried_bytes(message: Message) -> int:
    """Return the approximate bytes on a connection of a message that has no id yet."""
    try:
        size = sum(len(part) for part in segments(message.metadata, pack_body(message)))
    except MalformedMessage:  # the gRPC link does not carry arrays of this type, but an engine does
        size = sum(map(_size, message.content.values()))
    return message_bytes("x" * ID_BYTES, ID_BYTES + size)


def update_bytes(spec: SumSpec, size: int) -> int:
    """Return the approximate bytes of a client's reply to an instruction in the clear.

    Args:
      spec: of the sum.
      size: number of coordinates of the vector, all segments included.
    """
    return _update_bytes(size, width_of(spec), spec.clipping_norm is not None)


@lru_cache(maxsize=8)
def _update_bytes(size: int, width: int | None, on_grid: bool) -> int:
    """Return what `update_bytes` does, for integers packed to `width` bits; None: not packed, int32 on a grid or float64."""
    if width is None:
        vector = np.zeros(size, np.int32 if on_grid else np.float64)  # zeros that nobody reads take no memory
    else:
        vector = np.zeros(packed_size(size, width), np.uint8)
    content = RecordDict({wire.VECTOR_RECORD: wire.memory_arrays({wire.VECTOR: vector})})
    return carried_bytes(Message(content, reply_to=Message(RecordDict(), 2, "train")))
