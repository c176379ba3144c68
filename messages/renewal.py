"""Message with a later certificate for a connected device, and the device's description in its reply."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated

from flwr.app import ConfigRecord, Message, RecordDict

from ..base.bounded_decoding import read_record
from ..base.refusal import Form, Range
from .flower_adapter import config_of
from .run_over import MESSAGE_TYPE
from .wire import RENEWAL

DEVICE, CERTIFICATE, ROLLOVERS = "device", "certificate", "rollovers"
LONGEST_CERTIFICATE = 1 << 14
MAX_SUITES = 64
LAST_SECOND = 253_402_300_799  # of the year 9999, the last that a date can have


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
    """Return the message that asks a node for its description.

    Args:
      node: of the device.
      certificate: in PEM; empty for none.
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
    """Return the rollovers in a renewal, as text; empty for none."""
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
