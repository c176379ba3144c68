"""What travels: each message is a frozen dataclass, written as a msgpack array [kind, *fields] and read strictly.

A reply after the first one ends in a tag under a key that only this node and this server share for this
attempt, so that whatever was changed on the way is dropped and never summed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import msgpack

from .fields import ascending, fixed, many, node, nodes, read_terms, reason, unpack, write_terms
from .refusal import Reason, Refused
from .shamir import SECRET_BYTES
from .suite import KEM_KEY_BYTES, KEY_BYTES, NONCE_BYTES, SIGNATURE_BYTES, TAG_BYTES
from .transcript import HASH_BYTES, Terms

SHARE_BYTES = 32
SEAL_BYTES = NONCE_BYTES + TAG_BYTES  # what sealing adds; alone, it is the tag of a reply
SEALED_BYTES = 2 * SHARE_BYTES + SEAL_BYTES
DECLINED_BYTES = 40  # no other reply is as short


@dataclass(frozen=True)
class Proposal:
    """0, to the node: the attempt's public terms, who is asked, and the server's ephemeral X25519 key."""

    terms: Terms
    candidates: tuple[int, ...]
    server_key: bytes


@dataclass(frozen=True)
class Advert:
    """0, reply: ephemeral X25519 keys for masks and for shares, a commitment to the private seed, a signature.

    `kem_keys` are ML-KEM's for shares and for masks, where the suite is hybrid; else empty.
    """

    node: int
    mask_key: bytes
    share_key: bytes
    commitment: bytes
    signature: bytes
    kem_keys: bytes = b""


@dataclass(frozen=True)
class Cohort:
    """1, to the node: every advert of the attempt, by ascending node."""

    context: bytes
    adverts: tuple[Advert, ...]


@dataclass(frozen=True)
class SealedShares:
    """1, reply: one sealed pair of shares for each neighbour, by ascending node, and the cohort it is for.

    `kem` holds a block for each neighbour, as `hybrid` says; empty without it.
    """

    cohort: bytes
    sealed: bytes
    kem: bytes = b""


@dataclass(frozen=True)
class Inbox:
    """2, to the node: its neighbours' sealed shares and blocks, who shared at all, and which model to start from."""

    context: bytes
    model_hash: bytes
    sharers: tuple[int, ...]
    sealed: bytes
    kem: bytes = b""


@dataclass(frozen=True)
class Survivors:
    """3a, to the node: whose vectors are in the sum, and whose never came."""

    context: bytes
    alive: tuple[int, ...]
    dead: tuple[int, ...]


@dataclass(frozen=True)
class Confirmation:
    """3a, reply: what this node takes the round and its survivors to be, signed."""

    node: int
    model_hash: bytes
    round_context: bytes
    survivors: bytes
    signature: bytes


@dataclass(frozen=True)
class Confirmed:
    """3b, to the node: the confirmations of the cohort."""

    context: bytes
    confirmations: tuple[Confirmation, ...]


@dataclass(frozen=True)
class Revealed:
    """3b, reply: one share for each neighbour that shared: of the private seed if alive, of the mask key if not.

    `seeds` are those of noise in the sender's own vector that so many survivors do not need, 32 bytes each.
    """

    survivors: bytes
    shares: bytes
    seeds: bytes


@dataclass(frozen=True)
class Declined:
    """Any reply: a node's reason to stop, as a code and nothing else."""

    reason: str


Message = (
    Proposal
    | Advert
    | Cohort
    | SealedShares
    | Inbox
    | Survivors
    | Confirmation
    | Confirmed
    | Revealed
    | Declined
)
M = TypeVar("M", bound=Message)


def write(message: Message) -> bytes:
    """Return the message's bytes."""
    kind = type(message)
    return cast(bytes, msgpack.packb([_KINDS.index(kind), *_plain(message)]))


def read_any(data: bytes) -> Message:
    """Return the message that the bytes hold.

    Raises:
      Refused: MALFORMED, where a field is missing, added, of another type, length or order.
    """
    row = unpack(data)
    if type(row) is not list or not row or type(row[0]) is not int or not 0 <= row[0] < len(_KINDS):
        raise Refused(Reason.MALFORMED, "no message of this protocol")
    return _row(row[1:], _KINDS[row[0]])


def read(data: bytes, kind: type[M]) -> M:
    """Return the message of this kind.

    Raises:
      Refused: MALFORMED, see `read_any`; OUT_OF_ORDER for another kind.
    """
    message = read_any(data)
    if not isinstance(message, kind):
        raise Refused(Reason.OUT_OF_ORDER, f"a {type(message).__name__} where a {kind.__name__} is due")
    return message


def _plain(value: Message) -> list[Any]:
    return [_plain_field(getattr(value, name)) for name in _FIELDS[type(value)]]


def _plain_field(value: Any) -> Any:
    if isinstance(value, Terms):
        return write_terms(value)
    if isinstance(value, tuple):
        return [item if isinstance(item, int) else _plain(item) for item in cast(tuple[Any, ...], value)]
    return value


def _row(values: Sequence[Any], kind: type[Message]) -> Message:
    checks = _FIELDS[kind]
    if len(values) != len(checks):
        raise Refused(Reason.MALFORMED, f"{kind.__name__} has {len(checks)} fields")
    return kind(*(check(value) for check, value in zip(checks.values(), values, strict=True)))


def _rows(kind: type[Advert | Confirmation]) -> Callable[[Any], tuple[Message, ...]]:
    def check(value: Any) -> tuple[Message, ...]:
        if type(value) is not list or any(type(item) is not list for item in cast(list[Any], value)):
            raise Refused(Reason.MALFORMED, f"not a list of {kind.__name__}")
        rows = tuple(_row(item, kind) for item in cast(list[Any], value))
        ascending([cast(Advert | Confirmation, row).node for row in rows])
        return rows

    return check


_hash = fixed(HASH_BYTES)
_FIELDS: dict[type[Message], dict[str, Callable[[Any], Any]]] = {
    Proposal: {"terms": read_terms, "candidates": nodes, "server_key": fixed(KEY_BYTES)},
    Advert: {
        "node": node,
        "mask_key": fixed(KEY_BYTES),
        "share_key": fixed(KEY_BYTES),
        "commitment": _hash,
        "signature": fixed(SIGNATURE_BYTES),
        "kem_keys": many(KEM_KEY_BYTES),
    },
    Cohort: {"context": _hash, "adverts": _rows(Advert)},
    SealedShares: {"cohort": _hash, "sealed": many(SEALED_BYTES), "kem": many(1)},
    Inbox: {
        "context": _hash,
        "model_hash": _hash,
        "sharers": nodes,
        "sealed": many(SEALED_BYTES),
        "kem": many(1),
    },
    Survivors: {"context": _hash, "alive": nodes, "dead": nodes},
    Confirmation: {
        "node": node,
        "model_hash": _hash,
        "round_context": _hash,
        "survivors": _hash,
        "signature": fixed(SIGNATURE_BYTES),
    },
    Confirmed: {"context": _hash, "confirmations": _rows(Confirmation)},
    Revealed: {"survivors": _hash, "shares": many(SHARE_BYTES), "seeds": many(SECRET_BYTES)},
    Declined: {"reason": reason},
}
_KINDS = list(_FIELDS)
