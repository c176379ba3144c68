"""Verbs of `fedveil report`: a run's page, JSON, model card and bill of materials, its bundle, and signatures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..base.refusal import Refusal
from ..run.files import (
    ASSESSMENT,
    CARD,
    CONFIG,
    FOR_OPERATOR,
    MATERIALS,
    MODEL,
    OF_ANSWERS,
    OPERATOR,
    PAGE,
    REPORT,
    TIME_STAMP,
)
from .grammar import DAY, GROUP, Json, argument, flag, option, read, verb

if TYPE_CHECKING:
    from rich.table import Table

    from ..evidence.comparison import ComparedValue
    from ..run.run_files import Fields

READABLE, PRIVATE = 0o644, 0o600  # permissions of files that all may read, and of those for the owner alone
WIDTH = 110
BUNDLE = "bundle"  # default name of the bundle's folder, in the run's
Signers = Annotated[
    list[Path] | None, option("F", "Private key to sign with; once for each algorithm.", "--key")
]
group = typer.Typer(**GROUP)


@verb(group, "RUN", "Write the page of a run and its JSON.", hidden=True, needs="server")
def report(
    run: Annotated[Path, argument("RUN", "Folder of a run or of answers.", file_okay=False)],
    out: Annotated[
        Path | None, option("FOLDER", "Output folder; the run's folder by default.", file_okay=False)
    ] = None,
    assessment: Annotated[
        Path | None, option("FILE", "The organisation's answers; RUN/assessment.yaml by default.")
    ] = None,
    answers: Annotated[
        Path | None,
        option(
            "FOLDER",
            "Folder of answers to fedveil ask; with a server's run, the server's by default.",
            file_okay=False,
        ),
    ] = None,
    other: Annotated[
        Path | None,
        option("OTHER", "The same run without privacy, to compare what both remember.", "--compare"),
    ] = None,
    operator: Annotated[
        bool,
        flag("--operator", "Write RUN/operator with all times, bytes and counts, for its owner alone."),
    ] = False,
    as_json: Json = False,
) -> int:
    """Write report.html, report.json, CARD.md and bom.cdx.json of a run, from its folder alone.

    With a folder of answers to fedveil ask, write report/report.html and report/report.json.

    Example:
      fedveil report runs/2026-01-31/12-00-00
      fedveil report runs/2026-01-31/12-00-00 --answers questions
      fedveil report private --compare plain
      fedveil report questions
    """
    if not (run / CONFIG).is_file() and any(run.glob("*.json")):
        options = {
            "--assessment": assessment,
            "--answers": answers,
            "--operator": operator,
            "--compare": other,
        }
        for name, value in options.items():
            if value:
                raise Refusal(name, str(value), "belongs to the report of a run")
        return _report_answers(run, out, as_json=as_json)
    if assessment and not assessment.is_file():
        remedy = f"does not exist; start from the {ASSESSMENT} of a report"
        raise Refusal("--assessment", str(assessment), remedy)
    if answers and not answers.is_dir():
        raise Refusal("--answers", str(answers), "does not exist; name the folder of the answers")
    if operator and not (run / OPERATOR).is_file():
        remedy = f"has no {OPERATOR}: all that is known of the run is public; leave --operator out"
        raise Refusal("RUN", str(run), remedy)
    files = (assessment or run / ASSESSMENT, answers, other)
    return _report_run(run, out, *files, operator=operator, as_json=as_json)


def _report_run(
    folder: Path,
    out: Path | None,
    assessment: Path,
    answers: Path | None,
    other: Path | None,
    *,
    operator: bool,
    as_json: bool,
) -> int:
    """Write the report of a run, or print it with `as_json`; for the operator only its page and JSON are written.

    If `assessment` is the file in the run's folder, and missing, an empty form is written beside the report.
    """
    from ..evidence.card import card_of
    from ..evidence.commands import commands_of
    from ..evidence.content import report_of, to_json
    from ..evidence.forms import empty_assessment, read_assessment
    from ..evidence.materials import materials_of
    from ..evidence.memorisation import comparable
    from ..evidence.page import page_of
    from ..run.run_files import as_a_run_wrote, read_run

    with as_a_run_wrote(folder):
        run = read_run(folder, read_assessment(assessment), answers, operator)
        report = report_of(run, commands_of(run), _shapes(folder), other=comparable(run, other))
        text = to_json(report)
        files = {REPORT: text, PAGE: page_of(report), CARD: card_of(report), MATERIALS: materials_of(report)}
    status = run.result.get("status", "not ended")
    if as_json:
        print(text, end="")
    elif operator:
        target = out or folder / FOR_OPERATOR
        _write(target, {REPORT: text, PAGE: files[PAGE]}, PRIVATE)
        print(f"{target / PAGE}: {status}; for the operator alone")
    else:
        target = out or folder
        if assessment == folder / ASSESSMENT and not assessment.is_file():
            files[ASSESSMENT] = empty_assessment()
        _write(target, files)
        empty = report["forms_counted"]["empty"]
        print(f"{target / PAGE}: {status}; {empty} fields of {ASSESSMENT} are empty")
    return 0


def _shapes(folder: Path) -> dict[str, Any] | None:
    """Return the shapes of a run's additive model on tables; None for any other model."""
    from ..configs.bundle_files import SCHEMA

    if not (folder / SCHEMA).is_file():
        return None
    from ..tasks.shapes import read_shapes

    return read_shapes(folder / SCHEMA, folder / MODEL)


