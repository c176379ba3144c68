"""Answer of a client to a question: what it counts of its own rows, as the segments of one vector."""

from __future__ import annotations

import numpy as np
from flwr.app import Message, MetricRecord, RecordDict

from ..privacy.statistics.columns import Table
from ..privacy.statistics.inquiry import Inquiry
from ..strategies.wire import memory_arrays
from .private_update import SEGMENTS_RECORD


def answered(message: Message, inquiry: Inquiry, table: Table) -> Message:
    """Return the reply of a client's app, which the private sum clips, rounds and hides.

    Args:
      message: the instruction.
      inquiry: that it brings.
      table: the client's columns.

    Raises:
      Refusal: a column is missing.
    """
    values = inquiry.contribution(table)
    parts = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
    metrics = {name: float(value) for name, value in values.items() if name not in parts}
    content = RecordDict(
        {SEGMENTS_RECORD: memory_arrays(dict(parts)), "metrics": MetricRecord(dict(metrics))}
    )
    return Message(content, reply_to=message)
