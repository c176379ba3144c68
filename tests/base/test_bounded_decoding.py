"""Bytes and text from elsewhere: sound ones are read as msgpack and JSON read them, the others refused before they are built."""

import json
import struct
import tracemalloc
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any, NamedTuple

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.base.bounded_decoding import (
    JSON_DEPTH,
    RARE,
    Bounds,
    Undecodable,
    build,
    build_listed,
    check_fields,
    plain_of,
    read_json,
    read_record,
    unpack,
)
from fedveil.base.refusal import Form, OneOf, Range, Refusal

BOUNDS = Bounds(depth=4, width=10, items=40)
TEXT = st.text(st.characters(codec="utf-8"), max_size=40)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 63), (1 << 64) - 1),
    st.floats(allow_nan=False),
    TEXT,
    st.binary(max_size=300),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=12), st.dictionaries(TEXT, inner, max_size=6)),
    max_leaves=30,
)


def shape(value: Any) -> tuple[int, int, int]:
    """Return depth, width and number of values, counted anew."""
    if not isinstance(value, (list, dict)):
        return 0, 0, 1
    parts = value if isinstance(value, list) else [each for pair in value.items() for each in pair]
    inner = [shape(each) for each in parts]
    depth = 1 + max((each[0] for each in inner), default=0)
    return depth, max([len(parts), *(each[1] for each in inner)]), 1 + sum(each[2] for each in inner)


@settings(max_examples=300)
@given(VALUES)
def test_only_values_within_the_bounds_are_read(value: Any) -> None:
    data, (depth, width, items) = msgpack.packb(value), shape(value)
    if depth <= BOUNDS.depth and width <= BOUNDS.width and items <= BOUNDS.items:
        assert unpack(data, BOUNDS) == value
        with pytest.raises(Undecodable):
            unpack(data + b"\x00", BOUNDS)
        for end in range(len(data)):
            with pytest.raises(Undecodable):
                unpack(data[:end], BOUNDS)
    else:
        with pytest.raises(Undecodable):
            unpack(data, BOUNDS)


@pytest.mark.parametrize(
    "data",
    [
        b"\x91" * 5 + b"\x01",
        b"\x91" * 100_000,
        b"\x81\xa1x" * 900 + b"\x01",
        b"\xdd\xff\xff\xff\xff" * 1000,
        (b"\xdc\xff\xff" * 500).ljust(1 << 16, b"\x90"),
        b"\xdf\x00\x00\x00\x06" + b"\x01" * 12,
        b"\xc6\xff\xff\xff\xffabc",
        b"\x82\xa1k\x01\xa1k\x02",
        b"\x81\x01\x02",
        b"\xd4\x05x",
        b"\xd6\xff" + bytes(4),
        b"\xc7\x00\x01",
        b"\xc1",
        b"\xa2\xff\xfe",
        b"\xdd",
    ],
)
def test_bombs_lies_and_extensions_are_refused_before_building(data: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(Undecodable):
            unpack(data, BOUNDS)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 15


def test_lists_of_thousands_are_read_where_they_may_be() -> None:
    value = [[number, "x", b"y"] for number in range(20_000)]
    wide = Bounds(depth=2, width=20_000, items=100_000)
    assert unpack(msgpack.packb(value), wide) == value
    assert unpack(msgpack.packb(value), wide, use_list=False) == tuple(map(tuple, value))
    with pytest.raises(Undecodable):
        unpack(b"\xdd" + struct.pack(">I", 20_001) + bytes(20_001), wide)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[" * (JSON_DEPTH + 1) + "]" * (JSON_DEPTH + 1),
        "[" * 100_000,
        '{"a":' * 500 + "1" + "}" * 500,
        '{"a": 1, "a": 2}',
        '{"a": {"b": 1, "b": 1}}',
        "1" * 21,
        "[-" + "1" * 5000 + "]",
        b"\xff",
        "{'a': 1}",
    ],
)
def test_text_that_is_deep_double_or_beyond_64_bits_is_refused(text: str | bytes) -> None:
    with pytest.raises(Undecodable):
        read_json(text)


def test_brackets_in_a_text_are_no_groups() -> None:
    value = {"a": "[{" * 50 + '\\"[', "b": [[[1, -(2**63), 2**64 - 1, 0.5]]]}
    assert read_json(json.dumps(value)) == value


@dataclass(frozen=True)
class Inner:
    """One of a few."""

    name: str
    share: float | None = None


@dataclass(frozen=True)
class Outer:
    """What a text describes."""

    count: int
    on: bool = False
    parts: tuple[Inner, ...] = ()


