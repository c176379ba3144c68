"""Wire format of a question: an instruction with a training order and either an inquiry or an evaluation of a model.

An inquiry has no model; an evaluation contains its model. At the record level an inquiry contains zeros in the shapes
of the answer instead of a model: the answer is the update to them. If each client adds its own noise, the instruction
states how much.

The question is in the strategy's configuration record, like the order, so that secure aggregation binds a cohort to the
question, and a device checks its privacy promise against its owner's policy as for training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from ..base.refusal import Refusal, real
from ..messages.flower_adapter import records_of, values_under
from ..messages.wire import EVALUATION_KEY, QUESTION_KEY, Layout, layout_of, memory_arrays
from ..privacy.budget import Unit
from ..privacy.statistics.evaluation import Evaluation, evaluation_from_json
from ..privacy.statistics.inquiry import Inquiry, from_json

CLIENT_NOISE_KEY = "fedveil-question-noise"
RELEASED_KEY = "fedveil-question-model"
# Names that Flower's strategies give the records of the model and of the order.
MODEL, CONFIG = "arrays", "config"
Request = Inquiry | Evaluation


def question_content(
    inquiry: Inquiry, order: Mapping[str, str], noise: float | None = None, released: bytes | None = None
) -> RecordDict:
    """Return the records of a question.

    Args:
      inquiry: the questions.
      order: that nothing is trained, and what the answer costs, by `question_order`.
      noise: that each client adds separately, over the norm of a record's part; None if it adds none, or a share.
      released: file of the model that the question is about; None if it is about the clients' own columns.
    """
    config = ConfigRecord({**order, QUESTION_KEY: inquiry.text})
    if noise is not None:
        config[CLIENT_NOISE_KEY] = noise
    if released is not None:
        config[RELEASED_KEY] = released
    return RecordDict({MODEL: _zeros(inquiry), CONFIG: config})


def evaluation_content(
    evaluation: Evaluation, model: ArrayRecord | bytes, order: Mapping[str, str]
) -> RecordDict:
    """Return the records of an evaluation.

    Args:
      evaluation: the question.
      model: to evaluate, at least one array; at the record level its file, since the answer takes the place of the
        update's arrays.
      order: states the charge of an evaluation and what clients are promised, by `question_order`.
    """
    config = ConfigRecord({**order, EVALUATION_KEY: evaluation.text})
    if isinstance(model, ArrayRecord):
        return RecordDict({MODEL: model, CONFIG: config})
    config[RELEASED_KEY] = model
    return RecordDict({MODEL: _zeros(evaluation), CONFIG: config})


def update_layout(request: Request) -> Layout:
    """Return the shapes of the arrays that take an update's place in an answer; none at the client level."""
    return {} if request.unit is Unit.CLIENT else request.layout


def _zeros(request: Request) -> ArrayRecord:
    """Return zeros in the place of a model, to which an answer is the update."""
    return memory_arrays({name: np.zeros(shape) for name, shape in update_layout(request).items()})


def with_evaluation(content: RecordDict, evaluation: Evaluation) -> RecordDict:
    """Return a strategy's records, which include a model, with an evaluation of it added."""
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
    texts = [(key, value) for key in keys for value in values_under(content, key)]
    if not texts:
        return None
    key, text = texts[0]
    if len(texts) > 1 or not isinstance(text, str):
        raise Refusal(key, f"{len(texts)} values", "an instruction must have one question")
    request = evaluation_from_json(text) if key == EVALUATION_KEY else from_json(text)
    layouts = [layout_of(dict(each.items())) for each in records_of(content, ArrayRecord).values()]
    released = released_of(content)
    if isinstance(request, Evaluation):
        if not _has_its_model(request, layouts, released):
            raise Refusal(key, None, "needs exactly the model to evaluate")
        return request
    if any(layout != update_layout(request) for layout in layouts):
        raise Refusal(QUESTION_KEY, request.name, "has a model; a question must have none")
    digest = None if released is None else hashlib.sha256(released).hexdigest()
    if digest != request.model:
        raise Refusal("model", request.model, "is not the SHA-256 of the question's model")
    return request


def _has_its_model(evaluation: Evaluation, layouts: Sequence[Layout], released: bytes | None) -> bool:
    """Return whether an instruction has the model to evaluate: as arrays or, at the record level, as a file."""
    if evaluation.unit is Unit.RECORD:
        return released is not None and layouts == [evaluation.layout]
    return released is None and any(layouts)


def released_of(content: RecordDict) -> bytes | None:
    """Return the file of the released model that a question is about; None without one. Refuse several."""
    values = values_under(content, RELEASED_KEY)
    if not values:
        return None
    if len(values) > 1 or not isinstance(values[0], bytes):
        raise Refusal(RELEASED_KEY, f"{len(values)} values", "a question must be about one model")
    return values[0]


def client_noise_of(content: RecordDict) -> float | None:
    """Return the noise that each client adds separately, over the norm of a record's part; None if it adds none."""
    values = values_under(content, CLIENT_NOISE_KEY)
    if not values:
        return None
    noise = real(CLIENT_NOISE_KEY, values[0])
    if len(values) > 1 or noise <= 0:
        raise Refusal(CLIENT_NOISE_KEY, noise, "give one number above 0")
    return noise
