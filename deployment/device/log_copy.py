"""Device's copy of the server's log: the hashes of its leaves and its newest head, compared with each instruction.

A server that sends one device different values than the others must either keep a separate log for it, and can then
never merge the two, or write both values into one log, whose entries reveal this. Devices compare their copies without
the server, and owners may require that witnesses have co-signed the head.
"""

import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from ...base.durable_files import replace_file, write_at
from ...base.refusal import Refusal
from ...links.cosigned_heads import FILE, read_cosignatures
from ...links.log_export import covers
from ...links.log_wire import NO_ENTRY, LogStatement
from ...links.server_log import final_entry, model_entry, roster_entry
from ...links.tree_head import TreeHead, check_head, read_head
from ...messages.flower_adapter import records_of
from ...messages.secure_wire import model_hash, roster_of
from ...messages.wire import OVER, SPEC_RECORD, read_round
from ...privacy.merkle import HASH_BYTES, Frontier, leaf_hash, root_of
from ...privacy.secagg.refusal import Refused
from ...privacy.secagg.roster import read_roster
from ...privacy.witness import TWO_BRANCHES, HeadCosignature, format_cosignatures, newest, read_cosignature
from .owner_policy import OwnerPolicy

logger = logging.getLogger("fedveil.client")

HEAD, LEAVES, FORK = "log.head.json", "log.leaves", "log.fork.json"
BRANCHES = "log.witness.json"  # evidence of a witness that has co-signed two branches
FORKED = "forks from what this device has seen"


def stored_cosignatures(state: Path) -> tuple[HeadCosignature, ...]:
    """Return the newest co-signature that a device has seen of each of its owner's witnesses.

    Raises:
      Refusal: the file cannot be read.
    """
    return read_cosignatures(state, "remove it")


def _store_cosignatures(state: Path, cosignatures: Sequence[HeadCosignature]) -> None:
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


class Forked(Refusal):
    """Refusal of a log that contradicts the device's copy."""


def expected_entries(content: RecordDict, *authorities: bytes) -> tuple[bytes | None, bytes | None]:
    """Return the entries that the log must contain for an instruction: of its model, and of its roster.

    Args:
      content: of the instruction.
      authorities: keys one of which must have signed the roster.

    Raises:
      Refusal: it belongs to a round and to a run's end, so that one of its models would be unchecked; or the roster is
        invalid.
    """
    records = records_of(content, ConfigRecord)
    model = roster = None
    if SPEC_RECORD in records and OVER in records:
        raise Refusal("log", "record", "an instruction must be either of a round or of a run's end")
    if records_of(content, ArrayRecord):
        model_digest = model_hash(content)
        if SPEC_RECORD in records:
            run, number = read_round(content)
            model = model_entry(run, number, model_digest)
        else:
            model = final_entry(str(records[OVER]["run"]), model_digest)
    if (signed := roster_of(content)) is not None:
        try:
            roster = roster_entry(read_roster(signed, *authorities))
        except Refused as refused:
            raise Refusal("roster", "of the server", f"is not signed by the authority ({refused})") from None
    return model, roster


def text_of_head(state: Path) -> str:
    """Return the newest head that a device has seen, as text; empty without one."""
    with suppress(OSError):
        return (state / HEAD).read_text("utf-8", "replace")
    return ""


