"""Last message of a run, which tells each client its status and final model.

The reply is the device's receipt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from numpy.typing import NDArray

from ..privacy.ledger.receipt import COMMITMENT_BYTES, SIGNATURE_BYTES, Receipt
from .flower_adapter import records_of
from .training_order import MAX_ORDER_BYTES
from .wire import memory_arrays, views

OVER, MODEL, MESSAGE_TYPE = "run over", "model", "query"
RECEIPT = "receipt"
RARE = ("agreement", "manifest", "moments", "listed")  # fields that a message may lack
LONGEST = 64  # characters of a text
HASH = re.compile("[0-9a-f]{64}")
MOST_MANIFEST = 1 << 20  # characters


@dataclass(frozen=True)
class RunOver:
    """Run that has ended.

    Attributes:
      run: its display name.
      status: how it ended, as in result.json.
      rounds: number of completed ones.
      model: the released model's arrays by name; empty if the run has no usable model.
      agreement: hash of the run's schema and model, as in its orders; empty without a schema.
      moments: mean and deviation of the columns that scaled the run's inputs, as JSON; empty without scaling.
      manifest: SHA-256 of the manifest that closed the run, in hexadecimal; empty if it was not closed.
      listed: text of the manifest; empty from a server of an earlier release.
    """

    run: str
    status: str
    rounds: int
    model: Mapping[str, NDArray[np.generic]]
    agreement: str = ""
    manifest: str = ""
    moments: str = ""
    listed: str = ""


def message_to(node: int, over: RunOver) -> Message:
    """Return the message to a node."""
    rare = {name: getattr(over, name) for name in RARE}
    told = {"run": over.run, "status": over.status, "rounds": over.rounds}
    said = ConfigRecord({**told, **{name: value for name, value in rare.items() if value}})
    return Message(RecordDict({OVER: said, MODEL: memory_arrays(dict(over.model))}), node, MESSAGE_TYPE)


def read_over(message: Message) -> RunOver | None:
    """Return the end of a run in a message; None if it is another message or unreadable."""
    if message.metadata.message_type != MESSAGE_TYPE or message.has_error():
        return None
    said = records_of(message.content, ConfigRecord).get(OVER)
    arrays = records_of(message.content, ArrayRecord).get(MODEL)
    if said is None or arrays is None:
        return None
    run, status, rounds = said.get("run"), said.get("status"), said.get("rounds")
    agreement, manifest, moments, listed = (said.get(name, "") for name in RARE)
    if not (_is_word(run) and _is_word(status) and type(rounds) is int):
        return None
    if agreement != "" and not _is_word(agreement):
        return None
    if manifest != "" and not (isinstance(manifest, str) and HASH.fullmatch(manifest)):
        return None
    for text, most in ((moments, MAX_ORDER_BYTES), (listed, MOST_MANIFEST)):
        if not isinstance(text, str) or len(text) > most:
            return None
    model = views(arrays)
    return RunOver(str(run), str(status), rounds, model, *map(str, (agreement, manifest, moments, listed)))


def reply_with(receipt: Receipt | None, message: Message) -> Message:
    """Return a device's reply to the message: its receipt, if any."""
    if receipt is None:
        return Message(RecordDict(), reply_to=message)
    fields = ConfigRecord({"commitment": receipt.commitment, "signature": receipt.signature})
    return Message(RecordDict({RECEIPT: fields}), reply_to=message)


def read_receipt(reply: Message) -> Receipt | None:
    """Return the receipt in a reply, unchecked; None if it has none that is readable."""
    if reply.has_error():
        return None
    fields = records_of(reply.content, ConfigRecord).get(RECEIPT)
    if fields is None:
        return None
    commitment, signature = fields.get("commitment"), fields.get("signature")
    if not (isinstance(commitment, bytes) and isinstance(signature, bytes)):
        return None
    if (len(commitment), len(signature)) != (COMMITMENT_BYTES, SIGNATURE_BYTES):
        return None
    return Receipt(reply.metadata.src_node_id, commitment, signature)


def _is_word(value: object) -> bool:
    return isinstance(value, str) and value.isprintable() and 0 < len(value) <= LONGEST
