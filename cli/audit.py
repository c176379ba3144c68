"""``fedveil audit claim``: evidence from any model or run against a claim of privacy, with an exit code for a CI."""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from ..privacy.audit.one_run import Guesses, Scores
from ..privacy.audit.verdict import Judgement, Method, Verdict, by_guesses, by_many_runs, by_one_run, judge
from ..privacy.refusal import Refusal

EXIT_CODES = {Verdict.CONSISTENT: 0, Verdict.VIOLATED: 3, Verdict.TOO_WEAK: 4}
USAGE = """\
usage: fedveil audit RUN [--json]                          weigh a run again from its folder
       fedveil audit RUN --membership loss|rmia|lira|art   attack its final model
       fedveil audit RUN --records [--json]                what it learnt by heart, by owner
       fedveil audit claim --epsilon E --delta D EVIDENCE  weigh any claim: fedveil audit claim --help"""
EVIDENCE = """\
evidence, one of:
  --guesses N --correct R [--canaries M]   one run: N guesses who was in, R of them right, of M canaries (N by default)
  --scores FILE                            .npz with the arrays members and others, or .csv with the columns score
                                           and member (1 or 0)
  --in-scores FILE --out-scores FILE       .npy, or one number a line
Higher scores say in. Scores are of one run, each canary in or out by a fair coin of its own; with --many-runs each
score is of a run of its own. Exit codes: 0 consistent, 3 violated, 4 too weak to tell, 2 refused.
"""


def audit(argv: Sequence[str]) -> int:
    """Run ``fedveil audit``; return the exit code."""
    if "--records" in argv:
        from .audit_records import records

        return records(argv)
    if "--membership" in argv:
        from ..simulations.membership_attacks import membership

        return membership(argv)
    if argv[:1] != ["claim"] and (folders := [each for each in argv if not each.startswith("-")]):
        from .audit_run import audit_run

        (folder, *more), flags = folders, set(argv) - set(folders)
        if more or flags - {"--json"}:
            print(USAGE)
            return 2
        return audit_run(Path(folder), as_text="--json" not in flags)
    if argv[:1] != ["claim"]:
        print(USAGE)
        return 0 if set(argv) & {"-h", "--help"} else 2
    try:
        asked = _parser().parse_args(argv[1:])
    except SystemExit as stopped:  # it has said why
        return int(stopped.code or 0)
    epsilon = _within("epsilon", asked.epsilon, 0, math.inf)
    delta = _within("delta", asked.delta, 0, 1, or_at=0)
    if asked.gaussian and delta == 0:
        raise Refusal("delta", delta, "no Gaussian mechanism has it; give a number above 0")
    alpha = 1 - _within("confidence", asked.confidence, 0.5, 1)
    judgement = judge(_methods(asked, delta), epsilon, alpha)
    print(_as_json(judgement) if asked.json else _in_words(judgement, epsilon, delta, alpha))
    return EXIT_CODES[judgement.verdict]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "fedveil audit claim",
        allow_abbrev=False,
        epilog=EVIDENCE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--epsilon", required=True, help="what is claimed, in nats")
    parser.add_argument("--delta", required=True, help="what is claimed; 0 for pure differential privacy")
    parser.add_argument(
        "--confidence", default="0.99", help="of the bounds and of the verdict; 0.99 by default"
    )
    parser.add_argument("--gaussian", action="store_true", help="the claim is about a Gaussian mechanism")
    parser.add_argument("--many-runs", action="store_true", help="each score is of a run of its own")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    for name in ("guesses", "correct", "canaries"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    for name in ("scores", "in-scores", "out-scores"):
        parser.add_argument(f"--{name}", type=Path, help=argparse.SUPPRESS)
    return parser


def _within(field: str, text: str, low: float, high: float, or_at: float | None = None) -> float:
    try:
        value = float(text)
    except ValueError:
        raise Refusal(field, text, "give a number") from None
    if not (low < value < high or value == or_at):
        upper = "" if math.isinf(high) else f" and below {high:g}"
        raise Refusal(field, text, f"give a number {'from' if or_at == low else 'above'} {low:g}{upper}")
    return value


def _methods(asked: argparse.Namespace, delta: float) -> list[Method]:
    given = {name for name in _FORMS if getattr(asked, name) is not None}
    match sorted(given - {"canaries"}):
        case ["correct", "guesses"] if not asked.many_runs:
            made = _whole("guesses", asked.guesses)
            canaries = _whole("canaries", asked.canaries or asked.guesses)
            return by_guesses(
                Guesses(canaries, made, _whole("correct", asked.correct)), delta, asked.gaussian
            )
        case ["scores"] if "canaries" not in given:
            members, others = _both(asked.scores)
        case ["in_scores", "out_scores"] if "canaries" not in given:
            members, others = _numbers(asked.in_scores), _numbers(asked.out_scores)
        case _:
            shown = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(given)) or "none"
            raise Refusal(
                "evidence", shown, "give it in one of the forms that fedveil audit claim --help lists"
            )
    return (by_many_runs if asked.many_runs else by_one_run)(members, others, delta, asked.gaussian)


_FORMS = ("guesses", "correct", "canaries", "scores", "in_scores", "out_scores")


def _whole(field: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise Refusal(field, text, "give a whole number") from None


def _both(path: Path) -> tuple[Scores, Scores]:
    if path.suffix == ".npz":
        with (
            _reading(path, "needs the arrays members and others"),
            np.load(path, allow_pickle=False) as arrays,
        ):
            return _checked(path, arrays["members"]), _checked(path, arrays["others"])
    with _reading(path, "needs the columns score and member, 1 or 0"), open(path, newline="") as file:
        rows = [(float(row["score"]), ("0", "1").index(row["member"])) for row in csv.DictReader(file)]
    members, others = (np.array([score for score, kind in rows if kind == each]) for each in (1, 0))
    return _checked(path, members), _checked(path, others)


def _numbers(path: Path) -> Scores:
    with _reading(path, "needs one number a line"):
        if path.suffix == ".npy":
            return _checked(path, np.load(path, allow_pickle=False))
        return _checked(path, np.array(path.read_text().split(), float))


@contextmanager
def _reading(path: Path, remedy: str) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise Refusal("scores", str(path), f"cannot be read ({error.strerror or 'damaged'})") from None
    except (KeyError, ValueError, TypeError, EOFError, BadZipFile):
        raise Refusal("scores", str(path), remedy) from None


def _checked(path: Path, scores: Any) -> Scores:
    array = np.asarray(scores, np.float64)
    if array.ndim != 1 or not len(array) or not np.isfinite(array).all():
        raise Refusal("scores", str(path), "each kind needs one row of finite numbers, at least one")
    return array


def _in_words(judgement: Judgement, epsilon: float, delta: float, alpha: float) -> str:
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
            said = f"epsilon is at least {first.lower:.3g}, and {epsilon:g} is claimed"
        case Verdict.CONSISTENT:
            said = "this evidence does not refute the claim, and proves no privacy"
        case Verdict.TOO_WEAK:
            said = f"not even perfect guesses could have shown more than epsilon {first.ceiling:.3g}"
    return "\n".join([*lines, f"{judgement.verdict}: {said}"])


def _as_json(judgement: Judgement) -> str:
    findings = [
        {"method": f.method}
        | {
            name: value if math.isfinite(value := getattr(f, name)) else "infinity"
            for name in ("lower", "ceiling", "p_value")
        }
        for f in judgement.findings
    ]
    return json.dumps({"verdict": str(judgement.verdict), "findings": findings}, allow_nan=False)
