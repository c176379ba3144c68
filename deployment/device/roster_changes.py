"""Changes of the roster for a device's owner: logged, kept in the state folder, and optionally subject to approval.

The roster's signer controls the cohorts of this device. An unnoticed change could surround it with members of one
party.
"""

import json
import logging
from dataclasses import asdict
from pathlib import Path

from ...base.bounded_decoding import read_json_file, read_lines
from ...base.durable_files import append_line, replace_file
from ...base.refusal import Refusal
from ...configs.bundle_files import ROSTER
from ...privacy.secagg.roster import Roster, cosignatures_in, cosigned_by
from ...privacy.secagg.roster_change import RosterChange, change_between
from .owner_policy import OwnerPolicy

logger = logging.getLogger("fedveil.client")

CHANGES, PENDING, APPROVED = "rosters.jsonl", "roster.pending.json", "roster.approved"
PENDING_ROSTER = "roster.pending.bin"  # as received, for its owner to sign


def check_change(
    state: Path, old: Roster, new: Roster, signed: bytes, device: str, policy: OwnerPolicy
) -> RosterChange:
    """Return the change from a device's roster to a newer one; one that its owner does not allow yet waits.

    Args:
      state: the device's state folder.
      old: of the device.
      new: of a higher version, signed by the authority.
      signed: its bytes, with the signatures of members.
      device: name of this device, whose own new keys need no approval, and whose signature does not count.
      policy: the owner's.

    Raises:
      Refusal: it does not follow from the older one; or it waits, stored, because it has too few of the owner's
        peers, too few members have signed it, or the owner has not approved it.
    """
    if not new.follows(old):
        remedy = f"does not follow from version {old.version}, which this device has: the authority signed two; ask it"
        logger.error("roster version %s %s", new.version, remedy)
        raise Refusal("roster", f"version {new.version}", remedy)
    change = change_between(old, new)
    changed_names = {entry.split()[0] for entry in (*change.added, *change.removed)}
    if changed_names - {device}:
        fault = _missing_peers(new, device, policy) or _missing_signatures(old, new, signed, device, policy)
        if not fault and policy.approve_rosters and _approved(state) != change.hash:
            fault = f"waits for its owner: fedveil client roster FOLDER --approve {new.version}"
        if fault:
            _wait(state, change, signed)
            raise Refusal("roster", f"version {new.version}", fault)
    return change


def _missing_peers(new: Roster, device: str, policy: OwnerPolicy) -> str:
    """Return a clause if the newer roster has too few of the owner's peers; empty if it has enough."""
    peers = set(policy.peers.values())
    num_peers = sum(member.fingerprint in peers for member in new.members if member.name != device)
    if num_peers >= policy.peers_at_least:
        return ""
    remedy = "compare new fingerprints with their owners, and name them in [peers] of policy.toml"
    return f"has {num_peers} of the owner's peers, and peers_at_least={policy.peers_at_least}; {remedy}"


def _missing_signatures(old: Roster, new: Roster, signed: bytes, device: str, policy: OwnerPolicy) -> str:
    """Return a clause if too few members of the older roster signed the newer one; empty if enough did."""
    peers = set(policy.peers.values())
    others = {
        member.public: member.name
        for member in old.members
        if member.name != device and (not peers or member.fingerprint in peers)
    }
    cosignatures = {public: each for public, each in cosignatures_in(signed).items() if public in others}
    names = sorted(others[public] for public in cosigned_by(new, cosignatures))
    if len(names) >= policy.cosigned_by_at_least:
        return ""
    electorate = "the owner's peers" if peers else f"the members of version {old.version}"
    return (
        f"is signed by {', '.join(names) or 'nobody'} of {electorate}, and "
        f"cosigned_by_at_least={policy.cosigned_by_at_least}; "
        f"ask them for fedveil client roster FOLDER --sign FOLDER/state/{PENDING_ROSTER}"
    )


def adopt(state: Path, change: RosterChange, signed: bytes) -> None:
    """Log a change, store its roster as the device's, and end its wait; arguments as of `check_change`, which made it."""
    logger.warning("%s", change)
    append_line(state / CHANGES, asdict(change))
    replace_file(state / ROSTER, signed)
    for name in (PENDING, PENDING_ROSTER, APPROVED):
        (state / name).unlink(missing_ok=True)


def changes(state: Path) -> list[RosterChange]:
    """Return the changes seen by the device, oldest first; a truncated line is left out."""
    return read_lines(RosterChange, state / CHANGES)


def pending(state: Path) -> RosterChange | None:
    """Return the change that waits for the owner's approval or for signatures, or None."""
    return read_json_file(RosterChange, state / PENDING)


def waiting_for(state: Path, version: int) -> RosterChange:
    """Return the change that waits for the owner's approval; Refusal if it is of another version than the owner read."""
    waiting = pending(state)
    if waiting is None or waiting.version != version:
        status = "none waits" if waiting is None else f"version {waiting.version} waits"
        raise Refusal("approve", version, f"{status}; check again and give the version that is shown")
    return waiting


def approve(state: Path, digest: str) -> None:
    """Approve the change with this hash, and no other of its version; a running agent applies it in the next round."""
    replace_file(state / APPROVED, digest.encode())


def withdraw(state: Path) -> None:
    """Take back the approval of a change that waits."""
    (state / APPROVED).unlink(missing_ok=True)


def _approved(state: Path) -> str:
    """Return the hash of the roster that the owner has approved; empty for none."""
    try:
        return (state / APPROVED).read_text("ascii")
    except (OSError, ValueError):
        return ""


def _wait(state: Path, change: RosterChange, signed: bytes) -> None:
    """Keep a change for its owner's approval or signatures; a stored one is replaced by a newer version only."""
    earlier = pending(state)
    if earlier is not None and change.version <= earlier.version:
        if change.hash != earlier.hash:  # the owner's version refers to the displayed roster
            logger.error(
                "another roster of version %d or earlier already waits: ask the authority", earlier.version
            )
        return
    logger.warning("not applied yet: %s", change)
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    replace_file(state / PENDING_ROSTER, signed)
    replace_file(state / PENDING, (json.dumps(asdict(change)) + "\n").encode())
