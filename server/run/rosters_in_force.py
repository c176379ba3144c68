"""Rosters that were in force in a run: the file ROSTERS of its folder has a line for each, from which round on."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...privacy.bounded_decoding import Undecodable, build, read_json
from ...privacy.ledger.durable_files import open_for_owner
from ...privacy.secagg.roster import Roster
from ...privacy.secagg.roster_change import RosterChange, change_from
from ...reports.files import ROSTERS


@dataclass(frozen=True)
class InForce:
    """Roster in force, and the first round that may have been drawn from it."""

    round: int
    change: RosterChange


def note_roster(folder: Path, roster: Roster, number: int) -> None:
    """Write down the roster from which cohorts are drawn, unless it is the one of before.

    Args:
      folder: of the run.
      roster: now in force.
      number: of the round that comes next.

    Raises:
      OSError: the folder cannot be written.
    """
    known = rosters_in(folder)
    if known and known[-1].change.hash == roster.hash.hex():
        return
    members = frozenset[str]()
    for each in known:
        members = (members - set(each.change.removed)) | set(each.change.added)
    change = change_from(members, known[-1].change.version if known else 0, roster)
    with open_for_owner(folder / ROSTERS) as file:
        file.write((json.dumps(asdict(InForce(number, change))) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def rosters_in(folder: Path) -> list[InForce]:
    """Return the rosters of a run in their order, none in a simulation; a line that was cut short is left out."""
    path = folder / ROSTERS
    found: list[InForce] = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            found.append(build(InForce, read_json(line)))
        except Undecodable:
            continue
    return found


def told_rosters(folder: Path, names: bool) -> list[dict[str, Any]]:
    """Return the rosters of a run as its result tells them.

    Args:
      folder: of the run.
      names: whether who was a member may be told.
    """
    rows = [{"round": each.round, **asdict(each.change)} for each in rosters_in(folder)]
    secret = {} if names else dict.fromkeys(("members", "added", "removed"))
    return [row | secret for row in rows]
