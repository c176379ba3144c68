"""Messages as bytes: what goes in comes out, and whatever comes in is a message or one named error."""

import struct
import tracemalloc
from typing import Any

import msgpack
import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from fedveil.messages.flower_adapter import claim_identity, name_message
from fedveil.messages.message_codec import DTYPES, MAX_HEADER_BYTES, MalformedMessage, pack, unpack
from fedveil.messages.wire import memory_arrays, view

claim_identity(1)

MEBI = 1 << 20
NAMES = st.text(st.characters(codec="utf-8"), max_size=8)
WHOLE, REAL = st.integers(-(1 << 63), (1 << 63) - 1), st.floats(allow_nan=False)
METRICS = st.one_of(WHOLE, REAL, st.lists(WHOLE, max_size=4), st.lists(REAL, max_size=4))
CONFIGS = st.one_of(
    METRICS,
    st.booleans(),
    NAMES,
    st.binary(max_size=20),
    st.lists(NAMES, max_size=4),
    st.lists(st.binary(max_size=20), max_size=4),
    st.lists(st.booleans(), max_size=4),
)
ARRAYS = st.sampled_from(sorted(DTYPES)).flatmap(
    lambda dtype: arrays_of.arrays(dtype, arrays_of.array_shapes(min_dims=0, max_side=4, min_side=0))
)
RECORDS = st.one_of(
    st.dictionaries(NAMES, ARRAYS, max_size=4).map(memory_arrays),
    st.dictionaries(NAMES, METRICS, max_size=4).map(MetricRecord),
    st.dictionaries(NAMES, CONFIGS, max_size=4).map(ConfigRecord),
)
CONTENTS = st.dictionaries(NAMES, RECORDS, max_size=4).map(RecordDict)


def message(content: RecordDict, name: str = "run/1/0/0/5") -> Message:
    made = Message(content, 5, "train", group_id="3")
    name_message(made, name)
    return made


def plain(content: RecordDict) -> list[Any]:
    """Return a content as what compares: arrays by dtype, shape and bytes."""
    return [
        (name, type(record).__name__, [(key, _plain(value)) for key, value in record.items()])
        for name, record in content.items()
    ]


def _plain(value: Any) -> Any:
    if not hasattr(value, "stype"):
        return (type(value).__name__, value)
    array = view(value)
    return (array.dtype.str, array.shape, array.tobytes())


@settings(max_examples=150)
@given(CONTENTS)
def test_messages_survive_the_round_trip(content: RecordDict) -> None:
    sent = message(content)
    got = unpack(bytearray(pack(sent)))
    assert plain(got.content) == plain(content)
    for name in ("run_id", "message_id", "src_node_id", "dst_node_id", "group_id", "message_type"):
        assert getattr(got.metadata, name) == getattr(sent.metadata, name)
    reply = Message(RecordDict(), reply_to=got)
    assert unpack(pack(reply)).metadata.reply_to_message_id == "run/1/0/0/5"


def test_of_an_error_the_code_travels_and_no_text() -> None:
    data = pack(Message(Error(1001, "patient 17 was unusual"), reply_to=message(RecordDict())))
    assert b"unusual" not in data
    assert (unpack(data).error.code, unpack(data).error.reason) == (1001, None)


@pytest.mark.parametrize(
    "made",
    [
        np.arange(6, dtype=">f8").reshape(2, 3),
        np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
        np.arange(12, dtype=np.int32)[::2],
    ],
)
def test_arrays_of_another_order_arrive_as_they_are(made: np.ndarray) -> None:
    got = unpack(pack(message(RecordDict({"a": ArrayRecord([made])}))))
    np.testing.assert_array_equal(view(got.content["a"]["0"]), made)


def test_arrays_are_read_where_they_lie_and_aligned() -> None:
    content = RecordDict({"odd": ConfigRecord({"b": b"abc"}), "a": memory_arrays({"x": np.arange(5.0)})})
    data = bytearray(pack(message(content)))
    got = view(unpack(data).content["a"]["x"])
    assert got.flags.aligned and got.flags.writeable
    got[0] = 7.0
    assert struct.pack("<d", 7.0) in data


@pytest.mark.parametrize(
    "record",
    [
        *(memory_arrays({"x": np.zeros(2, dtype)}) for dtype in (np.complex64, object, "U3", "M8[s]")),
        ConfigRecord({"text": "x" * MAX_HEADER_BYTES}),
    ],
    ids=lambda record: type(record).__name__,
)
def test_other_dtypes_and_names_that_are_too_many_do_not_travel(record: Any) -> None:
    with pytest.raises(MalformedMessage):
        pack(message(RecordDict({"a": record})))


# --- hostile bytes ----------------------------------------------------------------------------------------------

NAMED = [1, "id", "", 1, 5, "3", "train"]


