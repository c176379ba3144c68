"""Fields of messages as they come from others: each of one type, length and order, or the message is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple
from enum import Enum
from itertools import pairwise
from typing import Any, cast, get_type_hints

import msgpack

from .refusal import Reason, Refused
from .transcript import Terms

NODES = 1 << 64  # Flower's node numbers are unsigned 64-bit


def unpack(data: bytes) -> Any:
    """Return what the bytes say in msgpack, without extensions.

    Raises:
      Refused: MALFORMED, if they say nothing.
    """
    try:
        return msgpack.unpackb(data, strict_map_key=True, ext_hook=_no_extension)
    except Exception as error:  # msgpack documents no closed set
        raise Refused(Reason.MALFORMED, "not msgpack") from error


def _no_extension(code: int, data: bytes) -> object:
    raise ValueError(code)


def fixed(length: int) -> Callable[[Any], bytes]:
    def check(value: Any) -> bytes:
        if type(value) is not bytes or len(value) != length:
            raise Refused(Reason.MALFORMED, f"not {length} bytes")
        return value

    return check


def many(length: int) -> Callable[[Any], bytes]:
    def check(value: Any) -> bytes:
        if type(value) is not bytes or len(value) % length:
            raise Refused(Reason.MALFORMED, f"not a multiple of {length} bytes")
        return value

    return check


def node(value: Any) -> int:
    if type(value) is not int or not 0 <= value < NODES:
        raise Refused(Reason.MALFORMED, "no node")
    return value


def ascending(nodes: Sequence[int]) -> None:
    if any(left >= right for left, right in pairwise(nodes)):
        raise Refused(Reason.MALFORMED, "nodes not in ascending order, each once")


def nodes(value: Any) -> tuple[int, ...]:
    if type(value) is not list:
        raise Refused(Reason.MALFORMED, "not a list of nodes")
    nodes = tuple(node(item) for item in cast(list[Any], value))
    ascending(nodes)
    return nodes


def reason(value: Any) -> str:
    if type(value) is not str or value not in list(Reason):
        raise Refused(Reason.MALFORMED, "no reason")
    return value


def write_terms(terms: Terms) -> list[Any]:
    """Return what `read_terms` reads."""
    return [field.value if isinstance(field, Enum) else field for field in astuple(terms)]


def read_terms(value: Any) -> Terms:
    """Return terms from a msgpack list.

    Raises:
      Refused: MALFORMED, where a field has another type.
    """
    hints = get_type_hints(Terms)
    if type(value) is not list or len(cast(list[Any], value)) != len(hints):
        raise Refused(Reason.MALFORMED, "not terms")
    fields = [_term(item, kind) for item, kind in zip(cast(list[Any], value), hints.values(), strict=True)]
    return Terms(*fields)


def _term(value: Any, kind: Any) -> Any:
    if issubclass(kind, Enum) and type(value) is str and value in {member.value for member in kind}:
        return kind(value)
    if type(value) is not kind or (type(value) is int and not 0 <= value < NODES):
        raise Refused(Reason.MALFORMED, "terms with a field of another type")
    return value
