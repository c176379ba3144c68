"""Changes of the roster as a device's owner sees them: on the log, in a file of the state folder, and on demand to approve.

Who signs rosters decides with whom this device's vector is summed. A change that the owner does not see could surround it
with members of one party.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict
from pathlib import Path

from ...privacy.bounded_decoding import Undecodable, build, read_json
from ...privacy.ledger.durable_files import replace_file
from ...privacy.refusal import Refusal
from ...privacy.secagg.roster import Roster
from ...privacy.secagg.roster_change import RosterChange, change_between

logger = logging.getLogger("fedveil.client")

CHANGES, PENDING, APPROVED = "rosters.jsonl", "roster.pending.json", "roster.approved"


def check_change(state: Path, old: Roster, new: Roster, *, approve: bool) -> None:
    """Let a newer roster take the place of an older one, and write down what it changes.

    Args:
      state: folder of what the device remembers.
      old: that the device has.
      new: of a higher version, signed by the authority.
      approve: whether the owner must have approved of changed members.

    Raises:
      Refusal: it does not follow from the older one, or waits for the owner's approval.
    """
    if not new.follows(old):
        remedy = f"does not follow from version {old.version}, which this device has: the authority signed two; ask it"
        logger.error("roster version %s %s", new.version, remedy)
        raise Refusal("roster", f"version {new.version}", remedy)
    change = change_between(old, new)
    if approve and (change.added or change.removed) and _approved(state) != change.hash:
        _wait(state, change)
        remedy = f"waits for its owner: fedveil client roster FOLDER --approve {new.version}"
        raise Refusal("roster", f"version {new.version}", remedy)
    note(state, change)


def note(state: Path, change: RosterChange) -> None:
    """Write a change to the log and, durably, behind those before it."""
    logger.warning("%s", change)
    with open(state / CHANGES, "a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(change)) + "\n")
        file.flush()
        os.fsync(file.fileno())
    for name in (PENDING, APPROVED):
        (state / name).unlink(missing_ok=True)


def changes(state: Path) -> list[RosterChange]:
    """Return the changes that the device has seen, the oldest first; a line that was cut short is left out."""
    path = state / CHANGES
    found: list[RosterChange] = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            found.append(build(RosterChange, read_json(line)))
        except Undecodable:
            continue
    return found


def pending(state: Path) -> RosterChange | None:
    """Return the change that waits for the owner's approval, or None."""
    try:
        return build(RosterChange, read_json((state / PENDING).read_bytes()))
    except (OSError, Undecodable):
        return None


def approve(state: Path, version: int) -> RosterChange:
    """Approve of the change that waits; a running agent takes it with the next round that asks.

    Args:
      state: folder of what the device remembers.
      version: of the roster, as the owner read it.

    Raises:
      Refusal: no such version waits.
    """
    waiting = pending(state)
    if waiting is None or waiting.version != version:
        shown = "none waits" if waiting is None else f"version {waiting.version} waits"
        raise Refusal("approve", version, f"{shown}; look again and name what you have seen")
    replace_file(state / APPROVED, waiting.hash.encode())
    return waiting


def _approved(state: Path) -> str:
    try:
        return (state / APPROVED).read_text("ascii")
    except (OSError, ValueError):
        return ""


def _wait(state: Path, change: RosterChange) -> None:
    before = pending(state)
    if before is not None and before.hash == change.hash:
        return
    logger.warning("not taken before its owner approves: %s", change)
    replace_file(state / PENDING, (json.dumps(asdict(change)) + "\n").encode())
