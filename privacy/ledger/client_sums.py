"""Charges of records for what their client releases as a whole: one budget for a record, whatever the mode.

A record is part of its client, so a release that hides the client costs the record as well (`accounting.record_events`),
unless it was computed from what the record was charged for already. The ledger of records holds these charges under the
client's keys. Entries of releases before it existed, or before ledgers were kept this way, are added at its next use.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..accounting.epsilon import GATE_INTERVAL, epsilon
from ..accounting.events import Gaussian, event_from_json, event_to_json
from ..accounting.record_events import record_event, record_event_of
from ..budget import OF_CLIENT, OF_RECORDS, UNLIMITED_EPSILON, Adjacency, Adversary, Budget, Release, Unit
from .caps import Cap, CapEnded, capped, caps_on
from .hash_chain import Draft, Entry, Head, canonical
from .ledger import BudgetExhausted, Key, Ledger, require_affordable
from .ledger_state import RESERVE, LedgerRelease, LedgerState, ReleaseState, state_at
from .question_caps import require_allowed

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

SUFFIX = (
    " of the client"  # of a mechanism: else a record-level release of the same run and round had the same key
)


def key_of(key: Key) -> Key:
    """Return the key of a client's release on the ledger of its records."""
    return (key[0], key[1], f"{key[2]}{SUFFIX}")


def release_of(release: Release, budget: Budget) -> Release:
    """Return a client's release as one of its records.

    Args:
      release: on the client's ledger.
      budget: of the records; its unit and adjacency are their ledger's.
    """
    plain = {
        adversary: record_event(event_to_json(event), budget.adjacency, secret=release.filter_order is None)
        for adversary, event in release.events.items()
    }
    events = {adversary: _event_of(event) for adversary, event in plain.items()}
    changed = replace(release, unit=budget.unit, events=events, cohort=None, source=OF_CLIENT)
    return replace(changed, mechanism=key_of(release.key)[2])


def _event_of(plain: dict[str, Any]) -> "DpEvent | Gaussian":
    """Return an event; a device that only adds Gaussian noise loads no accountant for it."""
    return Gaussian(plain["noise_multiplier"]) if plain["kind"] == "Gaussian" else event_from_json(plain)


def pending_drafts(clients: LedgerState, records: LedgerState, budget: Budget) -> list[Draft]:
    """Return the entries of the client's releases that the ledger of its records lacks.

    Args:
      clients: state of the client's ledger.
      records: state of its records' ledger.
      budget: of the records: gives adjacency and delta. What has left is charged, whatever epsilon may be spent.
    """
    drafts: list[Draft] = []
    for text, booked in clients.releases.items():
        run, number, mechanism = json.loads(text)
        key = canonical(list(key_of((run, number, mechanism))))
        spent = booked.state is not ReleaseState.VOID and booked.source != OF_RECORDS
        if spent and key not in records.releases:
            drafts.append(Draft(RESERVE, key, _payload(booked, records, budget)))
    return drafts


def _payload(booked: LedgerRelease, records: LedgerState, budget: Budget) -> str:
    payload: dict[str, Any] = json.loads(booked.entry.payload)
    filtered = "filter_order" in payload
    payload["events"] = {
        adversary.value: record_event_of(text, budget.adjacency, not filtered)
        for adversary, text in booked.events.items()
    }
    payload["budget"] = {"target_epsilon": UNLIMITED_EPSILON, "target_delta": budget.target_delta}
    payload.pop("cohort", None)
    if filtered and records.filter_order is not None:
        payload["filter_order"] = records.filter_order
    return canonical({**payload, "source": OF_CLIENT})


def charge_records(ledger: Ledger, clients: Path, budget: Budget) -> None:
    """Charge a ledger of records with what their client's ledger holds and it lacks.

    Args:
      ledger: of the records, open for writing.
      clients: path of the client's ledger, which need not exist.
      budget: as of `pending_drafts`.

    Raises:
      Refusal: the client's ledger cannot be read.
      LedgerUnavailable: nothing could be written.
    """
    book = state_at(clients)
    if pending_drafts(book, ledger.book, budget):
        ledger.charge(lambda records: pending_drafts(book, records, budget))


def as_records(clients: LedgerState, records: LedgerState, budget: Budget) -> LedgerState:
    """Return what records have spent, as a state in memory: on their ledger, and by their client's releases.

    Args:
      clients: state of the client's ledger.
      records: state of the records' ledger, which is extended; empty without one.
      budget: of the records.
    """
    book = records
    if not book.identity:
        identity = {"unit": str(budget.unit), "adjacency": str(budget.adjacency)}
        book = LedgerState(identity=identity, head=Head(1, ""))  # as after its first entry
    for draft in pending_drafts(clients, book, budget):
        take(book, draft)
    return book


