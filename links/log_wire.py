"""Log in instructions: a signed head, the leaves that the node may lack, and the indices of the instruction's entries."""

from dataclasses import dataclass
from typing import Annotated

from flwr.app import ConfigRecord, RecordDict

from ..base.bounded_decoding import RARE, plain_of, read_record
from ..base.refusal import Refusal
from ..messages.flower_adapter import records_of
from ..messages.wire import LOG_RECORD
from ..privacy.merkle import HASH_BYTES

MAX_COSIGNATURES = 64  # in one instruction
NO_ENTRY = -1  # index of an entry that an instruction does not have


@dataclass(frozen=True)
class LogStatement:
    """Statement of an instruction about the log.

    Attributes:
      head: a `TreeHead` as text.
      start: index of the first leaf in the statement.
      leaves: hashes from there up to the head's size.
      model, roster: indices of the entries of the instruction's model and roster; `NO_ENTRY` without one.
      cosignatures: of witnesses under the head, as text, unchecked.
    """

    head: str
    start: int
    leaves: tuple[bytes, ...]
    model: int = NO_ENTRY
    roster: int = NO_ENTRY
    cosignatures: Annotated[tuple[str, ...], RARE] = ()


def log_record(statement: LogStatement) -> ConfigRecord:
    """Return the record that is added to an instruction."""
    return ConfigRecord({**plain_of(statement), "leaves": b"".join(statement.leaves)})


def log_of(content: RecordDict) -> LogStatement | None:
    """Return an instruction's statement about the log, None without one.

    Raises:
      Refusal: it is malformed.
    """
    record = records_of(content, ConfigRecord).get(LOG_RECORD)
    if record is None:
        return None
    leaves = record.get("leaves")
    hashes = None
    if isinstance(leaves, bytes) and not len(leaves) % HASH_BYTES:
        hashes = [leaves[at : at + HASH_BYTES] for at in range(0, len(leaves), HASH_BYTES)]
    statement = read_record(LogStatement, record, leaves=hashes)
    if statement is None or len(statement.cosignatures) > MAX_COSIGNATURES:
        raise Refusal("log", "record", "is not made as it should be; the server may be of another release")
    return statement
