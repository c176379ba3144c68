"""Last model of a device: the one that it received last, in a file; the server may send the next as a difference from it.

The file is not flushed to disk: after a power cut a truncated file has another hash, and the device requests the whole
model.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from flwr.app import ArrayRecord, Message, RecordDict

from ...base.durable_files import replace_file
from ...client.private_update import NotTrained
from ...messages.flower_adapter import delivered_message
from ...messages.message_codec import MalformedMessage, pack_body, segments, unpack
from ...messages.model_difference import apply, hash_of
from ...messages.wire import (
    FAILED,
    NO_BASE,
    ModelStatement,
    memory_arrays,
    only_arrays,
    read_statement,
    views,
    with_arrays_again,
    with_report,
)

logger = logging.getLogger("fedveil.client")

FILE = "held"


@dataclass(frozen=True)
class LastModel:
    """Last model that a device received, if it has stored one.

    Attributes:
      path: of its file.
    """

    path: Path

    def with_whole_model(self, message: Message) -> tuple[Message, ModelStatement | None]:
        """Return an instruction with its whole model, and the encoding in which it came; None for the plain encoding.

        Raises:
          NotTrained: NO_BASE if no model is stored, or the difference from it does not give the named model; FAILED if a
            whole model is not the named one.
        """
        try:
            statement = read_statement(message.content)
        except ValueError as error:
            logger.warning("an instruction's model cannot be read: %s", error)
            raise NotTrained(FAILED) from error
        if statement is None:
            return message, None
        record = self._apply_difference(statement) if statement.difference else only_arrays(message.content)
        arrays = views(record)
        if hash_of(arrays) != statement.model:
            logger.warning("an instruction's model is not the one that it names")
            raise NotTrained(NO_BASE if statement.difference else FAILED)
        content = with_arrays_again(message.content, statement, record)
        return delivered_message(content, message.metadata), statement

    def keep(self, message: Message, statement: ModelStatement, reply: Message) -> Message:
        """Store the model of an answered instruction, as of `with_whole_model`; then add its hash to the reply."""
        record = RecordDict({FILE: only_arrays(message.content)})
        try:
            stored = Message(record, 0, "train")
            replace_file(self.path, segments(stored.metadata, pack_body(stored)), flush=False)
        except (OSError, MalformedMessage) as error:
            logger.warning("the model is not stored, so the next one is sent whole: %s", error)
            return reply
        return Message(with_report(reply.content, statement.model), reply_to=message)

    def _apply_difference(self, statement: ModelStatement) -> ArrayRecord:
        """Return the stored model with the statement's difference added."""
        try:
            stored = only_arrays(unpack(self.path.read_bytes()).content)
            return memory_arrays(apply(views(stored), statement.difference))
        except (OSError, ValueError) as error:  # no file, no message, no difference from this model
            logger.info("a difference refers to a model that this device does not hold: %s", error)
            raise NotTrained(NO_BASE) from error
