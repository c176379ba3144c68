"""What a run says it promised and spent: the ``privacy`` list of its result, and the versions it ran on."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dp_accounting.dp_event import DpEvent

from ..privacy.accounting import PUBLISH_INTERVAL, accountant_name, epsilon
from ..privacy.budget import Adjacency, Adversary, Unit
from ..privacy.ledger import Ledger
from ..privacy.ledger_book import Book
from ..privacy.ledger_store import Chain
from .federation import CLIENT_ADVERSARIES, Federation

PACKAGES = ("fedveil", "flwr", "opacus", "torch", "dp-accounting", "numpy")
EVERYBODY = (Adversary.SERVER, Adversary.CLIENTS, Adversary.MODEL)


@dataclass(frozen=True)
class Spent:
    """What one unit has revealed to one adversary so far; epsilon may be infinite."""

    unit: Unit
    adversary: Adversary
    adjacency: Adjacency
    epsilon: float
    delta: float
    target_epsilon: float | None
    accountant: str
    sampling: str

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON; JSON has no infinity, so it is spelled."""
        shown = "infinity" if math.isinf(self.epsilon) else self.epsilon
        return {
            "unit": str(self.unit),
            "adversary": str(self.adversary),
            "adjacency": str(self.adjacency),
            "epsilon": shown,
            "delta": self.delta,
            "target_epsilon": self.target_epsilon,
            "accountant": self.accountant,
            "sampling": self.sampling,
        }


def spent(federation: Federation, ledger: Ledger | None, client_ledgers: Path | None) -> list[Spent]:
    """Return what every unit has revealed to every adversary, at the accountant's finest setting.

    Args:
      federation: the parts.
      ledger: the population's, if clients are protected in the sum.
      client_ledgers: the folder of the clients' own ledgers, if records are protected.
    """
    rows: list[Spent] = []
    if federation.record is not None:
        assert client_ledgers is not None
        rows += _record_rows(federation, client_ledgers)
    if federation.client is not None:
        assert ledger is not None
        rows += _client_rows(federation, ledger)
    return rows or [_unprotected(Unit.CLIENT, adversary, 0.0, "not accounted") for adversary in EVERYBODY]


def _client_rows(federation: Federation, ledger: Ledger) -> list[Spent]:
    client = federation.client
    assert client is not None
    delta, adjacency = client.target_delta, client.adjacency
    server = _unprotected(Unit.CLIENT, Adversary.SERVER, delta, "trusted: it sees single updates", adjacency)
    rows = [server]
    for adversary in CLIENT_ADVERSARIES:
        events = ledger.events(adversary)
        name = accountant_name(delta, adjacency, PUBLISH_INTERVAL)
        cost = epsilon(events, delta, adjacency)
        sampling = federation.cohort.name
        rows.append(
            Spent(Unit.CLIENT, adversary, adjacency, cost, delta, client.target_epsilon, name, sampling)
        )
    return rows


def _record_rows(federation: Federation, client_ledgers: Path) -> list[Spent]:
    """Return the maximum over the clients: clients hold different records, so their losses compose in parallel."""
    record = federation.record
    assert record is not None
    worst = max(
        (epsilon(events, record.target_delta, record.adjacency) for events in _each(client_ledgers)),
        default=0.0,
    )
    name = accountant_name(record.target_delta, record.adjacency, PUBLISH_INTERVAL)
    return [
        Spent(
            Unit.RECORD,
            a,
            record.adjacency,
            worst,
            record.target_delta,
            record.target_epsilon,
            name,
            "poisson batches",
        )
        for a in EVERYBODY
    ]


def _each(folder: Path) -> list[Sequence[DpEvent]]:
    return [read_events(path, Adversary.MODEL) for path in sorted(folder.glob("*.ledger"))]


def read_events(path: Path, adversary: Adversary) -> Sequence[DpEvent]:
    """Return what this adversary has seen, from a ledger that nobody needs to have open."""
    book = Book()
    with closing(Chain.for_reading(path)) as chain:
        book.replay(chain)
    return book.events(adversary)


def _unprotected(
    unit: Unit, adversary: Adversary, delta: float, why: str, adjacency: Adjacency = Adjacency.ZERO_OUT
) -> Spent:
    return Spent(unit, adversary, adjacency, math.inf, delta, None, why, "none")


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
