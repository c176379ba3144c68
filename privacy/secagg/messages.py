"""Messages that travel: frozen dataclasses, written as msgpack arrays [kind, *fields] and read strictly.

Untrusted fields have one type, length and order each, or the message is refused. A reply after the first one ends in a
tag under a key that only this node and this server share for this attempt, so that a modified reply is dropped and
never summed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Sequence
from dataclasses import astuple, dataclass
from enum import Enum
from functools import cache, cached_property, lru_cache, partial
from itertools import pairwise
from typing import Annotated, Any, TypeVar, cast, get_args, get_type_hints

import msgpack

from ...base import bounded_decoding
from ...base.bounded_decoding import Bounds, Undecodable
from .complaint import PROOF_BYTES
from .deal import COMMITMENT_BYTES, SEED_COMMITMENT_BYTES
from .graph import MAXIMUM_CLIENTS
from .refusal import Reason, Refused
from .shamir import SECRET_BYTES
from .suite import KEM_KEY_BYTES, KEY_BYTES, NONCE_BYTES, SUITES, TAG_BYTES
from .transcript import HASH_BYTES, AttemptTerms, Purpose, frame

SHARE_BYTES = 32
SEAL_BYTES = NONCE_BYTES + TAG_BYTES  # added by sealing; alone, the tag of a reply
SEALED_BYTES = 2 * SHARE_BYTES + SEAL_BYTES
EVIDENCE_BYTES = COMMITMENT_BYTES + SHARE_BYTES + HASH_BYTES
FURTHER_BYTES = 8  # of the number that is sealed behind a masked vector
DECLINED_BYTES = 40  # no other reply is as short
NODES = 1 << 64  # Flower's node numbers are unsigned 64-bit
# The deepest value is a node's memory: attempts, each with its openings, each with a number and a seed. The largest are
# the adverts of a cohort, with their fields.
BOUNDS = Bounds(depth=5, width=MAXIMUM_CLIENTS, items=8 * MAXIMUM_CLIENTS)


# --- fields, as they come from others


def unpack(data: bytes) -> Any:
    """Return the msgpack value of the bytes, without extensions.

    Raises:
      Refused: MALFORMED, if there is none.
    """
    try:
        return bounded_decoding.unpack(data, BOUNDS)
    except Undecodable as error:
        raise Refused(Reason.MALFORMED, str(error)) from error


# Each reader returns a decoded msgpack value in the type of a field, or refuses it as malformed.


def _bytes(value: Any, lengths: Container[int], problem: str) -> bytes:
    if type(value) is not bytes or len(value) not in lengths:
        raise Refused(Reason.MALFORMED, problem)
    return value


def _fixed(length: int) -> Callable[[Any], bytes]:
    """Return the reader of byte strings of this length."""
    return partial(_bytes, lengths={length}, problem=f"not {length} bytes")


def _multiple(length: int) -> Callable[[Any], bytes]:
    """Return the reader of byte strings of a multiple of this length."""
    multiples = range(0, sys.maxsize, length)
    return partial(_bytes, lengths=multiples, problem=f"not a multiple of {length} bytes")


SIGNATURES = frozenset(suite.signature_bytes for suite in SUITES.values())  # lengths


def _node(value: Any) -> int:
    if type(value) is not int or not 0 <= value < NODES:
        raise Refused(Reason.MALFORMED, "no node")
    return value


def _ascending(nodes: Sequence[int]) -> None:
    if any(previous >= node for previous, node in pairwise(nodes)):
        raise Refused(Reason.MALFORMED, "nodes not in ascending order, each once")


def _nodes(value: Any) -> tuple[int, ...]:
    if type(value) is not list:
        raise Refused(Reason.MALFORMED, "not a list of nodes")
    nodes = tuple(_node(item) for item in cast(list[Any], value))
    _ascending(nodes)
    return nodes


def _reason(value: Any) -> str:
    if type(value) is not str or value not in list(Reason):
        raise Refused(Reason.MALFORMED, "no reason")
    return value


def write_terms(terms: AttemptTerms) -> list[Any]:
    """Return what `read_terms` reads."""
    return [field.value if isinstance(field, Enum) else field for field in astuple(terms)]


def read_terms(value: Any) -> AttemptTerms:
    """Return terms from a msgpack list.

    Raises:
      Refused: MALFORMED, where a field has another type.
    """
    hints = _term_hints()
    if type(value) is not list or len(cast(list[Any], value)) != len(hints):
        raise Refused(Reason.MALFORMED, "not terms")
    fields = [_term(item, kind) for item, kind in zip(cast(list[Any], value), hints.values(), strict=True)]
    return AttemptTerms(*fields)


@cache
def _term_hints() -> dict[str, Any]:
    return get_type_hints(AttemptTerms)


def _term(value: Any, kind: Any) -> Any:
    """Return a decoded field of terms in its type."""
    if issubclass(kind, Enum) and type(value) is str and value in {member.value for member in kind}:
        return kind(value)
    if type(value) is not kind or (type(value) is int and not 0 <= value < NODES):
        raise Refused(Reason.MALFORMED, "terms with a field of another type")
    return value


Node = Annotated[int, _node]
Nodes = Annotated[tuple[int, ...], _nodes]
Hash = Annotated[bytes, _fixed(HASH_BYTES)]
Key = Annotated[bytes, _fixed(KEY_BYTES)]
Signature = Annotated[bytes, partial(_bytes, lengths=SIGNATURES, problem="no signature")]
LateSignature = Annotated[bytes, partial(_bytes, lengths={0, *SIGNATURES}, problem="no signature")]
Sealed = Annotated[bytes, _multiple(SEALED_BYTES)]
Shares = Annotated[bytes, _multiple(SHARE_BYTES)]
Kem = Annotated[bytes, _multiple(1)]  # blocks of two sizes, which `hybrid.blocks` checks


# --- the messages


@dataclass(frozen=True)
class Proposal:
    """0, to the node: the attempt's public terms, its candidates, and the server's ephemeral X25519 key."""

    terms: Annotated[AttemptTerms, read_terms]
    candidates: Nodes
    server_key: Key


@dataclass(frozen=True)
class Advert:
    """0, reply: a node's ephemeral keys, and a signature.

    Attributes:
      node: who advertises.
      mask_key: X25519, for masks.
      share_key: X25519, for shares.
      signature: by the node's identity.
      kem_keys: ML-KEM's for shares and for masks, where the suite is hybrid; else empty.
    """

    node: Node
    mask_key: Key
    share_key: Key
    signature: Signature
    kem_keys: Annotated[bytes, _multiple(KEM_KEY_BYTES)] = b""

    @cached_property
    def body(self) -> bytes:
        """Bytes that the node signs in the attempt's context."""
        return frame(Purpose.ADVERT, self.node, self.mask_key, self.share_key, self.kem_keys)


