"""Strict reader of groups of keys: by type, by range, no conversions, no unknown keys; and its sentences for mistakes."""

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, is_dataclass
from datetime import date
from enum import StrEnum
from types import NoneType
from typing import Any, TypeVar, cast, get_args, get_origin

from ..base.bounded_decoding import defaults_of, hints_of, marks_of, options_of
from ..base.refusal import OneOf, Refusal

MAX_SHOWN = 60
MAX_NAMES = 60
TYPES = {
    "NoneType": "null",
    "str": "text",
    "bool": "a switch",
    "float": "a fraction",
    "int": "a whole number",
}
EXPECTED = {
    float: "a number",
    int: "a whole number",
    bool: "true or false",
    str: "a line of text",
    date: "a day, YYYY-MM-DD without quotes",
    Mapping: "a group of keys",
}
TARGET = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")

T = TypeVar("T")


class Mistakes(Refusal):
    """Every mistake of one configuration; ``str`` is one sentence a line."""

    def __init__(self, each: Sequence[Refusal]) -> None:
        super().__init__(each[0].field, each[0].value, each[0].remedy)
        self.each = tuple(each)

    def __str__(self) -> str:
        return "\n".join(str(mistake) for mistake in self.each)


def nearest(word: str, names: Iterable[str]) -> str:
    """``; did you mean 'x'?`` or, when nothing is near, ``; known: a, b``."""
    ordered = sorted(names)
    matches = difflib.get_close_matches(word, ordered, n=1, cutoff=0.6)
    if matches:
        return f"did you mean '{matches[0]}'?"
    more = f" and {len(ordered) - MAX_NAMES} more" if len(ordered) > MAX_NAMES else ""  # of a table's columns
    return f"known: {', '.join(ordered[:MAX_NAMES])}{more}" if ordered else "there is nothing to set here"


def shortened(value: object) -> object:
    """Return a value for a message: of a long text only the beginning."""
    return f"{value[:MAX_SHOWN]}..." if isinstance(value, str) and len(value) > MAX_SHOWN else value


def value_at(values: Any, path: Iterable[str]) -> object:
    """Return, for a message, the value at a path of keys; None where there is none."""
    for key in path:
        values = cast(Mapping[str, Any], values).get(key) if isinstance(values, Mapping) else None
    return shortened(values)


def type_of(value: object) -> str:
    """Return a value's type in a user's words."""
    return TYPES.get(type(value).__name__, f"a {type(value).__name__}")


def wrong(kind: Any, value: object) -> str:
    """Return the remedy for a value that is not of this type."""
    if kind in (float, int, bool):
        return f"must be {EXPECTED[kind]}, not {type_of(value)}"
    return f"must be {EXPECTED[kind]}"


def unknown_key(key: str, names: Iterable[str]) -> str:
    """Return the remedy for a key that does not exist."""
    return f"there is no such key; {nearest(key, names)}"


