"""Wire format of models that are told as differences: what stands beside a sum's spec, and what a device says that it holds.

An instruction names its model by a hash. One to a device that holds an earlier model brings the difference instead of arrays;
whether that device holds the right one shows in the hash of what comes out. A device that knows these keys says in its reply
which model it holds from then on. An older one overlooks them, says nothing, and is always sent the whole.
"""

from __future__ import annotations

from dataclasses import dataclass

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from .flower_adapter import records_of
from .wire import SPEC_RECORD

MODEL, ARRAYS, DIFFERENCE, SIZE, AGAIN = "model", "arrays", "difference", "size", "again"
KEYS = (MODEL, ARRAYS, DIFFERENCE, SIZE, AGAIN)  # beside the keys of a sum
HELD_RECORD = "fedveil.held"
HASH_LENGTH = 64  # characters


@dataclass(frozen=True)
class ToldModel:
    """Model of an instruction, as its sender tells it.

    Attributes:
      model: its hash.
      arrays: name of its record in the instruction.
      size: its bytes.
      difference: as `model_difference.difference` returns it; empty where the whole model is there.
      again: whether it is sent to a device that did not hold the model of the difference that it was sent.
    """

    model: str
    arrays: str
    size: int
    difference: bytes = b""
    again: bool = False


def with_model(content: RecordDict, told: ToldModel) -> RecordDict:
    """Return an instruction that tells its model so: without its arrays, where a difference stands in their place.

    Args:
      content: with the arrays.
      told: of its model.
    """
    said = ConfigRecord(dict(records_of(content, ConfigRecord)[SPEC_RECORD].items()))
    said[MODEL], said[ARRAYS], said[SIZE] = told.model, told.arrays, told.size
    if told.again:
        said[AGAIN] = 1
    records = {**dict(content.items()), SPEC_RECORD: said}
    if told.difference:
        said[DIFFERENCE] = told.difference
        del records[told.arrays]
    return RecordDict(records)


def told_model(content: RecordDict) -> ToldModel | None:
    """Return how an instruction tells its model; None where it has no word of it.

    Raises:
      ValueError: what stands there is none.
    """
    record = records_of(content, ConfigRecord).get(SPEC_RECORD)
    if record is None or MODEL not in record:
        return None
    model, arrays = (text if isinstance(text := record.get(key), str) else "" for key in (MODEL, ARRAYS))
    size, difference = record.get(SIZE), record.get(DIFFERENCE, b"")
    if not isinstance(difference, bytes) or type(size) is not int or size < 0:
        raise ValueError("no difference of models")
    if len(model) != HASH_LENGTH or not arrays:
        raise ValueError("no hash of a model")
    brought = list(records_of(content, ArrayRecord))
    if brought != ([] if difference else [arrays]) or (difference and arrays in content):
        raise ValueError("other arrays than those of its model")
    return ToldModel(model, arrays, size, difference, AGAIN in record)


def with_arrays_again(content: RecordDict, told: ToldModel, arrays: ArrayRecord) -> RecordDict:
    """Return the instruction as it was before `with_model`.

    Args:
      content: that came.
      told: of its model.
      arrays: of that model.
    """
    said = records_of(content, ConfigRecord)[SPEC_RECORD]
    plain = ConfigRecord({name: value for name, value in said.items() if name not in KEYS})
    return RecordDict({told.arrays: arrays, **dict(content.items()), SPEC_RECORD: plain})


def asked_alike(content: RecordDict) -> RecordDict:
    """Return what is the same of an instruction however its model is told: it stands for the arrays by its hash."""
    record = records_of(content, ConfigRecord).get(SPEC_RECORD)
    if record is None or MODEL not in record:
        return content
    said = ConfigRecord({k: value for k, value in record.items() if k != DIFFERENCE})
    others = {k: each for k, each in content.items() if not isinstance(each, ArrayRecord)}
    return RecordDict({**others, SPEC_RECORD: said})


def with_held(content: RecordDict, model: str) -> RecordDict:
    """Return a reply's content that says which model its device holds now, by the hash."""
    return RecordDict({**dict(content.items()), HELD_RECORD: ConfigRecord({MODEL: model})})


def parted(content: RecordDict) -> tuple[RecordDict, str]:
    """Return a reply's content without what it says of the model that its device holds, and that; empty for nothing."""
    if HELD_RECORD not in content:
        return content, ""
    said = records_of(content, ConfigRecord).get(HELD_RECORD, ConfigRecord()).get(MODEL)
    others = RecordDict({name: each for name, each in content.items() if name != HELD_RECORD})
    return others, said if isinstance(said, str) else ""
