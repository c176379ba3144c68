"""Roster of the members: names and public keys, signed by the federation's authority, not the server."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import msgpack
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ...base.bounded_decoding import Undecodable, unpack
from .double_signature import ML_DSA_KEY_BYTES, both_of, sign_as_authority, verify_authority, verify_by
from .messages import BOUNDS
from .refusal import Reason, Refused
from .suite import KEY_BYTES, Suite, public_of, sign, verify
from .transcript import HASH_BYTES, Purpose, digest

# Owners read it: no name looks like another, or contains a hash.
MEMBER_NAME = re.compile("[a-z0-9][a-z0-9_-]{0,47}")
_SIMULATED = re.compile("simulated client [0-9]{1,9}")
_FORMAT = 2
_UNCHAINED = 1  # older format, without the chain of earlier versions
UNKNOWN = bytes(HASH_BYTES)  # replaces the hash of a version in that format
_CONTEXT, _COSIGNED = digest(Purpose.ROSTER), digest(Purpose.COSIGNATURE)


@dataclass(frozen=True)
class Member:
    """One client: its node number, name, Ed25519 public key, and the Unix second until which the key is valid.

    `post_quantum` is its ML-DSA-65 public key; empty where the federation does not sign with it.
    """

    node: int
    name: str
    public: bytes
    not_after: int
    post_quantum: bytes = field(default=b"", repr=False)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the public key, in hexadecimal, by which an owner recognises a peer."""
        return hashlib.sha256(self.public).hexdigest()

    def check(self, suite: Suite, context: bytes, body: bytes, signature: bytes) -> None:
        """Check that the member signed a body as the suite requires; arguments as of `double_signature.verify_by`.

        Raises:
          Refused: BAD_SIGNATURE.
        """
        verify_by(suite, self.public, self.post_quantum, context, body, signature)

    @property
    def parts(self) -> tuple[int | str | bytes, ...]:
        """Fields of the member in a signed roster."""
        fields = (self.node, self.name, self.public, self.not_after)
        return (*fields, self.post_quantum) if self.post_quantum else fields


@dataclass(frozen=True)
class Roster:
    """Version of the list of members, in order of their nodes, and the chain of versions before it.

    Attributes:
      version: counts from 1.
      members: by ascending node.
      earlier: hashes of the versions before, from the first on; `UNKNOWN` for a version without a chain; empty where
        there is no chain, as in a simulation.

    Raises:
      Refused: MALFORMED when members are unordered, or two of them share a node, a name or a key, or the chain is of
        another length.
    """

    version: int
    members: tuple[Member, ...]
    earlier: tuple[bytes, ...] = ()

    def __post_init__(self) -> None:
        nodes = [member.node for member in self.members]
        if nodes != sorted(set(nodes)):
            raise Refused(Reason.MALFORMED, "members are not in strict order of their nodes")
        for name in ("public", "name"):
            if len({getattr(member, name) for member in self.members}) != len(self.members):
                raise Refused(Reason.MALFORMED, "two members have one key, or one name")
        if any(len(member.public) != KEY_BYTES for member in self.members):
            raise Refused(Reason.MALFORMED, f"a public key is not {KEY_BYTES} bytes long")
        if any(len(member.post_quantum) not in (0, ML_DSA_KEY_BYTES) for member in self.members):
            raise Refused(Reason.MALFORMED, f"an ML-DSA key is not {ML_DSA_KEY_BYTES} bytes long")
        if self.earlier and (
            len(self.earlier) != self.version - 1 or {len(each) for each in self.earlier} != {HASH_BYTES}
        ):
            problem = "the chain of earlier versions is not as long as the version says"
            raise Refused(Reason.MALFORMED, problem)

    @cached_property
    def hash(self) -> bytes:
        """Hash by which the terms of an attempt name the roster, 32 bytes."""
        parts = (part for member in self.members for part in member.parts)
        return digest(Purpose.ROSTER, self.version, len(self.earlier), *self.earlier, *parts)

    def holders(self, fingerprints: AbstractSet[str], nodes: Iterable[int]) -> list[int]:
        """Return those of the nodes whose keys have one of these `Member.fingerprint`s."""
        members = ((node, self._by_node.get(node)) for node in nodes)
        return [node for node, member in members if member and member.fingerprint in fingerprints]

    def follows(self, other: Roster) -> bool:
        """Return whether the other version is in this one's chain, which has every version that it came from."""
        return 0 < other.version <= len(self.earlier) and self.earlier[other.version - 1] == other.hash

    @cached_property
    def _by_node(self) -> dict[int, Member]:
        return {member.node: member for member in self.members}

    def name_of(self, node: int) -> str:
        """Return the name of the member at `node`, whether its key is still valid or not."""
        return self._by_node[node].name

    def ended(self, now: int) -> frozenset[int]:
        """Return the nodes of members whose key has expired at the Unix second `now`."""
        return frozenset(member.node for member in self.members if now > member.not_after)

    def member(self, node: int, now: int) -> Member:
        """Return the member at `node`, valid at the Unix second `now`.

        Raises:
          Refused: UNKNOWN_MEMBER or EXPIRED.
        """
        member = self._by_node.get(node)
        if member is None:
            raise Refused(Reason.UNKNOWN_MEMBER, f"node {node} is not in roster version {self.version}")
        if now > member.not_after:
            raise Refused(Reason.EXPIRED, f"the key of {member.name} expired at {member.not_after}")
        return member