def leaves(node: object, above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what groups of keys hold, by dotted keys.

    Args:
        node: a group, or what stands in one.
        above: its key.
    """
    if not isinstance(node, Mapping):
        yield above, node
        return
    for key, value in cast(Mapping[Any, Any], node).items():
        yield from leaves(value, f"{above}.{key}" if above else str(key))


def read_group(kind: type[T], values: object, path: str) -> T:
    """Return the frozen dataclass that describes a group of keys.

    The annotations of its fields say type, range, words and form (`base.refusal`), and the defaults what a group may leave
    out. Its method `rules`, if it has one, yields a key and a remedy for each rule between keys that is broken, where each
    key is right by itself. A text without a form is one line, not empty.

    Args:
        kind: dataclass of numbers, switches, texts, days, words, tuples, mappings and dataclasses of these.
        values: the group.
        path: where it stands, for messages; empty for a whole file.

    Raises:
        Mistakes: every mistake in it.
        Refusal: it is not a group.
    """
    if not isinstance(values, Mapping):
        raise Refusal(path, values, wrong(Mapping, values))
    group, hints, above = cast(Mapping[Any, Any], values), hints_of(kind), f"{path}." if path else ""
    optional = defaults_of(kind).keys() - group.keys()
    parts = {
        name: (hint, group.get(name, MISSING), f"{above}{name}")
        for name, hint in hints.items()
        if name not in optional
    }
    strangers = [
        Refusal(f"{above}{key}", shortened(value), unknown_key(str(key), hints))
        for key, value in group.items()
        if key not in hints
    ]
    result = kind(**_each(parts, strangers))
    rules = cast(Iterable[tuple[str, str]], getattr(result, "rules", tuple)())
    if faults := [Refusal(f"{above}{key}", value_at(group, key.split(".")), remedy) for key, remedy in rules]:
        raise Mistakes(faults)
    return result


def _each(parts: Mapping[Any, tuple[Any, object, str]], others: Sequence[Refusal] = ()) -> dict[Any, Any]:
    """Return values by key, each of an annotation, a value and a place; or raise their mistakes, and others."""
    result, mistakes = dict[Any, Any](), list[Refusal]()
    for key, (hint, value, where) in parts.items():
        try:
            absent = {} if is_dataclass(hint) else None  # its own keys are missing
            result[key] = _value(hint, absent if value is MISSING else value, where)
        except Mistakes as several:
            mistakes += several.each
        except Refusal as mistake:
            remedy = mistake.remedy
            if value is MISSING:
                value, remedy = None, f"is missing; {remedy.removesuffix(', not null')}"
            mistakes.append(Refusal(where, shortened(value), remedy))
    if mistakes or others:
        raise Mistakes([*mistakes, *others])
    return result


def _value(hint: Any, value: object, where: str) -> Any:
    """Return the value if it is as its annotation says; Refusal otherwise."""
    options = options_of(hint)
    if value is None and NoneType in options:
        return None
    (hint,) = (each for each in options if each is not NoneType)
    check = next((each.check for each in marks_of(hint) if hasattr(each, "check")), None)
    kind = get_args(hint)[0] if check else hint
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return kind(OneOf(tuple(kind)).check(str, where, value))
    if check and kind not in (float, int):
        return check(kind, where, value)
    if is_dataclass(kind):
        return read_group(cast(type, kind), value, where)
    if (origin := get_origin(kind)) is tuple:
        return _items(get_args(kind)[0], value, where)
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise Refusal(where, value, wrong(origin, value))
        inner = get_args(kind)[1]
        group = cast(Mapping[str, Any], value)
        return _each({name: (inner, each, f"{where}.{name}") for name, each in group.items()})
    number = _plain(kind, value, where)
    return check(kind, where, number) if check else number


def _plain(kind: Any, value: Any, where: str) -> Any:
    """Return a number, a switch, a line of text or a day, of no other type."""
    if kind is Any:
        return value
    sound = type(value) is kind or (kind is float and type(value) is int)
    if not sound or (kind is str and not (value and str(value).isprintable())):
        raise Refusal(where, value, wrong(kind, value))
    if kind is float:
        value = float(value) if abs(value) < 2**1000 else math.inf
        if not math.isfinite(value):
            raise Refusal(where, value, "must be finite")
    return value


def _items(item: Any, value: object, where: str) -> tuple[Any, ...]:
    """Return the items of a list: groups of keys, or values that have one sentence for all."""
    remedies = (each.remedy for each in marks_of(item) if hasattr(each, "remedy"))
    sort = "whole numbers" if item is int else "groups of keys"
    refusal = Refusal(where, value, next(remedies, f"must be a list of {sort}"))
    if not isinstance(value, list):
        raise refusal
    items = cast(list[Any], value)
    if is_dataclass(item) and all(isinstance(each, Mapping) for each in items):
        entries = enumerate(items)
        return tuple(_each({index: (item, each, f"{where}[{index}]") for index, each in entries}).values())
    try:
        return tuple(_value(item, each, where) for each in items)
    except Refusal:
        raise refusal from None
