"""Wire format of an unencrypted private sum: conversion between Flower records and vectors.

An instruction to a client contains the strategy's records and the sum's public parameters. A reply contains one array,
the client's vector, and no metric, count or error text.

A link may send a model as a difference: the instruction then names its model by a hash. A device with an earlier model
gets the difference instead of arrays; the hash of the result shows whether it held the right one. In its reply it names
the model that it holds. A device of an older release ignores these keys, and always gets the whole model.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache, lru_cache
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from ..base.bounded_decoding import Undecodable, build, plain_of, read_json
from ..base.refusal import Refusal
from ..privacy.mechanisms.compression import Sketch, sketch_of
from ..privacy.mechanisms.packing import Packed, pack, packed_size, width_of
from ..privacy.mechanisms.private_sum import CohortSum, Contribution, add, add_packed
from ..privacy.mechanisms.sum_spec import SumSpec
from .flower_adapter import config_of, records_of, values_under

logger = logging.getLogger("fedveil.server")

SPEC_RECORD = "fedveil.sum"
VECTOR_RECORD = "fedveil.vector"
VECTOR = "vector"
SECURE_RECORD, ROSTER_RECORD = "fedveil.secagg", "fedveil.roster"
LOG_RECORD, QUOTE_RECORD = "fedveil.log", "fedveil.quote"
VOUCHING = (LOG_RECORD, QUOTE_RECORD)  # the server's statements about itself, never in a question
OVER, RENEWAL = "run over", "renewal"
MAX_HEADER_BYTES = 4096  # of a .npy file; NEP 1 allows 64 KiB, ours has under 200
WEIGHT = "num-examples"  # Flower's key for the weight of a reply
QUESTION_KEY, EVALUATION_KEY = "fedveil-question", "fedveil-evaluation"  # in the configuration record
CANARY_RECORDS = "fedveil.canaries"  # additional array of a sum: a coordinate for each canary record

BUDGET_SPENT = 1001  # Flower error code of a reply: the client's ledger has no budget for the request
LATE = 1002  # the client exceeded its deadline
OWNERS_POLICY = 1003  # the client's owner does not allow the request
NOT_ELIGIBLE = 1004  # the device is on battery, hot, busy, on a metered network, or outside its hours
NOT_READY = 1005  # the device's clock is wrong, or its disk cannot be written
HANDLED_BEFORE = 1006  # the client lost the state of an exchange; it is not answered or charged again
UNREADABLE = 1007  # the reply is not a valid message
NO_EXAMPLES = 1008  # the client has no examples and does not take part
NO_BASE = 1009  # the device lacks the base model of a difference; it is sent the whole model
MIXES = 1010  # the client's task mixed the examples of a step
FORKED = 1011  # the device has read another log of this server, for example before a restoration
RESTORED = 1012  # the device's ledger is older than its last answer
WAITING = 1013  # the device's owner has not decided yet, or pauses: nothing was begun, and the same may be sent again
FAILED = 1  # Flower's code for an exception at the client; its text, which may contain data, stays there
DROP_REASONS = {
    BUDGET_SPENT: "budget spent",
    LATE: "late",
    OWNERS_POLICY: "owner's policy",
    NOT_ELIGIBLE: "not eligible",
    NOT_READY: "not ready",
    HANDLED_BEFORE: "handled before",
    UNREADABLE: "unreadable",
    NO_EXAMPLES: "no examples",
    NO_BASE: "holds another model",
    MIXES: "mixes examples",
    FORKED: "has seen another log",
    RESTORED: "restored",
    WAITING: "waits for its owner",
}
# Final reasons: the client repeats them for the same request.
LASTING = frozenset(DROP_REASONS[code] for code in (BUDGET_SPENT, OWNERS_POLICY, FORKED, RESTORED))
DECLINED = "declined: policy"  # the client's owner does not allow an encrypted sum
POLICY_REASONS = frozenset({DROP_REASONS[OWNERS_POLICY], DECLINED})
NO_REPLY = "no reply"
NOT_NEEDED = "not needed"  # enough others had answered


class Exchange(IntEnum):
    """Exchange of messages in an attempt at an encrypted sum, with the name of the server's message."""

    PROPOSAL = 0
    COHORT = 1
    PARCELS = 2
    DISPUTED = 3
    INBOX = 4
    SURVIVORS = 5
    CONFIRMED = 6


