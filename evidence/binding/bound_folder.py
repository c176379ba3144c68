"""Folder under verification: the parts of a run or bundle, read on first use, and what the verifier knows already."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from ...base.refusal import Refusal
from ...privacy.ledger.export import entries_from, read_export
from ...privacy.ledger.hash_chain import Entry, Head
from ...privacy.ledger.ledger import read_entries
from ...privacy.ledger.ledger_state import LedgerState
from ...privacy.secagg.rollover import Rollover
from ...run.files import MANIFEST, METRICS, RESULT, SAVED, locate_ledger
from ...run.manifest import Manifest, read_manifest
from .bundle import CLIENT_LEDGERS, LEDGER, Listing, read_list
from .receipts import Receipts, read_receipts
from .signatures import Signature, read_signatures

SAME = 1e-6  # tolerance: two machines may add in different orders, and printed numbers have fewer digits
RESUMABLE = ("interrupted", "paused")  # statuses of a run that is not closed
EPOCH = "1970-01-01T00:00:00+00:00"


class Wrong(Exception):
    """A check failed; the message says why."""


class NotShown(Exception):
    """These files cannot decide a check; the message says why."""


@dataclass(frozen=True)
class Knowledge:
    """Independent knowledge of the verifier; by default none.

    Attributes:
      keys: public keys in hexadecimal, each of which must have signed the bundle, or the roster of its receipts.
      head: an entry that the ledger must contain.
      device: folder of a device's ledgers, and of the openings of its receipts.
      roster: hash of the roster whose members signed the receipts, in hexadecimal.
      receipts: number of receipts that are needed; None needs those of all members of the roster.
      rollovers: chains of authorities, whose newest keys are among `keys`.
      witnesses: Ed25519 keys in hexadecimal, each of which must have co-signed the log that holds the manifest.
      time_stamps: file of certificates in PEM, of authorities for time stamps that the verifier trusts.
    """

    keys: Sequence[str] = ()
    head: Head | None = None
    device: Path | None = None
    roster: str | None = None
    receipts: int | None = None
    rollovers: Sequence[Sequence[Rollover]] = ()
    witnesses: Sequence[str] = ()
    time_stamps: Path | None = None


@dataclass(frozen=True)
class BoundFolder:
    """Folder of a run or bundle. A part that cannot be read raises a `Refusal` when it is used."""

    path: Path  # of the files
    bundled: bool  # whether it is a bundle
    knowledge: Knowledge = Knowledge()  # independent knowledge of the verifier

    @cached_property
    def listing(self) -> Listing:
        """The bundle's list of its content."""
        return read_list(self.path)

    @cached_property
    def signatures(self) -> Sequence[Signature]:
        """The signatures of a bundle, unchecked; a run folder has none."""
        return read_signatures(self.path)

    @property
    def signers(self) -> set[str]:
        """Public keys of the signatures, in hexadecimal."""
        return {public for signature in self.signatures for public in signature.keys.values()}

    @cached_property
    def manifest(self) -> Manifest:
        """The run's manifest."""
        return read_manifest(self.path)

    @cached_property
    def result(self) -> dict[str, Any]:
        """The run's result."""
        try:
            return dict(json.loads((self.path / RESULT).read_bytes()))
        except ValueError as problem:
            raise Wrong(f"{RESULT} cannot be read: {problem}") from None

    @cached_property
    def rounds(self) -> list[dict[str, Any]]:
        """The run's rounds, from its metrics lines."""
        return [json.loads(line) for line in (self.path / METRICS).read_text(encoding="utf-8").splitlines()]

    @property
    def is_resumable(self) -> bool:
        """Whether the run has stopped and may continue, so that it has no manifest yet."""
        unbound = not self.bundled and not (self.path / MANIFEST).exists()
        return unbound and self.result["status"] in RESUMABLE

    def require_final(self) -> None:
        """Raise `NotShown` if the run may continue: a check that needs its manifest is then undecided, not failed."""
        if self.is_resumable:
            raise NotShown("the run can still be resumed")

    @cached_property
    def run(self) -> str:
        """The run's name on its ledger; of a run without a manifest, from its saved state."""
        if self.is_resumable:
            return str(json.loads((self.path / SAVED).read_bytes())["run"])
        return self.manifest.run

    @property
    def has_ledger(self) -> bool:
        """Whether the run is charged on a ledger of its own."""
        return self.result["ledger_head"] is not None

    @property
    def ledger(self) -> Path:
        """Path of the run's ledger."""
        return self.path / LEDGER if self.bundled else locate_ledger(self.path, self.result["ledger"])

    @cached_property
    def entries(self) -> list[Entry]:
        """The entries of the run's ledger, in an intact chain; `NotShown` if it has none of its own."""
        if not self.has_ledger:
            raise NotShown("the run has no ledger of its own")
        return entries_in(self.ledger)

    @property
    def last_head(self) -> Head:
        """The ledger's last entry when the run ended, as the result names it."""
        return Head(*self.result["ledger_head"])

    @cached_property
    def ledger_state(self) -> LedgerState:
        """The content of the run's ledger."""
        return state_of(self.entries, str(self.ledger))

    @cached_property
    def client_entries(self) -> dict[str, list[Entry]]:
        """The entries of the clients' ledgers that the manifest names, by ledger."""
        if not self.manifest.heads:
            return {}
        if not self.bundled:
            return {name: entries_in(self.path / "client_ledgers" / name) for name in self.manifest.heads}
        exports = json.loads((self.path / CLIENT_LEDGERS).read_bytes())
        return {name: entries_from(exports[name], name) for name in self.manifest.heads}

    @cached_property
    def receipts(self) -> Receipts:
        """The receipts of devices, unchecked."""
        return read_receipts(self.path)

    @cached_property
    def authorities(self) -> set[str]:
        """Keys in hexadecimal of the authority that signed the receipts' roster; none without receipts.

        They are its key in the receipts and, by rollovers that both sides signed, those before it and after it.
        """
        try:
            receipts = self.receipts
        except Refusal:
            return set()
        authorities = {authority := receipts.authority.hex()}
        for chain in (receipts.rollovers, *self.knowledge.rollovers):
            keys = {key for rollover in chain for key in (rollover.old, rollover.new)}
            if authority in keys:
                authorities |= keys
        return authorities

    @property
    def seconds_of_end(self) -> int:
        """Unix second of the close, or else of the last roster; 0 if the files name neither."""
        try:
            time = json.loads(self.ledger_state.closes[self.run].payload)["time"]
        except NotShown:
            rosters = self.result.get("rosters") or [{"at": EPOCH}]
            time = rosters[-1]["at"]
        return int(datetime.fromisoformat(time).timestamp())


def entries_in(path: Path) -> list[Entry]:
    """Return the entries of a ledger, or of its export as JSON."""
    return read_export(path.read_bytes(), str(path)) if path.suffix == ".json" else read_entries(path)


def state_of(entries: Sequence[Entry], source: str) -> LedgerState:
    """Return the content of a ledger with these entries; a refusal names it by `source`."""
    state = LedgerState()
    for entry in entries:
        state.take(entry, source)
    return state


def is_close(one: float, other: float) -> bool:
    """Return whether two numbers differ by at most `SAME`, relative or absolute; infinity equals itself."""
    return one == other or math.isclose(one, other, rel_tol=SAME, abs_tol=SAME)
