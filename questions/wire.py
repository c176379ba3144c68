"""Wire format of a question: an instruction with a training order and either an inquiry or an evaluation of a model.

An inquiry has no model; an evaluation contains its model. At the record level an inquiry contains zeros in the shapes
of the answer instead of a model: the answer is the update to them. If each client adds its own noise, the instruction
states how much.

The question is in the strategy's configuration record, like the order, so that secure aggregation binds a cohort to the
question, and a device checks its privacy promise against its owner's policy as for training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from ..base.refusal import Refusal, real
from ..messages.flower_adapter import records_of, values_under
from ..messages.wire import EVALUATION_KEY, QUESTION_KEY, layout_of, memory_arrays
from ..privacy.budget import Unit
from ..privacy.statistics.evaluation import Evaluation, evaluation_from_json
from ..privacy.statistics.inquiry import Inquiry, from_json

OWN_NOISE_KEY = "fedveil-question-noise"
RELEASED_KEY = "fedveil-question-model"
NO_MODEL = MODEL = "arrays"  # names that Flower's strategies give these records
CONFIG = "config"
Asked = Inquiry | Evaluation


def question_content(
    inquiry: Inquiry, order: Mapping[str, str], own_noise: float | None = None, released: bytes | None = None
) -> RecordDict:
    """Return the records of a question.

    Args:
      inquiry: what is asked.
      order: sent with it, as `order_of` returns it.
      own_noise: that each client adds separately, over the norm of a record's part; None if it adds none, or a share.
      released: file of the model that the question is about; None if it is about the clients' own columns.
    """
    config = ConfigRecord({**order, QUESTION_KEY: inquiry.text})
    if own_noise is not None:
        config[OWN_NOISE_KEY] = own_noise
    if released is not None:
        config[RELEASED_KEY] = released
    return RecordDict({NO_MODEL: _zeros(inquiry), CONFIG: config})


def evaluation_content(
    evaluation: Evaluation, model: ArrayRecord | bytes, order: Mapping[str, str]
) -> RecordDict:
    """Return the records of an evaluation.

    Args:
      evaluation: what is asked.
      model: to evaluate, at least one array; at the record level its file, since the answer takes the place of the
        update's arrays.
      order: what travels beside it.
    """
    config = ConfigRecord({**order, EVALUATION_KEY: evaluation.text})
    if isinstance(model, ArrayRecord):
        return RecordDict({MODEL: model, CONFIG: config})
    config[RELEASED_KEY] = model
    return RecordDict({NO_MODEL: _zeros(evaluation), CONFIG: config})


def _zeros(request: Asked) -> ArrayRecord:
    """Return zeros in the shapes of an answer at the record level; empty at the client level."""
    layout = {} if request.unit is Unit.CLIENT else request.layout
    return memory_arrays({name: np.zeros(shape) for name, shape in layout.items()})


def with_evaluation(content: RecordDict, evaluation: Evaluation) -> RecordDict:
    """Return a strategy's records, which include a model, with an evaluation of it added.

    Args:
      content: of the strategy.
      evaluation: what is asked.
    """
    out = RecordDict(dict(content.items()))
    out[EVALUATION_KEY] = ConfigRecord({EVALUATION_KEY: evaluation.text})
    return out


def question_of(content: RecordDict) -> Asked | None:
    """Return the question in an instruction, or None.

    Raises:
      Refusal: it has two questions or an unreadable one, an inquiry with a model to train or another model than it
        names, or an evaluation without a model.
    """
    keys = (QUESTION_KEY, EVALUATION_KEY)
    found = [(key, value) for key in keys for value in values_under(content, key)]
    if not found:
        return None
    key, text = found[0]
    if len(found) > 1 or not isinstance(text, str):
        raise Refusal(key, f"{len(found)} values", "an instruction must have one question")
    asked = evaluation_from_json(text) if key == EVALUATION_KEY else from_json(text)
    layouts = [layout_of(dict(each.items())) for each in records_of(content, ArrayRecord).values()]
    released = released_of(content)
    if isinstance(asked, Evaluation):
        of_records = asked.unit is Unit.RECORD
        known = released is not None and layouts == [asked.layout] if of_records else any(layouts)
        if not known or (released is not None) != of_records:
            raise Refusal(key, None, "needs exactly the model to evaluate")
        return asked
    if any(layout != ({} if asked.unit is Unit.CLIENT else asked.layout) for layout in layouts):
        raise Refusal(QUESTION_KEY, asked.name, "has a model; a question must have none")
    if (None if released is None else hashlib.sha256(released).hexdigest()) != asked.model:
        raise Refusal("model", asked.model, "is not the SHA-256 of the question's model")
    return asked


def released_of(content: RecordDict) -> bytes | None:
    """Return the file of the released model that a question is about; None without one.

    Raises:
      Refusal: there are two, or the value is not a file.
    """
    found = values_under(content, RELEASED_KEY)
    if not found:
        return None
    if len(found) > 1 or not isinstance(found[0], bytes):
        raise Refusal(RELEASED_KEY, f"{len(found)} values", "a question must be about one model")
    return found[0]


def own_noise_of(content: RecordDict) -> float | None:
    """Return the noise that each client adds separately, over the norm of a record's part; None without it.

    Raises:
      Refusal: it is not a positive number.
    """
    found = values_under(content, OWN_NOISE_KEY)
    if not found:
        return None
    noise = real(OWN_NOISE_KEY, found[0])
    if len(found) > 1 or noise <= 0:
        raise Refusal(OWN_NOISE_KEY, noise, "give one number above 0")
    return noise
