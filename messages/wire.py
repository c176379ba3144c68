"""Wire format of a private sum in the clear: Flower records on one side, vectors on the other.

An instruction consists of the strategy's records and the sum's public parameters. A reply is one array, the client's
vector, without metric, count or error text.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import IntEnum
from functools import cache
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
MAX_HEADER_BYTES = 4096  # a .npy header; NEP 1 asks for at most 64 KiB, ours has under 200
WEIGHT = "num-examples"  # Flower's key for the weight of a reply
QUESTION_KEY, EVALUATION_KEY = "fedveil-question", "fedveil-evaluation"  # in the configuration record
CANARY_RECORDS = "fedveil.canaries"  # additional array of a sum: a coordinate for each canary record

BUDGET_SPENT = 1001  # Flower error code of a client whose own ledger refuses
LATE = 1002  # of a client that took longer than its deadline
OWNERS_POLICY = 1003  # of a client whose owner does not allow the request
NOT_ELIGIBLE = 1004  # of a device that is on battery, hot, busy, on a metered network, or outside its hours
NOT_READY = 1005  # of a device whose clock is wrong, or that cannot write
HANDLED_BEFORE = 1006  # of a client that lost the state of an exchange: not answered or charged again
UNREADABLE = 1007  # of a reply that is not a message
NO_EXAMPLES = 1008  # of a client without examples, which sits out
NO_BASE = 1009  # of a device without the base model of a difference; it is sent the whole model
MIXES = 1010  # of a client whose task mixed the examples of a step
FORKED = 1011  # of a device that has seen another log of this server, for example before that was restored
RESTORED = 1012  # of a device whose ledger is older than its last answer
FAILED = 1  # Flower's error code of a client that raised; its text stays there, since it may hold data
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
}
# Reasons that a client repeats for the same request.
LASTING = frozenset(DROP_REASONS[code] for code in (BUDGET_SPENT, OWNERS_POLICY, FORKED, RESTORED))
DECLINED = "declined: policy"  # of a client that leaves an encrypted sum for its owner's policy
POLICY_REASONS = frozenset({DROP_REASONS[OWNERS_POLICY], DECLINED})
NO_REPLY = "no reply"
NOT_NEEDED = "not needed"  # enough others had answered


class Exchange(IntEnum):
    """Exchange of an attempt, named by the server's message."""

    PROPOSAL = 0
    COHORT = 1
    PARCELS = 2
    DISPUTED = 3
    INBOX = 4
    SURVIVORS = 5
    CONFIRMED = 6


Layout = dict[str, tuple[int, ...]]


class MemoryArray(Array):
    """`Array` that stays an ndarray until its bytes are read, so that one process need not serialise.

    Args:
      ndarray: the values.
      given: whether the reader may overwrite them.
    """

    def __init__(self, ndarray: NDArray[np.generic], lent: bool = False) -> None:
        # Not by attributes: Flower's bookkeeping of changed fields takes longer than all the rest.
        self.__dict__.update(
            dtype=_name(ndarray.dtype), shape=ndarray.shape, stype="numpy.ndarray", ndarray=ndarray, lent=lent
        )

    @property
    def data(self) -> bytes:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The array as .npy bytes, made on demand."""
        return Array.from_numpy_ndarray(self.__dict__["ndarray"]).data

    def numpy(self) -> NDArray[np.generic]:
        """Return a copy, because clients of one process must not see each other's changes."""
        return self.__dict__["ndarray"].copy()

    def __reduce__(self) -> tuple[Callable[[NDArray[np.generic]], MemoryArray], tuple[NDArray[np.generic]]]:
        """Pickle as the ndarray between the processes of one engine."""
        return _memory_array, (self.__dict__["ndarray"],)


@cache
def _name(dtype: np.dtype[Any]) -> str:
    return str(dtype)


def _memory_array(ndarray: NDArray[np.generic]) -> MemoryArray:  # pickle finds no class by another one's name
    return MemoryArray(ndarray)


# Flower writes the class name into the serialised object and refuses any other on reading.
MemoryArray.__qualname__ = "Array"


