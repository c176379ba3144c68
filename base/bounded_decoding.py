"""Decoders of untrusted msgpack and JSON: depth, width, types and integers are checked before any object is built.

All bytes from another party are decoded with these functions. The result consists of lists, dictionaries, strings,
bytes, numbers, booleans and None within fixed bounds on depth and width, so code that traverses it terminates.

A message is a frozen dataclass: `build` creates it from decoded JSON, and `plain_of` converts it back. Annotations may
restrict a field by `Range`, `Form`, `OneOf` or a StrEnum. `check_fields` refuses any other value and names the field;
`build` calls it, and so does `__post_init__` of a dataclass that is created in other ways too.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import StrEnum
from functools import cache, partial
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import msgpack

from .refusal import Refusal, word

JSON_DEPTH = 8  # levels of nesting; an order has 2, a spec of shares 3
INFINITY = "infinity"  # word for infinite numbers, which JSON lacks
MAX_DIGITS = 20  # of an integer, enough for 64 bits
RARE = "rare"  # mark of a field that JSON omits at its default, so that earlier releases can read the rest
# MessagePack's formats by first byte (github.com/msgpack/msgpack, spec.md): size in bytes of a value of fixed size, of the
# length of a text or byte string, and of the count of a list or map. Extensions are absent, and so refused.
_FIXED = {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8} | {0xCC + k: 1 << k % 4 for k in range(8)}
_SIZED = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
_COUNTED = {0xDC: 2, 0xDD: 4, 0xDE: 2, 0xDF: 4}
_MAPS = (0xDE, 0xDF)
_MARKS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)

T = TypeVar("T")


class Undecodable(ValueError):
    """Error of bytes or text that are malformed or exceed their bounds; its message contains no value from them."""


@dataclass(frozen=True)
class Bounds:
    """Bounds of a msgpack value.

    Attributes:
      depth: levels of nested lists and maps.
      width: values in one list or map; an entry of a map counts as two.
      items: values in total, lists and maps included.
    """

    depth: int
    width: int
    items: int


def unpack(data: bytes | bytearray | memoryview, bounds: Bounds, *, use_list: bool = True) -> Any:
    """Decode bytes that contain exactly one msgpack value; extension types are refused.

    Args:
      data: msgpack bytes.
      bounds: largest depth, width and number of values.
      use_list: False decodes lists as tuples.

    Raises:
      Undecodable: the bytes are malformed or exceed the bounds; no bytes raise any other exception.
    """
    _check(data, bounds)
    try:
        return msgpack.unpackb(data, use_list=use_list, strict_map_key=True, object_pairs_hook=_unique)
    except Undecodable:
        raise
    except Exception as error:  # msgpack documents no closed set
        raise Undecodable("not msgpack") from error


def read_json(text: str | bytes) -> Any:
    """Decode JSON of at most `JSON_DEPTH` levels, without repeated keys, and with integers of at most `MAX_DIGITS`.

    Raises:
      Undecodable: the text is malformed or exceeds the bounds; no text raises any other exception.
    """
    try:
        text = text if isinstance(text, str) else text.decode()
        _check_depth(text)
        return json.loads(text, object_pairs_hook=_unique, parse_int=_whole)
    except Undecodable:
        raise
    except (ValueError, RecursionError) as error:
        raise Undecodable("not JSON") from error


def build(kind: type[T], plain: object, *, whole: bool = False) -> T:
    """Create a dataclass from a dictionary of decoded JSON, and check the type of every field.

    Args:
      kind: dataclass of integers, finite floats, booleans, strings, None, and tuples, mappings and dataclasses of these.
      plain: the dictionary; a nested value may already be an instance of its dataclass.
      whole: whether all fields are required except `RARE` ones; by default only fields without a default value are.

    Raises:
      Undecodable: a field is missing, unknown or of another type, or a number is infinite or too large.
      Refusal: a value violates its annotation (`check_fields`), or the dataclass's own checks.
      ValueError: a value violates the dataclass's own checks.
    """
    hints = hints_of(kind)
    if not isinstance(plain, dict) or not cast(dict[object, object], plain).keys() <= hints.keys():
        raise Undecodable(f"no {kind.__name__}, or fields that it does not have")
    entries = cast(dict[str, object], plain)
    if whole and (missing := hints.keys() - entries.keys() - _rare(kind).keys()):
        raise Undecodable(f"no {kind.__name__}: it lacks {', '.join(sorted(missing))}")
    values = {name: _typed(f"{kind.__name__}.{name}", hints[name], v, whole) for name, v in entries.items()}
    try:
        instance = kind(**values)
        check_fields(instance)
        return instance
    except (TypeError, ArithmeticError) as error:
        raise Undecodable(f"no {kind.__name__}: {type(error).__name__}") from error


def build_listed(kind: type[T], values: object) -> T:
    """Create a dataclass from a list of all its fields in order, as decoded from msgpack; errors as of `build`."""
    names = list(hints_of(kind))
    if not isinstance(values, list) or len(cast(list[object], values)) != len(names):
        raise Undecodable(f"no {kind.__name__}: another number of fields")
    return build(kind, dict(zip(names, cast(list[object], values), strict=True)))


def read_record(kind: type[T], record: Mapping[str, Any], **others: object) -> T | None:
    """Create a dataclass from a peer's record; return None if a field is missing or invalid.

    Args:
      kind: dataclass, as of `build`.
      record: fields by name; unknown ones, from another release, are ignored.
      others: fields that the record does not contain.
    """
    fields = {name: value for name, value in record.items() if name in hints_of(kind)}
    try:
        return build(kind, {**fields, **others})
    except (ValueError, Refusal):
        return None


def plain_of(value: Any) -> Any:
    """Return a dataclass as plain data for `build`, like `dataclasses.asdict` but without `RARE` fields at defaults."""
    if is_dataclass(value):
        rare, values = _rare(type(value)), {name: getattr(value, name) for name in hints_of(type(value))}
        return {k: plain_of(each) for k, each in values.items() if k not in rare or each != rare[k]}
    if isinstance(value, list | tuple):
        return [plain_of(each) for each in cast(list[Any], value)]
    if isinstance(value, Mapping):
        return {name: plain_of(each) for name, each in cast(Mapping[str, Any], value).items()}
    return value


def json_number(value: T) -> T | str:
    """Return a value for JSON: `INFINITY` for an infinite number, any other value unchanged."""
    return INFINITY if isinstance(value, float) and math.isinf(value) else value


def format_number(value: float | str, form: str) -> str:
    """Return a number as text; `INFINITY` if it is not finite.

    Args:
      value: a number, or a result of `json_number`.
      form: format of a finite number, such as `.2f`.
    """
    return format(float(value), form) if math.isfinite(float(value)) else INFINITY


def check_fields(value: object, path: str = "") -> None:
    """Check a dataclass's fields against the marks of their annotations, and convert them to their types in place.

    Args:
      value: instance of a dataclass, which may be frozen or still in its `__post_init__`.
      path: prefix of the field's name in a refusal, such as `privacy.`.

    Raises:
      Refusal: a value is invalid; the refusal names its field.
    """
    for name, (optional, check) in _checks(type(value)).items():
        if (each := getattr(value, name)) is not None or not optional:
            object.__setattr__(value, name, check(f"{path}{name}", each))


def read_json_file(kind: type[T], path: Path) -> T | None:
    """Return the dataclass in a JSON file; None if the file is missing or cannot be decoded.

    Args:
      kind: dataclass, as of `build`.
      path: path of the file.
    """
    try:
        return build(kind, read_json(path.read_bytes()))
    except (OSError, ValueError):
        return None


def read_lines(kind: type[T], path: Path) -> list[T]:
    """Return the dataclasses in a file of JSON lines; a missing file is empty, and undecodable lines are skipped.

    Arguments as of `read_json_file`.
    """
    values: list[T] = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with suppress(Undecodable):
            values.append(build(kind, read_json(line)))
    return values


@cache
def hints_of(kind: type) -> dict[str, Any]:
    """Return the annotation of each constructor field by name, with its marks except a `RARE` that is the only one."""
    hints = get_type_hints(kind, include_extras=True)
    bare = {name: get_args(hint)[0] if marks_of(hint) == (RARE,) else hint for name, hint in hints.items()}
    return {each.name: bare[each.name] for each in fields(kind) if each.init}


@cache
def defaults_of(kind: type) -> dict[str, Any]:
    """Return the default of each field that has one, by name."""
    pairs = ((each.name, each.default, each.default_factory) for each in fields(kind))
    return {
        name: default if factory is MISSING else factory()
        for name, default, factory in pairs
        if default is not factory  # a required field has MISSING for both
    }


@cache
def _rare(kind: type) -> dict[str, Any]:
    """Return the default of each field that is marked `RARE`, by name."""
    hints = get_type_hints(kind, include_extras=True)
    return {name: each for name, each in defaults_of(kind).items() if RARE in marks_of(hints[name])}


def marks_of(hint: Any) -> tuple[Any, ...]:
    """Return the metadata of an `Annotated` type; () for any other type."""
    return getattr(hint, "__metadata__", ())


@cache
def _checks(kind: type) -> dict[str, tuple[bool, Callable[[str, Any], Any]]]:
    """Return, for each field with a StrEnum or a mark, whether None is allowed and the function that checks a value."""
    checks: dict[str, tuple[bool, Callable[[str, Any], Any]]] = {}
    for name, hint in hints_of(kind).items():
        for option in (options := options_of(hint)):
            if isinstance(option, type) and issubclass(option, StrEnum):
                checks[name] = type(None) in options, partial(word, option)
            for mark in marks_of(option):
                if hasattr(mark, "check"):
                    checks[name] = type(None) in options, partial(mark.check, get_args(option)[0])
    return checks


def options_of(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union type; any other type is its only member."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _typed(where: str, hint: Any, value: Any, whole: bool) -> Any:
    """Return the value converted to the annotated type; an int in place of a float stays an int."""
    if (options := options_of(hint)) != (hint,):
        hint = type(None) if value is None else next(each for each in options if each is not type(None))
    if is_dataclass(hint):
        return value if type(value) is hint else build(cast(type, hint), value, whole=whole)
    inner = get_args(hint)
    if (
        isinstance(hint, type) and issubclass(hint, tuple) and isinstance(value, list) and not inner
    ):  # a NamedTuple
        kinds = get_type_hints(hint).values()
        return hint(*_typed(where, tuple[*kinds], value, whole))
    if get_origin(hint) is list:
        return list(_typed(where, tuple[inner[0], ...], value, whole))
    if get_origin(hint) is tuple and isinstance(value, list):
        items = cast(list[Any], value)
        if inner[-1] is not Ellipsis and len(items) != len(inner):
            raise Undecodable(f"{where} has another length")
        kinds = inner if inner[-1] is not Ellipsis else inner[:1] * len(items)
        return tuple(_typed(where, *each, whole) for each in zip(kinds, items, strict=True))
    if get_origin(hint) is Mapping and isinstance(value, dict):
        items = cast(dict[Any, Any], value)
        if any(type(name) is not inner[0] for name in items):
            raise Undecodable(f"{where} has a key of another type")
        return {name: _typed(where, inner[1], each, whole) for name, each in items.items()}
    if hint is Any or marks_of(hint) or (isinstance(hint, type) and issubclass(hint, StrEnum)):
        return value  # `check_fields` checks it, with a sentence for users
    sound = type(value) is hint or (hint is float and type(value) is int)
    if not sound or (isinstance(value, float) and not math.isfinite(value)):
        raise Undecodable(f"{where} is of another type")
    return value


def _check_depth(text: str) -> None:
    depth = 0
    for match in _MARKS.finditer(text):
        mark = match[0]
        depth += (mark in "[{") - (mark in "]}")
        if depth > JSON_DEPTH:
            raise Undecodable(f"groups deeper than {JSON_DEPTH}")


def _unique(pairs: Any) -> dict[Any, Any]:
    items = list(cast(Iterator[tuple[Any, Any]], pairs))
    unique = dict(items)
    if len(unique) != len(items):
        raise Undecodable("a key stands twice")
    return unique


def _whole(digits: str) -> int:
    if len(digits.removeprefix("-")) > MAX_DIGITS:
        raise Undecodable(f"a whole number of more than {MAX_DIGITS} digits")
    return int(digits)


def _check(data: bytes | bytearray | memoryview, bounds: Bounds) -> None:
    """Raise Undecodable unless the bytes are one value within the bounds; no value is built."""
    at, items, end = 0, 0, len(data)
    due = [1]  # number of missing values, by level
    while due:
        if not due[-1]:
            due.pop()
            continue
        due[-1] -= 1
        if at >= end:
            raise Undecodable("it ends before its last value")
        items += 1
        at, count = _passed(data, at)
        if count is None:
            continue
        if len(due) > bounds.depth:
            raise Undecodable(f"lists deeper than {bounds.depth}")
        if count > min(bounds.width, bounds.items - items, end - at):
            raise Undecodable("a list that is longer than the bytes, or than any")
        due.append(count)
    if at != end or items > bounds.items:
        raise Undecodable("bytes behind its last value, or too many values")


def _passed(data: bytes | bytearray | memoryview, at: int) -> tuple[int, int | None]:
    """Return the end of the value at `at`, and None; for a list or map, the end of its header and its number of values."""
    head, at = data[at], at + 1
    if head < 0x80 or head >= 0xE0:
        return at, None
    if head < 0xA0:
        return at, (head & 15) * (2 if head < 0x90 else 1)
    if head < 0xC0:
        return at + (head & 31), None
    if head in _FIXED:
        return at + _FIXED[head], None
    if (wide := _SIZED.get(head)) is not None:
        return at + wide + int.from_bytes(data[at : at + wide], "big"), None
    if (wide := _COUNTED.get(head)) is not None:
        count = int.from_bytes(data[at : at + wide], "big")
        return at + wide, count * (2 if head in _MAPS else 1)
    raise Undecodable("an extension")
