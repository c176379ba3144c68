"""What one question of a server to one node is called, so that the same question again has the same name."""

from __future__ import annotations

import hashlib

from flwr.app import ConfigRecord, Message

from ...strategies.flower_adapter import records_of
from ...strategies.wire import SPEC_RECORD
from .message_codec import Body

SHOWN_RUN = 64  # characters of a run's name in an id; the digest covers all of it


def question_id(message: Message, body: Body, node: int) -> str | None:
    """Return run, round, attempt, exchange, node and a digest of the content; None for a message of no run.

    Two messages have one id if, and only if, they ask the same, whatever link carries them and however often.
    """
    record = records_of(message.content, ConfigRecord).get(SPEC_RECORD)
    if record is None:
        return None
    run, *place = (str(record.get(name, 0)) for name in ("run", "round", "attempt", "exchange"))
    digest = hashlib.sha256(f"{run}|{node}|{message.metadata.message_type}|{body.digest}".encode())
    shown = run[:SHOWN_RUN] if run.isprintable() else "run"
    return "/".join([shown, *place, str(node), digest.hexdigest()[:32]])
