"""The clients' own ledgers as one machine that simulates them all sees them: each one's spending, each one's head."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...privacy.accounting.epsilon import within
from ...privacy.accounting.renyi_filter import counted
from ...privacy.budget import Adversary
from ...privacy.ledger.caps import CapEnded, capped
from ...privacy.ledger.hash_chain import Chain
from ...privacy.ledger.ledger import Head
from ...privacy.refusal import Refusal
from ...strategies.client_settings import ClientSettings
from ...strategies.record_plan import record_plan
from .federation import Federation
from .report import read_events

OUTSIDE = "a record that occurs at two clients: what it loses at each adds up"


def spending(federation: Federation, client: ClientSettings) -> dict[str, Any] | None:
    """Return what each client's records have lost, in the clients' order, and how many clients cannot go on.

    None where records are not protected. A client counts as exhausted when its budget affords it no further round.
    """
    if client.record is None:
        return None
    lost, exhausted = [0.0] * len(federation.fingerprints), 0
    budget = client.record.budget()
    for number, name in enumerate(federation.fingerprints):
        path = client.record.ledger_path(name)
        if not path.exists():
            continue
        events = read_events(path, Adversary.MODEL)
        lost[number] = counted(events, budget.target_delta, budget.adjacency, None)
        records = len(federation.task.client_data(number))
        try:
            allowed = capped(path, budget)
            exhausted += not within([*events, record_plan(client.record, records, client).event()], allowed)
        except CapEnded:
            exhausted += 1
    return {"epsilon": lost, "delta": budget.target_delta, "exhausted": exhausted, "outside": OUTSIDE}


@dataclass
class KnownHeads:
    """The heads of the clients' ledgers, read again where a file has changed since."""

    federation: Federation
    client: ClientSettings
    _read: dict[str, tuple[int, Head]] = field(default_factory=dict[str, tuple[int, Head]])

    def now(self) -> dict[str, Head]:
        """Return the head of every ledger that one of this federation's clients has, by the ledger's name."""
        if self.client.record is None:
            return {}
        for name in self.federation.fingerprints:
            path = self.client.record.ledger_path(name)
            changed = path.stat().st_mtime_ns if path.exists() else 0
            if changed and self._read.get(path.name, (0,))[0] != changed:
                with closing(Chain.for_reading(path)) as chain:
                    self._read[path.name] = (changed, chain.last())
        return {name: head for name, (_, head) in self._read.items()}


def require_heads(folder: Path, heads: Mapping[str, Head]) -> None:
    """Refuse to go on from a checkpoint that knows a client's ledger which is gone, cut or another one."""
    for name, head in heads.items():
        path = folder / name
        if not path.exists():
            raise Refusal("ledger", str(path), f"missing, though entry {head.seq} of it is known; restore it")
        with closing(Chain.for_reading(path)) as chain:
            chain.require(head)
