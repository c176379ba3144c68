"""Notices to connected devices outside their rounds: the end of a run with its model, and a later certificate.

The reply to the first is the device's receipt, that to the second the device's description.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from numpy.typing import NDArray

from ..base.bounded_decoding import RARE, plain_of, read_record
from ..base.refusal import Form, Range
from ..privacy.ledger.receipt import COMMITMENT_BYTES, SIGNATURE_BYTES, Receipt
from .flower_adapter import config_of, records_of
from .training_order import MAX_ORDER_BYTES
from .wire import OVER, RENEWAL, memory_arrays, views

MESSAGE_TYPE = "query"  # of both notices, Flower's word
MODEL, RECEIPT = "model", "receipt"
DEVICE, CERTIFICATE, ROLLOVERS = "device", "certificate", "rollovers"
WORD, HASH = Form(".{1,64}"), Form("([0-9a-f]{64})?")
MAX_MANIFEST = 1 << 20  # characters
MANIFEST_TEXT = Form(f".{{,{MAX_MANIFEST}}}", printable=False)
LONGEST_CERTIFICATE = 1 << 14  # characters; of a head of the log, too
MAX_SUITES = 64  # in a device's description
LAST_SECOND = 253_402_300_799  # of the year 9999, the last that a date can have


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
    """Return the message that tells a node the end of a run."""
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
    """Return a device's reply to the end of a run: its receipt, if any."""
    if receipt is None:
        return Message(RecordDict(), reply_to=message)
    fields = ConfigRecord({"commitment": receipt.commitment, "signature": receipt.signature})
    return Message(RecordDict({RECEIPT: fields}), reply_to=message)


def read_receipt(reply: Message) -> Receipt | None:
    """Return the receipt in a reply, its signature unchecked; None if it has none that is readable."""
    if reply.has_error():
        return None
    fields = config_of(reply.content, RECEIPT)
    commitment, signature = fields.get("commitment"), fields.get("signature")
    if not (isinstance(commitment, bytes) and isinstance(signature, bytes)):
        return None
    if (len(commitment), len(signature)) != (COMMITMENT_BYTES, SIGNATURE_BYTES):
        return None
    return Receipt(reply.metadata.src_node_id, commitment, signature)


@dataclass(frozen=True)
class DeviceFacts:
    """Facts of a device that do not depend on its owner's data.

    Attributes:
      version: of its fedveil.
      certificate_ends: Unix second at which its certificate expires.
      roster: version of its roster.
      suites: numbers of the cipher suites that its owner's policy allows.
      log: newest head of the server's log that it has seen, as text; empty for none.
      authority: fingerprint of the authority in force there; empty from an older release.
    """

    version: Annotated[str, Form(".{,32}")]
    certificate_ends: Annotated[int, Range(ge=0, le=LAST_SECOND)]
    roster: Annotated[int, Range(ge=0, le=2**53)]
    suites: tuple[int, ...]
    log: Annotated[str, Form(f".{{,{LONGEST_CERTIFICATE}}}", printable=False)] = ""
    authority: Annotated[str, Form(".{,64}")] = ""


def renewal_to(node: int, certificate: str, rollovers: str = "") -> Message:
    """Return the message that brings a node its later certificate, and asks for its description.

    Args:
      node: of the device.
      certificate: the device's later one, in PEM; empty for none.
      rollovers: of the authority, as text; empty for none.
    """
    record = ConfigRecord({CERTIFICATE: certificate})
    if rollovers:
        record[ROLLOVERS] = rollovers
    return Message(RecordDict({RENEWAL: record}), node, MESSAGE_TYPE)


def read_renewal(message: Message) -> str | None:
    """Return the certificate in a message, empty for none; None if it is another message."""
    if message.metadata.message_type != MESSAGE_TYPE or message.has_error():
        return None
    certificate = config_of(message.content, RENEWAL).get(CERTIFICATE)
    return certificate if isinstance(certificate, str) and len(certificate) <= LONGEST_CERTIFICATE else None


def rollovers_in(message: Message) -> str:
    """Return the rollovers in a renewal, as unchecked text; empty for none."""
    rollovers = config_of(message.content, RENEWAL).get(ROLLOVERS)
    return rollovers if isinstance(rollovers, str) else ""


def facts_reply(message: Message, facts: DeviceFacts) -> Message:
    """Return a device's reply to a renewal."""
    record = ConfigRecord({**asdict(facts), "suites": list(facts.suites)})
    return Message(RecordDict({DEVICE: record}), reply_to=message)


def read_facts(reply: Message) -> DeviceFacts | None:
    """Return a device's description; None if it cannot be read, as from an older release."""
    if reply.has_error():
        return None
    facts = read_record(DeviceFacts, config_of(reply.content, DEVICE))
    return facts if facts and len(facts.suites) <= MAX_SUITES else None
