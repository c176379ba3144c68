"""Change from one version of a roster to a newer one, as people read it: who was added, who was removed, when it was seen."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .roster import Roster

# Hexadecimal digits of a fingerprint in a line of text. An authority could find another key with the same 12 digits.
FINGERPRINT_DIGITS = 32


@dataclass(frozen=True)
class RosterChange:
    """Change from one version of the roster to another.

    Attributes:
      version, hash: of the newer one, the hash in hexadecimal.
      before: version of the older one; 0 where there was none.
      members: number of members of the newer one.
      added, removed: members as "name fingerprint"; a member with new keys is in both.
      at: time at which the change was seen, UTC in ISO 8601.
    """

    version: int
    hash: str
    before: int
    members: int
    added: tuple[str, ...]
    removed: tuple[str, ...]
    at: str

    def __str__(self) -> str:
        return f"roster version {self.version} of {self.members} members; {self.summary}"

    @property
    def summary(self) -> str:
        """Who was added and who was removed, in words."""
        groups = (("added", self.added), ("removed", self.removed))
        parts = [f"{word} " + ", ".join(map(_short, names)) for word, names in groups if names]
        return "; ".join(parts) or "the same members"


def names_of(roster: Roster) -> frozenset[str]:
    """Return the members of a roster, each as "name fingerprint"."""
    return frozenset(f"{member.name} {member.fingerprint}" for member in roster.members)


def change_between(old: Roster | None, new: Roster) -> RosterChange:
    """Return what differs between two rosters; without an old one, all members are added."""
    return change_from(frozenset(), 0, new) if old is None else change_from(names_of(old), old.version, new)


def change_from(before: frozenset[str], version: int, new: Roster) -> RosterChange:
    """Return what differs between an older version, its members as of `names_of`, and a newer roster.

    Other arguments as of `change_between`.
    """
    after, now = names_of(new), datetime.now(UTC).isoformat(timespec="seconds")
    added, removed = (tuple(sorted(each)) for each in (after - before, before - after))
    return RosterChange(new.version, new.hash.hex(), version, len(new.members), added, removed, now)


def _short(member: str) -> str:
    name, _, fingerprint = member.rpartition(" ")
    return f"{name} ({fingerprint[:FINGERPRINT_DIGITS]})"