def forged(header: Any, blobs: bytes = b"") -> bytes:
    packed = msgpack.packb(header)
    start = len(packed).to_bytes(4, "little") + packed
    return start + bytes(-len(start) % 8) + blobs


def forged_array(dtype: Any, shape: Any, blobs: bytes = b"") -> bytes:
    return forged([1, NAMED, [["a", "a", [["x", [dtype, shape]]]]]], blobs)


def deep(levels: int, kind: type = list) -> Any:
    made: Any = 1
    for _ in range(levels):
        made = [made] if kind is list else {"bytes": made}
    return made


HOSTILE = {
    "nothing": b"",
    "a header that is not there": (1 << 31).to_bytes(4, "little"),
    "a header of 4 GiB": b"\xff\xff\xff\xff" + bytes(MEBI),
    "other format": forged([2, NAMED, 1]),
    "no list": forged(3),
    "no metadata": forged([1, [], 1]),
    "text for a node": forged([1, [1, "id", "", "x", 5, "3", "train"], 1]),
    "a type that is none": forged([1, [1, "id", "", 1, 5, "3", "os.system"], 1]),
    "a bool for an error": forged([1, NAMED, True]),
    "unknown record": forged([1, NAMED, [["a", "z", []]]]),
    "a list for a kind": forged([1, NAMED, [["a", [], []]]]),
    "a name twice": forged([1, NAMED, [["a", "m", []], ["a", "m", []]]]),
    "a key twice": forged([1, NAMED, [["a", "m", [["k", 1], ["k", 2]]]]]),
    "a name that is no text": forged([1, NAMED, [[3, "m", []]]]),
    "an array that is huge": forged_array("<f8", [100_000, 100_000], bytes(24)),
    "an array beyond any": forged_array("<f8", [1 << 63] * 32),
    "a negative side": forged_array("<f4", [-1, -1], bytes(8)),
    "a side that is no number": forged_array("<f4", [1.0], bytes(8)),
    "too many sides": forged_array("<f4", [1] * 33, bytes(8)),
    "pickled objects": forged_array("|O", [1], bytes(8)),
    "a list for a dtype": forged_array(["<f4"], [1], bytes(8)),
    "too few bytes": forged_array("<f4", [3], bytes(8)),
    "left over": forged_array("<f4", [1], bytes(16)),
    "bytes beyond the end": forged([1, NAMED, [["c", "c", [["k", {"bytes": 1 << 40}]]]]]),
    "negative bytes": forged([1, NAMED, [["c", "c", [["k", {"bytes": -8}]]]]]),
    "a map of another name": forged([1, NAMED, [["c", "c", [["k", {"x": 1}]]]]]),
    "a list in a list": forged([1, NAMED, [["c", "c", [["k", [[1]]]]]]]),
    "nothing for a value": forged([1, NAMED, [["c", "c", [["k", None]]]]]),
    "text for a metric": forged([1, NAMED, [["m", "m", [["k", "text"]]]]]),
    "an extension": forged([1, NAMED, [["m", "m", [["k", msgpack.ExtType(5, b"x")]]]]]),
    "a list 500 deep": forged([1, NAMED, [["c", "c", [["k", deep(500)]]]]]),
    "a map 500 deep": forged([1, NAMED, [["c", "c", [["k", deep(500, dict)]]]]]),
    "a moment": forged([1, NAMED, [["m", "m", [["k", msgpack.Timestamp(1)]]]]]),
    "lists in lists": (1 << 19).to_bytes(4, "little") + b"\xdd\x00\x00\x1f\xff" * (MEBI // 10) + bytes(8),
    "a million empty lists": b"\x00\x00\x08\x00\xdd\x00\x08\x00\x00" + b"\x90" * (1 << 19),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bytes_are_one_named_error_and_no_memory(name: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(MalformedMessage):
            unpack(HOSTILE[name])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MEBI


@settings(max_examples=300)
@given(st.binary(max_size=300))
@example(b"")
def test_any_bytes_are_a_message_or_a_named_error(data: bytes) -> None:
    try:
        unpack(data)
    except MalformedMessage as error:
        assert str(error)


GOOD = pack(
    message(
        RecordDict(
            {
                "arrays": memory_arrays({"w": np.arange(6, dtype=np.float32), "b": np.zeros((), np.int64)}),
                "config": ConfigRecord({"lr": 0.1, "bytes": [b"abc", b""], "on": True}),
                "metrics": MetricRecord({"loss": [0.5, 1.5]}),
            }
        )
    )
)


@settings(max_examples=400)
@given(st.integers(0, len(GOOD) - 1), st.integers(0, 255), st.integers(0, len(GOOD)))
def test_a_flipped_byte_or_a_cut_is_a_message_or_a_named_error(at: int, byte: int, end: int) -> None:
    data = bytearray(GOOD)
    data[at] = byte
    for changed in (data, data[:end]):
        try:
            unpack(changed)
        except MalformedMessage:
            continue
