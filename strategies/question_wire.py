"""Wire format of a question: an instruction that brings an inquiry beside a training order, and no model.

Where records are hidden it brings zeros in the shapes of the answer, in the place of a model: an answer is what a client adds
to them. Where each client adds noise of its own, it says how much.

The inquiry lies in the strategy's configuration record, as the order does, so that secure aggregation binds a cohort to the
question that it answers, and a device holds the promise against its owner's policy in the way that it knows.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from ..privacy.budget import Unit
from ..privacy.refusal import Refusal, real
from ..privacy.statistics.inquiry import Inquiry, from_json
from .flower_adapter import records_of
from .wire import layout_of, memory_arrays

QUESTION_KEY = "fedveil-question"  # in the configuration record
OWN_NOISE_KEY = "fedveil-question-noise"
NO_MODEL, CONFIG = "arrays", "config"  # names that Flower's strategies give these records


def question_content(
    inquiry: Inquiry, order: Mapping[str, str], own_noise: float | None = None
) -> RecordDict:
    """Return the records of a question.

    Args:
      inquiry: what is asked.
      order: what travels beside it, as `order_of` returns it.
      own_noise: that each client adds by itself, over the norm of a record's part; None where it adds none, or a share.
    """
    config = ConfigRecord({**order, QUESTION_KEY: inquiry.text})
    if own_noise is not None:
        config[OWN_NOISE_KEY] = own_noise
    zeros = ArrayRecord()
    if inquiry.unit is Unit.RECORD:
        zeros = memory_arrays({name: np.zeros(shape) for name, shape in inquiry.layout.items()})
    return RecordDict({NO_MODEL: zeros, CONFIG: config})


def question_of(content: RecordDict) -> Inquiry | None:
    """Return the inquiry in an instruction, or None if it has none.

    Raises:
      Refusal: it has two, one that cannot be read, or one beside a model.
    """
    found = _values(content, QUESTION_KEY)
    if not found:
        return None
    if len(found) > 1 or not isinstance(found[0], str):
        raise Refusal(QUESTION_KEY, f"{len(found)} values", "an instruction has one question")
    inquiry = from_json(found[0])
    layout = inquiry.layout if inquiry.unit is Unit.RECORD else {}
    for arrays in records_of(content, ArrayRecord).values():
        if layout_of(dict(arrays.items())) != layout:
            raise Refusal(QUESTION_KEY, inquiry.name, "comes beside a model; a question has none")
    return inquiry


def own_noise_of(content: RecordDict) -> float | None:
    """Return the noise that each client adds by itself, over the norm of a record's part; None where there is none.

    Raises:
      Refusal: it is none that hides anything.
    """
    found = _values(content, OWN_NOISE_KEY)
    if not found:
        return None
    noise = real(OWN_NOISE_KEY, found[0])
    if len(found) > 1 or noise <= 0:
        raise Refusal(OWN_NOISE_KEY, noise, "give one number above 0")
    return noise


def _values(content: RecordDict, key: str) -> list[object]:
    return [record[key] for record in records_of(content, ConfigRecord).values() if key in record]