MODEL_KEY, ARRAYS_KEY, DIFFERENCE_KEY, SIZE_KEY, AGAIN_KEY = "model", "arrays", "difference", "size", "again"
STALENESS_KEY = "staleness"  # beside a sum's spec, if an answer may count in a later round
MODEL_KEYS = (MODEL_KEY, ARRAYS_KEY, DIFFERENCE_KEY, SIZE_KEY, AGAIN_KEY)  # in addition to the keys of a sum
MODEL_REPORT = "fedveil.held"  # record of a reply: the model that the device holds
MODEL_HASH_LENGTH = 64  # characters

Layout = dict[str, tuple[int, ...]]


class MemoryArray(Array):
    """Flower `Array` that is serialised only when its bytes are read, so never for clients in the server's process.

    Args:
      ndarray: values of the array.
      lent: whether a reader may overwrite the values.
    """

    def __init__(self, ndarray: NDArray[np.generic], lent: bool = False) -> None:
        # Not by attributes: Flower tracks changed fields, which takes longer than everything else here.
        fields = {"dtype": _name(ndarray.dtype), "shape": ndarray.shape, "stype": "numpy.ndarray"}
        self.__dict__.update(**fields, ndarray=ndarray, lent=lent)

    @property
    def data(self) -> bytes:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Array in .npy format, serialised on access."""
        return Array.from_numpy_ndarray(self.__dict__["ndarray"]).data

    def numpy(self) -> NDArray[np.generic]:
        """Return a copy of the values: clients in one process must not share them."""
        return self.__dict__["ndarray"].copy()

    def __reduce__(self) -> tuple[Callable[[NDArray[np.generic]], MemoryArray], tuple[NDArray[np.generic]]]:
        """Pickle as the ndarray between the processes of one engine."""
        return _memory_array, (self.__dict__["ndarray"],)


@cache  # numpy composes the name at each call
def _name(dtype: np.dtype[Any]) -> str:
    return str(dtype)


def _memory_array(ndarray: NDArray[np.generic]) -> MemoryArray:  # pickle cannot find a renamed class
    return MemoryArray(ndarray)


# Flower writes the class name into the serialised object and refuses any other on reading.
MemoryArray.__qualname__ = "Array"


def memory_arrays(arrays: Mapping[str, NDArray[Any]], lent: bool = False) -> ArrayRecord:
    """Return a record of arrays, by name, without copies; `lent` allows its reader to overwrite them."""
    record = ArrayRecord()
    for name, value in arrays.items():
        record[name] = MemoryArray(value, lent)
    return record


def view(array: Array) -> NDArray[Any]:
    """Return the array's values, for reading unless it `is_lent`: those of a `MemoryArray` are not copied."""
    return array.__dict__["ndarray"] if isinstance(array, MemoryArray) else array.numpy()


def views(arrays: Mapping[str, Array]) -> dict[str, NDArray[Any]]:
    """Return the values of arrays by name, as `view` does."""
    return {name: view(array) for name, array in arrays.items()}


def is_lent(array: Array) -> bool:
    """Return whether the values that `view` returns may be overwritten, since their sender needs them no more."""
    return isinstance(array, MemoryArray) and bool(array.__dict__["lent"])


def layout_of(arrays: Mapping[str, Array]) -> Layout:
    """Return the shapes, by name, of the arrays that are averaged: all floating-point ones, in the record's order."""
    return {k: tuple(a.shape) for k, a in arrays.items() if np.dtype(a.dtype).kind == "f"}


def instruct(
    content: RecordDict, spec: SumSpec, run: str, server_round: int, staleness: int = 0
) -> RecordDict:
    """Return an instruction: the strategy's records, the sum's spec, the run's name and the round's number.

    Args:
      content: records of the strategy.
      spec: of the sum.
      run: name of the run.
      server_round: number of the round.
      staleness: number of later rounds in which the answer may count.
    """
    record = ConfigRecord({"spec": json.dumps(plain_of(spec)), "run": run, "round": server_round})
    if staleness:
        record[STALENESS_KEY] = staleness
    return RecordDict({**dict(content.items()), SPEC_RECORD: record})


