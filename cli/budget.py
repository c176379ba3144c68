"""Verbs of `fedveil budget`: caps that the data's owner sets on what may be spent, and what is spent."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .grammar import DAY, GROUP, Json, argument, option, read, verb

if TYPE_CHECKING:
    from ..privacy.ledger.caps import Cap
    from ..privacy.ledger.ledger_state import LedgerState

group = typer.Typer(**GROUP)
COLUMNS = ("data", "unit", "spent", "delta", "cap", "data_id", "as_client")  # fields of a row, see `_row`
LedgerDir = Annotated[
    Path | None, option("FOLDER", "Folder of the ledgers; ~/.local/share/fedveil/ledgers by default.")
]


@verb(group, "set", "Cap the epsilon spent on your data.")
def set_budget(
    epsilon: Annotated[str, option("E", "Largest epsilon that a ledger may spend.")],
    delta: Annotated[str, option("D", "Largest delta at which epsilon may be computed.")],
    data: Annotated[str, option("LEDGER", "One ledger, by its name in column data of budget show.")] = "all",
    until: Annotated[str | None, option("YYYY-MM-DD", "Last day, UTC, of releases.")] = None,
    questions: Annotated[str | None, option("E", "Largest epsilon that questions may spend of it.")] = None,
    purposes: Annotated[
        str | None, option("WORDS", "Permitted purposes of questions, separated by commas; any by default.")
    ] = None,
    reason: Annotated[str | None, option("TEXT", "Reason, recorded with the decision.")] = None,
    ledger_dir: LedgerDir = None,
    as_json: Json = False,
) -> int:
    """Cap the epsilon that may be spent, from the next release on.

    Example:
      fedveil budget set --epsilon 3 --delta 1e-5 --until 2099-12-31
      fedveil budget set --epsilon 3 --delta 1e-5 --purposes statistics
    """
    from ..privacy.ledger.caps import Cap, default_folder, set_cap

    cap = Cap(
        data,
        read(float, "epsilon", epsilon),
        read(float, "delta", delta),
        None if until is None else read(date.fromisoformat, "until", until, DAY),
        reason=reason,
        questions=None if questions is None else read(float, "questions", questions),
        purposes=None if purposes is None else tuple(each for each in purposes.split(",") if each),
    )
    set_cap(ledger_dir or default_folder(), cap)
    print(json.dumps(_plain(cap)) if as_json else f"{cap.data}: {_format_cap(cap)}")
    return 0


@verb(group, "show", "Show the caps and the spent epsilon.")
def show(ledger_dir: LedgerDir = None, as_json: Json = False) -> int:
    """Show the caps of a folder, and the epsilon that its ledgers have spent.

    Example:
      fedveil budget show
    """
    from rich.table import Table

    from ..privacy.ledger.caps import default_folder, read_caps
    from ..run.display import console_for

    folder = ledger_dir or default_folder()
    caps = read_caps(folder)
    data_ids, client_ledgers = _data_ids(folder), _client_ledgers(folder)
    paths = dict.fromkeys([*sorted(folder.glob("*.ledger")), *sorted(client_ledgers)])
    rows = [_row(path, client_ledgers.get(path), data_ids) for path in paths]
    rows.sort(key=lambda row: _sort_key(row["data_id"]))
    if as_json:
        print(json.dumps({"caps": [_plain(cap) for cap in caps], "ledgers": rows}))
        return 0
    console = console_for(120)
    for cap in caps:
        console.print(f"{cap.decided}  {cap.data}: {_format_cap(cap)}", markup=False, highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in COLUMNS:
        table.add_column(column, no_wrap=column in ("unit", "spent", "delta"), overflow="fold")
    for row in rows:
        table.add_row(*row.values())
    if rows:
        console.print(table)
    elif not caps:
        print(f"{folder}: no cap and no ledger")
    return 0


@verb(group, "adopt", "Charge an older ledger to a named data set.")
def adopt(
    old: Annotated[str, argument("LEDGER", "Name of the ledger's file, without .ledger.")],
    data_id: Annotated[str, argument("DATA_ID", "Name of the data set, as in task.data_id.")],
    ledger_dir: LedgerDir = None,
) -> int:
    """Charge the entries of an older ledger to a named data set, at the start of its next run.

    Example:
      fedveil budget adopt 9f86d081884c7d659a2feaa0c55ad015 clinics-2026
    """
    from ..privacy.ledger import data_sets
    from ..privacy.ledger.caps import default_folder

    data_sets.adopt(ledger_dir or default_folder(), old, data_id)
    print(f"{data_id}: the next run is charged the entries of {old} first")
    return 0


def _data_ids(folder: Path) -> dict[str, str]:
    """Return, by a ledger's name in column data, its data set and, if it is the ledger of one client, the client's number."""
    from ..privacy.ledger import data_sets
    from ..privacy.ledger.caps import NAME_LENGTH

    ids: dict[str, str] = {}
    for data_id, data_set in data_sets.read_data_sets(folder).items():
        ids[data_sets.population_ledger(data_id)[:NAME_LENGTH]] = data_id
        ledgers = data_sets.client_ledgers(data_id, data_set.fingerprints)
        # Clients with equal data have one ledger, which is shown under the first one's number.
        for number, name in reversed(list(enumerate(ledgers))):
            ids[name[:NAME_LENGTH]] = f"{data_id}, client {number}"
    return ids


def _sort_key(data_id: str) -> tuple[bool, str, int]:
    """Return the key by which rows are sorted: data sets by name, their clients by number, ledgers of no data set last."""
    data_set, _, client = data_id.partition(", client ")
    return not data_id, data_set, int(client or -1)


def _client_ledgers(folder: Path) -> dict[Path, Path]:
    """Return, by ledger of records, the ledger of whole clients whose sums are charged to these records too."""
    from ..privacy.ledger import data_sets

    ledgers: dict[Path, Path] = {}
    for data_id in data_sets.read_data_sets(folder):
        clients = data_sets.population_path(folder, data_id)
        if clients.exists():
            records = data_sets.record_paths(folder, data_id) or [data_sets.together_path(folder, data_id)]
            ledgers |= dict.fromkeys(records, clients)
    return ledgers


def _plain(cap: Cap) -> dict[str, object]:
    return {**asdict(cap), "until": cap.until and cap.until.isoformat()}


def _row(path: Path, clients: Path | None, data_ids: Mapping[str, str]) -> dict[str, str]:
    """Return the row of a ledger, by `COLUMNS`; as_client is the epsilon that its records lost by sums on ledger `clients`."""
    from ..privacy.ledger.caps import NAME_LENGTH, POPULATION, RECORDS, caps_on
    from ..privacy.ledger.client_sums import read_records
    from ..privacy.ledger.ledger_state import LedgerState, read_ledger

    book, sums = read_records(clients, path) if clients else (read_ledger(path), LedgerState())
    owner = book.identity.get("owner", path.stem.removeprefix(POPULATION).removeprefix(RECORDS))
    name = str(owner)[:NAME_LENGTH]
    row = {"data": name, "unit": str(book.identity["unit"]), "spent": "0", "delta": ""}
    row["cap"] = " and ".join(map(_format_cap, caps_on(path))) or "none"
    row |= {"data_id": data_ids.get(name, ""), "as_client": ""}
    if book.granted:
        delta = [*book.granted.values()][-1].target_delta
        row |= {"spent": f"{_spent(book, delta):.4g}", "delta": f"{delta:g}"}
        row["as_client"] = f"{_spent(sums, delta):.4g}" if sums.releases else ""
    return row


def _spent(book: LedgerState, delta: float) -> float:
    """Return the largest epsilon of a ledger's releases against any adversary, at delta."""
    from ..privacy.accounting.epsilon import GATE_INTERVAL
    from ..privacy.accounting.renyi_filter import spent_epsilon
    from ..privacy.budget import Adjacency

    adjacency, order = Adjacency(book.identity["adjacency"]), book.filter_order
    return max(
        (spent_epsilon(book.events(each), delta, adjacency, order, GATE_INTERVAL) for each in book.spent),
        default=0.0,
    )


def _format_cap(cap: Cap) -> str:
    until = f" until {cap.until}" if cap.until else ""
    questions = "" if cap.questions is None else f", of which questions {cap.questions:g}"
    purposes = "" if cap.purposes is None else f", questions for {', '.join(cap.purposes) or 'nothing'}"
    return f"epsilon {cap.target_epsilon:g} at delta {cap.target_delta:g}{until}{questions}{purposes}"
