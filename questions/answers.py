"""Answer of a client to a question: counts or measurements of its own rows, as segments or as its records' sum."""

from collections.abc import Callable

import numpy as np
from flwr.app import Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from ..client.private_update import SEGMENTS_RECORD, record_sum_reply
from ..messages.wire import WEIGHT, memory_arrays, sum_spec_of
from ..privacy.budget import Unit
from ..privacy.mechanisms.private_sum import add_noise, on_grid
from ..privacy.mechanisms.randomness import Stream
from ..privacy.statistics.columns import Table
from ..privacy.statistics.evaluation import Evaluation, HeldOutMeans, HeldOutRows
from ..privacy.statistics.inquiry import Inquiry
from ..tasks.columns import columns_of
from ..tasks.protocol import Task
from .wire import client_noise_of, question_of

Measured = HeldOutMeans | HeldOutRows  # of an evaluation at the client or the record level


def answer_inquiry(message: Message, inquiry: Inquiry, table: Table, stream: Stream) -> Message:
    """Return a client's reply to an inquiry; the private sum clips, rounds and noises it, unless it is noised here.

    Args:
      message: the instruction.
      inquiry: of the instruction.
      table: the client's columns.
      stream: the client's own, secret; used for this answer only.

    Raises:
      Refusal: a column is missing.
    """
    if inquiry.unit is Unit.RECORD:
        return _of_records(message, inquiry, table, stream)
    values = inquiry.contribution(table)
    cells = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
    scalars = MetricRecord({name: float(value) for name, value in values.items() if name not in cells})
    content = RecordDict({SEGMENTS_RECORD: memory_arrays(dict(cells)), "metrics": scalars})
    return Message(content, reply_to=message)


def counts_of(
    task: Task, content: RecordDict
) -> Callable[[int], dict[str, float | NDArray[np.floating]]] | None:
    """Return a function from a simulated client's number to its segments, as its app would answer without a message.

    It is None where only the app can answer: to an instruction without an inquiry, at the record level, about a model.
    """
    inquiry = question_of(content)
    if not isinstance(inquiry, Inquiry) or inquiry.unit is not Unit.CLIENT or inquiry.model is not None:
        return None
    return lambda client: inquiry.contribution(columns_of(task, client))


def answer_evaluation(message: Message, evaluation: Evaluation, measured: Measured | None) -> Message:
    """Return the reply of a client's app to an evaluation.

    Args:
      message: the instruction.
      evaluation: of the instruction.
      measured: on the client's held-out records; None if it has none.
    """
    if evaluation.unit is Unit.RECORD:
        assert not isinstance(measured, HeldOutMeans)
        return record_sum_reply(message, evaluation.contribution_of_records(measured, _unit_norm(message)))
    assert not isinstance(measured, HeldOutRows)
    parts = memory_arrays(dict(evaluation.contribution(measured)))
    return Message(RecordDict({SEGMENTS_RECORD: parts}), reply_to=message)


def _of_records(message: Message, inquiry: Inquiry, table: Table, stream: Stream) -> Message:
    """Return the reply to an inquiry that hides records, with the client's own noise if the instruction names it."""
    noise = client_noise_of(message.content)
    if noise is None:
        return record_sum_reply(message, inquiry.contribution_of_records(table, _unit_norm(message)))
    noised = memory_arrays(dict(noised_counts(inquiry, table, noise, stream)))
    content = RecordDict({"arrays": noised, "metrics": MetricRecord({WEIGHT: 1})})
    return Message(content, reply_to=message)


def _unit_norm(message: Message) -> float:
    """Return the norm of a record's part in the sum of an instruction."""
    unit_norm = sum_spec_of(message.content).unit_norm
    if unit_norm is None:
        raise ValueError("a record-level sum needs the norm of a record's part")
    return unit_norm


def noised_counts(
    inquiry: Inquiry, table: Table, noise: float, stream: Stream
) -> dict[str, NDArray[np.float64]]:
    """Return the sum of the parts of a client's records, each of a norm of at most 1, with exact noise on the grid.

    Args:
      inquiry: of the instruction.
      table: the client's columns.
      noise: standard deviation over the norm of a record's part.
      stream: for this answer only.
    """
    spec = inquiry.spec_of_records(1.0)
    parts = inquiry.contribution_of_records(table, 1.0)
    total, _ = add_noise(on_grid(parts, spec), noise, spec, stream)
    answer: dict[str, NDArray[np.float64]] = {}
    offset = 0
    for name, part in parts.items():
        answer[name] = total[offset : offset + part.size].reshape(part.shape) * spec.step
        offset += part.size
    return answer
