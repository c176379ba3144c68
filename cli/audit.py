"""Claims of privacy, of any model or run, weighed against evidence, with an exit code for a CI."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..base.refusal import Refusal
from ..base.tensor_file import read_npy, read_npz
from ..privacy.audit.one_run import Guesses, Scores
from ..privacy.audit.verdict import Judgement, Method, Verdict, by_guesses, by_many_runs, by_one_run, judge

FORMS = ("guesses", "correct", "canaries", "scores", "in_scores", "out_scores")
EXIT_CODES = {Verdict.CONSISTENT: 0, Verdict.VIOLATED: 3, Verdict.TOO_WEAK: 4}


@dataclass(frozen=True)
class AuditClaim:
    """A claim of differential privacy and the evidence against it, as they were typed.

    Attributes:
      epsilon, delta: what is claimed.
      confidence: of the bounds and of the verdict, above 0.5 and below 1.
      guesses, correct, canaries: of one run: guesses who was in, the right ones, and of how many canaries.
      scores: a file of both kinds.
      in_scores, out_scores: a file of each kind.
      gaussian: the claim is about a Gaussian mechanism.
      many_runs: each score is of a run of its own.
    """

    epsilon: str
    delta: str
    confidence: str = "0.99"
    guesses: str | None = None
    correct: str | None = None
    canaries: str | None = None
    scores: Path | None = None
    in_scores: Path | None = None
    out_scores: Path | None = None
    gaussian: bool = False
    many_runs: bool = False


def claim(audit: AuditClaim, *, as_json: bool = False) -> int:
    """Weigh a claim and print the verdict; return the exit code.

    Raises:
      Refusal: a number is out of range, or the evidence cannot be read.
    """
    epsilon = _within("epsilon", audit.epsilon, 0, math.inf)
    delta = _within("delta", audit.delta, 0, 1, or_at=0)
    if audit.gaussian and delta == 0:
        raise Refusal("delta", delta, "a Gaussian mechanism has a delta above 0; give such a number")
    alpha = 1 - _within("confidence", audit.confidence, 0.5, 1)
    judgement = judge(_methods(audit, delta), epsilon, alpha)
    print(_as_json(judgement) if as_json else _in_words(judgement, epsilon, delta, alpha))
    return EXIT_CODES[judgement.verdict]


def _within(field: str, text: str, low: float, high: float, or_at: float | None = None) -> float:
    try:
        value = float(text)
    except ValueError:
        raise Refusal(field, text, "give a number") from None
    if not (low < value < high or value == or_at):
        upper = "" if math.isinf(high) else f" and below {high:g}"
        raise Refusal(field, text, f"give a number {'from' if or_at == low else 'above'} {low:g}{upper}")
    return value


def _methods(audit: AuditClaim, delta: float) -> list[Method]:
    match audit:
        case AuditClaim(
            guesses=str(guesses),
            correct=str(correct),
            scores=None,
            in_scores=None,
            out_scores=None,
            many_runs=False,
        ):
            made = _whole("guesses", guesses)
            canaries = _whole("canaries", audit.canaries or guesses)
            return by_guesses(Guesses(canaries, made, _whole("correct", correct)), delta, audit.gaussian)
        case AuditClaim(
            scores=Path() as file, guesses=None, correct=None, canaries=None, in_scores=None, out_scores=None
        ):
            members, others = _both(file)
        case AuditClaim(
            in_scores=Path() as inside,
            out_scores=Path() as outside,
            guesses=None,
            correct=None,
            canaries=None,
            scores=None,
        ):
            members, others = _numbers(inside), _numbers(outside)
        case _:
            given = sorted(name for name in FORMS if getattr(audit, name) is not None)
            shown = ", ".join(f"--{name.replace('_', '-')}" for name in given) or "none"
            remedy = "give it in one of the forms that fedveil audit claim --help lists"
            raise Refusal("evidence", shown, remedy)
    return (by_many_runs if audit.many_runs else by_one_run)(members, others, delta, audit.gaussian)


def _whole(field: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise Refusal(field, text, "give a whole number") from None


def _both(path: Path) -> tuple[Scores, Scores]:
    if path.suffix == ".npz":
        with (
            _reading(path, "needs the arrays members and others"),
            path.open("rb") as file,
        ):
            arrays = read_npz(file)
            return _checked(path, arrays["members"]), _checked(path, arrays["others"])
    with _reading(path, "needs the columns score and member, 1 or 0"), open(path, newline="") as file:
        rows = [(float(row["score"]), ("0", "1").index(row["member"])) for row in csv.DictReader(file)]
    members, others = (np.array([score for score, kind in rows if kind == each]) for each in (1, 0))
    return _checked(path, members), _checked(path, others)


def _numbers(path: Path) -> Scores:
    with _reading(path, "needs one number a line"):
        if path.suffix == ".npy":
            with path.open("rb") as file:
                return _checked(path, read_npy(file))
        return _checked(path, np.array(path.read_text().split(), float))


@contextmanager
def _reading(path: Path, remedy: str) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise Refusal("scores", str(path), f"cannot be read ({error.strerror or 'damaged'})") from None
    except (KeyError, ValueError, TypeError):
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
