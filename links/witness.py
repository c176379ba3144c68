"""Witness of a server's log: it co-signs a head that extends the last one that it co-signed, and no other.

The newest head of each federation that a key has co-signed lies beside the key.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from ..base.bounded_decoding import Undecodable, build, read_json
from ..base.durable_files import replace_file
from ..base.refusal import Refusal
from ..configs.bundle_files import read_file
from ..privacy.merkle import root_of
from ..privacy.witness import HeadCosignature, cosign_head
from .log_export import ConsistencyProof, LogDocument, LogExport
from .tree_head import TreeHead

SUFFIX = ".heads.json"  # of the file beside a key


@dataclass(frozen=True)
class WitnessedHead:
    """Head that a key has co-signed.

    Attributes:
      head: as the server signed it.
      cosignature: of the key.
    """

    head: TreeHead
    cosignature: HeadCosignature


def heads_of_key(path: Path) -> dict[str, WitnessedHead]:
    """Return the newest head that a private key has co-signed, by federation, from the file beside it; none without a file.

    Raises:
      Refusal: the file cannot be read.
    """
    file = path.with_name(f"{path.name}{SUFFIX}")
    if not file.exists():
        return {}
    try:
        content = cast(dict[str, object], read_json(read_file(file)))
        return {name: build(WitnessedHead, each) for name, each in content.items()}
    except (Undecodable, AttributeError) as error:
        raise Refusal("witness", str(file), f"cannot be read ({error}); restore its newest copy") from None


def contradiction(last: TreeHead, document: LogDocument) -> str:
    """Return a sentence on how a log does not extend a head, with both heads; empty if it does.

    Args:
      last: the head that was co-signed last.
      document: the log or a proof, checked by itself.

    Raises:
      Refusal: the document does not show whether it does.
    """
    head = document.head
    both = f"this key co-signed {last.size} entries, root {last.root}; here are {head.size}, root {head.root}"
    if head.size < last.size:
        return f"the log was cut, or is forked: {both}"
    root = None  # of the first `last.size` entries, in this document
    if head.size == last.size:
        root = head.root
    elif isinstance(document, LogExport):
        root = root_of([bytes.fromhex(each) for each in document.leaves[: last.size]]).hex()
    elif isinstance(document, ConsistencyProof) and document.size == last.size:
        root = document.root
    if root is None:
        remedy = f"shows nothing of the first {last.size} entries; take fedveil server log FOLDER --json, or --consistency {last.size}"
        raise Refusal("log", f"{head.size} entries", remedy)
    return "" if root == last.root else f"the log is forked: its first {last.size} entries are others: {both}"


def cosign_log(document: LogDocument, key: Ed25519PrivateKey, path: Path) -> HeadCosignature:
    """Return the co-signature of a log's head, once it is on disk beside the key; the same head gets the same again.

    Args:
      document: the log or proof; the caller has seen no `contradiction` with the head that the key co-signed last.
      key: of the witness.
      path: of the private key; the caller holds its lock, so that no other process signs meanwhile.

    Raises:
      Refusal: the log has no entry.
      OSError: nothing can be written; nothing is signed.
    """
    head, stored = document.head, heads_of_key(path)
    if head.size < 1:
        raise Refusal("log", head.federation, "has no entry yet; co-sign it once it has")
    last = stored.get(head.federation)
    if last is not None and (last.head.size, last.head.root) == (head.size, head.root):
        return last.cosignature
    cosignature = cosign_head(head.federation, head.size, head.root, int(time.time()), key)
    heads = {**stored, head.federation: WitnessedHead(head, cosignature)}
    text = json.dumps({name: asdict(each) for name, each in heads.items()}, indent=1)
    replace_file(path.with_name(f"{path.name}{SUFFIX}"), f"{text}\n".encode())
    return cosignature
