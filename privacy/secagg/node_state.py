"""What a node remembers between two messages, sealed with AES-256-GCM under a key of the node: bytes, no files."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, cast

import msgpack

from .attempt import Attempt, Stage
from .client import Participant
from .fields import read_terms, unpack, write_terms
from .messages import Cohort, read, write
from .refusal import Reason, Refused
from .suite import SUITES, seal, unseal
from .transcript import Purpose, frame

_FORMAT = 2
_SUITE = SUITES[1]  # whatever suite an attempt uses
_NODES = ("candidates", "sharers", "alive")


def write_state(participant: Participant, node_key: bytes) -> bytes:
    """Return the node's memory, sealed. Keep it durably before the reply it belongs to leaves.

    Args:
      participant: the node.
      node_key: 32 bytes that never leave the node: of a TPM, of the system's key ring, or of a file of mode 0600.
    """
    seen = [[run, *pair] for run, rounds in participant.seen.items() for pair in rounds.items()]
    attempts = [_plain(attempt) for attempt in participant.attempts.values()]
    body = cast(bytes, msgpack.packb([_FORMAT, seen, attempts]))
    return seal(_SUITE, node_key, body, frame(Purpose.STATE, participant.node))


def read_state(participant: Participant, data: bytes, node_key: bytes) -> None:
    """Give a fresh participant the memory that `write_state` sealed.

    Raises:
      Refused: BAD_SHARE if it does not open under this key for this node; MALFORMED if another version wrote it.
    """
    row = unpack(unseal(_SUITE, node_key, data, frame(Purpose.STATE, participant.node)))
    try:
        written, seen, attempts = row
        rounds = [(int(run), int(number), int(attempt)) for run, number, attempt in seen]
        restored = [_attempt(fields_) for fields_ in attempts]
    except (TypeError, ValueError, KeyError) as error:
        raise Refused(Reason.MALFORMED, "a node's state of another version") from error
    if written != _FORMAT:
        raise Refused(Reason.MALFORMED, f"a node's state of format {written}")
    participant.seen = {}
    for run, number, attempt in rounds:
        participant.seen.setdefault(run, {})[number] = attempt
    participant.attempts = {attempt.context: attempt for attempt in restored}


def _plain(attempt: Attempt) -> dict[str, Any]:
    row = {field.name: getattr(attempt, field.name) for field in fields(attempt)}
    row["terms"] = write_terms(attempt.terms)
    row["adverts"] = write(Cohort(attempt.context, attempt.adverts))
    row["stage"] = int(attempt.stage)
    return row


def _attempt(row: dict[str, Any]) -> Attempt:
    row["terms"] = read_terms(row["terms"])
    row["adverts"] = read(row["adverts"], Cohort).adverts
    row["stage"] = Stage(row["stage"])
    row["openings"] = tuple((int(least), bytes(seed)) for least, seed in row["openings"])
    row |= {name: tuple(row[name]) for name in _NODES}
    return Attempt(**row)