def lost_by_records(clients: LedgerState, delta: float) -> float | None:
    """Return the epsilon of each record by what its client released as a whole, to the adversary who saw most of it.

    Args:
      clients: state of a ledger of clients.
      delta: in (0, 1).

    Returns:
      None where a filter composes the releases: what it counts is no guarantee.
    """
    if clients.filter_order is not None:
        return None
    mine = (
        _record_events(clients, adversary, Adjacency.ZERO_OUT, secret=True) for adversary in clients.spent
    )
    return max((epsilon(each, delta, Adjacency.ZERO_OUT, GATE_INTERVAL) for each in mine), default=0.0)


def sums_of_records(clients: Path, adjacency: Adjacency) -> "list[DpEvent]":
    """Return the events of each record by the sums of clients on a ledger at this path; none without one."""
    book = state_at(clients)
    return _record_events(book, Adversary.MODEL, adjacency, secret=book.filter_order is None)


def _record_events(
    clients: LedgerState, adversary: Adversary, adjacency: Adjacency, *, secret: bool
) -> "list[DpEvent]":
    sums = clients.events(adversary, lambda booked: booked.source != OF_RECORDS)
    return [event_from_json(record_event(event_to_json(each), adjacency, secret)) for each in sums]


def take(book: LedgerState, draft: Draft) -> None:
    """Count an entry in a state that stays in memory."""
    book.take(Entry(book.head.seq + 1, draft.kind, draft.key, draft.payload, "", ""), "memory")


@dataclass
class RecordsBudget:
    """Budget of records that the releases of their client spend too, while the client's ledger is open.

    Attributes:
      path: of the records' ledger, which need not exist: its caps hold.
      budget: of the records, before caps.
      book: what they have spent, in memory; it grows with the releases.
      caps: further caps of their owner.
    """

    path: Path
    budget: Budget
    book: LedgerState
    caps: tuple[Cap, ...] = ()

    def require(self, release: Release) -> None:
        """Refuse a release of the client that its records cannot afford.

        Raises:
          BudgetExhausted: naming the records' budget.
          Refusal: its purpose is not allowed.
        """
        if release.source == OF_RECORDS:
            return
        mine, adversary = release_of(release, self.budget), next(iter(release.events))
        try:
            budget = capped(self.path, self.budget)
        except CapEnded as ended:
            raise BudgetExhausted(self.budget, adversary, math.inf, str(ended)) from ended
        events = {who.value: event_to_json(event) for who, event in mine.events.items()}
        require_affordable(mine, events, budget, self.book)
        if excess := require_allowed(mine, (*caps_on(self.path), *self.caps), self.book, budget):
            raise BudgetExhausted(budget, adversary, math.inf, f"of a record {excess}")

    def add(self, release: Release) -> None:
        """Count a release."""
        if release.source == OF_RECORDS:
            return
        mine = release_of(release, self.budget)
        payload = {
            "events": {adversary.value: event_to_json(event) for adversary, event in mine.events.items()},
            "budget": {"target_epsilon": UNLIMITED_EPSILON, "target_delta": self.budget.target_delta},
            "source": OF_CLIENT,
        }
        optional = {"segments": mine.segments, "kind": mine.kind, "arm": mine.arm and mine.arm.to_json()}
        payload |= {name: value for name, value in optional.items() if value is not None}
        take(self.book, Draft(RESERVE, canonical(list(mine.key)), canonical(payload)))


def read_records(
    clients: Path, records: Path, adjacency: Adjacency = Adjacency.ZERO_OUT
) -> tuple[LedgerState, LedgerState]:
    """Return what records have spent, and what of it by releases of their client alone, as states in memory.

    Args:
      clients: path of the client's ledger, which need not exist.
      records: path of its records' ledger, which need not exist.
      adjacency: of the records before they have a ledger.

    Raises:
      Refusal: a ledger is damaged.
    """
    of_client, direct = (state_at(each) for each in (clients, records))
    deltas = [each.target_delta for book in (of_client, direct) for each in book.granted.values()]
    unit, adjacency = direct.identity.get("unit", Unit.RECORD), direct.identity.get("adjacency", adjacency)
    budget = Budget(unit, UNLIMITED_EPSILON, min(deltas, default=0.5), adjacency)
    return as_records(of_client, direct, budget), as_records(of_client, LedgerState(), budget)
