"""Verbs of `fedveil ledger`: a ledger shown, verified and exported, without trust in its content, also while it is in use."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer

from ..base.bounded_decoding import json_number
from ..base.refusal import Refusal
from ..run.files import OF_RECORDS
from .grammar import GROUP, Head, Json, argument, flag, option, read, verb

if TYPE_CHECKING:
    from ..privacy.ledger.ledger import Entry, Verification
    from ..privacy.ledger.ledger import Head as EntryHead

DAMAGED = 1
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
) -> int:
    """Show the entries of a ledger in sentences, the newest run first: releases, refusals, decisions, closes.

    Example:
      fedveil ledger show first/ledger
    """
    from ..privacy.ledger.caps import NAME_LENGTH
    from ..privacy.ledger.ledger import read_entries
    from ..run.display import hanging

    rows: list[dict[str, Any]] = []
    for ledger in ledgers_in(path):
        entries = read_entries(ledger)
        identity = json.loads(entries[0].payload)
        if unit not in (None, identity["unit"]):
            continue
        selection = [entry for entry in entries if _matches(entry, run, purpose)]
        rows += [entry._asdict() for entry in selection]
        if as_json:
            continue
        title = f"{ledger}: {identity['unit']} level, {identity['adjacency']}, owner {str(identity['owner'])[:NAME_LENGTH]}"
        head = f"head {entries[-1].seq} {entries[-1].hash[:16]}"
        print(hanging("", f"{title}; {head}"))
        for lead, line in _by_run(selection):
            print(hanging(lead, line))
    if as_json:
        print(json.dumps(rows, indent=1))
    return 0


def ledgers_in(path: Path) -> list[Path]:
    """Return the ledgers at a path: the path itself, or those of a folder of ledgers, a run or a bundle.

    Raises:
      Refusal: the path is a folder without a ledger.
    """
    if not path.is_dir():
        return [path]
    paths = sorted(each for each in path.iterdir() if each.name == "ledger" or each.suffix == ".ledger")
    paths += path.glob(f"{OF_RECORDS}/ledger")
    # Of a server, of a device, of a simulation's clients.
    for folder in ("ledgers", "state/ledgers", "client_ledgers"):
        paths += sorted((path / folder).glob("*.ledger"))
    if not paths:
        raise Refusal("path", str(path), "holds no bundle, no run and no ledger; name a folder that does")
    return paths


def _matches(entry: Entry, run: str | None, purpose: str | None) -> bool:
    """Return whether the entry's run begins with `run`, and its purpose contains `purpose`; None permits any."""
    from ..privacy.ledger.ledger_state import run_of

    entry_purpose = str(json.loads(entry.payload).get("purpose", ""))
    return run_of(entry).startswith(run or "") and (purpose or "") in entry_purpose


def _by_run(entries: Sequence[Entry]) -> Iterator[tuple[str, str]]:
    """Yield a line for each run, the newest first, and one for each of its entries, each as (indent with number, text).

    A commit or void has no line, but is part of that of its release.
    """
    from ..privacy.ledger.acts import CAPS, DECISIONS, ROSTERS
    from ..privacy.ledger.ledger_state import COMMIT, VOID, run_of

    runs: dict[str, list[Entry]] = {}
    for entry in entries:
        runs.setdefault(run_of(entry), []).append(entry)
    settled = {entry.key: entry for entry in entries if entry.kind in (COMMIT, VOID)}
    for run, run_entries in sorted(runs.items(), key=lambda item: -item[1][-1].seq):
        payloads = [json.loads(entry.payload) for entry in run_entries]
        purposes = sorted({str(each["purpose"]) for each in payloads if "purpose" in each})
        if run:
            what = f"run {run}" if run not in (CAPS, ROSTERS, DECISIONS) else "decisions of the data's owner"
            yield "", what + (f", for {', '.join(purposes)}" if purposes else "")
        for entry, payload in zip(run_entries, payloads, strict=True):
            if entry.kind not in (COMMIT, VOID):
                lead = f"  {entry.seq:>5}  {payload.get('time', '')[:19]}  "
                yield lead, _sentence(entry, payload, settled)