def memory_arrays(arrays: Mapping[str, NDArray[Any]], lent: bool = False) -> ArrayRecord:
    """Return a record of arrays that are serialised only when they leave the process.

    Args:
      arrays: by name.
      lent: whether the reader may overwrite them.
    """
    record = ArrayRecord()
    for name, value in arrays.items():
        record[name] = MemoryArray(value, lent)
    return record


def view(array: Array) -> NDArray[Any]:
    """Return the array's values for reading only, without a copy if it was never serialised."""
    return array.__dict__["ndarray"] if isinstance(array, MemoryArray) else array.numpy()


def views(arrays: Mapping[str, Array]) -> dict[str, NDArray[Any]]:
    """Return the values of arrays by name, each as `view` does."""
    return {name: view(array) for name, array in arrays.items()}


def is_lent(array: Array) -> bool:
    """Return whether what `view` returns of an array may be overwritten."""
    return isinstance(array, MemoryArray) and bool(array.__dict__["lent"])


def layout_of(arrays: Mapping[str, Array]) -> Layout:
    """Return the shapes of the arrays that are averaged, by name: the floating-point ones, in the record's order."""
    return {k: tuple(a.shape) for k, a in arrays.items() if np.dtype(a.dtype).kind == "f"}


# --- out: instruction to the clients ---------------------------------------------------------------------------


def instruct(content: RecordDict, spec: SumSpec, run: str, server_round: int) -> RecordDict:
    """Return the strategy's records with the sum's public parameters."""
    out = RecordDict(dict(content.items()))
    out[SPEC_RECORD] = ConfigRecord({"spec": json.dumps(plain_of(spec)), "run": run, "round": server_round})
    return out


def with_canary_records(content: RecordDict, count: int) -> RecordDict:
    """Return an instruction whose sum has a coordinate for each canary record; unchanged without canaries."""
    if not count:
        return content
    arrays = ArrayRecord(dict(only_arrays(content).items()))
    arrays[CANARY_RECORDS] = MemoryArray(np.zeros(count, np.float32))
    return with_arrays(content, arrays)


def with_arrays(content: RecordDict, arrays: ArrayRecord) -> RecordDict:
    """Return an instruction with its arrays replaced."""
    (name,) = records_of(content, ArrayRecord)
    return RecordDict({**dict(content.items()), name: arrays})


def read_round(content: RecordDict) -> tuple[str, int]:
    """Return the run and the round of an instruction, in the ledgers' naming."""
    record = config_of(content, SPEC_RECORD)
    return str(record["run"]), int(str(record["round"]))


def sketch_for(content: RecordDict, spec: SumSpec) -> Sketch | None:
    """Return the matrix that compresses the updates of an instruction's round; None without compression."""
    return None if spec.compression is None else sketch_of(spec.compression, read_round(content)[1])


def read_attempt(content: RecordDict) -> int:
    """Return the attempt number of an instruction; 0 for a sum in the clear, which has only one."""
    return int(str(config_of(content, SPEC_RECORD).get("attempt", 0)))


def is_query(content: RecordDict) -> bool:
    """Return whether an instruction asks for something else than training."""
    return any(values_under(content, key) for key in (QUESTION_KEY, EVALUATION_KEY))


def read_spec(content: RecordDict) -> SumSpec | None:
    """Return the parameters of the private sum that an instruction belongs to, or None."""
    record = config_of(content, SPEC_RECORD)
    return build(SumSpec, read_json(str(record["spec"]))) if record else None


def sum_spec_of(content: RecordDict) -> SumSpec:
    """Return the parameters of an instruction's sum, in the clear or masked."""
    fields = read_json(str(config_of(content, SPEC_RECORD)["spec"]))
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


# --- back: reply of a client -----------------------------------------------------------------------------------


def reply_with(vector: Contribution, spec: SumSpec, message: Message) -> Message:
    """Return the reply with the client's vector; a lattice vector is packed into the bits that the lattice needs.

    Args:
      vector: shape (size,).
      spec: of the sum.
      message: the instruction that it answers.
    """
    width = width_of(spec)
    payload = vector if width is None else pack(cast(NDArray[np.int32], vector), width)
    return Message(RecordDict({VECTOR_RECORD: memory_arrays({VECTOR: payload})}), reply_to=message)