def with_canary_records(content: RecordDict, count: int) -> RecordDict:
    """Return an instruction with an array of one coordinate for each canary record; unchanged if `count` is 0."""
    if not count:
        return content
    arrays = ArrayRecord(dict(only_arrays(content).items()))
    arrays[CANARY_RECORDS] = MemoryArray(np.zeros(count, np.float32))
    return with_arrays(content, arrays)


def with_arrays(content: RecordDict, arrays: ArrayRecord) -> RecordDict:
    """Return an instruction with other arrays in its one array record."""
    (name,) = records_of(content, ArrayRecord)
    return RecordDict({**dict(content.items()), name: arrays})


def read_round(content: RecordDict) -> tuple[str, int]:
    """Return the run and the round of an instruction, as in the key of a release."""
    record = config_of(content, SPEC_RECORD)
    return str(record["run"]), int(str(record["round"]))


def may_be_late(content: RecordDict) -> bool:
    """Return whether the answer to an instruction may count in the round after its own."""
    return bool(config_of(content, SPEC_RECORD).get(STALENESS_KEY))


def sketch_for(content: RecordDict, spec: SumSpec) -> Sketch | None:
    """Return the public matrix that compresses updates in an instruction's round; None without compression."""
    return None if spec.compression is None else sketch_of(spec.compression, read_round(content)[1])


def read_attempt(content: RecordDict) -> int:
    """Return the attempt number of an instruction; 0 for a sum in the clear, which has only one."""
    return int(str(config_of(content, SPEC_RECORD).get("attempt", 0)))


def is_query(content: RecordDict) -> bool:
    """Return whether an instruction is a question or an evaluation, rather than training."""
    return any(values_under(content, key) for key in (QUESTION_KEY, EVALUATION_KEY))


def read_spec(content: RecordDict) -> SumSpec | None:
    """Return the spec of an instruction's private sum; None if it has none."""
    record = config_of(content, SPEC_RECORD)
    return build(SumSpec, read_json(str(record["spec"]))) if record else None


def sum_spec_of(content: RecordDict) -> SumSpec:
    """Return the spec of an instruction's sum, unencrypted or masked; raise KeyError without one, Undecodable if malformed."""
    return _sum_spec(str(config_of(content, SPEC_RECORD)["spec"]))


@lru_cache(maxsize=16)  # all messages of a round have the same spec
def _sum_spec(text: str) -> SumSpec:
    fields = read_json(text)
    if not isinstance(fields, dict):
        raise Undecodable("the instruction has no spec of a sum")
    return build(SumSpec, fields.get("sum", fields))


def only_arrays(content: RecordDict) -> ArrayRecord:
    """Return the one array record of an instruction or a reply.

    Raises:
      ValueError: there is none, or more than one.
    """
    records = list(records_of(content, ArrayRecord).values())
    if len(records) != 1:
        raise ValueError(f"expected one ArrayRecord, found {len(records)}")
    return records[0]


def reply_with(vector: Contribution, spec: SumSpec, message: Message) -> Message:
    """Return the reply with a client's vector; integers on the lattice are packed to the bits that they need.

    Args:
      vector: of the client, shape (size,).
      spec: of the sum.
      message: instruction of the server.
    """
    width = width_of(spec)
    payload = vector if width is None else pack(cast(NDArray[np.int32], vector), width)
    return Message(RecordDict({VECTOR_RECORD: memory_arrays({VECTOR: payload})}), reply_to=message)


def add_reply(cohort_sum: CohortSum, reply: Message, spec: SumSpec) -> None:
    """Add one reply to the sum; an error or an invalid reply counts as dropped, with its reason.

    Args:
      cohort_sum: sum of the cohort, changed in place.
      reply: of one client.
      spec: of the sum.
    """
    if reply.has_error():
        return cohort_sum.drop(DROP_REASONS.get(reply.error.code, "failed"))
    try:
        vector = _vector(reply.content, cohort_sum.total.size, spec)
    except Exception as error:  # noqa: BLE001 (Flower's records and numpy's headers document no closed set)
        logger.warning("a reply cannot be read: %s", type(error).__name__)
        vector = DROP_REASONS[UNREADABLE]
    if isinstance(vector, str):
        return cohort_sum.drop(vector)
    if isinstance(vector, Packed):
        return add_packed(cohort_sum, vector, spec)
    add(cohort_sum, vector, spec)


