"""Verbs of `fedveil budget`: arguments, options, help and example of each; the bodies are imported when called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from .grammar import GROUP, Json, verb

budget = typer.Typer(**GROUP)
LedgerDir = Annotated[
    Path | None,
    Option(metavar="FOLDER", help="Where the ledgers lie; ~/.local/share/fedveil/ledgers by default."),
]


@verb(budget, "set", "Cap what may be spent on your data.")
def budget_set(
    epsilon: Annotated[str, Option(metavar="E", help="The most that a ledger may spend.")],
    delta: Annotated[str, Option(metavar="D", help="The largest delta at which epsilon may be counted.")],
    data: Annotated[
        str, Option(metavar="LEDGER", help="One ledger, by its name in `budget show`'s column data.")
    ] = "all",
    until: Annotated[
        str | None, Option(metavar="YYYY-MM-DD", help="The last day, UTC, on which anything may be released.")
    ] = None,
    questions: Annotated[
        str | None, Option(metavar="E", help="The most that questions may spend of it.")
    ] = None,
    purposes: Annotated[
        str | None, Option(metavar="WORDS", help="What questions may be for, with commas; none allows any.")
    ] = None,
    reason: Annotated[str | None, Option(metavar="TEXT", help="Why; kept with the decision.")] = None,
    ledger_dir: LedgerDir = None,
    as_json: Json = False,
) -> int:
    """Cap what may be spent, from the next release on.

    Example:
      fedveil budget set --epsilon 3 --delta 1e-5 --until 2099-12-31
      fedveil budget set --epsilon 3 --delta 1e-5 --purposes statistics
    """
    from .budget import set_budget

    asked = (data, epsilon, delta, until, questions, purposes)
    return set_budget(ledger_dir, asked, reason=reason, as_json=as_json)


@verb(budget, "show", "Show the caps, and what is spent.")
def budget_show(ledger_dir: LedgerDir = None, as_json: Json = False) -> int:
    """Show the caps, and what the ledgers beside them have spent.

    Example:
      fedveil budget show
    """
    from .budget import show

    return show(ledger_dir, as_json=as_json)


@verb(budget, "adopt", "Let a named data set answer for an older ledger.")
def budget_adopt(
    old: Annotated[str, Argument(metavar="LEDGER", help="Name of the ledger's file, without .ledger.")],
    data_id: Annotated[str, Argument(metavar="DATA_ID", help="As task.data_id names the data set.")],
    ledger_dir: LedgerDir = None,
) -> int:
    """Let a data set that has a name answer for what an older ledger holds; the next run charges it first.

    Example:
      fedveil budget adopt 9f86d081884c7d659a2feaa0c55ad015 clinics-2026
    """
    from .budget import adopt

    return adopt(ledger_dir, old, data_id)
