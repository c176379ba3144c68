"""Verbs of `fedveil audit`: a run's claim held against its measurements, and any claim of privacy against evidence."""

from __future__ import annotations

import json
import math
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer
from typer import Option

from ..base.bounded_decoding import format_number, json_number
from ..base.refusal import Refusal
from .grammar import GROUP, Json, argument, option, read, verb

if TYPE_CHECKING:
    from ..audit.result import RecomputedAudit
    from ..privacy.audit.one_run import Scores
    from ..privacy.audit.run_audit import Measured
    from ..privacy.audit.verdict import Judgement

# By verdict; a run may have none.
EXIT_CODES = {"consistent": 0, "violated": 3, "too weak to tell": 4, None: 4}
group = typer.Typer(**GROUP)


@verb(group, "RUN", "Compare a run's claims and measurements.", hidden=True, needs="simulation")
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
    from ..audit.result import recompute_audit
    from ..run.run_files import as_a_run_wrote

    with as_a_run_wrote(run):
        audit = recompute_audit(run)
    print(json.dumps(audit.to_json(), allow_nan=False) if as_json else "\n".join(_audit_lines(run, audit)))
    return EXIT_CODES[audit.summary.verdict]


def _audit_lines(folder: Path, audit: RecomputedAudit) -> list[str]:
    from ..audit.line import format_alarm, visibility

    terms, summary = audit.terms, audit.summary
    clients = f", {terms.canaries} canary clients" if terms.canaries else ""
    claim = f"; epsilon at delta {terms.delta:g}" if terms.delta else ""
    lines = [f"{folder}: {audit.rounds} rounds{clients}{claim}"]
    measurement = summary.measured
    if measurement is not None:
        lines.append(_line("claimed, at most", _number(measurement.claimed)))
        span = f"({_number(measurement.low)} to {_number(measurement.high)} at 95 %)"
        lines.append(_line("measured", f"{_number(measurement.epsilon)} {span}"))
    lines += [_line(f"at least, {each.method}", _number(each.lower)) for each in summary.findings]
    if summary.final is not None:
        final = summary.final
        span = f"({_number(final.low)} to {_number(final.high)})"
        lines.append(_line("first and last model alone", f"{_number(final.epsilon)} {span}"))
    if measurement is not None:
        lines.append(_line("could have been shown", _number(measurement.ceiling)))
    if terms.delta:
        lines.append(
            _line("noise as claimed", f"p = {summary.norm_p:.2g}; {visibility(summary.visible_shortfall)}")
        )
        lines.append(_line("noise new in each round", f"p = {summary.reuse_p:.2g}"))
    if terms.clients:
        lines.append(_line("drawn as accounted", f"p = {summary.draw_p:.2g}"))
    if summary.records is not None:
        lines += _of_records(summary.records)
    lines += [_line("alarm", f"round {each.round}, {format_alarm(each.alarm)}") for each in audit.raised]
    return [*lines, f"{summary.verdict or 'no verdict'}: {summary.sentence}"]


def _of_records(measurement: Measured) -> list[str]:
    span = f"({_number(measurement.low)} to {_number(measurement.high)} at 95 %)"
    return [
        _line("claimed of records, at most", _number(measurement.claimed)),
        _line("measured of records", f"{_number(measurement.epsilon)} {span}"),
        *(_line(f"at least, {name}", _number(value)) for name, value in measurement.lower.items()),
        _line("could have been shown of records", _number(measurement.ceiling)),
    ]


def _number(value: float) -> str:
    return format_number(value, ".3f")


def _line(name: str, value: str) -> str:
    return f"{name:<40}  {value}"


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
    from ..privacy.audit.one_run import Guesses
    from ..privacy.audit.verdict import by_guesses, by_many_runs, by_one_run, judge

    claimed, at = _within("epsilon", epsilon, 0, math.inf), _within("delta", delta, 0, 1, or_at=0)
    if gaussian and at == 0:
        raise Refusal("delta", at, "a Gaussian mechanism has a delta above 0; give such a number")
    alpha = 1 - _within("confidence", confidence, 0.5, 1)
    by_scores = by_many_runs if many_runs else by_one_run
    match guesses, correct, canaries, scores, in_scores, out_scores:
        case str(), str(), _, None, None, None if not many_runs:
            num_guesses, count = _whole("guesses", guesses), _whole("canaries", canaries or guesses)
            methods = by_guesses(Guesses(count, num_guesses, _whole("correct", correct)), at, gaussian)
        case None, None, None, Path(), None, None:
            methods = by_scores(*_both(scores), at, gaussian)
        case None, None, None, None, Path(), Path():
            methods = by_scores(_numbers(in_scores), _numbers(out_scores), at, gaussian)
        case evidence:
            names = ("guesses", "correct", "canaries", "scores", "in-scores", "out-scores")
            options = sorted(
                f"--{name}" for name, each in zip(names, evidence, strict=True) if each is not None
            )
            remedy = "give it in one of the forms that fedveil audit claim --help lists"
            raise Refusal("evidence", ", ".join(options) or "none", remedy)
    judgement = judge(methods, claimed, alpha)
    print(_as_json(judgement) if as_json else _format_judgement(judgement, claimed, at, alpha))
    return EXIT_CODES[judgement.verdict]


def _within(field: str, text: str, low: float, high: float, or_at: float | None = None) -> float:
    value = read(float, field, text)
    if not (low < value < high or value == or_at):
        upper = "" if math.isinf(high) else f" and below {high:g}"
        raise Refusal(field, text, f"give a number {'from' if or_at == low else 'above'} {low:g}{upper}")
    return value


def _whole(field: str, text: str) -> int:
    return read(int, field, text, "give a whole number")


def _both(path: Path) -> tuple[Scores, Scores]:
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


def _numbers(path: Path) -> Scores:
    import numpy as np

    from ..base.tensor_file import read_npy

    with _reading(path, "needs one number a line"):
        if path.suffix == ".npy":
            with path.open("rb") as file:
                return _check_scores(path, read_npy(file))
        return _check_scores(path, np.array(path.read_text().split(), float))


@contextmanager
def _reading(path: Path, remedy: str) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise Refusal("scores", str(path), f"cannot be read ({error.strerror or 'damaged'})") from None
    except (KeyError, ValueError, TypeError):
        raise Refusal("scores", str(path), remedy) from None


def _check_scores(path: Path, scores: Any) -> Scores:
    import numpy as np

    array = np.asarray(scores, np.float64)
    if array.ndim != 1 or not len(array) or not np.isfinite(array).all():
        raise Refusal("scores", str(path), "each kind needs one row of finite numbers, at least one")
    return array


def _format_judgement(judgement: Judgement, epsilon: float, delta: float, alpha: float) -> str:
    from ..privacy.audit.verdict import Verdict

    lines = [f"claim: epsilon {epsilon:g} at delta {delta:g}; confidence {1 - alpha:g}"]
    width = max(len(finding.method) for finding in judgement.findings)
    lines.append(f"{'method'.ljust(width)}  epsilon at least  could have shown  p of the claim")
    lines += [
        f"{f.method.ljust(width)}  {f.lower:<16.3f}  {f.ceiling:<16.3f}  {f.p_value:.2g}"
        for f in judgement.findings
    ]
    first = judgement.findings[0]
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
