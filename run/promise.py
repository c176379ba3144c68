"""Promise of a run, ended or not: rows under the names of the registry of DP deployments, and two sentences."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..privacy.accounting.epsilon import GATE_INTERVAL
from ..privacy.accounting.renyi_filter import accountant, spent_epsilon
from ..privacy.budget import Adjacency, Adversary
from ..privacy.ledger.ledger_state import RESERVE, LedgerState, run_of
from .run_files import OWN_LEDGERS, Fields, RunFiles

FALSE_POSITIVE = 0.05  # rate of the membership test in the sentences
WEAK = 0.5  # true positive rate of that test, above which a sentence says what the guarantee does not prevent
ROLE = {"model": "recipients of the model", "clients": "the other clients", "server": "the server's operator"}
HIDES = {
    "client": "everything that one client contributes",
    "record": "one example of one client",
    "person": "all examples of one person at one client",
    "person_everywhere": "all examples of one person at all clients",
}
# Sentences after the promise.
GOES_ON = "The run has not ended: each further round adds to this, up to its budget."
VIOLATED = "The audit of this run found that this does not hold."
REFUTED = "This run found that this does not hold: its task mixed the examples of a step."
OF_RECORDS = ("record", "person", "person_everywhere")
UNITS = ("client", *reversed(OF_RECORDS))
CLIENT_SOFTWARE = "the clients' own software"
FEW_COLLUDE = "the clients' own software, and that few clients work for the server"
TRUSTED = "trusted: it sees single updates"  # accountant of a row
CENTRAL = "a server that adds the noise and does not disclose single updates"
DP_SGD = "DP-SGD: Gaussian noise on the sum of a batch's clipped gradients, added at each client"
ON_THE_SUM = "exact discrete Gaussian noise on the sum of the clients' clipped updates, added at the server"
SHARES = "shares of an exact discrete Gaussian, added by the clients to encrypted updates"
SHARES_OF_STEPS = "shares of an exact discrete Gaussian on the sum of all clients' clipped gradients, added by the clients to encrypted sums"


def promise_rows(run: RunFiles) -> list[dict[str, Any]]:
    """Return what every unit has revealed to every adversary, so far where the run goes on, under the registry's names."""
    mode = str(run.setting("privacy", "name"))
    rows = run.result.get("privacy", None) or privacy_so_far(run)
    rows = [_row(mode, row, _trusts_server(rows)) for row in rows]
    if run.setting("privacy", "noise") == "correlated":
        for row in rows:
            if row["mechanism"] == ON_THE_SUM:
                row["mechanism"] += ", correlated over the rounds"
    return rows


def row_by_sums(run: RunFiles) -> dict[str, Any] | None:
    """Return what a record has lost by sums of whole clients, as a row; None where the result does not say."""
    row = run.result.get("record_by_sums")
    if row is None:
        return None
    mode = str(run.setting("privacy", "name"))
    promised = _row(mode, {**row, "unit": "client"}, _trusts_server(run.result["privacy"]))
    return {**promised, "unit": "record", "hides": f"{HIDES['record']}, by sums of whole clients"}


def _trusts_server(rows: Sequence[Fields]) -> bool:
    """Return whether clients are not hidden from the server."""
    return any((r["unit"], r["adversary"], r["epsilon"]) == ("client", "server", "infinity") for r in rows)


def _basis_and_mechanism(mode: str, unit: str, trusted: bool) -> tuple[str, str]:
    """Return what a promise about a unit relies on, and its mechanism, both in words."""
    if unit == "client":
        return (CENTRAL, ON_THE_SUM) if trusted else (FEW_COLLUDE, SHARES)
    return (FEW_COLLUDE, SHARES_OF_STEPS) if mode == "record_distributed" else (CLIENT_SOFTWARE, DP_SGD)


def _row(mode: str, row: Fields, trusted: bool) -> dict[str, Any]:
    """Return a row of a result under the registry's names; `trusted` says that clients are not hidden from the server."""
    unit, adversary = str(row["unit"]), str(row["adversary"])
    promised = row["epsilon"] != "infinity"
    relies, mechanism = _basis_and_mechanism(mode, unit, trusted)
    if row.get("sampling") in ("poisson", "cyclic_poisson") and unit == "client":
        relies += ", and a draw of the clients that stays secret"
    return {
        "unit": unit,
        "adversary": adversary,
        "adjacency": row["adjacency"],
        "epsilon": row["epsilon"],
        "delta": row["delta"],
        "target_epsilon": row["target_epsilon"],
        "mechanism": mechanism if promised else "none",
        "accountant": row["accountant"],
        "sampling": row["sampling"],
        "hides": HIDES.get(unit, unit),
        "whom": ROLE.get(adversary, adversary),
        "relies_on": relies if promised else None,
        "recognised": recognised(row),
        "curve": row.get("curve"),
        "groups": row.get("groups", []),
    }


def recognised(row: Fields) -> float:
    """Return the largest true positive rate of any membership test with false positive rate `FALSE_POSITIVE`.

    It follows from a row of a result, by its curve or, in those of earlier releases, by epsilon and delta.
    """
    curve = row.get("curve")
    miss_rates: Mapping[float, float] = {rate: miss for rate, miss in curve["trade_off"]} if curve else {}
    if FALSE_POSITIVE in miss_rates:
        return 1 - miss_rates[FALSE_POSITIVE]
    if row["epsilon"] == "infinity":
        return 1.0
    # Dong et al. 2019, arXiv:1905.02383, proposition 2.12.
    size, delta = float(row["epsilon"]), float(row["delta"])
    steep = math.exp(min(size, 700.0)) * FALSE_POSITIVE + delta
    flat = 1 - math.exp(-size) * (1 - delta - FALSE_POSITIVE)
    return min(1.0, steep, flat)