@dataclass(frozen=True)
class CohortAdverts:
    """1, to the node: every advert of the attempt, by ascending node."""

    context: Hash
    adverts: Annotated[tuple[Advert, ...], _rows(Advert)]


@dataclass(frozen=True)
class SealedShares:
    """1, reply: one sealed pair of shares for each neighbour, by ascending node, and the cohort it is for.

    Attributes:
      cohort: hash of all adverts, 32 bytes.
      sealed: `SEALED_BYTES` for each neighbour.
      commitments: to these shares, as `deal` says, for each neighbour.
      proof: as `deal` says, a value for each neighbour.
      seed: commitment to the private seed.
      signature: by the node's identity, over all of this.
      kem: a block for each neighbour, as `hybrid` says; empty without it.
    """

    cohort: Hash
    sealed: Sealed
    commitments: Annotated[bytes, _multiple(COMMITMENT_BYTES)]
    proof: Shares
    seed: Annotated[bytes, _fixed(SEED_COMMITMENT_BYTES)]
    signature: Signature
    kem: Kem = b""


@dataclass(frozen=True)
class NeighbourShares:
    """2, to the node: the deals of its neighbours that shared, by ascending node.

    Attributes:
      context: of the attempt, 32 bytes.
      sharers: nodes that shared at all.
      sealed: of each neighbour among them, `SEALED_BYTES`.
      evidence: of each what it takes to check a share, `EVIDENCE_BYTES`: commitments, value of the proof, hash of
        all commitments.
      kem: blocks of the neighbours, as `hybrid` says; empty without it.
    """

    context: Hash
    sharers: Nodes
    sealed: Sealed
    evidence: Annotated[bytes, _multiple(EVIDENCE_BYTES)]
    kem: Kem = b""


