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
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import msgpack

from .refusal import Refusal, word

JSON_DEPTH = 8  # levels of nesting; an order has 2, a spec of shares 3
INFINITY = "infinity"  # word for infinite numbers, which JSON lacks
MAX_DIGITS = 20  # digits of an integer in JSON, enough for 64 bits
RARE = "rare"  # mark of a field that JSON omits at its default, so that earlier releases can read the rest
# MessagePack's formats by first byte (github.com/msgpack/msgpack, spec.md). Extensions are absent, and so refused.
# _FIXED: bytes of the value itself; _SIZED: bytes of the length of a text or byte string; _COUNTED: bytes of the number of
# items of a list or entries of a map.
_FIXED = {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8} | {0xCC + k: 1 << k % 4 for k in range(8)}
_SIZED = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
_COUNTED = {0xDC: 2, 0xDD: 4, 0xDE: 2, 0xDF: 4}
_MAPS = (0xDE, 0xDF)
_STRING_OR_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)  # a string may hold brackets

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
    _check_bounds(data, bounds)
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
        rare = _rare(type(value))
        values = {name: getattr(value, name) for name in hints_of(type(value))}
        return {name: plain_of(v) for name, v in values.items() if name not in rare or v != rare[name]}
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
    for name, check in _checks(type(value)).items():
        object.__setattr__(value, name, check(f"{path}{name}", getattr(value, name)))


def read_json_file(kind: type[T], path: Path) -> T | None:
    """Return the dataclass `kind` that a JSON file holds; None if the file is missing or cannot be decoded."""
    try:
        return build(kind, read_json(path.read_bytes()))
    except (OSError, ValueError):
        return None


def read_lines(kind: type[T], path: Path) -> list[T]:
    """Return the dataclasses in a file of JSON lines, none if it is missing; lines that cannot be decoded are skipped."""
    values: list[T] = []
    lines = path.read_bytes().splitlines() if path.exists() else []
    for line in lines:
        with suppress(Undecodable):
            values.append(build(kind, read_json(line)))
    return values


@cache
def hints_of(kind: type) -> dict[str, Any]:
    """Return the annotation of each constructor field by name; one whose only mark is `RARE` is returned without it."""
    hints = get_type_hints(kind, include_extras=True)
    # `_typed` leaves marked values to `check_fields`, which knows no `RARE`; without the mark it checks them itself.
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
def _checks(kind: type) -> dict[str, Callable[[str, Any], Any]]:
    """Return, for each field with a StrEnum or a mark, a function (name, value) that returns or refuses the value."""
    checks: dict[str, Callable[[str, Any], Any]] = {}
    for name, hint in hints_of(kind).items():
        for option in options_of(hint):
            if isinstance(option, type) and issubclass(option, StrEnum):
                checks[name] = partial(word, option)
            for mark in marks_of(option):
                if hasattr(mark, "check"):
                    checks[name] = partial(mark.check, get_args(option)[0])
        if name in checks and NoneType in options_of(hint):
            checks[name] = partial(_check_optional, checks[name])
    return checks


def _check_optional(check: Callable[[str, Any], Any], name: str, value: Any) -> Any:
    return None if value is None else check(name, value)


