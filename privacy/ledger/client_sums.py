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
from .ledger import BudgetExhausted, Ledger, events_to_json, key_text, require_affordable
from .ledger_state import RESERVE, LedgerRelease, LedgerState, ReleaseState, state_at
from .question_caps import question_excess

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

# Ends the mechanism of a client's release on its records' ledger: a record-level release may have the key without it.
SUFFIX = " of the client"


def record_release(release: Release, budget: Budget) -> Release:
    """Return the release that charges a client's records for its release: the key ends with `SUFFIX`, no cohort is kept.

    Args:
      release: release that is charged on the client's ledger.
      budget: budget of the records; its unit and adjacency are their ledger's.
    """
    plain = {
        adversary: record_event(event_to_json(event), budget.adjacency, secret=release.filter_order is None)
        for adversary, event in release.events.items()
    }
    events = {adversary: _event_of(event) for adversary, event in plain.items()}
    mechanism = f"{release.mechanism}{SUFFIX}"
    return replace(
        release, unit=budget.unit, mechanism=mechanism, events=events, cohort=None, source=OF_CLIENT
    )


def _event_of(plain: dict[str, Any]) -> "DpEvent | Gaussian":
    """Return the event of an event's JSON; a device that only adds Gaussian noise loads no accountant for it."""
    return Gaussian(plain["noise_multiplier"]) if plain["kind"] == "Gaussian" else event_from_json(plain)


def pending_drafts(clients: LedgerState, records: LedgerState, budget: Budget) -> list[Draft]:
    """Return the entries of the client's releases that the ledger of its records lacks.

    Args:
      clients: state of the client's ledger.
      records: state of its records' ledger.
      budget: budget of the records; its epsilon is not used, because what was released is charged beyond any epsilon.
    """
    drafts: list[Draft] = []
    for text, booked in clients.releases.items():
        run, number, mechanism = json.loads(text)
        key = key_text((run, number, f"{mechanism}{SUFFIX}"))
        spent = booked.state is not ReleaseState.VOID and booked.source != OF_RECORDS
        if spent and key not in records.releases:
            drafts.append(Draft(RESERVE, key, _record_payload(booked, records, budget)))
    return drafts


def _record_payload(booked: LedgerRelease, records: LedgerState, budget: Budget) -> str:
    """Return the payload that charges the records for `booked`, a client's release. Others as of `pending_drafts`."""
    payload: dict[str, Any] = json.loads(booked.entry.payload)
    filtered = "filter_order" in payload
    payload["events"] = {
        adversary.value: record_event_of(text, budget.adjacency, not filtered)
        for adversary, text in booked.events.items()
    }
    payload["budget"] = {"target_epsilon": UNLIMITED_EPSILON, "target_delta": budget.target_delta}
    payload.pop("cohort", None)
    if filtered and records.filter_order is not None:  # a ledger has one order
        payload["filter_order"] = records.filter_order
    return canonical({**payload, "source": OF_CLIENT})


def charge_records(ledger: Ledger, clients: Path, budget: Budget) -> None:
    """Charge a ledger of records with those releases of their client that it lacks.

    Args:
      ledger: ledger of the records, open for writing.
      clients: path of the client's ledger, which need not exist.
      budget: as of `pending_drafts`.

    Raises:
      Refusal: the client's ledger cannot be read.
      LedgerUnavailable: nothing could be written.
    """
    book = state_at(clients)
    # Without any, no transaction is needed. Inside it they are computed anew, from what the file then holds.
    if pending_drafts(book, ledger.book, budget):
        ledger.charge(lambda records: pending_drafts(book, records, budget))


def as_records(clients: LedgerState, records: LedgerState, budget: Budget) -> LedgerState:
    """Return what records have spent, as a state in memory: on their ledger, and by their client's releases.

    Args:
      clients: state of the client's ledger.
      records: state of the records' ledger, which is extended in place; an empty state if they have no ledger.
      budget: budget of the records.
    """
    book = records
    if not book.identity:
        identity = {"unit": str(budget.unit), "adjacency": str(budget.adjacency)}
        book = LedgerState(identity=identity, head=Head(1, ""))  # as after its first entry
    for draft in pending_drafts(clients, book, budget):
        _count(book, draft)
    return book


