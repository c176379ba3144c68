"""How secure aggregation travels in Flower's records: protocol messages as bytes, beside the round's public spec.

A message of the server is of type `train` and holds the bytes for one node; where they bring the model, the
strategy's own records lie beside them. A reply is bytes alone: no array, metric, count or error text goes with it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import cast

import numpy as np
from flwr.app import ConfigRecord, RecordDict

from ..privacy.mechanisms.sizing import Attendance, Layer, ShareSpec
from ..privacy.mechanisms.sum_spec import Scalar, SumSpec
from .flower_adapter import records_of
from .wire import SPEC_RECORD, only_arrays, view

SECURE_RECORD, ROSTER_RECORD = "fedveil.secagg", "fedveil.roster"
_OURS = (SPEC_RECORD, SECURE_RECORD)


class Exchange(IntEnum):
    """What the server sends in the exchanges of an attempt."""

    PROPOSAL = 0
    COHORT = 1
    INBOX = 2
    SURVIVORS = 3
    CONFIRMED = 4


@dataclass(frozen=True)
class Place:
    """Where in a run an exchange is; for clients' own records and streams, the protocol has its own."""

    run: str
    round: int
    attempt: int
    exchange: Exchange


def ask(messages: Sequence[bytes], spec: ShareSpec, place: Place) -> dict[str, ConfigRecord]:
    """Return the records that carry an exchange's messages to one node."""
    return {
        SPEC_RECORD: ConfigRecord({"spec": write_share_spec(spec), **asdict(place)}),
        SECURE_RECORD: ConfigRecord({"messages": list(messages)}),
    }


def with_roster(records: dict[str, ConfigRecord], signed: bytes) -> dict[str, ConfigRecord]:
    """Return the records, and beside them the roster as its authority signed it, if there is one to be sent."""
    return {**records, ROSTER_RECORD: ConfigRecord({"signed": signed})} if signed else records


def roster_of(content: RecordDict) -> bytes | None:
    """Return the signed roster that an instruction brings, or None."""
    record = records_of(content, ConfigRecord).get(ROSTER_RECORD)
    found = None if record is None else record.get("signed")
    return found if isinstance(found, bytes) else None


def answer(replies: Sequence[bytes], failure: int | None = None) -> RecordDict:
    """Return the content of a node's reply; `failure` says by code why one of them is empty."""
    record = ConfigRecord({"messages": list(replies)})
    if failure is not None:
        record["failure"] = failure
    return RecordDict({SECURE_RECORD: record})


def failure_of(content: RecordDict) -> int | None:
    """Return the code of a reply that says why one of its messages is empty."""
    found = records_of(content, ConfigRecord).get(SECURE_RECORD, ConfigRecord()).get("failure")
    return found if isinstance(found, int) else None


def messages_of(content: RecordDict) -> list[bytes] | None:
    """Return the protocol's bytes in an instruction or a reply; None if it has none, or anything else in their place."""
    record = records_of(content, ConfigRecord).get(SECURE_RECORD)
    found = None if record is None else record.get("messages")
    if not isinstance(found, list) or not all(isinstance(each, bytes) for each in found):
        return None
    return cast(list[bytes], found)


def write_share_spec(spec: ShareSpec) -> str:
    """Return the spec as text, the same for equal specs."""
    return json.dumps(asdict(spec), sort_keys=True)


def read_share_spec(content: RecordDict) -> ShareSpec:
    """Return the spec of an instruction.

    Raises:
      Refusal: it is unsafe, as `ShareSpec` says.
      ValueError, TypeError, KeyError: it is none.
    """
    fields = json.loads(str(records_of(content, ConfigRecord)[SPEC_RECORD]["spec"]))
    summed = fields.pop("sum")
    scalars = tuple(Scalar(**scalar) for scalar in summed.pop("scalars"))
    attendance = Attendance(**fields.pop("attendance"))
    layers = tuple(Layer(**layer) for layer in fields.pop("layers"))
    return ShareSpec(sum=SumSpec(scalars=scalars, **summed), attendance=attendance, layers=layers, **fields)


def read_place(content: RecordDict) -> Place:
    """Return where an instruction belongs."""
    record = records_of(content, ConfigRecord)[SPEC_RECORD]
    round_, attempt, exchange = (int(str(record[name])) for name in ("round", "attempt", "exchange"))
    return Place(str(record["run"]), round_, attempt, Exchange(exchange))


def run_number(run: str) -> int:
    """Return the number that an attempt's terms know a run by, unsigned 64 bits."""
    return int.from_bytes(hashlib.sha256(run.encode()).digest()[:8], "big")


def task_hash(spec: ShareSpec) -> bytes:
    """Return what binds the spec to an attempt's terms, 32 bytes."""
    return hashlib.sha256(write_share_spec(spec).encode()).digest()


def model_hash(content: RecordDict) -> bytes:
    """Return SHA-256 over all that a client is to start from: the model, and what the strategy sends along."""
    digest = hashlib.sha256()
    for name, array in only_arrays(content).items():
        value = np.ascontiguousarray(view(array))
        digest.update(json.dumps([name, str(value.dtype), value.shape]).encode())
        digest.update(value.data if value.size else b"")
    for name, record in sorted(records_of(content, ConfigRecord).items()):
        if name not in _OURS:
            digest.update(json.dumps([name, sorted(record.items())], default=repr).encode())
    return digest.digest()


def rotation_seed(model: bytes, server_round: int) -> bytes:
    """Return the public seed of a round's rotation, 32 bytes: fixed before anybody has trained."""
    return hashlib.sha256(b"fedveil rotation" + server_round.to_bytes(8, "big") + model).digest()