@dataclass(frozen=True)
class Checked:
    """2, reply: dealers whose share did not open or does not match its commitment; usually none."""

    cohort: Hash
    accused: Nodes


@dataclass(frozen=True)
class Disputed:
    """2a, to a node that accused: the whole deals of those it accused, by ascending node, as they signed them."""

    context: Hash
    accused: Nodes
    deals: Annotated[tuple[SealedShares, ...], _rows(SealedShares)]


@dataclass(frozen=True)
class Complaints:
    """2a, reply: those whose signed deal is no good, and the secret shared with each, as `complaint` proves it.

    Attributes:
      cohort: hash of all adverts, 32 bytes.
      accused: dealers, ascending.
      proofs: of each, `PROOF_BYTES`.
      signatures: by the node's identity, over each complaint; none in version 3.
    """

    cohort: Hash
    accused: Nodes
    proofs: Annotated[bytes, _multiple(PROOF_BYTES)]
    signatures: Annotated[bytes, _multiple(1)] = b""


@dataclass(frozen=True)
class Void:
    """Complaint that nobody else can judge: its two nodes add no mask that they share."""

    holder: Node
    dealer: Node
    signature: Signature  # by the holder, of its complaint


@dataclass(frozen=True)
class Inbox:
    """3, to the node: the sharers with valid shares, and the initial model.

    Attributes:
      context: of the attempt, 32 bytes.
      model_hash: of the round's model.
      sharers: nodes that stay, ascending.
      void: of a hybrid suite, undecided complaints between two of them.
    """

    context: Hash
    model_hash: Hash
    sharers: Nodes
    void: Annotated[tuple[Void, ...], _rows(Void)] = ()


@dataclass(frozen=True)
class Survivors:
    """4, to the node: the survivors and the dropouts of the sum."""

    context: Hash
    alive: Nodes  # their vectors are in the sum
    dead: Nodes  # they shared, and no valid vector came


@dataclass(frozen=True)
class Confirmation:
    """4, reply: this node's signed view of the round and its survivors."""

    node: Node
    model_hash: Hash
    round_context: Hash  # `Agreement.round`
    survivors: Hash  # `survivors_digest`
    signature: Signature

    @cached_property
    def body(self) -> bytes:
        """Bytes that the node signs in the attempt's context."""
        fields = self.model_hash, self.round_context, self.survivors
        return frame(Purpose.SURVIVORS, self.node, *fields)


@dataclass(frozen=True)
class Confirmed:
    """5, to the node: the confirmations of the cohort."""

    context: Hash
    confirmations: Annotated[tuple[Confirmation, ...], _rows(Confirmation)]


@dataclass(frozen=True)
class Revealed:
    """5, reply: a share for each neighbour that shared: of its private seed if alive, else of its mask key.

    Attributes:
      survivors: hash of the round's survivors, 32 bytes.
      shares: `SHARE_BYTES` for each neighbour.
      mask_keys: for each neighbour that dropped out, the key of 32 bytes of the sender's mask with it, or what a hybrid
        suite derives it from; zeros for one with which it has none.
      seeds: of noise in the sender's own vector that this many survivors do not need, 32 bytes each.
      signature: by the node's identity, over all of this and the deals that it accepted; none in version 3.
    """

    survivors: Hash
    shares: Shares
    mask_keys: Annotated[bytes, _multiple(KEY_BYTES)]
    seeds: Annotated[bytes, _multiple(SECRET_BYTES)]
    signature: LateSignature = b""