def _vector(content: RecordDict, size: int, spec: SumSpec) -> Contribution | Packed | str:
    """Return the vector of `size` coordinates in a reply, or the reason to drop the reply.

    The stated type, shape and number of bytes are checked before the array's bytes are parsed, and again afterwards: the
    .npy header in the bytes has a type and a shape of its own.
    """
    record = records_of(content, ArrayRecord).get(VECTOR_RECORD, ArrayRecord())
    if len(content) != 1 or list(record.keys()) != [VECTOR]:
        return "layout"
    array = record[VECTOR]
    dtype = np.dtype(array.dtype)
    # Bytes are packed integers of `width` bits; a device with an earlier release sends integers that are not packed.
    width = width_of(spec) if dtype == np.uint8 else None
    count = size if width is None else packed_size(size, width)
    if tuple(array.shape) != (count,):
        return "shape"
    if width is None and dtype.kind not in ("if" if spec.clipping_norm is None else "i"):
        return "dtype"
    if not isinstance(array, MemoryArray):
        header_bytes = len(array.data) - count * dtype.itemsize
        if not 0 < header_bytes <= MAX_HEADER_BYTES:
            return "size"
    values = view(array)
    if values.shape != (count,) or values.dtype.kind not in ("if" if width is None else "u"):
        return "shape"
    if width is not None:
        return Packed(values.astype(np.uint8, copy=False), size, width)
    return cast(Contribution, values.astype("i4" if values.dtype == np.int32 else "f8", copy=False))


def common_content(messages: list[Message]) -> RecordDict:
    """Return the content that all clients receive.

    Raises:
      Refusal: the strategy sends different content to different clients, whose replies have no common sum.
    """
    content = messages[0].content
    for message in messages[1:]:
        if message.content is not content and message.content != content:
            remedy = "use a strategy that sends the same content to all"
            raise Refusal("strategy", "different messages to different clients", remedy)
    return content


def mean_reply(
    arrays: ArrayRecord, mean: dict[str, NDArray[Any]], scalars: dict[str, float], request: Message
) -> Message:
    """Return one reply for the whole cohort, of weight 1, to a strategy's message: the moved arrays, and the mean metrics.

    Args:
      arrays: global arrays.
      mean: mean update of each averaged array, by name.
      scalars: mean metrics by name.
      request: message of the strategy.
    """
    metrics = MetricRecord({**scalars, WEIGHT: 1})
    return Message(RecordDict({"arrays": _moved(arrays, mean), "metrics": metrics}), reply_to=request)


def _moved(arrays: ArrayRecord, mean: dict[str, NDArray[Any]]) -> ArrayRecord:
    """Return the global arrays plus the mean update; arrays that are not averaged stay unchanged."""
    moved = views(arrays)
    for name in mean.keys() & moved.keys():
        value = moved[name]
        moved[name] = np.add(value, mean[name], out=np.empty_like(value), casting="unsafe")
    return memory_arrays(moved)


@runtime_checkable
class SummingGrid(Protocol):
    """Grid that adds its clients' replies where they are produced, so that memory does not grow with their number."""

    def sum_replies(self, order: Message, nodes: Sequence[int], spec: SumSpec, size: int) -> CohortSum:
        """Deliver an instruction to every node and return the sum of the replies, shape (size,)."""
        ...


