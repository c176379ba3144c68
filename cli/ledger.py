"""Verbs of `fedveil ledger`: a ledger shown, verified and exported, without trust in its content, also while it is in use."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer

from ..base.bounded_decoding import json_number
from ..base.refusal import Refusal
from ..run.files import OF_RECORDS, RESULT
from .grammar import GROUP, Head, Json, argument, flag, option, read, verb

if TYPE_CHECKING:
    from ..privacy.ledger.ledger import Entry, Verification
    from ..privacy.ledger.ledger import Head as EntryHead
    from ..run.audit_trail import TrailRow

DAMAGED = 1
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # beginnings of formulas (OWASP, CSV injection)
COMPANIONS = (".lock", ".json", "-wal", "-shm")  # suffixes of files beside ledgers
group = typer.Typer(**GROUP)


@verb(group, "show", "Show the entries of a ledger.")
def show(
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
    as_csv: Annotated[bool, flag("--csv", "Write one row for each entry as CSV, for an auditor.")] = False,
) -> int:
    """Show the entries of a ledger in sentences, the newest last: releases, refusals, decisions, closes.

    Example:
      fedveil ledger show first/ledger
      fedveil ledger show first/ledger --csv
    """
    from ..privacy.ledger.ledger import read_entries
    from ..run.audit_trail import audit_trail

    if as_json and as_csv:
        raise click.UsageError("--json and --csv exclude each other", click.get_current_context())
    raw: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for ledger in ledgers_in(path):
        entries = read_entries(ledger)
        if unit not in (None, json.loads(entries[0].payload)["unit"]):
            continue
        selection = {entry.seq for entry in entries if _matches(entry, run, purpose)}
        if as_json:
            raw += [entry._asdict() for entry in entries if entry.seq in selection]
            continue
        trail = [row for row in audit_trail(entries) if row.entry.seq in selection]
        if as_csv:
            rows += [{"ledger": str(ledger), **row.cells()} for row in trail]
        else:
            _print(ledger, entries, trail)
    if as_json:
        print(json.dumps(raw, indent=1))
    if as_csv:
        import csv

        columns = dict.fromkeys(name for row in rows for name in row)  # those of every row
        table = csv.DictWriter(sys.stdout, [*columns], lineterminator="\n")
        table.writeheader()
        table.writerows({name: _as_text(value) for name, value in row.items()} for row in rows)
    return 0


def _as_text(value: Any) -> Any:
    """Return a cell that a spreadsheet shows and does not compute: a text from a ledger may begin as a formula does."""
    from ..run.display import visible

    if not isinstance(value, str):
        return value
    return f"'{visible(value)}" if value.startswith(FORMULA) else visible(value)


def _print(ledger: Path, entries: Sequence[Entry], trail: Sequence[TrailRow]) -> None:
    """Print the head of a ledger, and the rows of its audit trail under a heading for each run."""
    from ..privacy.ledger.caps import NAME_LENGTH
    from ..run.audit_trail import by_run, sentence
    from ..run.display import hanging

    identity = json.loads(entries[0].payload)
    title = f"{ledger}: {identity['unit']} level, {identity['adjacency']}, owner {str(identity['owner'])[:NAME_LENGTH]}"
    print(hanging("", f"{title}; head {entries[-1].seq} {entries[-1].hash[:16]}"))
    for heading, rows in by_run(trail):
        if heading:
            print(hanging("", heading))
        for row in rows:
            print(hanging(f"  {row.entry.seq:>5}  {row.time[:19]}  ", sentence(row)))


def ledgers_in(path: Path) -> list[Path]:
    """Return the ledgers at a path: the path itself, or those of a folder of ledgers, a run or a bundle.

    Raises:
      Refusal: the path is a folder without a ledger.
    """
    from ..privacy.ledger.store import ledgers_in as stored_in

    if not path.is_dir():
        return [path]
    paths = sorted([*path.glob("ledger"), *stored_in(path)])
    paths += path.glob(f"{OF_RECORDS}/ledger")
    # Of a server, of a device, of a simulation's clients.
    for folder in ("ledgers", "state/ledgers", "client_ledgers"):
        paths += stored_in(path / folder)
    if not paths:
        remedy = "holds no bundle, no run and no ledger; name a folder that does"
        if (path / RESULT).is_file():
            remedy = "is a run without a ledger of its own; fedveil budget show lists those of real data"
        raise Refusal("path", str(path), remedy)
    return paths


def _matches(entry: Entry, run: str | None, purpose: str | None) -> bool:
    """Return whether the entry's run begins with `run`, and its purpose contains `purpose`; None permits any."""
    from ..privacy.ledger.ledger_state import run_of

    entry_purpose = str(json.loads(entry.payload).get("purpose", ""))
    return run_of(entry).startswith(run or "") and (purpose or "") in entry_purpose


