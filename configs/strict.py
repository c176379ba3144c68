"""Strict reader of groups of keys: by type, by range, no conversions, no unknown keys; and its sentences for mistakes."""

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, is_dataclass
from datetime import date
from enum import StrEnum
from types import NoneType
from typing import Any, NamedTuple, TypeVar, cast, get_args, get_origin

from ..base.bounded_decoding import defaults_of, hints_of, marks_of, options_of
from ..base.refusal import OneOf, Refusal

MAX_SHOWN = 60  # characters of a text in a message
MAX_NAMES = 60  # names that a message lists, of a table's columns for instance
# Types in a user's words: of a value, and as a remedy expects it.
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
    """Return the end of a refusal of an unknown word: ``did you mean 'x'?``, or ``known: a, b`` if no name is similar."""
    ordered = sorted(names)
    if not ordered:
        return "there is nothing to set here"
    if matches := difflib.get_close_matches(word, ordered, n=1, cutoff=0.6):
        return f"did you mean '{matches[0]}'?"
    more = f" and {len(ordered) - MAX_NAMES} more" if len(ordered) > MAX_NAMES else ""
    return f"known: {', '.join(ordered[:MAX_NAMES])}{more}"


def shortened(value: object) -> object:
    """Return a value for a message: of a long text only the beginning."""
    return f"{value[:MAX_SHOWN]}..." if isinstance(value, str) and len(value) > MAX_SHOWN else value


def value_at(values: Any, path: Iterable[str]) -> object:
    """Return, for a message, the value at a path of keys; None where there is none."""
    for key in path:
        values = cast(Mapping[str, Any], values).get(key) if isinstance(values, Mapping) else None
    return shortened(values)


def wrong(kind: Any, value: object) -> str:
    """Return the remedy for a value that is not of this type, a key of `EXPECTED`."""
    if kind in (float, int, bool):
        type_name = type(value).__name__
        return f"must be {EXPECTED[kind]}, not {TYPES.get(type_name, f'a {type_name}')}"
    return f"must be {EXPECTED[kind]}"


def unknown_key(key: str, names: Iterable[str]) -> str:
    """Return the remedy for a key that does not exist."""
    return f"there is no such key; {nearest(key, names)}"


