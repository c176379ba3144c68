"""Summary of a whole run: the claim, the evidence of canaries and checks, and the verdict."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ...base.refusal import Refusal
from ..budget import Unit
from . import record_claim
from .alarms import Alarm, Check, Level
from .canary_clients import round_scores
from .free_checks import NORM_TESTS, visible_shortfall
from .normality import Estimate, estimate, separation
from .one_run import Scores
from .round_rows import Rows
from .run_audit import INTERVAL_ALPHA, AuditTerms, Evidence, Measured
from .verdict import Finding, Verdict, by_one_run, judge

UNCLAIMED = "nothing is claimed of whole clients: there is no noise to check, and no claim"  # for older releases' runs
UNITS = {  # units that clients hide by their own noise, in the plural
    Unit.RECORD: "single records",
    Unit.PERSON: "a person's records at one client",
    Unit.PERSON_EVERYWHERE: "a person's records at all clients",
}
CONSISTENT = "this evidence does not refute the claim, and proves no privacy"


@dataclass(frozen=True)
class Raised:
    """Alarm, and the round after which it was raised."""

    round: int
    alarm: Alarm

    @property
    def content(self) -> dict[str, int | float | str]:
        """Content of the summary's file, as plain data."""
        level, test = str(self.alarm.level), str(self.alarm.test)
        return {"round": self.round, "level": level, "test": test, "p_value": self.alarm.p_value}


@dataclass(frozen=True)
class Summary:
    """Result of an audit.

    Attributes:
      verdict: verdict on the claim; None without a client-level claim.
      sentence: the verdict in words.
      measured: measurement by canaries after the last round; None without them.
      findings: lower bounds at 95 %, those for any mechanism last.
      final: estimate from the first and last model; None without canaries or before the end.
      visible_shortfall: share of the noise's std whose absence these rounds would have shown; 1 if not even a
        complete absence would.
      norm_p: the smallest p-value of the rounds, times their number (Bonferroni), at most 1.
      reuse_p: likewise.
      draw_p: likewise.
      records: measurement by canary records at the last look; None without them.
    """

    verdict: Verdict | None
    sentence: str
    measured: Measured | None = None
    findings: tuple[Finding, ...] = ()
    final: Estimate | None = None
    visible_shortfall: float = 1.0
    norm_p: float = 1.0
    reuse_p: float = 1.0
    draw_p: float = 1.0
    records: Measured | None = None


def summarise(evidence: Evidence, raised: Sequence[Raised], final: Rows | None) -> Summary:
    """Return the summary of a run of at least one round.

    Args:
      evidence: rows and coins of the run.
      raised: alarms of the run's looks.
      final: row whose `along` and `norm` are those of the last model minus the first; None if they are not known.
    """
    terms = evidence.terms
    summary = _of_sums(evidence, final) if terms.delta else Summary(None, untested(terms) or UNCLAIMED)
    looks = (record_claim.read(row, terms.record_epsilon) for row in evidence.rows[::-1])
    if records := next(filter(None, looks), None):
        summary = replace(_with_records(summary, records), records=records)
    elif terms.delta and terms.own_noise:
        summary = replace(summary, sentence=f"{summary.sentence}; {untested(terms)}")
    if summary.verdict is None:
        return summary
    return _with_alarms(summary, raised)


def untested(terms: AuditTerms) -> str:
    """Return a clause on the promise that clients keep by their own noise, if no measurement tested it; else empty."""
    if terms.own_noise is None:
        return ""
    if not terms.own_noise:
        return "nothing is promised, so there is no claim to test"
    promise = f"the promise for {UNITS[Unit(terms.own_noise)]} was"
    if terms.records:
        return f"{promise} not tested: too few canary records were drawn"
    if terms.losses:
        return f"{promise} tested by the losses of planted records alone"
    full = "" if terms.looks else "; audit=full of a simulation tests it"
    return f"{promise} not tested: each client adds its own noise, and the audit checks that of sums{full}"


def _with_records(summary: Summary, records: Measured) -> Summary:
    """Return the summary with canary records: too weak if they could not reach the claim, consistent if only they measured."""
    if records.ceiling <= records.claimed and summary.verdict is not Verdict.VIOLATED:
        sentence = f"canary records could not have shown more than epsilon {records.ceiling:.3g}"
        return replace(summary, verdict=Verdict.TOO_WEAK, sentence=sentence)
    without_clients = summary.measured is None and summary.verdict in (None, Verdict.CONSISTENT)
    return replace(summary, verdict=Verdict.CONSISTENT, sentence=CONSISTENT) if without_clients else summary