def test_a_dataclass_is_built_of_its_own_fields_and_types_alone() -> None:
    assert build(Outer, {"count": 3, "parts": [{"name": "a", "share": 1}, {"name": "b"}]}) == Outer(
        3, False, (Inner("a", 1), Inner("b"))
    )
    wrong: list[Any] = [
        *({}, [], None, {"count": "3"}, {"count": True}, {"count": 1.0}, {"count": 1, "more": 2}),
        *({"count": 1, "on": 1}, {"count": 1, "parts": {}}, {"count": 1, "parts": [[]]}),
        *({"count": 1, "parts": [{"name": "a", "share": value}]} for value in ("x", float("nan"), True, [1])),
    ]
    for plain in wrong:
        with pytest.raises(Undecodable):
            build(Outer, plain)


class Colour(StrEnum):
    RED = "red"


class Mark(NamedTuple):
    seq: int
    name: str


@dataclass(frozen=True)
class Checked:
    count: Annotated[int, Range(ge=1, le=9)]
    share: Annotated[float, Range(gt=0, lt=1)]
    colour: Colour = Colour.RED
    word: Annotated[str, OneOf(("a", "b"))] | None = None
    name: Annotated[str, RARE, Form("[a-z]*")] = ""
    marks: Annotated[Mapping[str, Mark], RARE] = field(default_factory=dict[str, Mark])
    pair: tuple[int, str] = (1, "x")

    def __post_init__(self) -> None:
        check_fields(self, "group.")


PLAIN = {"count": 2, "share": 0.5, "colour": "red", "word": "a", "pair": [3, "y"]}


def test_dataclass_is_built_from_its_annotations() -> None:
    made = build(Checked, PLAIN, whole=True)
    assert made == Checked(2, 0.5, Colour.RED, "a", pair=(3, "y"))
    whole = {**PLAIN, "name": "n", "marks": {"m": [4, "z"]}}
    assert build(Checked, whole).marks == {"m": Mark(4, "z")}
    assert plain_of(build(Checked, whole)) == whole
    assert plain_of(made) == PLAIN
    assert build_listed(Inner, ["a", 0.5]) == Inner("a", 0.5)
    assert read_record(Checked, {**PLAIN, "other": b""}, name="own") == build(
        Checked, {**PLAIN, "name": "own"}
    )


@pytest.mark.parametrize("missing", PLAIN)
def test_a_whole_dataclass_lacks_no_field(missing: str) -> None:
    with pytest.raises(Undecodable, match=f"lacks {missing}"):
        build(Checked, {name: each for name, each in PLAIN.items() if name != missing}, whole=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("count", value) for value in (0, 10, 2.0, True, None, "2")),
        *(("share", value) for value in (0, 1.0, None, "x")),
        *(("colour", value) for value in ("blue", None, ["red"])),
        *(("word", value) for value in ("c", 1, ["a"])),
        *(("name", value) for value in ("A", None, "a\n", 1)),
    ],
)
def test_a_field_out_of_its_range_is_refused_by_its_name(name: str, value: object) -> None:
    with pytest.raises(Refusal, match=rf"^group\.{name}="):
        build(Checked, {**PLAIN, name: value})
    assert read_record(Checked, {**PLAIN, name: value}) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("pair", value) for value in ([1], [1, 2], [1, "x", 1], "1x", None)),
        *(("marks", value) for value in ([], {"m": [1]}, {"m": [1, "x", 1]}, {"m": ["1", "x"]}, {"m": {}})),
    ],
)
def test_a_part_of_another_type_or_length_is_undecodable(name: str, value: object) -> None:
    with pytest.raises(Undecodable):
        build(Checked, {**PLAIN, name: value})


@pytest.mark.parametrize("values", [["a"], ["a", 0.5, 1], {"name": "a"}, None, [1, 0.5]])
def test_a_list_of_other_fields_is_undecodable(values: object) -> None:
    with pytest.raises(Undecodable):
        build_listed(Inner, values)


@dataclass(frozen=True)
class Trusting:
    """What does not check its own fields."""

    colour: Colour
    share: Annotated[float, Range(gt=0, le=1)]
    by_name: Mapping[str, int] = field(default_factory=dict[str, int])


@pytest.mark.parametrize("plain", [{"colour": 7, "share": 0.5}, {"colour": "red", "share": "much"}])
def test_a_field_is_checked_where_its_class_does_not(plain: Any) -> None:
    with pytest.raises(Refusal):
        build(Trusting, plain)
    made = build(Trusting, {"colour": "red", "share": 1})
    assert type(made.colour) is Colour and type(made.share) is float


def test_a_mapping_has_keys_of_its_type() -> None:
    packed = unpack(msgpack.packb({b"red": 1}), Bounds(2, 8, 8))
    with pytest.raises(Undecodable, match="a key of another type"):
        build(Trusting, {"colour": "red", "share": 1.0, "by_name": packed})
