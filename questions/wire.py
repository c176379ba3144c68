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

CLIENT_NOISE_KEY = "fedveil-question-noise"
RELEASED_KEY = "fedveil-question-model"
NO_MODEL = MODEL = "arrays"  # names that Flower's strategies give these records
CONFIG = "config"
Request = Inquiry | Evaluation


def question_content(
    inquiry: Inquiry, order: Mapping[str, str], noise: float | None = None, released: bytes | None = None
) -> RecordDict:
    """Return the records of a question.

    Args:
      inquiry: what is asked.
      order: sent with it, as `question_order` returns it.
      noise: that each client adds separately, over the norm of a record's part; None if it adds none, or a share.
      released: file of the model that the question is about; None if it is about the clients' own columns.
    """
    config = ConfigRecord({**order, QUESTION_KEY: inquiry.text})
    if noise is not None:
        config[CLIENT_NOISE_KEY] = noise
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


def _zeros(request: Request) -> ArrayRecord:
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


def question_of(content: RecordDict) -> Request | None:
    """Return the question in an instruction, or None.

    Raises:
      Refusal: it has two questions or an unreadable one, an inquiry with a model to train or another model than it
        names, or an evaluation without a model.
    """
    keys = (QUESTION_KEY, EVALUATION_KEY)
    values = [(key, value) for key in keys for value in values_under(content, key)]
    if not values:
        return None
    key, text = values[0]
    if len(values) > 1 or not isinstance(text, str):
        raise Refusal(key, f"{len(values)} values", "an instruction must have one question")
    request = evaluation_from_json(text) if key == EVALUATION_KEY else from_json(text)
    layouts = [layout_of(dict(each.items())) for each in records_of(content, ArrayRecord).values()]
    released = released_of(content)
    if isinstance(request, Evaluation):
        of_records = request.unit is Unit.RECORD
        has_model = released is not None and layouts == [request.layout] if of_records else any(layouts)
        if not has_model or (released is not None) != of_records:
            raise Refusal(key, None, "needs exactly the model to evaluate")
        return request
    if any(layout != ({} if request.unit is Unit.CLIENT else request.layout) for layout in layouts):
        raise Refusal(QUESTION_KEY, request.name, "has a model; a question must have none")
    if (None if released is None else hashlib.sha256(released).hexdigest()) != request.model:
        raise Refusal("model", request.model, "is not the SHA-256 of the question's model")
    return request


def released_of(content: RecordDict) -> bytes | None:
    """Return the file of the released model that a question is about; None without one.

    Raises:
      Refusal: there are two, or the value is not a file.
    """
    values = values_under(content, RELEASED_KEY)
    if not values:
        return None
    if len(values) > 1 or not isinstance(values[0], bytes):
        raise Refusal(RELEASED_KEY, f"{len(values)} values", "a question must be about one model")
    return values[0]


def client_noise_of(content: RecordDict) -> float | None:
    """Return the noise that each client adds separately, over the norm of a record's part; None without it.

    Raises:
      Refusal: it is not a positive number.
    """
    values = values_under(content, CLIENT_NOISE_KEY)
    if not values:
        return None
    noise = real(CLIENT_NOISE_KEY, values[0])
    if len(values) > 1 or noise <= 0:
        raise Refusal(CLIENT_NOISE_KEY, noise, "give one number above 0")
    return noise