def _of_sums(evidence: Evidence, final: Rows | None) -> Summary:
    """Return the summary of a run with a client-level claim by its released sums. Arguments as of `summarise`."""
    terms, rows = evidence.terms, evidence.rows
    names = ("norm_p", "reuse_p", "draw_p")
    # Bonferroni's bound over the rounds.
    p_values = {name: min(1.0, len(rows) * float(rows[name].min())) for name in names}
    sums = np.array([rows[name].sum(dtype=np.float64) for name in ("energy", "dimensions")])
    summary = replace(_without_canaries(terms), visible_shortfall=visible_in(terms, sums), **p_values)
    scores = _scores(evidence)
    if scores is None:
        return summary
    measured = evidence.measured()
    level = terms.alarms().threshold(Check.CANARIES)
    with_canary, without_canary = scores
    methods = by_one_run(with_canary, without_canary, terms.delta, gaussian=True)
    # Findings are reported at the level of the intervals; the verdict must agree with the alarms, and so is at theirs.
    findings = judge(methods, measured.claimed, INTERVAL_ALPHA, measured.ceiling).findings
    verdict = judge(methods, measured.claimed, level, measured.ceiling).verdict
    return replace(
        summary,
        verdict=verdict,
        sentence=_in_words(verdict, measured),
        measured=measured,
        findings=findings,
        final=_final(evidence, final),
    )


def visible_in(terms: AuditTerms, sums: NDArray[np.float64]) -> float:
    """Return how much smaller than claimed the noise's std would have to be to raise an alarm, as a share from 0 to 1.

    `sums` are those over all rounds of energies and of their dimensions, (2,).
    """
    if not terms.delta:
        return 1.0
    level = terms.alarms().threshold(Check.NORM) / NORM_TESTS
    return visible_shortfall(sums[:1], sums[1:], level)


def _scores(evidence: Evidence) -> tuple[Scores, Scores] | None:
    """Return the canaries' scores, in and out; None if there are none, or too few were drawn."""
    if not evidence.terms.canaries:
        return None
    try:
        return evidence.scores
    except Refusal:
        return None


def _with_alarms(summary: Summary, raised: Sequence[Raised]) -> Summary:
    """Return the summary after the run's alarms: a red one makes it violated, an orange one too weak to tell."""
    for each in raised:
        if each.alarm.level is Level.RED:
            return replace(summary, verdict=Verdict.VIOLATED, sentence=_sentence(each))
    for each in raised:
        if each.alarm.level is Level.ORANGE and summary.verdict is not Verdict.VIOLATED:
            sentence = f"perhaps {_sentence(each)}, but nothing confirmed it: run it again"
            return replace(summary, verdict=Verdict.TOO_WEAK, sentence=sentence)
    return summary


def _without_canaries(terms: AuditTerms) -> Summary:
    """Return the summary of a run whose canaries, if there are any, have no scores."""
    if terms.canaries:
        return Summary(Verdict.TOO_WEAK, "too few canaries were drawn to say anything")
    return Summary(
        Verdict.CONSISTENT,
        "the released sums hold the claimed noise, fresh in every round; what leaks was not measured",
    )


def _in_words(verdict: Verdict, measured: Measured) -> str:
    """Return the sentence of a verdict by canaries."""
    match verdict:
        case Verdict.VIOLATED:
            return f"canaries show epsilon {measured.epsilon:.3g}, and {measured.claimed:.3g} is claimed"
        case Verdict.CONSISTENT:
            return CONSISTENT
        case Verdict.TOO_WEAK:
            return f"not even without noise could these canaries have shown more than epsilon {measured.ceiling:.3g}"


def _sentence(raised: Raised) -> str:
    """Return the sentence of an alarm."""
    fault = {
        Check.NORM: "a released sum is shorter than its claimed noise",
        Check.REUSE: "noise was used twice",
        Check.DRAW: "clients are drawn more often, or more evenly, than was accounted",
        Check.RECORDS: "canary records show more than their owners claim",
        Check.BOOKS: "the ledger counts less than what the released sums cost",
        Check.LOSSES: "the losses of odd records tell more than their owners claim",
    }.get(raised.alarm.test, "canaries show more than is claimed")
    return f"{fault} (round {raised.round}, {raised.alarm.evidence})"


def _final(evidence: Evidence, final: Rows | None) -> Estimate | None:
    """Return the estimate from `final`, the row of the last model minus the first; None if there is none, or no move."""
    if final is None or not final["norm"] > 0:
        return None
    along = final["along"].astype(np.float64)[None]
    scores = round_scores(along, np.array([float(final["norm"])]), evidence.terms.dimension)
    apart = separation(scores[evidence.coins], scores[~evidence.coins])
    return estimate(apart, evidence.terms.delta, INTERVAL_ALPHA)
