"""Changes of the roster for a device's owner: logged, kept in the state folder, and optionally subject to approval.

The roster's signer controls the cohorts of this device. An unnoticed change could surround it with members of one
party.
"""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from ...privacy.bounded_decoding import read_kept, read_lines
from ...privacy.ledger.durable_files import append_line, replace_file
from ...privacy.refusal import Refusal
from ...privacy.secagg.roster import Roster, cosignatures_in, cosigned_by
from ...privacy.secagg.roster_change import RosterChange, change_between

logger = logging.getLogger("fedveil.client")

CHANGES, PENDING, APPROVED = "rosters.jsonl", "roster.pending.json", "roster.approved"
PENDING_ROSTER = "roster.pending.bin"  # as received, for its owner to sign


@dataclass(frozen=True)
class Demands:
    """An owner's requirements on a roster with changed members.

    Attributes:
      approval: whether the owner must approve.
      cosigned: smallest number of other members' signatures.
      peers: fingerprints of the signers that count; empty for all members of the previous roster.
    """

    approval: bool
    cosigned: int
    peers: frozenset[str]


def check_change(state: Path, old: Roster, new: Roster, signed: bytes, own: bytes, demands: Demands) -> None:
    """Replace an older roster by a newer one, and record the changes.

    Args:
      state: the device's state folder.
      old: of the device.
      new: of a higher version, signed by the authority.
      signed: its bytes, with the signatures of members.
      own: public key of this device, whose signature does not count.
      demands: of the owner.

    Raises:
      Refusal: it does not follow from the older one, too few of its members have signed it, or the owner's approval is
      pending.
    """
    if not new.follows(old):
        remedy = f"does not follow from version {old.version}, which this device has: the authority signed two; ask it"
        logger.error("roster version %s %s", new.version, remedy)
        raise Refusal("roster", f"version {new.version}", remedy)
    change = change_between(old, new)
    if change.added or change.removed:
        short = _too_few_signed(old, new, signed, own, demands)
        if not short and demands.approval and _approved(state) != change.hash:
            short = f"waits for its owner: fedveil client roster FOLDER --approve {new.version}"
        if short:
            _wait(state, change, signed)
            raise Refusal("roster", f"version {new.version}", short)
    note(state, change)


def _too_few_signed(old: Roster, new: Roster, signed: bytes, own: bytes, demands: Demands) -> str:
    """Return a clause if too few members of the older roster signed the newer one; empty if enough did."""
    others = {
        member.public: member.name
        for member in old.members
        if member.public != own and (not demands.peers or member.fingerprint in demands.peers)
    }
    given = {public: each for public, each in cosignatures_in(signed).items() if public in others}
    names = sorted(others[public] for public in cosigned_by(new, given))
    if len(names) >= demands.cosigned:
        return ""
    whose = "the owner's peers" if demands.peers else f"the members of version {old.version}"
    return (
        f"is signed by {', '.join(names) or 'nobody'} of {whose}, and cosigned_by_at_least={demands.cosigned}; "
        f"ask them for fedveil client roster FOLDER --sign FOLDER/state/{PENDING_ROSTER}"
    )


def note(state: Path, change: RosterChange) -> None:
    """Log a change and append it durably to the earlier ones."""
    logger.warning("%s", change)
    append_line(state / CHANGES, asdict(change))
    for name in (PENDING, PENDING_ROSTER, APPROVED):
        (state / name).unlink(missing_ok=True)


def changes(state: Path) -> list[RosterChange]:
    """Return the changes seen by the device, oldest first; a truncated line is left out."""
    return read_lines(RosterChange, state / CHANGES)


def pending(state: Path) -> RosterChange | None:
    """Return the change that waits for the owner's approval or for signatures, or None."""
    return read_kept(RosterChange, state / PENDING)


def waiting_for(state: Path, version: int) -> RosterChange:
    """Return the change that waits for the owner's approval.

    Args:
      state: the device's state folder.
      version: of the roster that the owner read.

    Raises:
      Refusal: this version does not wait for approval.
    """
    waiting = pending(state)
    if waiting is None or waiting.version != version:
        shown = "none waits" if waiting is None else f"version {waiting.version} waits"
        raise Refusal("approve", version, f"{shown}; check again and give the version that is shown")
    return waiting


def approve(state: Path, change: RosterChange) -> None:
    """Approve a change; a running agent applies it in the next round.

    Args:
      state: the device's state folder.
      change: as `waiting_for` returned it.
    """
    replace_file(state / APPROVED, change.hash.encode())


def _approved(state: Path) -> str:
    try:
        return (state / APPROVED).read_text("ascii")
    except (OSError, ValueError):
        return ""


def _wait(state: Path, change: RosterChange, signed: bytes) -> None:
    before = pending(state)
    if before is not None and change.version <= before.version:
        if change.hash != before.hash:  # the owner's version refers to the displayed roster
            logger.error(
                "another roster of version %d or earlier already waits: ask the authority", before.version
            )
        return
    logger.warning("not applied yet: %s", change)
    replace_file(state / PENDING_ROSTER, signed)
    replace_file(state / PENDING, (json.dumps(asdict(change)) + "\n").encode())
