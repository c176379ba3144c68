"""Privacy of a run that has not ended, as its ledger and its configuration tell it: the rows that its result will have."""

from __future__ import annotations

import json
from typing import Any

from ..privacy.accounting.epsilon import GATE_INTERVAL
from ..privacy.accounting.renyi_filter import accountant, spent_epsilon
from ..privacy.budget import Adjacency, Adversary
from ..privacy.ledger.ledger_state import RESERVE, LedgerState, run_of
from .run_files import OWN_LEDGERS, Fields, RunFiles

OF_RECORDS = ("record", "record_and_client")
TRUSTED = "trusted: it sees single updates"


def privacy_so_far(run: RunFiles) -> list[dict[str, Any]]:
    """Return the loss of every unit against every adversary so far; empty before the first release."""
    mode = run.said("privacy", "name")
    if mode == "none":
        return [_row("client", adversary, Adjacency.ZERO_OUT, 0.0, None) for adversary in Adversary]
    records = _rows_of_records(run) if mode in OF_RECORDS and run.rounds else []
    return [*records, *_rows_of_sums(run)]


def _rows_of_records(run: RunFiles) -> list[dict[str, Any]]:
    """Return the bound that clients' ledgers enforce, independent of the run so far."""
    level: Fields = run.said("privacy", "record") or run.said("privacy") or {}
    unit = "person" if level.get("per_person") else "record"
    target = level.get("target_epsilon")
    row = _row(unit, Adversary.SERVER, Adjacency(level["adjacency"]), float(level["target_delta"]), target)
    bound = {"epsilon": target or "infinity", "accountant": OWN_LEDGERS, "sampling": "poisson batches"}
    return [{**row, **bound, "adversary": str(adversary)} for adversary in Adversary]


def _rows_of_sums(run: RunFiles) -> list[dict[str, Any]]:
    """Return the ledger's loss over all its runs, after this run's first release."""
    reserved = [each for each in run.entries if each.kind == RESERVE]
    mine = [each for each in reserved if run_of(each) == run.name]
    if not mine and run.rounds:  # resumed, under a name that the ledger does not know yet
        mine = reserved
    if not mine:
        return []
    # A trusted server is not among them.
    events = json.loads(mine[-1].payload)["events"]
    level: Fields = run.said("privacy", "client") or run.said("privacy") or {}
    target = level.get("target_epsilon")
    book = LedgerState()
    for each in run.entries:
        book.apply(each)
    unit, adjacency = str(book.identity["unit"]), Adjacency(book.identity["adjacency"])
    rows: list[dict[str, Any]] = []
    for adversary in Adversary:
        if adversary not in events:
            delta = next(iter(book.granted.values())).target_delta
            rows.append({**_row(unit, adversary, adjacency, delta, None), "accountant": TRUSTED})
            continue
        budget, order = book.granted[adversary], book.filter_order
        # A filter's count promises nothing by itself: its budget does.
        size = target or "infinity"
        if order is None:
            size = spent_epsilon(book.events(adversary), budget.target_delta, adjacency, None, GATE_INTERVAL)
        row = _row(unit, adversary, adjacency, budget.target_delta, target)
        name = accountant(budget.target_delta, adjacency, order)
        rows.append({**row, "epsilon": size, "accountant": name, "sampling": run.said("cohort", "name")})
    return rows


def _row(
    unit: str, adversary: Adversary, adjacency: Adjacency, delta: float, target: float | None
) -> dict[str, Any]:
    return {
        "unit": unit,
        "adversary": str(adversary),
        "adjacency": str(adjacency),
        "epsilon": "infinity",
        "delta": delta,
        "target_epsilon": target,
        "accountant": "not accounted",
        "sampling": "none",
    }
