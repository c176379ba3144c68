"""Sizes of messages on the gRPC link, for the counts of a simulation and the public figures of a round.

Names and specs are public, and honest vectors of a round have equal length, so a size reveals nothing about a client.
"""

from functools import lru_cache

import numpy as np
from flwr.app import Message, RecordDict

from ..privacy.mechanisms.packing import packed_size, width_of
from ..privacy.mechanisms.sum_spec import SumSpec
from .frames import message_bytes
from .message_codec import MalformedMessage, pack_body, segments
from .traffic import content_bytes
from .wire import VECTOR, VECTOR_RECORD, memory_arrays

ID_BYTES = 64  # of an instruction's id, about: run, round, attempt, exchange, node and a digest of 32


def carried_bytes(message: Message) -> int:
    """Return the approximate bytes on a connection of a message that has no id yet."""
    try:
        size = sum(len(part) for part in segments(message.metadata, pack_body(message)))
    except MalformedMessage:  # the gRPC link does not carry arrays of this type, but an engine does
        size = content_bytes(message.content)
    return message_bytes("x" * ID_BYTES, ID_BYTES + size)


def update_bytes(spec: SumSpec, size: int) -> int:
    """Return the approximate bytes of a client's reply to an instruction in the clear.

    Args:
      spec: of the sum.
      size: number of coordinates of the vector, all segments included.
    """
    return _update_bytes(size, width_of(spec), spec.clipping_norm is not None)


@lru_cache(maxsize=8)
def _update_bytes(size: int, width: int | None, on_grid: bool) -> int:
    """Return the same for a vector of integers of `width` bits, or of numbers that are not packed."""
    if width is None:
        vector = np.zeros(size, np.int32 if on_grid else np.float64)  # zeros that nobody reads take no memory
    else:
        vector = np.zeros(packed_size(size, width), np.uint8)
    content = RecordDict({VECTOR_RECORD: memory_arrays({VECTOR: vector})})
    return carried_bytes(Message(content, reply_to=Message(RecordDict(), 2, "train")))
