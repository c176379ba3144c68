"""Change from one version of a roster to a newer one, as people read it: who was added, who was removed, when it was seen."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .roster import Roster

FINGERPRINT_DIGITS = 32  # hexadecimal digits of a fingerprint in a line of text: of 12, an authority finds another key with them


@dataclass(frozen=True)
class RosterChange:
    """Change from one version of the roster to another.

    Attributes:
      version, hash: of the newer one, the hash in hexadecimal.
      before: version of the older one; 0 where there was none.
      members: how many the newer one has.
      added, removed: names and fingerprints of keys, as "name fingerprint"; a member with new keys is in both.
      at: when it was seen (UTC).
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
    """Return what differs between two rosters; of one without a roster before, all members are added."""
    before = frozenset[str]() if old is None else names_of(old)
    return change_from(before, 0 if old is None else old.version, new)


def change_from(before: frozenset[str], version: int, new: Roster) -> RosterChange:
    """Return what differs between the members of an older version, as `names_of` has them, and a newer roster."""
    after, now = names_of(new), datetime.now(UTC).isoformat(timespec="seconds")
    added, removed = (tuple(sorted(each)) for each in (after - before, before - after))
    return RosterChange(new.version, new.hash.hex(), version, len(new.members), added, removed, now)


def _short(member: str) -> str:
    name, _, fingerprint = member.rpartition(" ")
    return f"{name} ({fingerprint[:FINGERPRINT_DIGITS]})"
