"""Verbs of `fedveil report`: arguments, options, help and example of each; the bodies are imported when called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from .grammar import GROUP, Json, verb

report = typer.Typer(**GROUP)


@verb(report, "RUN", "Make the page of a run, and its JSON.", hidden=True, needs="server")
def report_run(
    run: Annotated[Path, Argument(metavar="RUN", help="A run folder, or one of answers.", file_okay=False)],
    out: Annotated[
        Path | None, Option(metavar="FOLDER", help="Where to; the run's folder by default.", file_okay=False)
    ] = None,
    assessment: Annotated[
        Path | None,
        Option(metavar="FILE", help="Answers of the organisation; RUN/assessment.yaml by default."),
    ] = None,
    answers: Annotated[
        Path | None,
        Option(
            metavar="FOLDER",
            help="What clients answered; of a server's run the server's by default.",
            file_okay=False,
        ),
    ] = None,
    as_json: Json = False,
) -> int:
    """Make report.html, report.json, CARD.md and bom.cdx.json of a run, from its folder alone.

    Of a folder in which fedveil ask keeps answers it makes report/report.html and report/report.json.

    Example:
      fedveil report runs/2026-01-31/12-00-00
      fedveil report runs/2026-01-31/12-00-00 --answers questions
      fedveil report questions
    """
    from .report import report as body

    return body(run, out, assessment, answers, as_json=as_json)


@verb(report, "compare", "Show how two runs differ.", needs="server")
def report_compare(
    first: Annotated[Path, Argument(metavar="A", help="A run folder.", file_okay=False)],
    second: Annotated[Path, Argument(metavar="B", help="Another.", file_okay=False)],
    everything: Annotated[bool, Option("--all", help="What is the same in both, too.")] = False,
    as_json: Json = False,
) -> int:
    """Say in what the reports of two runs differ: what was asked for, promised, measured, reached and paid.

    Example:
      fedveil report compare runs/2026-01-31/12-00-00 runs/2026-01-31/12-05-00
    """
    from .report_compare import compare as body

    return body(first, second, everything=everything, as_json=as_json)


Signers = Annotated[
    list[Path] | None, Option("--key", metavar="F", help="A private key that signs; once for each algorithm.")
]


@verb(report, "bundle", "Make a bundle to verify offline.")
def report_bundle(
    run: Annotated[Path, Argument(metavar="RUN", help="A run folder.", file_okay=False)],
    out: Annotated[
        Path | None, Option(metavar="FOLDER", help="Where to; RUN/bundle by default.", file_okay=False)
    ] = None,
    keys: Signers = None,
    with_audit_rows: Annotated[
        bool,
        Option(
            "--with-audit-rows", help="With what the audit kept of real rounds: it tells how many took part."
        ),
    ] = False,
    as_json: Json = False,
) -> int:
    """Make the bundle of a run: its files, its ledger, a list of hashes that roles sign, and a check that needs no fedveil.

    Example:
      fedveil report bundle runs/2026-01-31/12-00-00 --key federation.key
    """
    from .report_bundle import bundle

    return bundle(run, out, keys or [], with_audit_rows=with_audit_rows, as_json=as_json)


@verb(report, "sign", "Sign a bundle in a role.")
def report_sign(
    folder: Annotated[Path, Argument(metavar="BUNDLE", help="A bundle.", file_okay=False)],
    role: Annotated[str, Option(metavar="ROLE", help="Who signs, such as 'data protection officer'.")],
    keys: Annotated[
        list[Path], Option("--key", metavar="F", help="A private key that signs; once for each algorithm.")
    ],
    day: Annotated[str | None, Option("--date", metavar="YYYY-MM-DD", help="Today, UTC, by default.")] = None,
) -> int:
    """Check a bundle and sign it in a role, over all who signed before.

    Example:
      fedveil report sign bundle --role "data protection officer" --key officer.key
    """
    from .report_bundle import sign

    return sign(folder, role, keys, day)


@verb(report, "key", "Make a key that signs.")
def report_key(
    path: Annotated[Path, Argument(metavar="FILE", help="Of the private key; FILE.pub is the public one.")],
    ml_dsa: Annotated[bool, Option("--ml-dsa", help="Of ML-DSA-65, to stand beside one of Ed25519.")] = False,
    unlocked: Annotated[bool, Option("--unlocked", help="Without a passphrase.")] = False,
) -> int:
    """Make a key that signs bundles, locked by a passphrase that is asked for, or stands in FEDVEIL_PASSPHRASE.

    Example:
      fedveil report key officer.key
    """
    from .report_bundle import key

    return key(path, ml_dsa=ml_dsa, unlocked=unlocked)