def add_reply(cohort_sum: CohortSum, reply: Message, spec: SumSpec) -> None:
    """Add one reply to the sum; a reply that cannot be used is dropped and counted.

    Args:
      cohort_sum: changed in place.
      reply: of a client.
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
    """Return the reply's vector, or the reason for its absence; sizes are checked before any byte is parsed."""
    record = records_of(content, ArrayRecord).get(VECTOR_RECORD, ArrayRecord())
    if len(content) != 1 or list(record.keys()) != [VECTOR]:
        return "layout"
    array = record[VECTOR]
    # An older device sends whole words.
    width = width_of(spec) if np.dtype(array.dtype) == np.uint8 else None
    count = size if width is None else packed_size(size, width)
    if tuple(array.shape) != (count,):
        return "shape"
    if width is None and np.dtype(array.dtype).kind not in ("if" if spec.clipping_norm is None else "i"):
        return "dtype"
    if not isinstance(array, MemoryArray):
        excess = len(array.data) - count * np.dtype(array.dtype).itemsize
        if not 0 < excess <= MAX_HEADER_BYTES:
            return "size"
    values = view(array)
    if values.shape != (count,) or values.dtype.kind not in ("if" if width is None else "u"):
        return "shape"
    if width is not None:
        return Packed(values.astype(np.uint8, copy=False), size, width)
    return cast(Contribution, values.astype("i4" if values.dtype == np.int32 else "f8", copy=False))


# --- in and out of the strategy ---------------------------------------------------------------------------------


def common_content(messages: list[Message]) -> RecordDict:
    """Return the content that all clients receive.

    Raises:
      Refusal: the strategy sends different content to different clients, which no sum can serve.
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
    """Return the single reply for the cohort: the global arrays plus the mean update, with metrics.

    Args:
      arrays: the global arrays.
      mean: mean update by name, with the shapes of the layout.
      scalars: mean metrics by name.
      request: the strategy's message.
    """
    metrics = MetricRecord({**scalars, WEIGHT: 1})
    return Message(RecordDict({"arrays": _moved(arrays, mean), "metrics": metrics}), reply_to=request)


def _moved(arrays: ArrayRecord, mean: dict[str, NDArray[Any]]) -> ArrayRecord:
    """Return the global arrays plus the mean update; arrays that are not averaged stay unchanged."""
    moved: dict[str, NDArray[Any]] = {}
    for name, array in arrays.items():
        value: NDArray[Any] = view(array)
        moved[name] = value
        if name in mean:
            moved[name] = np.add(value, mean[name], out=np.empty_like(value), casting="unsafe")
    return memory_arrays(moved)


# --- the seam between a grid and the sum ------------------------------------------------------------------------


@runtime_checkable
class SummingGrid(Protocol):
    """Grid that adds its clients' replies where they are produced, so that memory does not grow with their number."""

    def sum_replies(self, order: Message, nodes: Sequence[int], spec: SumSpec, size: int) -> CohortSum:
        """Deliver an instruction to every node and return the sum of the replies."""
        ...


def sum_of(
    replies: Iterable[Message], spec: SumSpec, size: int, invited: int, enough: int | None = None
) -> CohortSum:
    """Return the sum of replies; a repeated answer is ignored, and a node without an answer is dropped.

    Args:
      replies: in order of arrival.
      spec: of the sum.
      size: number of its coordinates.
      invited: number of nodes that were asked.
      enough: number of replies after which waiting ends; None waits for all.
    """
    cohort_sum = CohortSum(np.zeros(size))
    missing = NO_REPLY
    answered: set[str] = set()
    for reply in replies:
        key = reply.metadata.reply_to_message_id or str(reply.metadata.src_node_id)
        if key in answered:
            continue
        answered.add(key)
        add_reply(cohort_sum, reply, spec)
        del reply  # otherwise it is held until the next one arrives
        if cohort_sum.replies == enough:
            missing = NOT_NEEDED
            break
    cohort_sum.drop(missing, invited - len(answered))
    return cohort_sum
