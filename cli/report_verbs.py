"""Verbs of `fedveil report`: arguments, options, help and example of each; the bodies are imported when called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from .grammar import GROUP, Json, argument, option, verb

report = typer.Typer(**GROUP)


@verb(report, "RUN", "Write the page of a run and its JSON.", hidden=True, needs="server")
def report_run(
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
    operator: Annotated[
        bool,
        Option(
            "--operator", help="Write RUN/operator with all times, bytes and counts, for its owner alone."
        ),
    ] = False,
    as_json: Json = False,
) -> int:
    """Write report.html, report.json, CARD.md and bom.cdx.json of a run, from its folder alone.

    With a folder of answers to fedveil ask, write report/report.html and report/report.json.

    Example:
      fedveil report runs/2026-01-31/12-00-00
      fedveil report runs/2026-01-31/12-00-00 --answers questions
      fedveil report questions
    """
    from .report import report as body

    return body(run, out, assessment, answers, operator=operator, as_json=as_json)


@verb(report, "compare", "Show how two runs differ.", needs="server")
def report_compare(
    first: Annotated[Path, argument("A", "A run folder.", file_okay=False)],
    second: Annotated[Path, argument("B", "Another run folder.", file_okay=False)],
    everything: Annotated[bool, Option("--all", help="Show equal values too.")] = False,
    as_json: Json = False,
) -> int:
    """Show how the reports of two runs differ: settings, guarantees, measurements, results and costs.

    Example:
      fedveil report compare runs/2026-01-31/12-00-00 runs/2026-01-31/12-05-00
    """
    from .report_compare import compare as body

    return body(first, second, everything=everything, as_json=as_json)


Signers = Annotated[
    list[Path] | None, option("F", "Private key to sign with; once for each algorithm.", "--key")
]


@verb(report, "bundle", "Make a bundle to verify offline.")
def report_bundle(
    run: Annotated[Path, argument("RUN", "A run folder.", file_okay=False)],
    out: Annotated[
        Path | None, option("FOLDER", "Output folder; RUN/bundle by default.", file_okay=False)
    ] = None,
    keys: Signers = None,
    with_audit_rows: Annotated[
        bool,
        Option(
            "--with-audit-rows",
            help="Include the audit's rows, which reveal the number of clients per round.",
        ),
    ] = False,
    as_json: Json = False,
) -> int:
    """Make the bundle of a run: its files, its ledger, a signed list of hashes, and a check that needs no fedveil.

    Example:
      fedveil report bundle runs/2026-01-31/12-00-00 --key federation.key
    """
    from .report_bundle import bundle

    return bundle(run, out, keys or [], with_audit_rows=with_audit_rows, as_json=as_json)


@verb(report, "sign", "Sign a bundle in a role.")
def report_sign(
    folder: Annotated[Path, argument("BUNDLE", "A bundle.", file_okay=False)],
    role: Annotated[str, option("ROLE", "Signer's role, such as 'data protection officer'.")],
    keys: Annotated[list[Path], option("F", "Private key to sign with; once for each algorithm.", "--key")],
    day: Annotated[str | None, option("YYYY-MM-DD", "Date; today, UTC, by default.", "--date")] = None,
) -> int:
    """Check a bundle and sign it in a role, together with the earlier signatures.

    Example:
      fedveil report sign bundle --role "data protection officer" --key officer.key
    """
    from .report_bundle import sign

    return sign(folder, role, keys, day)


@verb(report, "stamp", "Get a time stamp of a run.")
def report_stamp(
    run: Annotated[Path, argument("RUN", "A run folder.", file_okay=False)],
    tsa: Annotated[
        str | None, option("URL", "Authority for time stamps (RFC 3161); FEDVEIL_TSA by default.")
    ] = None,
) -> int:
    """Get a time stamp of the hash of a run's manifest, and write it to RUN/manifest.tsr.

    Example:
      fedveil report stamp runs/2026-01-31/12-00-00 --tsa https://tsa.example.org
    """
    from .report_bundle import stamp_run

    return stamp_run(run, tsa)


@verb(report, "key", "Make a signing key.")
def report_key(
    path: Annotated[Path, argument("FILE", "Private key to write; FILE.pub is the public key.")],
    ml_dsa: Annotated[
        bool, Option("--ml-dsa", help="Make an ML-DSA-65 key; the default is Ed25519.")
    ] = False,
    unlocked: Annotated[bool, Option("--unlocked", help="Do not encrypt the key with a passphrase.")] = False,
) -> int:
    """Make a key that signs bundles. The passphrase is read from FEDVEIL_PASSPHRASE or the terminal.

    Example:
      fedveil report key officer.key
    """
    from .report_bundle import key

    return key(path, ml_dsa=ml_dsa, unlocked=unlocked)