def _report_answers(folder: Path, out: Path | None, *, as_json: bool) -> int:
    """Write or print the report of a folder of answers."""
    from ..evidence.answers import report_of_answers
    from ..evidence.content import to_json
    from ..evidence.page import page_of

    report = report_of_answers(folder)
    text = to_json(report)
    if as_json:
        print(text, end="")
        return 0
    target = out or folder / OF_ANSWERS
    _write(target, {REPORT: text, PAGE: page_of(report)})
    print(f"{target / PAGE}: {report['answered']} answer{'' if report['answered'] == 1 else 's'}")
    return 0


def _write(target: Path, files: Mapping[str, str], mode: int = READABLE) -> None:
    """Write files by name into a folder, which is created; refuse one that cannot be written."""
    from ..base.durable_files import replace_file

    try:
        target.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            replace_file(target / name, text.encode(), mode)
    except OSError as problem:
        remedy = f"cannot be written ({problem.strerror}); choose another with --out"
        raise Refusal("--out", str(target), remedy) from None


@verb(group, "compare", "Show how two runs differ.", needs="server")
def compare(
    first: Annotated[Path, argument("A", "A run folder.", file_okay=False)],
    second: Annotated[Path, argument("B", "Another run folder.", file_okay=False)],
    everything: Annotated[bool, flag("--all", "Show equal values too.")] = False,
    as_json: Json = False,
) -> int:
    """Show how the reports of two runs differ: settings, guarantees, measurements, results and costs.

    Example:
      fedveil report compare runs/2026-01-31/12-00-00 runs/2026-01-31/12-05-00
    """
    from ..evidence.comparison import compare_reports
    from ..run.display import console_for

    rows = compare_reports(_report(first), _report(second), everything=everything)
    if as_json:
        fields = {"first": str(first), "second": str(second), "values": [asdict(each) for each in rows]}
        print(json.dumps(fields))
    elif not rows:
        print("the reports of both runs are the same")
    else:
        console_for(WIDTH).print(_table(rows, first, second))
    return 0


def _report(folder: Path) -> Fields:
    """Return the report of a run, with the assessment in its folder."""
    from ..evidence.content import report_of
    from ..evidence.forms import read_assessment
    from ..run.run_files import as_a_run_wrote, read_run

    with as_a_run_wrote(folder):
        return report_of(read_run(folder, read_assessment(folder / ASSESSMENT)))


