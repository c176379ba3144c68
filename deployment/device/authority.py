"""Authority that a device trusts: pinned by its owner's policy.toml, and replaced by rollovers that the owner allows.

The file `ROLLOVERS` of the state folder holds those in force. It is replaced whole, and read at each use, so that a running
agent follows its owner's approval.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ...base.durable_files import replace_file
from ...base.refusal import Refusal
from ...configs.bundle_files import ROLLOVERS, read_rollovers
from ...links.enrolment.token import fingerprint_of
from ...privacy.secagg.refusal import Refused
from ...privacy.secagg.rollover import DAY_SECONDS, MAX_DAYS, Rollover, read_chain, rollovers_since
from .owner_policy import OwnerPolicy

logger = logging.getLogger("fedveil.client")

WAITING = "rollovers.waiting.json"  # in the state folder: what the owner must approve first


@dataclass(frozen=True)
class TrustedAuthority:
    """Authority of a device, and until its overlap ends the one before it.

    Attributes:
      key: public key that signs rosters; see `privacy.secagg.roster.read_roster`.
      ca: its certificate for TLS, in PEM.
      last: the rollover by which it came into force; None if no stored rollover led to it.
      earlier: keys of all authorities before it from that of policy.toml on, under which the device's own roster may stand.
      earlier_ca: certificates of these, in PEM, under which the device's own certificate may stand.
    """

    key: bytes
    ca: bytes
    last: Rollover | None = None
    earlier: tuple[bytes, ...] = ()
    earlier_ca: bytes = b""

    @property
    def fingerprint(self) -> str:
        """The authority's fingerprint in hexadecimal, as `fedveil provision rollover` prints it."""
        return fingerprint_of(self.ca, self.key).hex()

    def keys(self, now: float) -> tuple[bytes, ...]:
        """Return the keys whose signature counts at a Unix second."""
        return self.key, *(bytes.fromhex(last.old) for last in self._overlapping(now))

    def roots(self, now: float) -> bytes:
        """Return the certificates, in PEM, one of which must have signed the server's at a Unix second."""
        return b"\n".join([self.ca, *(last.old_ca.encode() for last in self._overlapping(now))])

    def _overlapping(self, now: float) -> list[Rollover]:
        """Return the last rollover if old and new authority both count at a Unix second; else an empty list."""
        return [self.last] if self.last and now < self.last.until else []


def current_authority(state: Path, policy: OwnerPolicy, ca: bytes, federation: str) -> TrustedAuthority:
    """Return the authority that is in force on a device, whose bundle has the certificate `ca` in PEM.

    Other arguments as of `adopt_rollovers`.

    Raises:
      Refusal: the rollovers in the state folder are damaged.
    """
    pinned = bytes.fromhex(policy.authority)
    chain = _read_stored(state / ROLLOVERS, federation)
    later = rollovers_since(chain, pinned)
    if not chain or later is None:  # the owner pinned another authority since
        return TrustedAuthority(pinned, ca)
    *earlier, key = (pinned, *(bytes.fromhex(rollover.new) for rollover in later))
    # The policy may name the newest key before the bundle has its certificate: then the last rollover leads there.
    path = later or chain[-1:]
    certificates = [ca, *(each.encode() for rollover in path for each in (rollover.old_ca, rollover.new_ca))]
    last = chain[-1]
    return TrustedAuthority(key, last.new_ca.encode(), last, tuple(earlier), b"\n".join(certificates))


