"""Wire format of secure aggregation in Flower's records: protocol messages as bytes, and the round's public spec.

A message of the server has the type `train` and holds the bytes for one node. A message with the model also has the
strategy's records. A reply holds only bytes: no array, metric, count or error text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import numpy as np
from flwr.app import ConfigRecord, RecordDict

from ..base.bounded_decoding import build, plain_of, read_json
from ..privacy.mechanisms.sizing import ShareSpec
from .flower_adapter import config_of, records_of
from .wire import ROSTER_RECORD, SECURE_RECORD, SPEC_RECORD, VOUCHING, Exchange, only_arrays, view

OURS = (SPEC_RECORD, SECURE_RECORD, *VOUCHING)  # no part of what a client starts from (`model_hash`)
# Exchanges of a round without a dispute, in their order.
USUAL = tuple(each for each in Exchange if each is not Exchange.DISPUTED)


@dataclass(frozen=True)
class Position:
    """Position of an exchange in a run, for clients' ledgers and streams; the protocol has its own.

    Attributes:
      run: name of the run.
      round: number of the round, from 1.
      attempt: number of the attempt at the round, from 0.
      exchange: exchange of messages in the attempt.
    """

    run: str
    round: int
    attempt: int
    exchange: Exchange


def ask(messages: Sequence[bytes], spec: ShareSpec, position: Position) -> dict[str, ConfigRecord]:
    """Return the records that carry an exchange's messages to one node."""
    head = {"spec": write_share_spec(spec), **vars(position)}
    return {SPEC_RECORD: ConfigRecord(head), SECURE_RECORD: ConfigRecord({"messages": list(messages)})}


def with_roster(records: dict[str, ConfigRecord], signed: bytes) -> dict[str, ConfigRecord]:
    """Return an instruction's records with a roster.

    Args:
      records: as `ask` returns them.
      signed: the roster as its authority signed it; empty if none is to be sent.
    """
    return {**records, ROSTER_RECORD: ConfigRecord({"signed": signed})} if signed else records


def roster_of(content: RecordDict) -> bytes | None:
    """Return the roster in an instruction, its signature unchecked; None if it has none."""
    roster = config_of(content, ROSTER_RECORD).get("signed")
    return roster if isinstance(roster, bytes) else None


def answer(replies: Sequence[bytes], failure: int | None = None) -> RecordDict:
    """Return the content of a node's reply.

    Args:
      replies: the protocol's messages, one for each that was received; empty for one without an answer.
      failure: Flower error code that says why a reply is empty; None if none is.
    """
    record = ConfigRecord({"messages": list(replies)})
    if failure is not None:
        record["failure"] = failure
    return RecordDict({SECURE_RECORD: record})


def failure_of(content: RecordDict) -> int | None:
    """Return the error code by which a reply explains an empty message; None if it has none."""
    failure = config_of(content, SECURE_RECORD).get("failure")
    return failure if isinstance(failure, int) else None


def messages_of(content: RecordDict) -> list[bytes] | None:
    """Return the protocol's messages in an instruction or a reply; None if it has none, or an invalid value."""
    messages = config_of(content, SECURE_RECORD).get("messages")
    if not isinstance(messages, list) or not all(isinstance(each, bytes) for each in messages):
        return None
    return cast(list[bytes], messages)


@lru_cache(maxsize=16)  # all messages of a round have the same spec
def write_share_spec(spec: ShareSpec) -> str:
    """Return the spec as text, the same for equal specs."""
    return json.dumps(plain_of(spec), sort_keys=True)


def read_share_spec(content: RecordDict) -> ShareSpec:
    """Return the spec of an instruction.

    Raises:
      Refusal: it is unsafe by the checks of `ShareSpec`.
      ValueError: it is not a spec.
      KeyError: there is none.
    """
    return _share_spec(str(config_of(content, SPEC_RECORD)["spec"]))


@lru_cache(maxsize=16)  # all messages of a round have the same spec
def _share_spec(text: str) -> ShareSpec:
    return build(ShareSpec, read_json(text))


def read_position(content: RecordDict) -> Position:
    """Return the position of an instruction."""
    record = config_of(content, SPEC_RECORD)
    round_, attempt, exchange = (int(str(record[name])) for name in ("round", "attempt", "exchange"))
    return Position(str(record["run"]), round_, attempt, Exchange(exchange))


def task_hash(spec: ShareSpec) -> bytes:
    """Return the hash that binds the spec to an attempt's terms, 32 bytes."""
    return hashlib.sha256(write_share_spec(spec).encode()).digest()


def model_hash(content: RecordDict) -> bytes:
    """Return SHA-256 over what a client starts from: the model, and the strategy's other records."""
    digest = hashlib.sha256()
    for name, array in only_arrays(content).items():
        value = np.ascontiguousarray(view(array))
        digest.update(json.dumps([name, str(value.dtype), value.shape]).encode())
        digest.update(value.data if value.size else b"")
    for name, record in sorted(records_of(content, ConfigRecord).items()):
        if name not in OURS:
            digest.update(json.dumps([name, sorted(record.items())], default=repr).encode())
    return digest.digest()


def rotation_seed(model: bytes, server_round: int) -> bytes:
    """Return the public seed of a round's rotation, 32 bytes, which is fixed before training.

    Args:
      model: as `model_hash` returns it.
      server_round: number of the round.
    """
    return hashlib.sha256(b"fedveil rotation" + server_round.to_bytes(8, "big") + model).digest()
