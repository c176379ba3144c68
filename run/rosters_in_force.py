"""Rosters of a run: the file ROSTERS of its folder has a line for each, with the first round that it applied to."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.bounded_decoding import read_lines
from ..base.durable_files import append_line
from ..privacy.secagg.roster_change import RosterChange, change_from
from .files import ROSTERS

if TYPE_CHECKING:
    from ..privacy.secagg.roster import Roster


@dataclass(frozen=True)
class InForce:
    """Roster in force, and the first round that may have been drawn from it."""

    round: int
    change: RosterChange


def note_roster(folder: Path, roster: Roster, number: int) -> None:
    """Record the roster from which cohorts are drawn, unless it is unchanged.

    Raises:
      OSError: the folder cannot be written.
    """
    rosters = rosters_in(folder)
    if rosters and rosters[-1].change.hash == roster.hash.hex():
        return
    members = frozenset[str]()
    for each in rosters:
        members = (members - set(each.change.removed)) | set(each.change.added)
    change = change_from(members, rosters[-1].change.version if rosters else 0, roster)
    append_line(folder / ROSTERS, asdict(InForce(number, change)))


def rosters_in(folder: Path) -> list[InForce]:
    """Return the rosters of a run in order, none in a simulation; a truncated line is left out."""
    return read_lines(InForce, folder / ROSTERS)


def roster_rows(folder: Path, names: bool) -> list[dict[str, Any]]:
    """Return the rosters of a run in the form of its result, with or without the members' names."""
    rows = [{"round": each.round, **asdict(each.change)} for each in rosters_in(folder)]
    secret = {} if names else dict.fromkeys(("members", "added", "removed"))
    return [row | secret for row in rows]
