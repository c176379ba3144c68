"""``fedveil budget set|show``: the owner of the data says what may be spent on it, and sees what is."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import closing
from datetime import date
from pathlib import Path

from rich.table import Table

from ..privacy.accounting.epsilon import GATE_INTERVAL
from ..privacy.accounting.renyi_filter import counted
from ..privacy.budget import Adjacency
from ..privacy.ledger.book import Book
from ..privacy.ledger.caps import ALL, NAMED, Cap, caps_on, default_folder, read_caps, set_cap
from ..privacy.ledger.hash_chain import Chain
from ..privacy.refusal import Refusal
from ..server.run.display import console_for


def budget(argv: Sequence[str]) -> int:
    """Run ``fedveil budget``; return the exit code."""
    parser = argparse.ArgumentParser("fedveil budget", allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True)
    setting = verbs.add_parser(
        "set", help="cap what may be spent, from the next release on", allow_abbrev=False
    )
    showing = verbs.add_parser(
        "show", help="caps, and what the ledgers beside them have spent", allow_abbrev=False
    )
    for each in (setting, showing):
        each.add_argument("--ledger-dir", type=Path, default=default_folder(), help="where the ledgers lie")
    setting.add_argument("--data", default=ALL, help="a fingerprint, as `show` lists it; all by default")
    setting.add_argument("--epsilon", required=True, help="the most that a ledger may spend")
    setting.add_argument("--delta", required=True, help="the largest delta at which epsilon may be counted")
    setting.add_argument("--until", help="YYYY-MM-DD, UTC: the last day on which anything may be released")
    try:
        asked = parser.parse_args(argv)
    except SystemExit as stopped:  # it has said why
        return int(stopped.code or 0)
    return _show(asked.ledger_dir) if asked.verb == "show" else _set(asked)


def _set(asked: argparse.Namespace) -> int:
    cap = Cap(asked.data, _number("epsilon", asked.epsilon), _number("delta", asked.delta), _day(asked.until))
    set_cap(asked.ledger_dir, cap)
    print(f"{cap.data}: {_in_words(cap)}")
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


def _show(folder: Path) -> int:
    console = console_for(120)
    decisions = read_caps(folder)
    for cap in decisions:
        console.print(f"{cap.decided}  {cap.data}: {_in_words(cap)}", markup=False, highlight=False)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("data", "unit", "spent", "delta", "cap"):
        table.add_column(column, no_wrap=True)
    for path in sorted(folder.glob("*.ledger")):
        table.add_row(*_row(path))
    if table.row_count:
        console.print(table)
    elif not decisions:
        print(f"{folder}: neither a cap nor a ledger")
    return 0


def _row(path: Path) -> tuple[str, ...]:
    book = Book()
    with closing(Chain.for_reading(path)) as chain:
        book.replay(chain)
    caps = caps_on(path)
    budgets = list(book.granted.values())
    cap = " and ".join(map(_in_words, caps)) or "none"
    named = (str(book.identity["owner"])[:NAMED], str(book.identity["unit"]))
    if not budgets:
        return (*named, "0", "", cap)
    delta, adjacency = budgets[-1].target_delta, Adjacency(book.identity["adjacency"])
    spent = max(
        counted(book.events(adversary), delta, adjacency, book.filter_order, GATE_INTERVAL)
        for adversary in book.spent
    )
    return (*named, f"{spent:.4g}", f"{delta:g}", cap)


def _in_words(cap: Cap) -> str:
    until = f" until {cap.until}" if cap.until else ""
    return f"epsilon {cap.target_epsilon:g} at delta {cap.target_delta:g}{until}"
