"""Verbs of `fedveil audit`: arguments, options, help and example of each; the bodies are imported when called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import click
import typer
from typer import Option

from .grammar import GROUP, Json, argument, option, verb

audit = typer.Typer(**GROUP)


@verb(audit, "RUN", "Compare a run's claims and measurements.", hidden=True, needs="simulation")
def audit_run(
    run: Annotated[Path, argument("RUN", "A run folder.", file_okay=False)],
    records: Annotated[bool, Option("--records", help="Show memorised records, by client.")] = False,
    membership: Annotated[
        str | None,
        option("ATTACK", "Membership attack on the final model: ", words=("loss", "rmia", "lira", "art")),
    ] = None,
    shadows: Annotated[int, option("N", "Number of shadow models of lira.")] = 8,
    epochs: Annotated[int, option("N", "Epochs of each reference model.")] = 20,
    as_json: Json = False,
) -> int:
    """Compare the claimed with the measured epsilon of a run, from its folder.

    Example:
      fedveil audit runs/2026-01-31/12-00-00
      fedveil audit runs/2026-01-31/12-00-00 --membership rmia

    Exit codes: 0 consistent, 3 violated, 4 too weak to tell, 2 refused.
    """
    if records and membership:
        raise click.UsageError("--records and --membership exclude each other", click.get_current_context())
    if records:
        from .audit_records import records as of_records

        return of_records(run, as_json=as_json)
    if membership is not None:
        from ..audit.membership_attacks import membership as of_membership

        return of_membership(run, membership, shadows, epochs, as_json=as_json)
    from .audit_run import audit_run as body

    return body(run, as_text=not as_json)


@verb(audit, "claim", "Test a privacy claim against evidence.")
def audit_claim(
    epsilon: Annotated[str, option("E", "Claimed epsilon, in nats.")],
    delta: Annotated[str, option("D", "Claimed delta; 0 for pure differential privacy.")],
    guesses: Annotated[str | None, option("N", "Number of guesses in one run.")] = None,
    correct: Annotated[str | None, option("R", "Number of correct guesses.")] = None,
    canaries: Annotated[str | None, option("M", "Number of canaries; as many as guesses by default.")] = None,
    scores: Annotated[
        Path | None,
        option(
            "FILE",
            ".npz with the arrays members and others, or .csv with the columns score and member (1 or 0).",
        ),
    ] = None,
    in_scores: Annotated[
        Path | None, option("FILE", "Scores of included canaries: .npy, or one number per line.")
    ] = None,
    out_scores: Annotated[Path | None, option("FILE", "Scores of excluded canaries.")] = None,
    confidence: Annotated[str, option("C", "Confidence of the bounds and the verdict.")] = "0.99",
    gaussian: Annotated[bool, Option("--gaussian", help="The claim is about a Gaussian mechanism.")] = False,
    many_runs: Annotated[bool, Option("--many-runs", help="Each score comes from a separate run.")] = False,
    as_json: Json = False,
) -> int:
    """Test any claim of differential privacy against evidence: guesses or scores.

    Example:
      fedveil audit claim --epsilon 3 --delta 1e-5 --guesses 400 --correct 330
      fedveil audit claim --epsilon 4 --delta 1e-5 --scores scores.npz

    Evidence is one of: --guesses with --correct; --scores; --in-scores with --out-scores. Higher scores mean included.
    Scores come from one run that included each canary by an independent fair coin, unless --many-runs is given.

    Exit codes: 0 consistent, 3 violated, 4 too weak to tell, 2 refused.
    """
    from .audit import AuditClaim, claim

    evidence = guesses, correct, canaries, scores, in_scores, out_scores
    return claim(AuditClaim(epsilon, delta, confidence, *evidence, gaussian, many_runs), as_json=as_json)
