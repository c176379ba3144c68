"""Wire format of models sent as differences: the keys next to a sum's spec, and a device's held model.

An instruction names its model by a hash. A device with an earlier model gets the difference instead of arrays; the hash
of the result shows whether it held the right one. A device that supports these keys names its new held model in its
reply. An older one ignores them and always gets the whole model.
"""

from __future__ import annotations

from dataclasses import dataclass

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from .flower_adapter import config_of, records_of
from .wire import SPEC_RECORD

MODEL, ARRAYS, DIFFERENCE, SIZE, AGAIN = "model", "arrays", "difference", "size", "again"
KEYS = (MODEL, ARRAYS, DIFFERENCE, SIZE, AGAIN)  # in addition to the keys of a sum
MODEL_REPORT = "fedveil.held"
HASH_LENGTH = 64  # characters


@dataclass(frozen=True)
class ModelStatement:
    """Encoding of an instruction's model.

    Attributes:
      model: its hash.
      arrays: name of its record in the instruction.
      size: its bytes.
      difference: as `model_difference.difference` returns it; empty if the whole model is sent.
      again: whether it repeats a difference that the device could not apply.
    """

    model: str
    arrays: str
    size: int
    difference: bytes = b""
    again: bool = False


def with_model(content: RecordDict, statement: ModelStatement) -> RecordDict:
    """Return an instruction, which has the model's arrays, with a statement of them: a difference replaces the arrays."""
    spec = ConfigRecord(dict(config_of(content, SPEC_RECORD).items()))
    spec[MODEL], spec[ARRAYS], spec[SIZE] = statement.model, statement.arrays, statement.size
    if statement.again:
        spec[AGAIN] = 1
    records = {**dict(content.items()), SPEC_RECORD: spec}
    if statement.difference:
        spec[DIFFERENCE] = statement.difference
        del records[statement.arrays]
    return RecordDict(records)


def read_statement(content: RecordDict) -> ModelStatement | None:
    """Return the encoding of an instruction's model; None if it does not state one.

    Raises:
      ValueError: the encoding is invalid.
    """
    record = config_of(content, SPEC_RECORD)
    if MODEL not in record:
        return None
    model, arrays = (text if isinstance(text := record.get(key), str) else "" for key in (MODEL, ARRAYS))
    size, difference = record.get(SIZE), record.get(DIFFERENCE, b"")
    if not isinstance(difference, bytes) or type(size) is not int or size < 0:
        raise ValueError("the difference is not bytes")
    if len(model) != HASH_LENGTH or not arrays:
        raise ValueError("the model's hash is invalid")
    expected = [] if difference else [arrays]  # a difference takes the place of the arrays
    if list(records_of(content, ArrayRecord)) != expected or (difference and arrays in content):
        raise ValueError("arrays of another model")
    return ModelStatement(model, arrays, size, difference, AGAIN in record)


def with_arrays_again(content: RecordDict, statement: ModelStatement, arrays: ArrayRecord) -> RecordDict:
    """Return the instruction as it was before `with_model`, from what came, its statement, and the model's arrays."""
    spec = config_of(content, SPEC_RECORD)
    plain = ConfigRecord({name: value for name, value in spec.items() if name not in KEYS})
    return RecordDict({statement.arrays: arrays, **dict(content.items()), SPEC_RECORD: plain})


def without_encoding(content: RecordDict) -> RecordDict:
    """Return an instruction's content independent of the model's encoding, with the hash in place of the arrays."""
    record = config_of(content, SPEC_RECORD)
    if MODEL not in record:
        return content
    spec = ConfigRecord({k: value for k, value in record.items() if k != DIFFERENCE})
    others = {k: each for k, each in content.items() if not isinstance(each, ArrayRecord)}
    return RecordDict({**others, SPEC_RECORD: spec})


def with_report(content: RecordDict, model: str) -> RecordDict:
    """Return a reply's content with the hash of the model that its device now holds."""
    return RecordDict({**dict(content.items()), MODEL_REPORT: ConfigRecord({MODEL: model})})


def split_report(content: RecordDict) -> tuple[RecordDict, str]:
    """Return a reply's content without the hash of its device's held model, and the hash; empty if it has none."""
    if MODEL_REPORT not in content:
        return content, ""
    model = config_of(content, MODEL_REPORT).get(MODEL)
    others = RecordDict({name: each for name, each in content.items() if name != MODEL_REPORT})
    return others, model if isinstance(model, str) else ""
