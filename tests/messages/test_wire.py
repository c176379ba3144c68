"""Bad replies: every one is dropped and counted, and none changes the sum."""

import gc
import json
import weakref
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from fedveil.messages.flower_adapter import claim_identity, name_message
from fedveil.messages.wire import (
    VECTOR,
    VECTOR_RECORD,
    MemoryArray,
    add_reply,
    instruct,
    layout_of,
    memory_arrays,
    only_arrays,
    read_round,
    read_spec,
    reply_with,
    sum_of,
    view,
)
from fedveil.privacy.mechanisms.packing import packed_size
from fedveil.privacy.mechanisms.private_sum import CohortSum, add, encode
from fedveil.privacy.mechanisms.sum_spec import Segment, SumSpec

SPEC = SumSpec(1.0, (Segment("loss", 5.0),), 0.02)
SIZE = 6

claim_identity(1)


def request(number: int = 1, node: int | None = None) -> Message:
    """Return the instruction of a number, to a node of its own unless another is named."""
    message = Message(RecordDict(), number + 1 if node is None else node, "train")
    name_message(message, str(number))
    return message


def reply(record: RecordDict, number: int = 1) -> Message:
    return Message(record, reply_to=request(number))


def vector_reply(values: np.ndarray, number: int = 1) -> Message:
    return reply(RecordDict({VECTOR_RECORD: ArrayRecord({VECTOR: Array(values)})}), number)


def forged(dtype: str, shape: tuple[int, ...], data: bytes) -> Message:
    return reply(
        RecordDict({VECTOR_RECORD: ArrayRecord({VECTOR: Array(dtype, shape, "numpy.ndarray", data)})})
    )


GOOD = np.arange(SIZE, dtype=np.int32)
HEADER = Array(GOOD).data