def options_of(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union type; any other type is its only member."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _typed(field: str, hint: Any, value: Any, whole: bool) -> Any:
    """Return a decoded value as the annotated type of its field; raise Undecodable for another type.

    An int may stand for a float, and stays an int. With `whole`, inner dataclasses need all fields but `RARE` ones.
    """
    if (options := options_of(hint)) != (hint,):  # an optional field
        hint = NoneType if value is None else next(each for each in options if each is not NoneType)
    if hint is Any or marks_of(hint) or (isinstance(hint, type) and issubclass(hint, StrEnum)):
        return value  # `check_fields` checks it, with a sentence for users
    if is_dataclass(hint):
        return value if type(value) is hint else build(cast(type, hint), value, whole=whole)
    kind = get_origin(hint) or hint  # such as tuple of tuple[int, ...]
    if isinstance(value, list) and isinstance(kind, type) and issubclass(kind, list | tuple):
        return _typed_items(field, hint, cast(list[Any], value), whole)
    if isinstance(value, dict) and kind is Mapping:
        (key_type, value_type), entries = get_args(hint), cast(dict[Any, Any], value)
        if any(type(key) is not key_type for key in entries):
            raise Undecodable(f"{field} has a key of another type")
        return {key: _typed(field, value_type, each, whole) for key, each in entries.items()}
    is_type = type(value) is hint or (hint is float and type(value) is int)
    if not is_type or (isinstance(value, float) and not math.isfinite(value)):
        raise Undecodable(f"{field} is of another type")
    return value


def _typed_items(field: str, hint: Any, items: list[Any], whole: bool) -> Any:
    """Return the items of a decoded list as the annotated list, tuple or NamedTuple; raise Undecodable for another length."""
    types = get_args(hint) or tuple(get_type_hints(hint).values())  # fields of a NamedTuple
    if get_origin(hint) is list or types[-1] is Ellipsis:  # one type for any number of items
        types = types[:1] * len(items)
    if len(items) != len(types):
        raise Undecodable(f"{field} has another length")
    converted = [_typed(field, each, item, whole) for each, item in zip(types, items, strict=True)]
    make = get_origin(hint) or hint._make
    return make(converted)


def _check_depth(text: str) -> None:
    """Raise Undecodable if more than `JSON_DEPTH` brackets are open at one time, before a recursive parser reads them."""
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        token = match[0]
        depth += (token in "[{") - (token in "]}")
        if depth > JSON_DEPTH:
            raise Undecodable(f"groups deeper than {JSON_DEPTH}")


def _unique(pairs: Any) -> dict[Any, Any]:
    """Return the pairs of a decoded object as a dictionary; raise Undecodable for a repeated key, which `dict` would drop."""
    items = list(cast(Iterator[tuple[Any, Any]], pairs))
    unique = dict(items)
    if len(unique) != len(items):
        raise Undecodable("a key stands twice")
    return unique


def _whole(digits: str) -> int:
    if len(digits.removeprefix("-")) > MAX_DIGITS:
        raise Undecodable(f"a whole number of more than {MAX_DIGITS} digits")
    return int(digits)


def _check_bounds(data: bytes | bytearray | memoryview, bounds: Bounds) -> None:
    """Check that the bytes are one value within the bounds, without building it; raise Undecodable if not."""
    at, items, end = 0, 0, len(data)
    # How many values have to follow: of the whole, of the open list in it, of the open list in that, ...
    missing = [1]
    while missing:
        if missing[-1] == 0:
            missing.pop()
            continue
        missing[-1] -= 1
        if at >= end:
            raise Undecodable("it ends before its last value")
        items += 1
        at, count = _skip(data, at)
        if count is None:  # neither a list nor a map
            continue
        if len(missing) > bounds.depth:
            raise Undecodable(f"lists deeper than {bounds.depth}")
        # Each value takes at least one byte, so no list may announce more values than bytes follow.
        if count > min(bounds.width, bounds.items - items, end - at):
            raise Undecodable("a list that is longer than the bytes, or than any")
        missing.append(count)
    if at != end or items > bounds.items:
        raise Undecodable("bytes behind its last value, or too many values")


def _skip(data: bytes | bytearray | memoryview, at: int) -> tuple[int, int | None]:
    """Return the end of the value that begins at `at`, and None; of a list or map the end of its header, and its length.

    The length is in values, of which an entry of a map has two. The end may lie behind the data; the caller checks it.
    """
    first, at = data[at], at + 1
    if first < 0x80 or first >= 0xE0:  # a small integer
        return at, None
    if first < 0x90:  # a short map
        return at, 2 * (first & 15)
    if first < 0xA0:  # a short list
        return at, first & 15
    if first < 0xC0:  # a short text
        return at + (first & 31), None
    if first in _FIXED:
        return at + _FIXED[first], None
    if first in _SIZED:
        end = at + _SIZED[first]
        return end + int.from_bytes(data[at:end], "big"), None
    if first in _COUNTED:
        end = at + _COUNTED[first]
        return end, (1 + (first in _MAPS)) * int.from_bytes(data[at:end], "big")
    raise Undecodable("an extension")
