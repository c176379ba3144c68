"""Verbs of `fedveil ledger`: arguments, options, help and example of each; the bodies are imported when called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import click
import typer
from typer import Option

from .grammar import GROUP, Head, Json, argument, option, verb

ledger = typer.Typer(**GROUP)
Ledger = Annotated[Path, argument("PATH", "File of a ledger.")]


@verb(ledger, "show", "Show the entries of a ledger.")
def ledger_show(
    path: Annotated[Path, argument("PATH", "A ledger, or a folder of ledgers.")],
    run: Annotated[str | None, option("NAME", "Only runs whose name has this prefix.")] = None,
    unit: Annotated[
        str | None,
        option(
            "UNIT", "Only ledgers of this unit: ", words=("client", "record", "person", "person_everywhere")
        ),
    ] = None,
    purpose: Annotated[str | None, option("TEXT", "Only releases whose purpose contains this.")] = None,
    as_json: Json = False,
) -> int:
    """Show the entries of a ledger in sentences, the newest run first: releases, refusals, decisions, closes.

    Example:
      fedveil ledger show first/ledger
    """
    from .ledger import show

    return show(path, (run, unit, purpose), as_json=as_json)


@verb(ledger, "verify", "Check every hash; recompute epsilon.")
def ledger_verify(
    paths: Annotated[
        list[Path], argument("PATH", "Ledgers, or folders of them; locks and journals are skipped.")
    ],
    head: Head = None,
    as_json: Json = False,
) -> int:
    """Check every entry's hash and recompute epsilon with two accountants. Exit code 1 if a ledger is damaged.

    Example:
      fedveil ledger verify first/ledger
    """
    from .ledger import verify_all

    return verify_all(paths, head or (), as_json=as_json)


@verb(ledger, "export", "Export a ledger for an auditor.")
def ledger_export(
    path: Ledger,
    as_json: Annotated[bool, Option("--json", help="Write JSON; the default.")] = False,
    as_csv: Annotated[bool, Option("--csv", help="Write CSV.")] = False,
) -> int:
    """Write a ledger, and the epsilon recomputed from it, for an auditor.

    Example:
      fedveil ledger export first/ledger --csv
    """
    from .ledger import export

    if as_json and as_csv:
        raise click.UsageError("--json and --csv exclude each other", click.get_current_context())
    return export(str(path), as_csv=as_csv)