@verb(group, "verify", "Check every hash; recompute epsilon.")
def verify(
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
    ledgers = [each for path in paths if not path.name.endswith(COMPANIONS) for each in ledgers_in(path)]
    if not ledgers:
        text = "is a lock or journal of a ledger; give the path of the ledger"
        raise Refusal("ledger", str(paths[0]), text)
    if head and len(ledgers) > 1:
        raise Refusal("head", " ".join(head), "belongs to one ledger; give only that ledger")
    return max(_verify(each, head or (), as_json=as_json) for each in ledgers)


def _verify(path: Path, head: Sequence[str], *, as_json: bool) -> int:
    """Verify one ledger, print the result, and return the exit code; `head` has two words, or none."""
    from ..run.display import console_for, visible

    verdict = verify_ledger(path, head_of(*head) if head else None)
    console = console_for(120)
    if as_json:
        print(json.dumps(_as_json(verdict), allow_nan=False))
        return 0 if verdict.ok else DAMAGED
    if not verdict.ok:
        console.print(f"{path}: DAMAGED: {visible(str(verdict.problem))}", style="bold red", markup=False)
        return DAMAGED
    last = f"head {verdict.head.seq} {verdict.head.hash[:16]}"
    console.print(f"{path}: {verdict.entries} entries, every hash is correct; {last}", markup=False)
    if verdict.delta is None:
        console.print("nothing was released")
        return 0
    order = verdict.filter_order
    rdp = "RDP" if order is None else f"the RDP filter at order {order:g}"
    for name, value in (("PLD", verdict.epsilon_pld), (rdp, verdict.epsilon_rdp)):
        if value is not None:
            console.print(f"epsilon by {name}: {value:.4f} at delta {verdict.delta:g}")
    return 0


@verb(group, "export", "Export a ledger for an auditor.")
def export(
    path: Annotated[Path, argument("PATH", "File of a ledger.")],
    as_json: Annotated[bool, flag("--json", "Write JSON; the default.")] = False,
    as_csv: Annotated[bool, flag("--csv", "Write CSV.")] = False,
) -> int:
    """Write a ledger, and the epsilon recomputed from it, for an auditor.

    Example:
      fedveil ledger export first/ledger --csv
    """
    if as_json and as_csv:
        raise click.UsageError("--json and --csv exclude each other", click.get_current_context())
    if path.is_dir():
        raise Refusal("ledger", str(path), "is a folder; give the path of one ledger in it")
    from ..privacy.ledger.export import export_text
    from ..privacy.ledger.ledger import read_entries

    verification = verify_ledger(path)
    if verification.problem:
        print(f"{path}: DAMAGED: {verification.problem}", file=sys.stderr)
    entries, spent = read_entries(path), _spent(verification)
    if as_csv:
        import csv

        # `hash` is SHA-256 over the JSON array, without spaces and in ASCII, of the five fields before it.
        rows = csv.writer(sys.stdout, lineterminator="\n")
        rows.writerow(("seq", "kind", "key", "payload", "prev_hash", "hash"))
        rows.writerows(entries)
        rows.writerows(("", "epsilon", row["adversary"], json.dumps(row), "", "") for row in spent)
    else:
        print(export_text(entries, _as_json(verification)))
    return 0 if verification.ok else DAMAGED


def _as_json(verification: Verification) -> dict[str, Any]:
    return {
        "ok": verification.ok,
        "problem": verification.problem,
        "entries": verification.entries,
        "head": verification.head._asdict(),
        "spent": _spent(verification),
    }


def head_of(seq: str, digest: str) -> EntryHead:
    """Return an entry's number and hash from the two words of --head."""
    from ..privacy.ledger.ledger import Head as EntryHead

    remedy = "give the entry's number and its hash, as a result's ledger_head"
    return EntryHead(read(int, "head", seq, remedy), digest)


def _spent(verification: Verification) -> list[dict[str, Any]]:
    """Return the recomputed epsilons of each adversary, for JSON."""
    names = ("epsilon", "epsilon_pld", "epsilon_rdp")
    return [
        {"adversary": str(adversary), "delta": verification.delta, "filter_order": verification.filter_order}
        | {name: json_number(size) for name, size in zip(names, sizes, strict=True)}
        for adversary, sizes in sorted(verification.by_adversary.items())
    ]


def verify_ledger(path: Path, head: EntryHead | None = None) -> Verification:
    """Verify a ledger, and that it contains the entry `head`: without it the result has a problem. Refuse a missing file."""
    import logging

    from ..privacy.ledger.ledger import verify
    from ..privacy.ledger.store import ledger_exists, reading

    if not ledger_exists(path):
        raise Refusal("ledger", str(path), "does not exist; give the path of a ledger")
    # The accountant logs a line for every order of RDP that it leaves out; its bound is valid without them.
    logging.getLogger("absl").setLevel(logging.ERROR)
    verification = verify(path)
    if verification.ok and head:
        with reading(path) as chain:
            try:
                chain.require(head)
            except Refusal as refusal:
                return replace(verification, ok=False, problem=str(refusal))
    return verification