def adopt_rollovers(
    state: Path, policy: OwnerPolicy, text: bytes | str, federation: str, approved: str = ""
) -> bool:
    """Follow the rollovers in a text, if they lead on from the authority in force and the owner allows it.

    Args:
      state: the device's state folder.
      policy: the owner's.
      text: of the whole chain, from a server, a file or a bundle.
      federation: of the device.
      approved: fingerprint of the new authority, which the owner has compared; empty for none.

    Returns:
      Whether the authority was replaced now.

    Raises:
      Refusal: the chain is not signed, contradicts the one in force, its overlap has ended or is too long, or its owner
        must approve it first. What is in force stays so.
    """
    try:
        chain = read_chain(text, federation)
    except Refused as refused:
        raise Refusal("rollover", federation, f"is not that of this device's authority ({refused})") from None
    stored = _read_stored(state / ROLLOVERS, federation)
    bodies, stored_bodies = [each.body for each in chain], [each.body for each in stored]
    if bodies == stored_bodies[: len(bodies)]:
        return False  # an older copy, or the same
    if stored_bodies != bodies[: len(stored_bodies)]:
        remedy = "contradicts the one in force here: the old key has signed two; ask the authority which is its own"
        logger.error("rollover %s %s", chain[-1].number, remedy)
        raise Refusal("rollover", f"number {chain[-1].number}", remedy)
    later = rollovers_since(chain, bytes.fromhex(policy.authority))
    if later is None:
        remedy = "does not lead from the authority in policy.toml; ask its holder for the whole chain"
        raise Refusal("rollover", f"number {chain[-1].number}", remedy)
    fresh = [each for each in later if each.number > len(stored)]
    if any(each.until - time.time() > MAX_DAYS * DAY_SECONDS for each in (*fresh, chain[-1])):
        remedy = f"has an overlap that ends in more than {MAX_DAYS} days: ask the authority, or set this device's clock"
        raise Refusal("rollover", f"number {chain[-1].number}", remedy)
    if objection := _objection(fresh, chain[-1], policy, approved):
        if not approved:
            _wait(state, chain, text)
        raise Refusal("rollover", f"number {chain[-1].number}", objection)
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    replace_file(state / ROLLOVERS, text if isinstance(text, bytes) else text.encode())
    (state / WAITING).unlink(missing_ok=True)
    logger.warning("the authority was replaced: %s", describe_rollover(chain[-1]))
    return True


def describe_rollover(rollover: Rollover) -> str:
    """Return a clause with what a rollover changes."""
    end = datetime.fromtimestamp(rollover.until, UTC).isoformat(timespec="seconds")
    return f"rollover {rollover.number}, new fingerprint {new_fingerprint(rollover)}, the old one counts until {end}"


def new_fingerprint(rollover: Rollover) -> str:
    """Return the fingerprint of a rollover's new authority, in hexadecimal."""
    return fingerprint_of(rollover.new_ca.encode(), bytes.fromhex(rollover.new)).hex()


def pending_rollovers(state: Path, federation: str) -> tuple[Rollover, ...]:
    """Return the chain that waits for the owner's approval, empty for none; arguments as of `adopt_rollovers`."""
    return _read_stored(state / WAITING, federation)


def _objection(fresh: Sequence[Rollover], last: Rollover, policy: OwnerPolicy, approved: str) -> str:
    """Return why a chain does not take effect now, empty if it does, from its `fresh` rollovers and its last one."""
    new = new_fingerprint(last)
    if approved:
        return "" if approved == new else f"has the fingerprint {new}, and --approve names another"
    late = any(each.until <= time.time() for each in fresh)
    if not fresh or not (late or policy.approve_authority):
        return ""
    reason = "waits for its owner"
    if late:
        reason = "has ended its overlap, so that the old key alone proves nothing"
    remedy = f"compare {new} with the holder of the authority, then: fedveil client authority FOLDER --approve FINGERPRINT"
    return f"{reason}; {remedy}"


def _wait(state: Path, chain: Sequence[Rollover], text: bytes | str) -> None:
    """Keep a chain for its owner's approval; the first one stays, because the owner may be comparing it."""
    pending = _read_stored(state / WAITING, chain[0].federation)
    if pending and pending[-1].number >= chain[-1].number:
        if pending[-1].body != chain[-1].body:
            logger.error("another rollover waits already: the old key has signed two; ask the authority")
        return
    logger.warning("not followed yet: %s", describe_rollover(chain[-1]))
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    replace_file(state / WAITING, text if isinstance(text, bytes) else text.encode())


def _read_stored(path: Path, federation: str) -> tuple[Rollover, ...]:
    remedy = "remove it, and give the rollover anew: fedveil client authority FOLDER --rollover FILE"
    return read_rollovers(path, federation, remedy)
