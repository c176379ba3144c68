"""Verbs of `fedveil audit`: a run's claim compared with its measurements, and any claim of privacy with evidence."""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer

from ..base.bounded_decoding import format_number, json_number
from ..base.refusal import Refusal
from .grammar import GROUP, Json, allow_local_modules, argument, flag, option, read, verb

if TYPE_CHECKING:
    from ..audit.result import RecomputedAudit
    from ..privacy.audit.memorisation import MemorisationResult
    from ..privacy.audit.normality import Estimate
    from ..privacy.audit.one_run import Scores
    from ..privacy.audit.run_audit import Measured
    from ..privacy.audit.verdict import Judgement

# By verdict; None is that of a run without a claim to test.
EXIT_CODES = {"consistent": 0, "violated": 3, "too weak to tell": 4, None: 4}
group = typer.Typer(**GROUP)


@verb(group, "RUN", "Compare a run's claims and measurements.", hidden=True, needs="simulation")
def audit_run(
    run: Annotated[Path, argument("RUN", "A run folder.", file_okay=False)],
    records: Annotated[bool, flag("--records", "Show memorised records, by client.")] = False,
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
    allow_local_modules()
    if records and membership:
        raise click.UsageError("--records and --membership exclude each other", click.get_current_context())
    if records:
        from .audit_records import show_records

        return show_records(run, as_json=as_json)
    if membership is not None:
        from ..audit.membership_attacks import membership as show_membership

        return show_membership(run, membership, shadows, epochs, as_json=as_json)
    from ..audit.result import memorised, recompute_audit
    from ..run.run_files import as_a_run_wrote

    with as_a_run_wrote(run):
        audit, by_heart = recompute_audit(run), memorised(run)
    if as_json:
        fields = audit.to_json() | {"memorisation": [_fields(each) for each in by_heart]}
        print(json.dumps(fields, allow_nan=False))
    else:
        print("\n".join(_audit_lines(run, audit, by_heart)))
    return EXIT_CODES[audit.summary.verdict]


def _fields(result: MemorisationResult) -> dict[str, Any]:
    """Return a test of memorisation as plain data."""
    figures = {name: json_number(value) for name, value in result.figures.items()}
    return {"name": result.name, "p_value": json_number(result.p_value), "shown": figures}


def _audit_lines(folder: Path, audit: RecomputedAudit, by_heart: Sequence[MemorisationResult]) -> list[str]:
    """Return the title, the rows and the verdict of a run's audit; tests that it did not make have no row.

    Args:
      folder: of the run.
      audit: recomputed from its files.
      by_heart: tests of memorisation.
    """
    from ..audit.line import format_memorised
    from ..run.display import visible

    terms, summary = audit.terms, audit.summary
    clients = f", {terms.canaries} canary clients" if terms.canaries else ""
    claim = f"; epsilon at delta {terms.delta:g}" if terms.delta else ""
    title = f"{folder}: {audit.rounds} rounds{clients}{claim}"
    tests = [(visible(each.name), visible(format_memorised(each))) for each in by_heart]
    rows = [f"{name:<40}  {text}" for name, text in (*_audit_rows(audit), *tests)]
    return [title, *rows, f"{summary.verdict or 'no verdict'}: {summary.sentence}"]


def _audit_rows(audit: RecomputedAudit) -> Iterator[tuple[str, str]]:
    """Yield the name and the value of each measurement, test and alarm."""
    from ..audit.line import format_alarm, visibility

    terms, summary = audit.terms, audit.summary
    clients, records = summary.measured, summary.records
    if clients:
        yield "claimed, at most", _number(clients.claimed)
        yield "measured", _interval(clients, " at 95 %")
    for each in summary.findings:
        yield f"at least, {each.method}", _number(each.lower)
    if summary.final:
        yield "first and last model alone", _interval(summary.final)
    if clients:
        yield "could have been shown", _number(clients.ceiling)
    if terms.delta:
        yield "noise as claimed", f"p = {summary.norm_p:.2g}; {visibility(summary.visible_shortfall)}"
        yield "noise new in each round", f"p = {summary.reuse_p:.2g}"
    if terms.clients:
        yield "drawn as accounted", f"p = {summary.draw_p:.2g}"
    if records:
        yield "claimed of records, at most", _number(records.claimed)
        yield "measured of records", _interval(records, " at 95 %")
        for name, value in records.lower.items():
            yield f"at least, {name}", _number(value)
        yield "could have been shown of records", _number(records.ceiling)
    for each in audit.raised:
        yield "alarm", f"round {each.round}, {format_alarm(each.alarm)}"


def _interval(measurement: Measured | Estimate, suffix: str = "") -> str:
    """Return a measured epsilon, and in brackets the ends of its interval with a suffix."""
    low, high = _number(measurement.low), _number(measurement.high)
    return f"{_number(measurement.epsilon)} ({low} to {high}{suffix})"


def _number(value: float) -> str:
    return format_number(value, ".3f")


@verb(group, "claim", "Test a privacy claim against evidence.")
def claim(
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
    gaussian: Annotated[bool, flag("--gaussian", "The claim is about a Gaussian mechanism.")] = False,
    many_runs: Annotated[bool, flag("--many-runs", "Each score comes from a separate run.")] = False,
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
    from ..privacy.audit.one_run import Guesses
    from ..privacy.audit.verdict import by_guesses, by_many_runs, by_one_run, judge

    claimed, claimed_delta = (
        _between("epsilon", epsilon, 0, math.inf),
        _between("delta", delta, 0, 1, or_low=True),
    )
    if gaussian and claimed_delta == 0:
        raise Refusal("delta", claimed_delta, "a Gaussian mechanism has a delta above 0; give such a number")
    alpha = 1 - _between("confidence", confidence, 0.5, 1)
    by_scores = by_many_runs if many_runs else by_one_run
    match guesses, correct, canaries, scores, in_scores, out_scores:
        case str(), str(), _, None, None, None if not many_runs:
            num_guesses, count = _whole("guesses", guesses), _whole("canaries", canaries or guesses)
            evidence = Guesses(count, num_guesses, _whole("correct", correct))
            methods = by_guesses(evidence, claimed_delta, gaussian)
        case None, None, None, Path(), None, None:
            methods = by_scores(*_read_both_scores(scores), claimed_delta, gaussian)
        case None, None, None, None, Path(), Path():
            methods = by_scores(_read_scores(in_scores), _read_scores(out_scores), claimed_delta, gaussian)
        case options:
            names = ("guesses", "correct", "canaries", "scores", "in-scores", "out-scores")
            used = sorted(f"--{name}" for name, each in zip(names, options, strict=True) if each is not None)
            remedy = "give it in one of the forms that fedveil audit claim --help lists"
            raise Refusal("evidence", ", ".join(used) or "none", remedy)
    judgement = judge(methods, claimed, alpha)
    print(_as_json(judgement) if as_json else _format_judgement(judgement, claimed, claimed_delta, alpha))
    return EXIT_CODES[judgement.verdict]


def _between(field: str, text: str, low: float, high: float, *, or_low: bool = False) -> float:
    """Return an option's number, which must be above `low`, or also `low` itself, and below `high`."""
    value = read(float, field, text)
    if not (low < value < high or (or_low and value == low)):
        upper = "" if math.isinf(high) else f" and below {high:g}"
        raise Refusal(field, text, f"give a number {'from' if or_low else 'above'} {low:g}{upper}")
    return value


def _whole(field: str, text: str) -> int:
    return read(int, field, text, "give a whole number")


def _read_both_scores(path: Path) -> tuple[Scores, Scores]:
    """Return the scores of included and of excluded canaries in a .npz or a .csv file, shape (n,) each."""
    import csv

    import numpy as np

    from ..base.tensor_file import read_npz

    if path.suffix == ".npz":
        with _reading(path, "needs the arrays members and others"), path.open("rb") as file:
            arrays = read_npz(file)
            return _check_scores(path, arrays["members"]), _check_scores(path, arrays["others"])
    with _reading(path, "needs the columns score and member, 1 or 0"), open(path, newline="") as file:
        rows = [(float(row["score"]), ("0", "1").index(row["member"])) for row in csv.DictReader(file)]
    members, others = (np.array([score for score, kind in rows if kind == each]) for each in (1, 0))
    return _check_scores(path, members), _check_scores(path, others)


def _read_scores(path: Path) -> Scores:
    """Return the scores in a .npy file, or in a text file with one number a line."""
    import numpy as np

    from ..base.tensor_file import read_npy

    with _reading(path, "needs one number a line"):
        if path.suffix == ".npy":
            with path.open("rb") as file:
                return _check_scores(path, read_npy(file))
        return _check_scores(path, np.array(path.read_text().split(), float))


@contextmanager
def _reading(path: Path, remedy: str) -> Generator[None]:
    """Refuse a file that the block cannot read, or whose content is of another form, with this remedy."""
    try:
        yield
    except OSError as error:
        raise Refusal("scores", str(path), f"cannot be read ({error.strerror or 'damaged'})") from None
    except (KeyError, ValueError, TypeError):
        raise Refusal("scores", str(path), remedy) from None


def _check_scores(path: Path, scores: Any) -> Scores:
    """Return scores as float64; refuse those that are not one row of finite numbers."""
    import numpy as np

    array = np.asarray(scores, np.float64)
    if array.ndim != 1 or not len(array) or not np.isfinite(array).all():
        raise Refusal("scores", str(path), "each kind needs one row of finite numbers, at least one")
    return array


def _format_judgement(judgement: Judgement, epsilon: float, delta: float, alpha: float) -> str:
    """Return the claim, a row for each method, and the verdict; `alpha` is one minus the confidence."""
    from ..privacy.audit.verdict import Verdict

    lines = [f"claim: epsilon {epsilon:g} at delta {delta:g}; confidence {1 - alpha:g}"]
    width = max(len(finding.method) for finding in judgement.findings)
    lines.append(f"{'method'.ljust(width)}  epsilon at least  could have shown  p of the claim")
    lines += [
        f"{f.method.ljust(width)}  {f.lower:<16.3f}  {f.ceiling:<16.3f}  {f.p_value:.2g}"
        for f in judgement.findings
    ]
    first = judgement.findings[0]  # of the method that decides
    match judgement.verdict:
        case Verdict.VIOLATED:
            conclusion = f"epsilon is at least {first.lower:.3g}, and {epsilon:g} is claimed"
        case Verdict.CONSISTENT:
            conclusion = "this evidence does not refute the claim, and proves no privacy"
        case Verdict.TOO_WEAK:
            conclusion = f"not even perfect guesses could have shown more than epsilon {first.ceiling:.3g}"
    return "\n".join([*lines, f"{judgement.verdict}: {conclusion}"])


def _as_json(judgement: Judgement) -> str:
    findings = [
        {"method": f.method}
        | {name: json_number(getattr(f, name)) for name in ("lower", "ceiling", "p_value")}
        for f in judgement.findings
    ]
    return json.dumps({"verdict": str(judgement.verdict), "findings": findings}, allow_nan=False)