def sum_of(
    replies: Iterable[Message], spec: SumSpec, size: int, invited: int, enough: int | None = None
) -> CohortSum:
    """Return the sum of replies, one of each node; repeated ones are ignored, and nodes without any are counted as dropped.

    Args:
      replies: replies in order of arrival.
      spec: spec of the sum.
      size: number of coordinates of the sum.
      invited: number of nodes that received the instruction.
      enough: number of valid replies after which waiting ends; None waits for all.
    """
    cohort_sum = CohortSum(np.zeros(size))
    missing = NO_REPLY
    answered, nodes = set[str](), set[int]()
    for reply in replies:
        key = reply.metadata.reply_to_message_id or str(reply.metadata.src_node_id)
        if key in answered or reply.metadata.src_node_id in nodes:
            continue
        answered.add(key)
        before = cohort_sum.replies
        add_reply(cohort_sum, reply, spec)
        if cohort_sum.replies > before:
            nodes.add(reply.metadata.src_node_id)
            cohort_sum.nodes.append(reply.metadata.src_node_id)
        del reply  # otherwise it stays in memory until the next one arrives
        if cohort_sum.replies == enough:
            missing = NOT_NEEDED
            break
    cohort_sum.drop(missing, invited - len(answered))
    return cohort_sum


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
    """Return an instruction with a statement of its model; a difference replaces the arrays.

    Args:
      content: instruction with the arrays.
      statement: of its model.
    """
    spec = ConfigRecord(dict(config_of(content, SPEC_RECORD).items()))
    spec[MODEL_KEY], spec[ARRAYS_KEY], spec[SIZE_KEY] = statement.model, statement.arrays, statement.size
    if statement.again:
        spec[AGAIN_KEY] = 1
    records = {**dict(content.items()), SPEC_RECORD: spec}
    if statement.difference:
        spec[DIFFERENCE_KEY] = statement.difference
        del records[statement.arrays]
    return RecordDict(records)


def read_statement(content: RecordDict) -> ModelStatement | None:
    """Return the encoding of an instruction's model; None if it does not state one.

    Raises:
      ValueError: the encoding is invalid.
    """
    record = config_of(content, SPEC_RECORD)
    if MODEL_KEY not in record:
        return None
    model, arrays = (
        text if isinstance(text := record.get(key), str) else "" for key in (MODEL_KEY, ARRAYS_KEY)
    )
    size, difference = record.get(SIZE_KEY), record.get(DIFFERENCE_KEY, b"")
    if not isinstance(difference, bytes) or type(size) is not int or size < 0:
        raise ValueError("the difference is not bytes")
    if len(model) != MODEL_HASH_LENGTH or not arrays:
        raise ValueError("the model's hash is invalid")
    expected = [] if difference else [arrays]  # a difference takes the place of the arrays
    if list(records_of(content, ArrayRecord)) != expected or (difference and arrays in content):
        raise ValueError("arrays of another model")
    return ModelStatement(model, arrays, size, difference, AGAIN_KEY in record)


def with_arrays_again(content: RecordDict, statement: ModelStatement, arrays: ArrayRecord) -> RecordDict:
    """Return the instruction as it was before `with_model`, once the device has the whole model.

    Args:
      content: instruction that came.
      statement: of its model.
      arrays: of the model.
    """
    spec = config_of(content, SPEC_RECORD)
    plain = ConfigRecord({name: value for name, value in spec.items() if name not in MODEL_KEYS})
    return RecordDict({statement.arrays: arrays, **dict(content.items()), SPEC_RECORD: plain})


def without_encoding(content: RecordDict) -> RecordDict:
    """Return an instruction's content with its model's hash in place of arrays or difference, so the same for either."""
    record = config_of(content, SPEC_RECORD)
    if MODEL_KEY not in record:
        return content
    spec = ConfigRecord({k: value for k, value in record.items() if k != DIFFERENCE_KEY})
    others = {k: each for k, each in content.items() if not isinstance(each, ArrayRecord)}
    return RecordDict({**others, SPEC_RECORD: spec})


def with_report(content: RecordDict, model: str) -> RecordDict:
    """Return a reply's content with the hash of the model that its device now holds."""
    return RecordDict({**dict(content.items()), MODEL_REPORT: ConfigRecord({MODEL_KEY: model})})


def split_report(content: RecordDict) -> tuple[RecordDict, str]:
    """Return a reply's content without the hash of its device's held model, and the hash; empty if it has none."""
    if MODEL_REPORT not in content:
        return content, ""
    model = config_of(content, MODEL_REPORT).get(MODEL_KEY)
    others = RecordDict({name: each for name, each in content.items() if name != MODEL_REPORT})
    return others, model if isinstance(model, str) else ""
