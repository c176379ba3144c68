"""Last message of a run, which tells each client its status and final model.

The reply is the device's receipt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from numpy.typing import NDArray

from ..base.bounded_decoding import RARE, plain_of, read_record
from ..base.refusal import Form
from ..privacy.ledger.receipt import COMMITMENT_BYTES, SIGNATURE_BYTES, Receipt
from .flower_adapter import config_of, records_of
from .training_order import MAX_ORDER_BYTES
from .wire import OVER, memory_arrays, views

MODEL, MESSAGE_TYPE = "model", "query"
RECEIPT = "receipt"
WORD, HASH = Form(".{1,64}"), Form("([0-9a-f]{64})?")
MAX_MANIFEST = 1 << 20  # characters
MANIFEST_TEXT = Form(f".{{,{MAX_MANIFEST}}}", printable=False)


@dataclass(frozen=True)
class RunOver:
    """Run that has ended.

    Attributes:
      run: its display name.
      status: how it ended, as in result.json.
      rounds: number of completed rounds.
      model: the released model's arrays by name; empty if the run has no usable model.
      agreement: hash of the run's schema and model, as in its orders; empty without a schema.
      manifest: SHA-256 of the manifest that closed the run, in hexadecimal; empty if it was not closed.
      moments: mean and deviation of the columns that scaled the run's inputs, as JSON; empty without scaling.
      listed: text of the manifest; empty from a server of an earlier release.
    """

    run: Annotated[str, WORD]
    status: Annotated[str, WORD]
    rounds: int
    model: Annotated[Mapping[str, NDArray[np.generic]], "arrays"]
    agreement: Annotated[str, RARE, Form(".{,64}")] = ""
    manifest: Annotated[str, RARE, HASH] = ""
    moments: Annotated[str, RARE, Form(f".{{,{MAX_ORDER_BYTES}}}", printable=False)] = ""
    listed: Annotated[str, RARE, MANIFEST_TEXT] = ""


def message_to(node: int, over: RunOver) -> Message:
    """Return the message to a node."""
    plain = plain_of(replace(over, model={}))
    del plain[MODEL]
    content = RecordDict({OVER: ConfigRecord(plain), MODEL: memory_arrays(dict(over.model))})
    return Message(content, node, MESSAGE_TYPE)


def read_over(message: Message) -> RunOver | None:
    """Return the end of a run in a message; None if it is another message or unreadable."""
    if message.metadata.message_type != MESSAGE_TYPE or message.has_error():
        return None
    arrays = records_of(message.content, ArrayRecord).get(MODEL)
    if arrays is None:
        return None
    return read_record(RunOver, config_of(message.content, OVER), model=views(arrays))


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
    fields = config_of(reply.content, RECEIPT)
    commitment, signature = fields.get("commitment"), fields.get("signature")
    if not (isinstance(commitment, bytes) and isinstance(signature, bytes)):
        return None
    if (len(commitment), len(signature)) != (COMMITMENT_BYTES, SIGNATURE_BYTES):
        return None
    return Receipt(reply.metadata.src_node_id, commitment, signature)