def write_roster(
    roster: Roster,
    authority: Ed25519PrivateKey,
    cosignatures: Mapping[bytes, bytes] | None = None,
    *,
    doubly: bool = False,
    successor: Ed25519PrivateKey | None = None,
) -> bytes:
    """Return the roster as the authority signs it.

    Args:
      roster: to sign.
      authority: its key.
      cosignatures: of members of the version before, by public key, as `cosign` makes them.
      doubly: whether its ML-DSA key signs as well, and travels along.
      successor: the key that replaces the authority's, and signs beside it during the overlap. Its signature stands
        among those of members, where an earlier release looks for its own members only.
    """
    entries = [member.parts for member in roster.members]
    body = cast(bytes, msgpack.packb((_FORMAT, roster.version, roster.earlier, entries)))
    signed = (body, sign_as_authority(authority, _CONTEXT, body, doubly=doubly))
    extra = dict(cosignatures or {})
    if successor is not None:
        public = both_of(successor) if doubly else public_of(successor)
        extra[public] = sign_as_authority(successor, _CONTEXT, body, doubly=doubly)
    return cast(bytes, msgpack.packb((*signed, sorted(extra.items())) if extra else signed))


def read_roster(data: bytes, authority: bytes, *others: bytes) -> Roster:
    """Return the roster that an authority signed.

    Args:
      data: what `write_roster` returned.
      authority: Ed25519 public key, 32 bytes; with the hash of its ML-DSA key behind it both must have signed.
      others: keys of authorities of which any may have signed instead.

    Raises:
      Refused: MALFORMED, or BAD_SIGNATURE.
    """
    body, first, _ = _parts(data)
    cosignatures = cosignatures_in(data).items()
    # A successor's signature is among the cosignatures; see `write_roster`.
    signatures = [
        (public, signature)
        for public in (authority, *others)
        for signature in (*(each for key, each in cosignatures if key[: len(public)] == public), first)
    ]
    for number, (public, signature) in enumerate(signatures, 1):
        try:
            verify_authority(public, _CONTEXT, body, signature)
            break
        except Refused:
            if number == len(signatures):
                raise
    return roster_in(data)


def roster_in(data: bytes) -> Roster:
    """Return the roster in the output of `write_roster`, without a check of its signatures.

    Raises:
      Refused: MALFORMED.
    """
    body, _, _ = _parts(data)
    fields = _unpack(body)
    if isinstance(fields, tuple) and fields[:1] == (_UNCHAINED,):  # then add the field of an empty chain
        fields = (_FORMAT, *cast(tuple[object, ...], fields)[1:2], (), *cast(tuple[object, ...], fields)[2:])
    number, version, earlier, entries = _exactly(fields, (int, int, tuple, tuple))
    if number != _FORMAT:
        raise Refused(Reason.MALFORMED, f"roster format {number} is not known")
    members = tuple(map(_member, entries))
    return Roster(version, members, _exactly(earlier, (bytes,) * len(earlier)))


def _member(entry: object) -> Member:
    """Return the member of `Member.parts`."""
    doubly = isinstance(entry, tuple) and len(cast(tuple[object, ...], entry)) == 5  # with an ML-DSA key
    member = Member(*_exactly(entry, (int, str, bytes, int, *[bytes] * doubly)))
    if not MEMBER_NAME.fullmatch(member.name) and not _SIMULATED.fullmatch(member.name):
        raise Refused(Reason.MALFORMED, f"{member.name[:48]!a} is no name of a member")
    return member


def cosign(roster: Roster, member: Ed25519PrivateKey) -> bytes:
    """Return a member's signature of a roster, which covers every version in the roster's chain."""
    return sign(member, _COSIGNED, roster.hash)


def cosignatures_in(data: bytes) -> dict[bytes, bytes]:
    """Return the unchecked signatures of members in the output of `write_roster`, by public key.

    Raises:
      Refused: MALFORMED.
    """
    _, _, pairs = _parts(data)
    return dict(_exactly(pair, (bytes, bytes)) for pair in pairs)


def cosigned_by(roster: Roster, cosignatures: Mapping[bytes, bytes]) -> frozenset[bytes]:
    """Return the public keys whose signature of the roster, as `cosign` makes it, is valid."""
    return frozenset(key for key, signature in cosignatures.items() if _is_cosigned(roster, key, signature))


def _is_cosigned(roster: Roster, public: bytes, signature: bytes) -> bool:
    try:
        verify(public, _COSIGNED, roster.hash, signature)
    except Refused:
        return False
    return True


def _parts(data: bytes) -> tuple[bytes, bytes, tuple[object, ...]]:
    """Return body, signature and pairs of cosigner and cosignature from the output of `write_roster`."""
    parts = _unpack(data)
    if isinstance(parts, tuple) and len(cast(tuple[object, ...], parts)) == 2:
        parts = (*cast(tuple[object, ...], parts), ())
    body, signature, pairs = _exactly(parts, (bytes, bytes, tuple))
    return body, signature, pairs


def _unpack(data: bytes) -> object:
    try:
        return unpack(data, BOUNDS, use_list=False)
    except Undecodable as error:
        raise Refused(Reason.MALFORMED, "the roster is not readable") from error


def _exactly(value: object, kinds: tuple[type, ...]) -> tuple[Any, ...]:
    """Return the value if it is a tuple with exactly these types of items; otherwise refuse it."""
    if not isinstance(value, tuple) or tuple(map(type, cast(tuple[object, ...], value))) != kinds:
        raise Refused(Reason.MALFORMED, "the roster is not made as it should be")
    return cast(tuple[Any, ...], value)
