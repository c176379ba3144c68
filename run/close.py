"""Close of a run: the last entry of its ledger, which binds the run's files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..privacy.budget import Budget
from ..privacy.ledger.ledger import Head, Ledger, read_entries
from ..server import noise_key
from ..server.rounds import Status
from .files import AUDIT_KEY, MANIFEST, RESULT, SAVED, locate_ledger
from .manifest import TASK_FILES, manifest_of, write_manifest

# An interrupted or paused run is resumed. A failed one may be resumed, and is then closed again.
CLOSED = (Status.COMPLETED, Status.EXHAUSTED, Status.ALARMED, Status.FAILED)
ANY = 1.0  # epsilon and, halved, delta of a budget that is opened without a charge


def head_before_close(ledger: Ledger, run: str) -> Head:
    """Return a ledger's head before the close of this run, so that repeating a finished run gives the same result."""
    entry = ledger.closed(run)
    if entry is None or entry.head != ledger.head:
        return ledger.head
    return Head(entry.seq - 1, entry.prev_hash)


def close(folder: Path, ledger: Ledger | None, heads: Mapping[str, Head]) -> None:
    """Write a run's manifest, and its hash as the run's last entry on the ledger.

    Args:
      folder: of the run, with its result.
      ledger: of the run, open; None where it has none of its own.
      heads: of the clients' own ledgers, where a simulation holds them.

    Raises:
      OSError: the folder cannot be written.
      LedgerUnavailable: the ledger cannot.
    """
    manifest = manifest_of(folder, heads)
    write_manifest(folder, manifest)
    if ledger is not None:
        ledger.close_run(manifest.run, manifest.hash, manifest.status)


def close_again(folder: Path) -> None:
    """Close a run whose process ended between its result and its close; do nothing for any other.

    Args:
      folder: of a run that has ended, by its result.

    Raises:
      Refusal: its ledger cannot be read or written.
    """
    saved, result = (json.loads((folder / name).read_bytes()) for name in (SAVED, RESULT))
    path = None if result["ledger"] is None else locate_ledger(folder, result["ledger"])
    if TASK_FILES not in saved or Status(result["status"]) not in CLOSED:
        return  # made before runs were closed, or paused
    noise_key.erase(folder)
    noise_key.erase(folder, AUDIT_KEY)
    if path is None or not path.is_file():  # charged on no ledger of its own
        if not (folder / MANIFEST).exists():
            close(folder, None, {})
        return
    identity: dict[str, Any] = json.loads(read_entries(path)[0].payload)
    budget = Budget(identity["unit"], ANY, ANY / 2, adjacency=identity["adjacency"])
    with Ledger.open(path, budget, owner=identity["owner"], simulated=identity["simulated"]) as ledger:
        if ledger.closed(saved["run"]) is None:
            close(folder, ledger, {})