@dataclass(frozen=True)
class Declined:
    """Any reply: a node's reason to stop, as a code and nothing else."""

    reason: Annotated[str, _reason]


Message = (
    Proposal
    | Advert
    | CohortAdverts
    | SealedShares
    | Inbox
    | Survivors
    | Confirmation
    | Confirmed
    | Revealed
    | Declined
    | NeighbourShares
    | Checked
    | Disputed
    | Complaints
)
LATE = (Inbox, Complaints, Revealed)  # version 3 lacks their last field, which is left out if it is empty
M = TypeVar("M", bound=Message | Void)


def write(message: Message) -> bytes:
    """Return the message's bytes."""
    return cast(bytes, msgpack.packb([_KINDS.index(type(message)), *_plain(message)]))


def read_any(data: bytes) -> Message:
    """Return the message that the bytes hold.

    Raises:
      Refused: MALFORMED, where a field is missing, added, of another type, length or order.
    """
    row = unpack(data)
    if type(row) is not list or not row or type(row[0]) is not int or not 0 <= row[0] < len(_KINDS):
        raise Refused(Reason.MALFORMED, "no message of this protocol")
    return _row(row[1:], _KINDS[row[0]])


# Of a cohort's messages: those of an attempt to all its nodes, and between them those to single nodes.
@lru_cache(maxsize=8)
def read_received(data: bytes) -> Message:
    """Return the message that the bytes hold, as `read_any`, decoded once for the nodes of this process that receive it."""
    return read_any(data)


def read(data: bytes, kind: type[M]) -> M:
    """Return the message of one kind that the bytes hold; arguments as of `read_any`.

    Raises:
      Refused: MALFORMED, see `read_any`; OUT_OF_ORDER for another kind.
    """
    return expect(read_any(data), kind)


def expect(message: Message, kind: type[M]) -> M:
    """Return the message if it is of this kind; raise Refused if not, as `read`."""
    if not isinstance(message, kind):
        raise Refused(Reason.OUT_OF_ORDER, f"a {type(message).__name__} where a {kind.__name__} is due")
    return message


def _plain(value: Message | Void) -> list[Any]:
    """Return the fields of a message as plain data for msgpack."""
    row = [_plain_field(getattr(value, name)) for name in _FIELDS[type(value)]]
    return row[:-1] if isinstance(value, LATE) and not row[-1] else row


def _plain_field(value: Any) -> Any:
    if isinstance(value, AttemptTerms):
        return write_terms(value)
    if isinstance(value, tuple) and value and not isinstance(value[0], int):
        return [_plain(item) for item in cast(tuple[Any, ...], value)]
    return value


def _row(values: Sequence[Any], kind: type[M]) -> M:
    """Return the message of this kind with these decoded fields."""
    readers = _FIELDS[kind]
    min_fields = len(readers) - (kind in LATE)
    if not min_fields <= len(values) <= len(readers):
        raise Refused(Reason.MALFORMED, f"{kind.__name__} has {len(readers)} fields")
    return kind(*(decode(value) for decode, value in zip(readers.values(), values, strict=False)))


def _rows(kind: type[Advert | Confirmation | SealedShares | Void]) -> Callable[[Any], tuple[Any, ...]]:
    """Return the reader of a list of messages of this kind, those with a node by ascending node."""

    def check(value: Any) -> tuple[Any, ...]:
        if type(value) is not list or any(type(item) is not list for item in cast(list[Any], value)):
            raise Refused(Reason.MALFORMED, f"not a list of {kind.__name__}")
        rows = tuple(_row(item, kind) for item in cast(list[Any], value))
        _ascending([row.node for row in rows if isinstance(row, (Advert, Confirmation))])
        return rows

    return check


_KINDS: tuple[type[Message], ...] = get_args(Message)  # a message's index here is its kind on the wire
_FIELDS: dict[type[Message | Void], dict[str, Callable[[Any], Any]]] = {
    kind: {name: get_args(hint)[1] for name, hint in get_type_hints(kind, include_extras=True).items()}
    for kind in (*_KINDS, Void)
}
