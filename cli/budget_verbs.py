"""Verbs of `fedveil budget`: arguments, options, help and example of each; the bodies are imported when called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .grammar import GROUP, Json, argument, option, verb

budget = typer.Typer(**GROUP)
LedgerDir = Annotated[
    Path | None, option("FOLDER", "Folder of the ledgers; ~/.local/share/fedveil/ledgers by default.")
]


@verb(budget, "set", "Cap the epsilon spent on your data.")
def budget_set(
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
    from .budget import set_budget

    asked = (data, epsilon, delta, until, questions, purposes)
    return set_budget(ledger_dir, asked, reason=reason, as_json=as_json)


@verb(budget, "show", "Show the caps and the spent epsilon.")
def budget_show(ledger_dir: LedgerDir = None, as_json: Json = False) -> int:
    """Show the caps of a folder, and the epsilon that its ledgers have spent.

    Example:
      fedveil budget show
    """
    from .budget import show

    return show(ledger_dir, as_json=as_json)


@verb(budget, "adopt", "Charge an older ledger to a named data set.")
def budget_adopt(
    old: Annotated[str, argument("LEDGER", "Name of the ledger's file, without .ledger.")],
    data_id: Annotated[str, argument("DATA_ID", "Name of the data set, as in task.data_id.")],
    ledger_dir: LedgerDir = None,
) -> int:
    """Charge the entries of an older ledger to a named data set, at the start of its next run.

    Example:
      fedveil budget adopt 9f86d081884c7d659a2feaa0c55ad015 clinics-2026
    """
    from .budget import adopt

    return adopt(ledger_dir, old, data_id)
