"""Budgets of the data's owner: caps on what may be spent, and what is spent."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import date
from pathlib import Path

from rich.table import Table

from ..base.refusal import Refusal
from ..privacy.accounting.epsilon import GATE_INTERVAL
from ..privacy.accounting.renyi_filter import counted
from ..privacy.budget import Adjacency
from ..privacy.ledger import data_sets
from ..privacy.ledger.book import Book, read_book
from ..privacy.ledger.caps import NAMED, POPULATION, RECORDS, Cap, caps_on, default_folder, read_caps, set_cap
from ..privacy.ledger.client_sums import read_records
from ..run.display import console_for

COLUMNS = ("data", "unit", "spent", "delta", "cap", "data_id", "as_client")

Asked = tuple[str, str, str, str | None, str | None, str | None]
"""Data, epsilon, delta, the last day, and what questions may spend and for what, as they were typed."""


def set_budget(folder: Path | None, asked: Asked, *, reason: str | None = None, as_json: bool = False) -> int:
    """Set a cap; return the exit code.

    Args:
      folder: of the ledgers; None is the folder of real data.
      asked: what may be spent on which data.
      reason: of the decision, in words.
      as_json: print the cap as JSON.

    Raises:
      Refusal: a value is out of range, or the cap cannot be written.
    """
    data, epsilon, delta, until, questions, purposes = asked
    cap = Cap(
        data,
        _number("epsilon", epsilon),
        _number("delta", delta),
        _day(until),
        reason=reason,
        questions=None if questions is None else _number("questions", questions),
        purposes=None if purposes is None else tuple(each for each in purposes.split(",") if each),
    )
    set_cap(folder or default_folder(), cap)
    print(json.dumps(_plain(cap)) if as_json else f"{cap.data}: {_in_words(cap)}")
    return 0


def adopt(folder: Path | None, old: str, data_id: str) -> int:
    """Let a data set answer for an older ledger; return the exit code.

    Arguments as of `fedveil budget adopt`.

    Raises:
      Refusal: there is no such ledger.
    """
    data_sets.adopt(folder or default_folder(), old, data_id)
    print(f"{data_id}: the next run is charged the entries of {old} first")
    return 0


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise Refusal(name, text, "give a number") from None


def _day(text: str | None) -> date | None:
    try:
        return None if text is None else date.fromisoformat(text)
    except ValueError:
        raise Refusal("until", text, "give a day as YYYY-MM-DD") from None


def show(folder: Path | None, *, as_json: bool = False) -> int:
    """Print the caps of a folder of ledgers and what each ledger has spent; return the exit code."""
    folder = folder or default_folder()
    decisions = read_caps(folder)
    names, clients = _names(folder), _clients_of(folder)
    paths = dict.fromkeys([*sorted(folder.glob("*.ledger")), *sorted(clients)])
    rows = [_row(path, clients.get(path)) for path in paths]
    rows = [(*row[:-1], names.get(row[0], ""), row[-1]) for row in rows]
    rows.sort(key=lambda row: _place(row[-2]))
    if as_json:
        ledgers = [dict(zip(COLUMNS, row, strict=True)) for row in rows]
        print(json.dumps({"caps": [_plain(cap) for cap in decisions], "ledgers": ledgers}))
        return 0
    console = console_for(120)
    for cap in decisions:
        console.print(f"{cap.decided}  {cap.data}: {_in_words(cap)}", markup=False, highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in COLUMNS:
        table.add_column(column, no_wrap=column in ("unit", "spent", "delta"), overflow="fold")
    for row in rows:
        table.add_row(*row)
    if rows:
        console.print(table)
    elif not decisions:
        print(f"{folder}: no cap and no ledger")
    return 0


def _names(folder: Path) -> dict[str, str]:
    """Return what people call the data of each ledger that goes by a name."""
    names: dict[str, str] = {}
    for data_id, known in data_sets.read_data_sets(folder).items():
        names[data_sets.population_ledger(data_id)[:NAMED]] = data_id
        ledgers = data_sets.client_ledgers(data_id, known.fingerprints)
        names |= {
            name[:NAMED]: f"{data_id}, client {number}" for number, name in reversed(list(enumerate(ledgers)))
        }
    return names


def _place(name: str) -> tuple[bool, str, int]:
    """Return what ledgers are sorted by: data sets by their names, of each the clients by their numbers; others last."""
    data_id, _, client = name.partition(", client ")
    return not name, data_id, int(client) if client else -1


def _clients_of(folder: Path) -> dict[Path, Path]:
    """Return the ledgers of records that pay for sums of whole clients, each with the ledger of these."""
    found: dict[Path, Path] = {}
    for data_id in data_sets.read_data_sets(folder):
        clients = data_sets.population_path(folder, data_id)
        held = data_sets.record_paths(folder, data_id) or [data_sets.together_path(folder, data_id)]
        found |= dict.fromkeys(held, clients) if clients.exists() else {}
    return found


def _plain(cap: Cap) -> dict[str, object]:
    return {**asdict(cap), "until": cap.until and cap.until.isoformat()}


def _row(path: Path, clients: Path | None) -> tuple[str, ...]:
    book, alone = (read_book(path), Book()) if clients is None else read_records(clients, path)
    cap = " and ".join(map(_in_words, caps_on(path))) or "none"
    owner = book.identity.get("owner", path.stem.removeprefix(POPULATION).removeprefix(RECORDS))
    named = (str(owner)[:NAMED], str(book.identity["unit"]))
    if not book.granted:
        return (*named, "0", "", cap, "")
    delta = list(book.granted.values())[-1].target_delta
    part = f"{_spent(alone, delta):.4g}" if alone.releases else ""
    return (*named, f"{_spent(book, delta):.4g}", f"{delta:g}", cap, part)


def _spent(book: Book, delta: float) -> float:
    adjacency, order = Adjacency(book.identity["adjacency"]), book.filter_order
    return max(
        (counted(book.events(each), delta, adjacency, order, GATE_INTERVAL) for each in book.spent),
        default=0.0,
    )


def _in_words(cap: Cap) -> str:
    until = f" until {cap.until}" if cap.until else ""
    questions = "" if cap.questions is None else f", of which questions {cap.questions:g}"
    purposes = "" if cap.purposes is None else f", questions for {', '.join(cap.purposes) or 'nothing'}"
    return f"epsilon {cap.target_epsilon:g} at delta {cap.target_delta:g}{until}{questions}{purposes}"