class LogCopy:
    """Device's copy, in its state folder, of the log of its federation's server.

    Attributes:
      ca: certificates of the federation's authority, in PEM, one of which must have signed the server's.
      head, leaves: of the device's copy.

    Raises:
      Refusal: the copy on disk is damaged.
      OSError: it cannot be read.
    """

    def __init__(self, state: Path, federation: str, ca: bytes) -> None:
        self._state, self._federation, self.ca = state, federation, ca
        self.head: TreeHead | None = None
        self.leaves: list[bytes] = []
        self._frontier = Frontier()
        if (state / HEAD).exists():
            self._read()

    def _read(self) -> None:
        """Read head and leaves from disk; the leaves of an interrupted write beyond the head are left out."""
        head = read_head((self._state / HEAD).read_text("utf-8", "replace"))
        data = (self._state / LEAVES).read_bytes() if (self._state / LEAVES).exists() else b""
        self.leaves = [data[at : at + HASH_BYTES] for at in range(0, head.size * HASH_BYTES, HASH_BYTES)]
        self._frontier.add(self.leaves)
        if len(data) < head.size * HASH_BYTES or self._frontier.root.hex() != head.root:
            remedy = "does not match its head; compare with other clients, then fedveil client forget"
            raise Refusal("log", str(self._state / LEAVES), remedy)
        self.head = head

    def check(
        self,
        statement: LogStatement,
        model: bytes | None,
        roster: bytes | None,
        policy: OwnerPolicy | None = None,
    ) -> None:
        """Require that an instruction's log extends the device's copy and contains the instruction's entries; store it.

        Args:
          statement: the instruction's statement about the log.
          model: entry of the instruction's model; None if it has none.
          roster: entry of the instruction's roster.
          policy: the owner's, which may demand witnesses.

        Raises:
          Refusal: it does not; only evidence of a fork is stored.
          OSError: it cannot be stored.
        """
        head = read_head(statement.head)
        check_head(head, self.ca, self._federation)
        new_leaves = self._new_leaves(statement, head)
        leaves = [*self.leaves, *new_leaves] if new_leaves else self.leaves
        for entry, index, kind in ((model, statement.model, "model"), (roster, statement.roster, "roster")):
            is_logged = entry is None or (NO_ENTRY < index < head.size and leaves[index] == leaf_hash(entry))
            if not is_logged:
                remedy = f"lacks the {kind} that the server sent: others were sent another one"
                raise Refusal("log", f"entry {index}", remedy)
        texts = statement.cosignatures
        cosignatures = () if policy is None else require_witnesses(self._state, head, leaves, texts, policy)
        if self.head is None or head.size > len(self.leaves):
            self._keep(head, new_leaves)
        if cosignatures:
            _store_cosignatures(self._state, cosignatures)

    def _new_leaves(self, statement: LogStatement, head: TreeHead) -> tuple[bytes, ...]:
        """Return the statement's leaves that the copy lacks; refuse a log that does not continue the copy."""
        size, end = len(self.leaves), statement.start + len(statement.leaves)
        if not 0 <= statement.start <= min(size, head.size) or end != head.size:
            remedy = f"leaves out entries; this device has {size} of {head.size}"
            raise Refusal("log", f"entries {statement.start} to {end}", remedy)
        if head.size <= size:  # a newer instruction overtook this one
            if root_of(self.leaves[: head.size]).hex() != head.root:
                self._refuse_fork(statement, head)
            return ()
        frontier, new_leaves = self._frontier.copy(), statement.leaves[size - statement.start :]
        frontier.add(new_leaves)
        if frontier.root.hex() != head.root:
            self._refuse_fork(statement, head)
        return new_leaves

    def _refuse_fork(self, statement: LogStatement, head: TreeHead) -> NoReturn:
        """Store both heads as evidence, and refuse."""
        evidence = {
            "seen": None if self.head is None else asdict(self.head),
            "told": asdict(head),
            "start": statement.start,
            "leaves": [each.hex() for each in statement.leaves],
        }
        path = self._state / FORK
        if not path.exists():  # the first evidence is the one to keep
            replace_file(path, (json.dumps(evidence) + "\n").encode())
        logger.error("the server's log %s: %s holds both heads, signed by the server", FORKED, path)
        remedy = f"{FORKED}, {len(self.leaves)} entries; compare with other clients: fedveil client log"
        raise Forked("log", f"{head.size} entries", remedy)

    def _keep(self, head: TreeHead, new_leaves: tuple[bytes, ...]) -> None:
        """Store a newer head; the leaves first, so that a head on disk never lacks some."""
        self._state.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_at(self._state / LEAVES, len(self.leaves) * HASH_BYTES, b"".join(new_leaves))
        replace_file(self._state / HEAD, head.to_json().encode())
        self.leaves += new_leaves
        self._frontier.add(new_leaves)
        self.head = head