def leaves(node: object, above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for each value in nested groups of keys; `above` is the dotted key of `node` itself."""
    if not isinstance(node, Mapping):
        yield above, node
        return
    for key, value in cast(Mapping[Any, Any], node).items():
        yield from leaves(value, f"{above}.{key}" if above else str(key))


def read_group(kind: type[T], values: object, path: str) -> T:
    """Return a group of keys as a frozen dataclass.

    The annotations of its fields define types, ranges, words and forms (`base.refusal`), and the defaults define which keys
    may be left out. Its method `rules`, if it has one, yields (key, remedy) for each broken rule between keys that are right
    by themselves. A text without a form is one line, not empty.

    Args:
        kind: dataclass of numbers, switches, texts, days, words, tuples, mappings and dataclasses of these.
        values: the group.
        path: dotted key of the group, for refusals; empty for a whole file.

    Raises:
        Mistakes: every mistake in the group.
        Refusal: `values` is not a group.
    """
    if not isinstance(values, Mapping):
        raise Refusal(path, values, wrong(Mapping, values))
    group, hints, above = cast(Mapping[Any, Any], values), hints_of(kind), f"{path}." if path else ""
    optional = defaults_of(kind).keys() - group.keys()
    entries = {
        name: _Entry(hint, group.get(name, MISSING), f"{above}{name}")
        for name, hint in hints.items()
        if name not in optional
    }
    unknown = [
        Refusal(f"{above}{key}", shortened(value), unknown_key(str(key), hints))
        for key, value in group.items()
        if key not in hints
    ]
    result = kind(**_read_entries(entries, unknown))
    broken = cast(Iterable[tuple[str, str]], getattr(result, "rules", tuple)())
    if faults := [
        Refusal(f"{above}{key}", value_at(group, key.split(".")), remedy) for key, remedy in broken
    ]:
        raise Mistakes(faults)
    return result


class _Entry(NamedTuple):
    """Entry of a group to read."""

    hint: Any  # annotation of the field
    value: object  # what the user gave; MISSING for a required key that was left out
    path: str  # dotted key, for refusals


def _read_entries(entries: Mapping[Any, _Entry], others: Sequence[Refusal] = ()) -> dict[Any, Any]:
    """Return the values of entries by key; raise all their mistakes at once, with `others` that the caller has found."""
    result, mistakes = dict[Any, Any](), list[Refusal]()
    for key, (hint, value, path) in entries.items():
        try:
            # A missing group is read as empty, so that each of its required keys is named; another value as null.
            absent = {} if is_dataclass(hint) else None
            result[key] = _read_value(hint, absent if value is MISSING else value, path)
        except Mistakes as several:
            mistakes += several.each
        except Refusal as mistake:
            remedy = mistake.remedy
            if value is MISSING:
                value, remedy = None, f"is missing; {remedy.removesuffix(', not null')}"
            mistakes.append(Refusal(path, shortened(value), remedy))
    if mistakes or others:
        raise Mistakes([*mistakes, *others])
    return result


def _read_value(hint: Any, value: object, path: str) -> Any:
    """Return a value as its annotation says; raise Refusal, or Mistakes of an inner group, for any other.

    A text with a mark (`base.refusal`) is read by the mark; a number is read as its type first, and then checked by it.
    """
    options = options_of(hint)
    if value is None and NoneType in options:
        return None
    (hint,) = (each for each in options if each is not NoneType)  # None or one other type
    check = next((each.check for each in marks_of(hint) if hasattr(each, "check")), None)
    kind = get_args(hint)[0] if check else hint
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return kind(OneOf(tuple(kind)).check(str, path, value))
    if check and kind not in (float, int):
        return check(kind, path, value)
    if is_dataclass(kind):
        return read_group(cast(type, kind), value, path)
    if (origin := get_origin(kind)) is tuple:
        return _read_items(get_args(kind)[0], value, path)
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise Refusal(path, value, wrong(origin, value))
        inner = get_args(kind)[1]
        group = cast(Mapping[str, Any], value)
        return _read_entries({name: _Entry(inner, each, f"{path}.{name}") for name, each in group.items()})
    number = _plain(kind, value, path)
    return check(kind, path, number) if check else number


def _plain(kind: Any, value: Any, path: str) -> Any:
    """Return a number, a switch, a line of text or a day; raise Refusal for another type than `kind`, but take 1 for 1.0."""
    if kind is Any:
        return value
    sound = type(value) is kind or (kind is float and type(value) is int)
    if not sound or (kind is str and not (value and str(value).isprintable())):
        raise Refusal(path, value, wrong(kind, value))
    if kind is float:
        value = float(value) if abs(value) < 2**1000 else math.inf  # float() fails for a longer int
        if not math.isfinite(value):
            raise Refusal(path, value, "must be finite")
    return value


def _read_items(hint: Any, value: object, path: str) -> tuple[Any, ...]:
    """Return the items of a list, of annotation `hint` each; groups are refused one by one, other items by one remedy."""
    remedies = (each.remedy for each in marks_of(hint) if hasattr(each, "remedy"))
    plural = "whole numbers" if hint is int else "groups of keys"
    refusal = Refusal(path, value, next(remedies, f"must be a list of {plural}"))
    if not isinstance(value, list):
        raise refusal
    items = cast(list[Any], value)
    if is_dataclass(hint) and all(isinstance(each, Mapping) for each in items):
        entries = {index: _Entry(hint, each, f"{path}[{index}]") for index, each in enumerate(items)}
        return tuple(_read_entries(entries).values())
    try:
        return tuple(_read_value(hint, each, path) for each in items)
    except Refusal:
        raise refusal from None
