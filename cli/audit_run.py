"""``fedveil audit RUN``: a finished run audited again from its auditor's files, with claimed and measured epsilon."""

from __future__ import annotations

import json
import math
from pathlib import Path

from ..audit.line import in_words, seen
from ..audit.result import Weighed, weigh
from ..privacy.audit.run_audit import Measured
from ..privacy.audit.verdict import Verdict
from ..run.run_files import as_a_run_wrote

EXIT_CODES = {Verdict.CONSISTENT: 0, Verdict.VIOLATED: 3, Verdict.TOO_WEAK: 4, None: 4}


def audit_run(folder: Path, as_text: bool = True) -> int:
    """Print what the audit of a run says; return the exit code, as `fedveil audit claim` has it.

    Raises:
      Refusal: the folder holds no audit of a run that is over.
    """
    with as_a_run_wrote(folder):
        found = weigh(folder)
    if as_text:
        print("\n".join(_in_words(folder, found)))
    else:
        print(json.dumps(found.to_json(), allow_nan=False))
    return EXIT_CODES[found.summary.verdict]


def _in_words(folder: Path, weighed: Weighed) -> list[str]:
    terms, summary = weighed.terms, weighed.summary
    clients = f", {terms.canaries} canary clients" if terms.canaries else ""
    claim = f"; epsilon at delta {terms.delta:g}" if terms.delta else ""
    lines = [f"{folder}: {weighed.rounds} rounds{clients}{claim}"]
    found = summary.measured
    if found is not None:
        lines.append(_line("claimed, at most", _number(found.claimed)))
        span = f"({_number(found.low)} to {_number(found.high)} at 95 %)"
        lines.append(_line("measured", f"{_number(found.epsilon)} {span}"))
    lines += [_line(f"at least, {each.method}", _number(each.lower)) for each in summary.findings]
    if summary.final is not None:
        final = summary.final
        span = f"({_number(final.low)} to {_number(final.high)})"
        lines.append(_line("first and last model alone", f"{_number(final.epsilon)} {span}"))
    if found is not None:
        lines.append(_line("could have been shown", _number(found.ceiling)))
    if terms.delta:
        lines.append(
            _line("noise as claimed", f"p = {summary.norm_p:.2g}; {seen(summary.visible_shortfall)}")
        )
        lines.append(_line("noise new in each round", f"p = {summary.reuse_p:.2g}"))
    if terms.clients:
        lines.append(_line("drawn as accounted", f"p = {summary.draw_p:.2g}"))
    if summary.records is not None:
        lines += _of_records(summary.records)
    lines += [_line("alarm", f"round {each.round}, {in_words(each.alarm)}") for each in weighed.raised]
    return [*lines, f"{summary.verdict or 'no verdict'}: {summary.sentence}"]


def _of_records(found: Measured) -> list[str]:
    span = f"({_number(found.low)} to {_number(found.high)} at 95 %)"
    return [
        _line("claimed of records, at most", _number(found.claimed)),
        _line("measured of records", f"{_number(found.epsilon)} {span}"),
        *(_line(f"at least, {name}", _number(value)) for name, value in found.lower.items()),
        _line("could have been shown of records", _number(found.ceiling)),
    ]


def _line(name: str, value: str) -> str:
    return f"{name:<40}  {value}"


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "infinity"
