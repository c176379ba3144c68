"""Receipts of real clients, counted for a report; `fedveil verify` checks each signature."""

from __future__ import annotations

import json
from typing import Any

from ..run.files import RECEIPTS
from ..run.run_files import RunFiles


def receipts_of(run: RunFiles) -> dict[str, Any] | None:
    """Return how many devices signed the run's files, as far as the number is public; None for a simulation."""
    if not run.deployed:
        return None
    # Where a trusted server draws in secret, only its operator may read the membership.
    public = bool(run.result) and run.result.get("seconds") is not None
    given, of_this_run = _given(run) if public else (None, None)
    rosters = run.result.get("rosters") or [{}]
    return {
        "public": public,
        "ended": bool(run.result),
        "given": given,
        "members": rosters[-1].get("members") if public else None,
        "of_this_run": of_this_run,
    }


def _given(run: RunFiles) -> tuple[int, bool | None]:
    """Return the number of receipts in the folder, and whether they match its manifest."""
    try:
        found: Any = json.loads((run.folder / RECEIPTS).read_bytes())
        return len(found["receipts"]), found["manifest"] == run.manifest
    except FileNotFoundError:
        return 0, None
    except (OSError, ValueError, LookupError, TypeError):
        return 0, False
