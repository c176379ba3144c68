"""Log as a file, for comparison: a server's or a client's, and proofs for a verifier that has only a head."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

from ..base.bounded_decoding import RARE, Undecodable, build, plain_of, read_json
from ..base.refusal import Refusal
from ..configs.bundle_files import read_file
from ..privacy.merkle import extends, includes, leaf_hash, root_of
from ..privacy.witness import HeadCosignature
from .tree_head import TreeHead, check_head

FORMAT = "fedveil log 1"


@dataclass(frozen=True)
class LogExport:
    """Copy of the log at one party.

    Attributes:
      head: the party's newest one.
      leaves: hashes of its entries, in hexadecimal.
      entries: as text, in the same order; empty where only hashes are known, as on a device.
      format: `FORMAT`.
      cosignatures: of witnesses, each under a head of this log.
    """

    head: TreeHead
    leaves: tuple[str, ...]
    entries: tuple[str, ...] = ()
    format: str = FORMAT
    cosignatures: Annotated[tuple[HeadCosignature, ...], RARE] = ()


@dataclass(frozen=True)
class InclusionProof:
    """Proof that the log contains an entry, for a verifier with its head (RFC 9162, section 2.1.3).

    Attributes:
      head: of the log.
      entry: as text.
      place: index of the entry, from 0.
      inclusion: the proof's hashes, in hexadecimal.
      format: `FORMAT`.
    """

    head: TreeHead
    entry: str
    place: int
    inclusion: tuple[str, ...]
    format: str = FORMAT


@dataclass(frozen=True)
class ConsistencyProof:
    """Proof that the log extends a shorter one, for a verifier with both heads (RFC 9162, section 2.1.4).

    Attributes:
      head: of the log.
      size: of the shorter one.
      root: of the shorter one, in hexadecimal.
      consistency: the proof's hashes, in hexadecimal.
      format: `FORMAT`.
    """

    head: TreeHead
    size: int
    root: str
    consistency: tuple[str, ...]
    format: str = FORMAT


LogDocument = LogExport | InclusionProof | ConsistencyProof


def to_text(document: LogDocument) -> str:
    """Return a file's content; without co-signatures, an earlier release can read it."""
    return json.dumps(plain_of(document), indent=1)


def read_log(path: Path, ca: bytes, federation: str) -> LogDocument:
    """Return the log or proof in a file, after verifying its internal consistency.

    Raises:
      Refusal: it is neither, its head is not the server's, or its content does not match its head.
    """
    return parse_log(read_file(path), str(path), ca, federation)


def parse_log(text: bytes, name: str, ca: bytes, federation: str | None = None) -> LogDocument:
    """Return the log or proof in a text, after verifying its internal consistency.

    Args:
      text: JSON.
      name: of its file, for a refusal.
      ca: certificate of the authority, in PEM.
      federation: name of the expected one; None for the one that the text names, and the authority certified.

    Raises:
      Refusal: it is neither, its head is not the server's, or its content does not match its head.
    """
    try:
        content = read_json(text)
        keys = cast(dict[str, Any], content).keys() if isinstance(content, dict) else set[str]()
        proof = InclusionProof if "inclusion" in keys else ConsistencyProof
        document = build(proof if keys & {"inclusion", "consistency"} else LogExport, content)
        if document.format != FORMAT:
            raise Undecodable(f"format {document.format!r}")
        check_head(document.head, ca, document.head.federation if federation is None else federation)
        if not _holds(document):
            raise Refusal("log", name, "does not match its head; ask for a true copy")
    except ValueError as error:
        raise Refusal("log", name, f"is not an export or proof of a log ({error})") from None
    return document


def _holds(document: LogDocument) -> bool:
    """Return whether a log's content, or a proof, matches its head."""
    root, size = bytes.fromhex(document.head.root), document.head.size
    match document:
        case InclusionProof():
            proof = [bytes.fromhex(each) for each in document.inclusion]
            return includes(root, size, leaf_hash(document.entry.encode()), document.place, proof)
        case ConsistencyProof():
            proof = [bytes.fromhex(each) for each in document.consistency]
            return extends(bytes.fromhex(document.root), document.size, root, size, proof)
        case _:
            leaves = [bytes.fromhex(each) for each in document.leaves]
            hashed = tuple(leaf_hash(each.encode()).hex() for each in document.entries)
            whole = len(leaves) == size and root_of(leaves) == root and hashed in ((), document.leaves)
            return whole and all(
                covers(each, document.head.federation, leaves) for each in document.cosignatures
            )


def covers(cosignature: HeadCosignature, federation: str, leaves: Sequence[bytes]) -> bool:
    """Return whether a co-signature holds, and is under a head of this log."""
    size = cosignature.size
    return (
        cosignature.holds
        and cosignature.federation == federation
        and 0 < size <= len(leaves)
        and root_of(leaves[:size]).hex() == cosignature.root
    )


def double_signers(mine: LogExport, other: LogDocument) -> list[tuple[HeadCosignature, HeadCosignature]]:
    """Return the two co-signatures of each witness that signed both of two logs past their fork, which convict the witness.

    Args:
      mine: the own log, checked by itself.
      other: the other party's log or proof, checked by itself.
    """
    if not isinstance(other, LogExport) or (fork := _fork_index(mine, other)) is None:
        return []
    others = {each.public: each for each in other.cosignatures}
    pairs = [(each, others[each.public]) for each in mine.cosignatures if each.public in others]
    return [pair for pair in pairs if min(each.size for each in pair) > fork]


def _fork_index(mine: LogExport, other: LogExport) -> int | None:
    """Return the index of the first entry that differs; None if the common part agrees."""
    leaves = enumerate(zip(mine.leaves, other.leaves, strict=False))
    return next((index for index, (one, another) in leaves if one != another), None)


def fork_between(mine: LogExport, other: LogDocument) -> str:
    """Return a sentence on how another log contradicts the own one; empty if their common part agrees.

    Both were checked by themselves: their heads are the server's, so that a contradiction proves that it keeps two logs.
    """
    if isinstance(other, LogExport):
        fork = _fork_index(mine, other)
        return "" if fork is None else f"entry {fork} is another one there"
    if other.head.size == mine.head.size and other.head.root != mine.head.root:
        return f"the root of {mine.head.size} entries is another one there"
    if isinstance(other, InclusionProof):
        leaf = leaf_hash(other.entry.encode()).hex()
        here = other.place >= mine.head.size or mine.leaves[other.place] == leaf
        return "" if here else f"entry {other.place} is another one there"
    leaves = [bytes.fromhex(each) for each in mine.leaves]
    same = other.size > len(leaves) or root_of(leaves[: other.size]).hex() == other.root
    return "" if same else f"the root of {other.size} entries is another one there"