BAD: dict[str, tuple[Callable[[], Message], str]] = {
    "error": (lambda: Message(Error(1, "secret text"), reply_to=request()), "failed"),
    "refusal": (lambda: Message(Error(1001, "spent"), reply_to=request()), "budget spent"),
    "nothing": (lambda: reply(RecordDict()), "layout"),
    "metrics beside it": (
        lambda: reply(
            RecordDict({VECTOR_RECORD: ArrayRecord({VECTOR: Array(GOOD)}), "m": MetricRecord({"loss": 1.0})})
        ),
        "layout",
    ),
    "another name": (
        lambda: reply(RecordDict({VECTOR_RECORD: ArrayRecord({"weights": Array(GOOD)})})),
        "layout",
    ),
    "an extra layer": (
        lambda: reply(RecordDict({VECTOR_RECORD: ArrayRecord({VECTOR: Array(GOOD), "x": Array(GOOD)})})),
        "layout",
    ),
    "a thousand arrays": (
        lambda: reply(
            RecordDict({VECTOR_RECORD: ArrayRecord({str(k): Array(GOOD[:1]) for k in range(1000)})})
        ),
        "layout",
    ),
    "too short": (lambda: vector_reply(GOOD[:-1]), "shape"),
    "broadcastable": (lambda: vector_reply(GOOD[:1]), "shape"),
    "another rank": (lambda: vector_reply(GOOD.reshape(2, 3)), "shape"),
    "empty": (lambda: vector_reply(GOOD[:0]), "shape"),
    "floats": (lambda: vector_reply(GOOD.astype(np.float32)), "dtype"),
    "NaN": (lambda: vector_reply(np.full(SIZE, np.nan)), "dtype"),
    "complex": (lambda: vector_reply(GOOD.astype(np.complex64)), "dtype"),
    "objects": (lambda: forged("object", (SIZE,), HEADER), "dtype"),
    "bool": (lambda: vector_reply(GOOD.astype(bool)), "dtype"),
    "a giant header": (lambda: forged("int32", (SIZE,), HEADER.replace(b"(6,)", b"(9,)")), "unreadable"),
    "fewer bytes": (lambda: forged("int32", (SIZE,), HEADER[:20]), "size"),
    "more bytes": (lambda: forged("int32", (SIZE,), HEADER + bytes(10_000)), "size"),
    "a pickle": (lambda: forged("int32", (SIZE,), b"\x80\x04" + bytes(60)), "unreadable"),
    "no bytes": (lambda: forged("int32", (SIZE,), b""), "size"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_replies_are_dropped_and_counted(name: str) -> None:
    make, reason = BAD[name]
    cohort_sum = CohortSum(np.zeros(SIZE))
    add_reply(cohort_sum, vector_reply(GOOD), SPEC)
    add_reply(cohort_sum, make(), SPEC)
    assert cohort_sum.dropped == {reason: 1}
    assert cohort_sum.total.tolist() == GOOD.tolist()


@pytest.mark.parametrize("kind", [">i4", "<i8", "<i2"])
def test_other_byte_orders_and_widths_are_read(kind: str) -> None:
    cohort_sum = CohortSum(np.zeros(SIZE))
    add_reply(cohort_sum, vector_reply(GOOD.astype(kind)), SPEC)
    assert cohort_sum.total.tolist() == GOOD.tolist()


def test_an_all_zero_update_is_a_contribution() -> None:
    cohort_sum = CohortSum(np.zeros(SIZE))
    add_reply(cohort_sum, vector_reply(np.zeros(SIZE, np.int32)), SPEC)
    assert cohort_sum.replies == 1


def test_not_finite_is_dropped_where_floats_travel() -> None:
    spec = SumSpec(None, (Segment("num-examples", 1e9),))
    cohort_sum = CohortSum(np.zeros(2))
    for values in ([np.nan, 1], [np.inf, 1], [1.0, np.nan], [1.0, -3.0], [1.0, 0.0], [1.0, 1e18]):
        add_reply(cohort_sum, vector_reply(np.array(values)), spec)
    assert cohort_sum.dropped == {"not finite": 3, "num-examples": 3}
    assert not cohort_sum.total.any()


def test_a_node_that_answers_twice_counts_once_and_silence_is_a_drop() -> None:
    replies = [vector_reply(GOOD, 1), vector_reply(GOOD, 1), vector_reply(GOOD, 2)]
    cohort_sum = sum_of(replies, SPEC, SIZE, invited=4)
    assert (cohort_sum.replies, cohort_sum.dropped) == (2, {"no reply": 2})


def test_a_node_that_answers_two_instructions_counts_once_in_a_sum() -> None:
    vector = RecordDict({VECTOR_RECORD: ArrayRecord({VECTOR: Array(GOOD)})})
    replies = [Message(vector, reply_to=request(number, node=2)) for number in (1, 2)]
    assert len({each.metadata.reply_to_message_id for each in replies}) == 2
    cohort_sum = sum_of(replies, SPEC, SIZE, invited=2)
    assert cohort_sum.nodes == [2] and cohort_sum.total.tolist() == GOOD.tolist()


def test_the_spec_travels() -> None:
    content = RecordDict({"arrays": ArrayRecord(), "config": ConfigRecord({"lr": 0.1})})
    out = instruct(content, SPEC, "a run", 3)
    assert read_spec(out) == SPEC
    assert read_round(out) == ("a run", 3)
    assert read_spec(content) is None
    json.dumps(dict(out.config_records["fedveil.sum"]))


def test_layout_holds_the_averaged_arrays_only() -> None:
    arrays = memory_arrays(
        {"w": np.zeros((2, 2), np.float32), "steps": np.array(7), "b": np.zeros((), np.float64)}
    )
    assert layout_of(arrays) == {"w": (2, 2), "b": ()}


def test_a_memory_array_is_an_array_to_flower() -> None:
    values = np.arange(6.0).reshape(2, 3)
    array = MemoryArray(values)
    plain = Array(values)
    assert array.data == plain.data
    assert (array.dtype, array.shape) == (plain.dtype, plain.shape)
    assert array.object_id == plain.object_id
    copy = array.numpy()
    copy[:] = 0
    assert values[0, 1] == 1
    assert view(array) is values
    again = Array.inflate(array.deflate(), array.children)
    assert again.numpy().tolist() == values.tolist()


@pytest.mark.parametrize(("cells", "width"), [(256, 10), (1 << 16, 18), (1 << 29, 31), (1 << 30, 32)])
def test_a_coordinate_has_the_bits_that_its_grid_needs(cells: int, width: int) -> None:
    """However it travels, the sum is bit for bit that of the vectors as they were encoded."""
    spec = replace(SPEC, cells=cells)
    rng, whole = np.random.default_rng(1), CohortSum(np.zeros(SIZE))
    sums = [CohortSum(np.zeros(SIZE)) for _ in range(3)]
    for number, scale in enumerate((1e-3, 0.3, 100.0, 0.0)):
        vector, _ = encode({"w": scale * rng.normal(size=SIZE - 1)}, {"loss": 1.0}, spec)
        add(whole, vector, spec)
        sent = reply_with(vector, spec, request(number))
        array = sent.content.array_records[VECTOR_RECORD][VECTOR]
        assert view(array).nbytes == -(-SIZE * width // 8)
        serialised = ArrayRecord({VECTOR: Array(view(array))})
        read = Message(RecordDict({VECTOR_RECORD: serialised}), reply_to=request(number))
        for total, reply in zip(sums, (sent, read, vector_reply(vector, number)), strict=True):
            add_reply(total, reply, spec)
    for total in sums:
        assert np.array_equal(total.total, whole.total) and total.replies == 4 and not total.dropped


def test_packed_bytes_of_a_wrong_length_are_no_contribution() -> None:
    total = CohortSum(np.zeros(SIZE))
    size = packed_size(SIZE, 18)
    for number, values in enumerate((np.zeros(size - 1, np.uint8), np.zeros(size + 1, np.uint8))):
        add_reply(total, vector_reply(values, number), SPEC)
    add_reply(total, forged("uint8", (size,), Array(np.zeros(size, np.int8)).data), SPEC)
    assert total.dropped == {"shape": 3} and not total.replies
    add_reply(total, vector_reply(np.full(size, 255, np.uint8)), SPEC)
    assert total.clipped_again == 1
    assert np.linalg.norm(total.total) <= SPEC.cells


def test_read_bytes_are_freed_at_once() -> None:
    """A cycle would hold a model of 40 MB until the garbage collector has counted enough small objects."""
    gc.collect()
    gc.disable()
    try:
        instruction = Message(
            instruct(RecordDict({"arrays": memory_arrays({"w": GOOD})}), SPEC, "run", 1), 2, "train"
        )
        name_message(instruction, "1")
        assert read_spec(instruction.content) is not None and read_round(instruction.content) == ("run", 1)
        only_arrays(instruction.content)
        answer = reply_with(GOOD, SPEC, instruction)
        add_reply(CohortSum(np.zeros(SIZE)), answer, SPEC)
        contents = [weakref.ref(each.content) for each in (instruction, answer)]
        del instruction, answer
        assert [content() for content in contents] == [None, None]
    finally:
        gc.enable()