def _sentence(entry: Entry, payload: dict[str, Any], settled: Mapping[str, Entry]) -> str:
    """Return an entry in a sentence; `payload` is its own, and `settled` has the commits and voids by key of the release."""
    from ..privacy.ledger.acts import ACTS, REFUSAL
    from ..privacy.ledger.ledger_state import CLOSE, OPEN, RESERVE
    from ..server.query_rows import FIRST_ROW

    _, row, mechanism = json.loads(entry.key) if entry.key else ("", 0, "")
    number = row % FIRST_ROW  # the round; rows of queries are FIRST_ROW and more beyond it
    if entry.kind == OPEN:
        return "The ledger was created."
    if entry.kind == RESERVE:
        return f"Round {number}, {mechanism}: {_charged(payload)}; {_outcome(settled.get(entry.key))}."
    if entry.kind == CLOSE:
        return f"The run was closed, {payload['status']}, with manifest {payload['manifest'][:16]}."
    if entry.kind == REFUSAL:
        return f"Round {number} was refused at no cost: {payload['reason']}."
    if entry.kind in ACTS:
        return f"{entry.kind.capitalize()} by {payload['who'] or 'an unknown person'}{_detail(payload)}: {payload['reason'] or 'no reason given'}."
    fields = ", ".join(f"{name} {value}" for name, value in payload.items() if name != "time")
    return f"Noted in round {number}, {mechanism}: {fields}."


def _charged(payload: dict[str, Any]) -> str:
    """Return the charge of a reservation in clauses: events with adversaries, arm, source of noise, order of the filter."""
    by_event: dict[str, list[str]] = {}
    for adversary, event in payload["events"].items():
        by_event.setdefault(format_event(event), []).append(adversary)
    clauses = [f"{event} against the {' and the '.join(names)}" for event, names in by_event.items()]
    if arm := payload.get("arm"):
        clauses.append(f"arm {arm['arm']} of {arm['arms']}")
    clauses.append(f"rng {payload['rng']}")
    if order := payload.get("filter_order"):
        clauses.append(f"chosen adaptively, filter at order {order:g}")
    return "; ".join(clauses)


def _outcome(settled: Entry | None) -> str:
    """Return what became of a reservation, from its commit or void; `settled` is None if it has neither."""
    from ..privacy.ledger.ledger_state import COMMIT

    if not settled:
        return "reserved, and spent whether or not it was released"
    return "released" if settled.kind == COMMIT else f"given back: {json.loads(settled.payload)['proof']}"


def _detail(payload: dict[str, Any]) -> str:
    """Return the object of a person's decision: a roster's version, or a cap; empty for any other."""
    if "version" in payload:
        return f", version {payload['version']}"
    if "verdict" in payload:
        return f" ({payload['role']}): {payload['kind']} {payload['name']} {payload['verdict']}"
    if "target_epsilon" not in payload:
        return ""
    until = f" until {payload['until']}" if payload["until"] else ""
    return f" to epsilon {payload['target_epsilon']:g} at delta {payload['target_delta']:g}{until}, {payload['decided']}"


def format_event(event: dict[str, Any]) -> str:
    """Return an event of a ledger as short text, such as ``Poisson(0.25, Gaussian(3.2192))``."""
    kind, inner = str(event["kind"]), event.get("event")
    numbers = [f"{v:.5g}" for v in event.values() if isinstance(v, int | float) and not isinstance(v, bool)]
    parts = numbers + ([format_event(inner)] if isinstance(inner, dict) else [])
    return f"{kind.removesuffix('Sampled')}({', '.join(parts)})"


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

    from ..privacy.ledger.hash_chain import Chain
    from ..privacy.ledger.ledger import verify

    if not path.exists():
        raise Refusal("ledger", str(path), "does not exist; give the path of a ledger")
    # The accountant logs a line for every order of RDP that it leaves out; its bound is valid without them.
    logging.getLogger("absl").setLevel(logging.ERROR)
    verification = verify(path)
    if verification.ok and head:
        with closing(Chain.for_reading(path)) as chain:
            try:
                chain.require(head)
            except Refusal as refusal:
                return replace(verification, ok=False, problem=str(refusal))
    return verification