def _table(rows: list[ComparedValue], first: Path, second: Path) -> Table:
    """Return a table of the values in which two runs differ; the part of a report stands in its first row alone."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None)
    names = (first.name, second.name) if first.name != second.name else (str(first), str(second))
    for name in ("", "", *names):
        table.add_column(Text(name, overflow="fold"))
    before = ""
    for row in rows:
        cells = (row.part if row.part != before else "", row.name, row.first, row.second)
        table.add_row(*(Text(each, overflow="fold") for each in cells))
        before = row.part
    return table


@verb(group, "bundle", "Make a bundle to verify offline.")
def bundle(
    run: Annotated[Path, argument("RUN", "A run folder.", file_okay=False)],
    out: Annotated[
        Path | None, option("FOLDER", "Output folder; RUN/bundle by default.", file_okay=False)
    ] = None,
    keys: Signers = None,
    with_audit_rows: Annotated[
        bool,
        flag(
            "--with-audit-rows",
            "Include audit rows and receipts; they reveal counts of clients, and members.",
        ),
    ] = False,
    as_json: Json = False,
) -> int:
    """Make the bundle of a run: its files, its ledger, a signed list of hashes, and a check that needs no fedveil.

    Example:
      fedveil report bundle runs/2026-01-31/12-00-00 --key federation.key
    """
    from ..evidence.binding.bundle import add_signature, make_bundle
    from ..evidence.binding.signatures import FEDERATION, read_key
    from ..evidence.binding.verify import contents_of
    from ..run.manifest import reveals_counts

    signers = [read_key(each) for each in keys or ()]
    contents, checks = contents_of(run)
    _require_answers(run)
    target = out or run / BUNDLE
    names = make_bundle(contents, target, with_audit_rows=with_audit_rows or not reveals_counts(run))
    if signers:
        add_signature(target, FEDERATION, _day(None), signers)
    if as_json:
        print(json.dumps({"bundle": str(target), "files": names, "signed": bool(signers)}))
        return 0
    for check in checks:
        if check.ok is None:  # files cannot decide it
            print(f"not in it: {check.name}: {check.finding}")
    print(f"{target}: {len(names)} files, {'signed' if signers else 'unsigned'}")
    return 0


def _require_answers(run: Path) -> None:
    """Require that the page of a run has the answers of its assessment; without PyYAML they are not compared."""
    if not (run / REPORT).is_file() or not find_spec("yaml"):
        return
    from ..evidence.forms import read_assessment

    items = [each for form in json.loads((run / REPORT).read_bytes())["forms"] for each in form["items"]]
    on_page = {(each["field"], each["organisation"]) for each in items}
    for name, _ in sorted(read_assessment(run / ASSESSMENT).answers.items() - on_page):
        remedy = f"its page lacks the answer {name} of {ASSESSMENT}; run fedveil report RUN again"
        raise Refusal("RUN", str(run), remedy)


@verb(group, "sign", "Sign a bundle in a role.")
def sign(
    folder: Annotated[Path, argument("BUNDLE", "A bundle.", file_okay=False)],
    role: Annotated[str, option("ROLE", "Signer's role, such as 'data protection officer'.")],
    keys: Annotated[list[Path], option("F", "Private key to sign with; once for each algorithm.", "--key")],
    day: Annotated[str | None, option("YYYY-MM-DD", "Date; today, UTC, by default.", "--date")] = None,
) -> int:
    """Check a bundle and sign it in a role, together with the earlier signatures.

    Example:
      fedveil report sign bundle --role "data protection officer" --key officer.key
    """
    from ..evidence.binding.bound_folder import Knowledge
    from ..evidence.binding.bundle import add_signature
    from ..evidence.binding.signatures import SHORT, read_key
    from ..evidence.binding.verify import verify_folder

    date = _day(day)
    for line in verify_folder(folder, Knowledge()):
        if line.ok is False:
            remedy = f"check {line.name} failed: {line.finding}; do not sign it"
            raise Refusal("bundle", str(folder), remedy)
    signature = add_signature(folder, role, date, [read_key(each) for each in keys])
    signers = ", ".join(f"{name} {public[:SHORT]}" for name, public in signature.keys.items())
    print(f"{folder}: signed by {signature.role}, {signature.date}, {signers}")
    return 0


@verb(group, "stamp", "Get a time stamp of a run.")
def stamp(
    run: Annotated[Path, argument("RUN", "A run folder.", file_okay=False)],
    tsa: Annotated[
        str | None, option("URL", "Authority for time stamps (RFC 3161); FEDVEIL_TSA by default.")
    ] = None,
) -> int:
    """Get a time stamp of the hash of a run's manifest, and write it to RUN/manifest.tsr.

    Example:
      fedveil report stamp runs/2026-01-31/12-00-00 --tsa https://tsa.example.org
    """
    import os

    from ..evidence.binding.time_stamp import TSA
    from ..evidence.binding.time_stamp import stamp as stamped

    url = os.environ.get(TSA) if tsa is None else tsa
    if not url:
        raise Refusal("--tsa", None, f"name an authority for time stamps, here or in {TSA}")
    print(f"{run / TIME_STAMP}: {stamped(run, url).isoformat(timespec='seconds')}, by {url}")
    return 0


@verb(group, "key", "Make a signing key.")
def key(
    path: Annotated[Path, argument("FILE", "Private key to write; FILE.pub is the public key.")],
    ml_dsa: Annotated[bool, flag("--ml-dsa", "Make an ML-DSA-65 key; the default is Ed25519.")] = False,
    unlocked: Annotated[bool, flag("--unlocked", "Do not encrypt the key with a passphrase.")] = False,
) -> int:
    """Make a key that signs bundles. The passphrase is read from FEDVEIL_PASSPHRASE or the terminal.

    Example:
      fedveil report key officer.key
    """
    from ..evidence.binding.signatures import SHORT, make_key, passphrase_for

    public = make_key(path, ml_dsa, None if unlocked else passphrase_for(path, again=True))
    print(f"{path}.pub: {public if not ml_dsa else public[:SHORT] + '...'}")
    return 0


def _day(text: str | None) -> str:
    """Return the day of --date as YYYY-MM-DD; without one, today in UTC."""
    from datetime import UTC, date, datetime

    day = datetime.now(UTC).date() if text is None else read(date.fromisoformat, "--date", text, DAY)
    return day.isoformat()
