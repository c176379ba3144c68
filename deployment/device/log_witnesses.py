"""Witnesses of the server's log at a device: how many of its owner's have co-signed the head of an instruction."""

import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from ...base.durable_files import replace_file
from ...base.refusal import Refusal
from ...links.cosigned_heads import FILE, read_cosignatures
from ...links.log_export import covers
from ...links.tree_head import TreeHead
from ...privacy.merkle import root_of
from ...privacy.witness import TWO_BRANCHES, HeadCosignature, format_cosignatures, newest, read_cosignature
from .owner_policy import OwnerPolicy

logger = logging.getLogger("fedveil.client")

BRANCHES = "log.witness.json"


def stored_cosignatures(state: Path) -> tuple[HeadCosignature, ...]:
    """Return the newest co-signature that a device has seen of each of its owner's witnesses.

    Raises:
      Refusal: the file cannot be read.
    """
    return read_cosignatures(state, "remove it")


def store_cosignatures(state: Path, cosignatures: Sequence[HeadCosignature]) -> None:
    """Store co-signatures, of each key the one with the most entries."""
    stored = stored_cosignatures(state)
    newest_ones = newest((*stored, *cosignatures))
    if newest_ones != stored:
        replace_file(state / FILE, format_cosignatures(newest_ones))


def require_witnesses(
    state: Path, head: TreeHead, leaves: Sequence[bytes], texts: Sequence[str], policy: OwnerPolicy
) -> tuple[HeadCosignature, ...]:
    """Return the co-signatures of the owner's witnesses under a head, each key once.

    Args:
      state: the device's state folder.
      head: of an instruction, signed by the server.
      leaves: hashes of the log's entries, at least as many as the head has.
      texts: co-signatures in the instruction; others than the owner's witnesses' count for nothing.
      policy: the owner's.

    Raises:
      Refusal: fewer than `witnessed_by_at_least` are under this head, or a witness has co-signed another branch.
      OSError: evidence cannot be stored.
    """
    names = {public: name for name, public in policy.witnesses.items()}
    cosignatures: list[HeadCosignature] = []
    for text in texts:
        with suppress(Refusal):
            each = read_cosignature(text)
            if each.public in names and each.federation == head.federation and each.holds:
                cosignatures.append(each)
    of_head = newest(each for each in cosignatures if (each.size, each.root) == (head.size, head.root))
    for each in cosignatures:
        if each not in of_head and each.size <= len(leaves) and not covers(each, head.federation, leaves):
            _refuse_branch(state, names[each.public], each, (*stored_cosignatures(state), *of_head), leaves)
    signers = sorted(names[each.public] for each in of_head)
    if len(signers) < policy.witnessed_by_at_least:
        remedy = f"is co-signed by {', '.join(signers) or 'none'} of [witnesses], and witnessed_by_at_least="
        remedy += f"{policy.witnessed_by_at_least}; ask the server's operator for its witnesses"
        raise Refusal("log", f"head of {head.size} entries", remedy)
    return of_head


def _refuse_branch(
    state: Path, name: str, other: HeadCosignature, signed: Sequence[HeadCosignature], leaves: Sequence[bytes]
) -> NoReturn:
    """Store a witness's co-signature of another branch with its own of this log, if any, and refuse."""
    here = next((each for each in signed if each.public == other.public and each.size >= other.size), None)
    this = f"{other.size} entries, root {root_of(leaves[: other.size]).hex()}, in this log"
    remedy = (
        f"{'has co-signed another branch' if here is None else TWO_BRANCHES}: {other}; and {here or this}"
    )
    if not (state / BRANCHES).exists():  # the first evidence is the one to keep
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        evidence = {"other": asdict(other), "own": None if here is None else asdict(here)}
        replace_file(state / BRANCHES, f"{json.dumps(evidence)}\n".encode())
    raise Refusal("witness", name, f"{remedy}; {state / BRANCHES} keeps the evidence")
