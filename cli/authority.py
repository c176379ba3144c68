"""Authority of a device as its owner sees it: which one is in force, which one waits, and its approval."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from ..base.durable_files import append_line
from ..base.refusal import Refusal
from ..configs.bundle_files import read_file
from ..deployment.device.authority import (
    WAITING,
    TrustedAuthority,
    in_words,
    new_fingerprint,
    offered,
    waiting,
)
from ..deployment.device.client_bundle import read_pinned
from ..privacy.ledger.acts import acting_user

APPROVALS = "authorities.jsonl"  # in the state folder: who approved what, and why


def authority(
    folder: Path, rollover: Path | None, approve: str | None, reason: str | None, *, as_json: bool = False
) -> int:
    """Follow a rollover of the authority, or print which authority is in force; return the exit code.

    Arguments as of `fedveil client authority`.

    Raises:
      Refusal: the rollover does not take effect, or none waits. What is in force stays so.
    """
    own, policy, before = read_pinned(folder)
    state = folder / own.state
    if rollover is not None or approve is not None:
        text = _text(state, rollover, own.federation)
        offered(state, policy, text, own.federation, (approve or "").strip().lower())
        _, _, held = read_pinned(folder)
        if approve is not None:
            said = {"authority": held.fingerprint, "who": acting_user(), "reason": reason}
            append_line(state / APPROVALS, {"at": datetime.now(UTC).isoformat(timespec="seconds"), **said})
        if not as_json:
            print("already in force" if held == before else "the authority was replaced")
    _show(read_pinned(folder)[2], state, own.federation, as_json)
    return 0


def _text(state: Path, rollover: Path | None, federation: str) -> bytes:
    if rollover is not None:
        return read_file(rollover)
    if not waiting(state, federation):
        remedy = "no rollover waits; ask the authority's holder for rollovers.json, and give --rollover rollovers.json"
        raise Refusal("approve", str(state), remedy)
    return read_file(state / WAITING)


def _show(held: TrustedAuthority, state: Path, federation: str, as_json: bool) -> None:
    waits = waiting(state, federation)
    until = held.last.until if held.last is not None and time.time() < held.last.until else None
    if as_json:
        shown = None if not waits else {**asdict(waits[-1]), "fingerprint": new_fingerprint(waits[-1])}
        plain = {"authority": held.key.hex(), "fingerprint": held.fingerprint, "former_until": until}
        print(json.dumps({**plain, "rollovers": len(held.earlier), "waiting": shown}))
        return
    print(f"authority {held.key.hex()}, fingerprint {held.fingerprint}")
    if until is not None:
        print(f"the one before it counts until {datetime.fromtimestamp(until, UTC).isoformat()}")
    if waits:
        print(f"waits (--approve FINGERPRINT): {in_words(waits[-1])}")
