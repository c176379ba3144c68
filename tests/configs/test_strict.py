"""Reader of groups of keys: what each annotation takes, and the sentence for what it does not."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date, datetime
from enum import StrEnum
from typing import Annotated, Any

import pytest

from fedveil.base.bounded_decoding import defaults_of
from fedveil.base.refusal import Form, OneOf, Range
from fedveil.configs.strict import Mistakes, read_group


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Inner:
    size: Annotated[int, Range(ge=1, le=9)]


@dataclass(frozen=True, kw_only=True)
class Outer:
    rate: Annotated[float, Range(gt=0, lt=1)]
    flag: bool = False
    line: str = "x"
    word: Annotated[str, OneOf(("a", "b"))] = "a"
    colour: Colour = Colour.RED
    day: date | None = None
    numbers: tuple[int, ...] = ()
    names: tuple[Annotated[str, Form("[a-z]*", "must be a list of names")], ...] = ()
    inner: Inner
    several: tuple[Inner, ...] = ()
    sizes: Mapping[str, Annotated[int, Range(ge=0)]] = field(default_factory=dict[str, int])

    def rules(self) -> Iterator[tuple[str, str]]:
        if self.rate > 0.5 and self.flag:
            yield "flag", "goes with a rate of 0.5 at most"
        for name, size in self.sizes.items():
            if size > self.inner.size:
                yield f"sizes.{name}", "is above inner.size"


LEAST: dict[str, Any] = {"rate": 0.25, "inner": {"size": 3}}


def test_a_group_is_read_with_its_defaults() -> None:
    assert read_group(Outer, LEAST, "") == Outer(rate=0.25, inner=Inner(3))
    assert set(defaults_of(Outer)) == {*Outer.__dataclass_fields__} - LEAST.keys()


def test_values_have_the_types_of_their_annotations() -> None:
    values = {
        **LEAST,
        "colour": "blue",
        "day": date(2031, 1, 2),
        "numbers": [1, 2],
        "several": [{"size": 1}, {"size": 2}],
    }
    outer = read_group(Outer, values, "")
    assert outer.colour is Colour.BLUE and outer.day == date(2031, 1, 2) and outer.numbers == (1, 2)
    assert outer.several == (Inner(1), Inner(2))


WRONG = [
    ("rate", True, "must be a number, not a switch"),
    ("rate", "0.5", "must be a number, not text"),
    ("rate", None, "must be a number, not null"),
    ("rate", math.nan, "must be finite"),
    ("rate", math.inf, "must be finite"),
    ("rate", 10**400, "must be finite"),
    ("rate", 1, "must be above 0 and below 1"),
    ("flag", 1, "must be true or false, not a whole number"),
    ("line", 1, "must be a line of text"),
    ("line", "", "must be a line of text"),
    ("line", "a\nb", "must be a line of text"),
    ("word", "c", "must be one of a, b"),
    ("word", 1, "must be one of a, b"),
    ("colour", "green", "must be one of red, blue"),
    ("colour", None, "must be one of red, blue"),
    ("day", "2031-01-02", "must be a day, YYYY-MM-DD without quotes"),
    ("day", datetime(2031, 1, 2), "must be a day, YYYY-MM-DD without quotes"),
    ("numbers", [1, True], "must be a list of whole numbers"),
    ("numbers", [1.0], "must be a list of whole numbers"),
    ("numbers", 1, "must be a list of whole numbers"),
    ("numbers", "12", "must be a list of whole numbers"),
    ("names", ["a", 1], "must be a list of names"),
    ("names", None, "must be a list of names"),
    ("inner", [], "must be a group of keys"),
    ("inner.size", True, "must be a whole number, not a switch"),
    ("inner.size", 1.0, "must be a whole number, not a fraction"),
    ("inner.size", 10, "must be from 1 to 9"),
    ("inner.sise", 1, "there is no such key; did you mean 'size'?"),
    ("several", [{"size": 1}, 2], "must be a list of groups of keys"),
    ("sizes", [], "must be a group of keys"),
    ("sizes.a", -1, "must be at least 0"),
    ("sizes.a", 4, "is above inner.size"),
]


@pytest.mark.parametrize(("key", "value", "remedy"), WRONG)
def test_a_wrong_value_is_refused_by_its_key(key: str, value: object, remedy: str) -> None:
    group, _, last = key.rpartition(".")
    values = {**LEAST, group: {**LEAST.get(group, {}), last: value}} if group else {**LEAST, key: value}
    with pytest.raises(Mistakes) as refused:
        read_group(Outer, values, "file")
    (mistake,) = refused.value.each
    assert (mistake.field, mistake.remedy) == (f"file.{key}", remedy)
    assert mistake.value is value or mistake.value == value


def test_all_mistakes_of_a_file_are_named() -> None:
    values = {"flag": True, "inner": {}, "several": [{"size": 0}, {"size": 1, "x": 2}], "wort": "a"}
    with pytest.raises(Mistakes) as refused:
        read_group(Outer, values, "")
    assert str(refused.value).splitlines() == [
        "rate=None: is missing; must be a number",
        "inner.size=None: is missing; must be a whole number",
        "several[0].size=0: must be from 1 to 9",
        "several[1].x=2: there is no such key; known: size",
        "wort='a': there is no such key; did you mean 'word'?",
    ]


def test_a_group_that_is_missing_lacks_its_keys() -> None:
    with pytest.raises(Mistakes, match=r"^inner\.size=None: is missing; must be a whole number$"):
        read_group(Outer, {"rate": 0.5}, "")


def test_rules_between_keys_are_checked() -> None:
    with pytest.raises(Mistakes, match="flag=True: goes with a rate"):
        read_group(Outer, {**LEAST, "rate": 0.75, "flag": True}, "")