def lost_by_records(clients: LedgerState, delta: float) -> float | None:
    """Return the epsilon of each record by what its client released as a whole, to the adversary who saw most of it.

    Args:
      clients: state of a ledger of clients.
      delta: in (0, 1).

    Returns:
      None if a filter composes the releases: the epsilon that it counts is no guarantee.
    """
    if clients.filter_order is not None:
        return None
    events = [_record_events(clients, adversary, Adjacency.ZERO_OUT) for adversary in clients.spent]
    return max((epsilon(each, delta, Adjacency.ZERO_OUT, GATE_INTERVAL) for each in events), default=0.0)


def sums_of_records(clients: Path, adjacency: Adjacency) -> "list[DpEvent]":
    """Return what the sums of clients on a ledger, which need not exist, cost each record against the model's recipients."""
    return _record_events(state_at(clients), Adversary.MODEL, adjacency)


def _record_events(clients: LedgerState, adversary: Adversary, adjacency: Adjacency) -> "list[DpEvent]":
    """Return what the sums on a ledger of clients cost each record; sums that the records paid for are left out."""
    sums = clients.events(adversary, lambda booked: booked.source != OF_RECORDS)
    secret = clients.filter_order is None
    return [event_from_json(record_event(event_to_json(each), adjacency, secret)) for each in sums]


def _count(book: LedgerState, draft: Draft) -> None:
    """Count an entry in a state that stays in memory, where no hash is checked."""
    book.take(Entry(book.head.seq + 1, draft.kind, draft.key, draft.payload, "", ""), "memory")


@dataclass
class RecordsBudget:
    """Budget of records that the releases of their client spend too, while the client's ledger is open.

    Attributes:
      path: path of the records' ledger, which need not exist; the caps on it apply.
      budget: budget of the records, before caps.
      book: what the records have spent, in memory; it grows with the releases.
      caps: further caps of the records' owner, on questions.
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
        mine, adversary = record_release(release, self.budget), next(iter(release.events))
        try:
            budget = capped(self.path, self.budget)
        except CapEnded as ended:
            raise BudgetExhausted(self.budget, adversary, math.inf, str(ended)) from ended
        require_affordable(mine, events_to_json(mine), budget, self.book)
        if excess := question_excess(mine, (*caps_on(self.path), *self.caps), self.book, budget):
            raise BudgetExhausted(budget, adversary, math.inf, f"of a record {excess}")

    def add(self, release: Release) -> None:
        """Count in `book` a release of the client, which `require` has admitted and the client's ledger is about to write."""
        if release.source == OF_RECORDS:
            return
        mine = record_release(release, self.budget)
        payload = {
            "events": events_to_json(mine),
            "budget": {"target_epsilon": UNLIMITED_EPSILON, "target_delta": self.budget.target_delta},
            "source": OF_CLIENT,
        }
        optional = {"segments": mine.segments, "kind": mine.kind, "arm": mine.arm and mine.arm.to_json()}
        payload |= {name: value for name, value in optional.items() if value is not None}
        _count(self.book, Draft(RESERVE, key_text(mine.key), canonical(payload)))


def read_records(
    clients: Path, records: Path, adjacency: Adjacency = Adjacency.ZERO_OUT
) -> tuple[LedgerState, LedgerState]:
    """Return two states in memory: of all that records have spent, and of the part by releases of their client.

    Args:
      clients: path of the client's ledger, which need not exist.
      records: path of its records' ledger, which need not exist.
      adjacency: adjacency of the records if they have no ledger.
    """
    of_client, of_records = state_at(clients), state_at(records)
    deltas = [each.target_delta for book in (of_client, of_records) for each in book.granted.values()]
    unit = of_records.identity.get("unit", Unit.RECORD)
    adjacency = of_records.identity.get("adjacency", adjacency)
    budget = Budget(unit, UNLIMITED_EPSILON, min(deltas, default=0.5), adjacency)
    return as_records(of_client, of_records, budget), as_records(of_client, LedgerState(), budget)