def main_row(rows: Sequence[Fields]) -> int | None:
    """Return the place of the first guarantee: the largest unit's, against the model's adversary; None without any."""
    for unit in UNITS:
        for adversary in ROLE:
            for index, row in enumerate(rows):
                if (row["unit"], row["adversary"]) == (unit, adversary) and row["epsilon"] != "infinity":
                    return index
    return None


def sentences(rows: Sequence[Fields], ended: bool, refuted: str | None = None) -> list[str]:
    """Return the promise in two sentences without symbols, and the findings against it.

    Args:
      rows: as of `promise_rows`.
      ended: whether the run has ended.
      refuted: sentence of a finding that the promise does not hold; None without one.
    """
    if not rows and not ended:
        return [
            "This run has not ended and has released nothing yet.",
            "Its guarantee is shown here after the first round.",
        ]
    index = main_row(rows)
    if index is None:
        return [
            "This run gives no guarantee.",
            "Every recipient of its model may learn any client's contribution.",
        ]
    row = rows[index]
    more = [] if ended else [GOES_ON]
    more += [refuted] if refuted else []
    others = [r["whom"] for r in rows if r["unit"] == row["unit"] and r["epsilon"] == row["epsilon"]]
    return [*meaning(others, row["unit"], row["recognised"]), *more]


def meaning(recipients: Sequence[str], unit: str, share: float) -> tuple[str, str]:
    """Return what a guarantee means in two sentences without symbols.

    Args:
      recipients: those from whom the unit is hidden, in words; at least one.
      unit: a key of `HIDES`.
      share: true positive rate of the best membership test, as of `recognised`.
    """
    audience = " and ".join(filter(None, [", ".join(recipients[:-1]), recipients[-1]]))
    start, hides = f"{audience[0].upper()}{audience[1:]}", HIDES.get(unit, unit)
    first = f"{start} can learn almost the same whether or not {hides} was in the training."
    if share > WEAK:
        first = (
            f"The guarantee does not prevent {audience} from finding out whether {hides} was in the training."
        )
    units = {"client": "clients", "record": "records"}.get(unit, "persons")
    second = (
        f"A test that wrongly suspects {FALSE_POSITIVE * 100:.0f} of 100 {units} that were not in it finds at most "
        f"{math.ceil(round(100 * share, 6))} of 100 that were, whatever else the tester knows."
    )
    return first, second


def privacy_so_far(run: RunFiles) -> list[dict[str, Any]]:
    """Return the rows that the result will have, by the ledger and the configuration; empty before the first release."""
    mode = run.setting("privacy", "name")
    if mode == "none":
        return [_row_so_far("client", adversary, Adjacency.ZERO_OUT, 0.0, None) for adversary in Adversary]
    records = _records_so_far(run) if mode in ("record", "record_and_client") and run.rounds else []
    return [*records, *_sums_so_far(run)]


def _records_so_far(run: RunFiles) -> list[dict[str, Any]]:
    """Return the bound that clients' ledgers enforce, independent of the run so far."""
    level: Fields = run.setting("privacy", "record") or run.setting("privacy") or {}
    unit = "person" if level.get("per_person") else "record"
    target = level.get("target_epsilon")
    row = _row_so_far(
        unit, Adversary.SERVER, Adjacency(level["adjacency"]), float(level["target_delta"]), target
    )
    bound = {"epsilon": target or "infinity", "accountant": OWN_LEDGERS, "sampling": "poisson batches"}
    return [{**row, **bound, "adversary": str(adversary)} for adversary in Adversary]


def _sums_so_far(run: RunFiles) -> list[dict[str, Any]]:
    """Return the ledger's loss over all its runs, after this run's first release."""
    reserved = [each for each in run.entries if each.kind == RESERVE]
    mine = [each for each in reserved if run_of(each) == run.name]
    if not mine and run.rounds:  # resumed, under a name that the ledger does not know yet
        mine = reserved
    if not mine:
        return []
    events = json.loads(mine[-1].payload)["events"]  # by adversary; none for a trusted server
    level: Fields = run.setting("privacy", "client") or run.setting("privacy") or {}
    target = level.get("target_epsilon")
    book = LedgerState()
    for each in run.entries:
        book.apply(each)
    unit, adjacency = str(book.identity["unit"]), Adjacency(book.identity["adjacency"])
    rows: list[dict[str, Any]] = []
    for adversary in Adversary:
        if adversary not in events:
            delta = next(iter(book.granted.values())).target_delta
            rows.append({**_row_so_far(unit, adversary, adjacency, delta, None), "accountant": TRUSTED})
            continue
        budget, order = book.granted[adversary], book.filter_order
        # A filter's count promises nothing by itself: its budget does.
        size = target or "infinity"
        if order is None:
            size = spent_epsilon(book.events(adversary), budget.target_delta, adjacency, None, GATE_INTERVAL)
        row = _row_so_far(unit, adversary, adjacency, budget.target_delta, target)
        name = accountant(budget.target_delta, adjacency, order)
        rows.append({**row, "epsilon": size, "accountant": name, "sampling": run.setting("cohort", "name")})
    return rows


def _row_so_far(
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
