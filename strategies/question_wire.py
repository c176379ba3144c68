"""Wire format of a question: an instruction without a model, that brings an inquiry beside a training order.

The inquiry lies in the strategy's configuration record, as the order does, so that secure aggregation binds a cohort to the
question that it answers, and a device holds the promise against its owner's policy in the way that it knows.
"""

from __future__ import annotations

from collections.abc import Mapping

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from ..privacy.refusal import Refusal
from ..privacy.statistics.inquiry import Inquiry, from_json
from .flower_adapter import records_of

QUESTION_KEY = "fedveil-question"  # in the configuration record
NO_MODEL, CONFIG = "arrays", "config"  # names that Flower's strategies give these records


def question_content(inquiry: Inquiry, order: Mapping[str, str]) -> RecordDict:
    """Return the records of a question.

    Args:
      inquiry: what is asked.
      order: what travels beside it, as `order_of` returns it.
    """
    config = ConfigRecord({**order, QUESTION_KEY: inquiry.text})
    return RecordDict({NO_MODEL: ArrayRecord(), CONFIG: config})


def question_of(content: RecordDict) -> Inquiry | None:
    """Return the inquiry in an instruction, or None if it has none.

    Raises:
      Refusal: it has two, one that cannot be read, or one beside a model.
    """
    found = [
        record[QUESTION_KEY]
        for record in records_of(content, ConfigRecord).values()
        if QUESTION_KEY in record
    ]
    if not found:
        return None
    arrays = records_of(content, ArrayRecord).values()
    if len(found) > 1 or not isinstance(found[0], str) or any(len(record) for record in arrays):
        raise Refusal(QUESTION_KEY, f"{len(found)} values", "an instruction has one question, and no model")
    return from_json(found[0])
