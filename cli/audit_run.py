"""``fedveil audit RUN``: a finished run weighed again from what its auditor kept, claimed beside measured."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from ..privacy.audit import round_rows
from ..privacy.audit.canary_clients import coins_of, commitment
from ..privacy.audit.run_audit import AuditTerms, Evidence, Measured
from ..privacy.audit.summary import Raised, Summary, summarise
from ..privacy.audit.verdict import Verdict
from ..privacy.refusal import Refusal
from ..server.auditing import Auditor
from ..server.run.audit import as_json, in_words, read_terms
from ..server.run.audit_line import seen
from ..server.run.files import AUDIT_ROWS, AUDIT_TERMS

EXIT_CODES = {Verdict.CONSISTENT: 0, Verdict.VIOLATED: 3, Verdict.TOO_WEAK: 4, None: 4}


def audit_run(folder: Path, as_text: bool = True) -> int:
    """Print what the audit of a run says; return the exit code, as `fedveil audit claim` has it.

    Raises:
      Refusal: the folder holds no audit of a run that is over.
    """
    fields = _fields(folder)
    terms = read_terms(fields["terms"])
    coins = _coins(folder, terms, fields)
    rows = round_rows.read(folder / AUDIT_ROWS, terms.canaries)
    whole = rows[rows["round"] == 0]
    rows = rows[rows["round"] > 0]
    if not len(rows):
        raise Refusal("audit", str(folder), "holds no audited round; give the folder of a run that has some")
    auditor = Auditor(terms, folder / AUDIT_ROWS, coins=coins)
    auditor.replay(rows)
    final = np.asarray(whole[-1]) if len(whole) else None
    summary = summarise(Evidence(terms, coins, rows), auditor.raised, final)
    if as_text:
        print("\n".join(_in_words(folder, terms, summary, auditor.raised, len(rows))))
    else:
        print(json.dumps(as_json(terms, summary, auditor.raised, str(fields["on_alarm"])), allow_nan=False))
    return EXIT_CODES[summary.verdict]


def _fields(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / AUDIT_TERMS).read_text()))
    except FileNotFoundError:
        remedy = "holds no audit that is over; give the folder of a run with audit=light or audit=full that has ended"
        raise Refusal("audit", str(folder), remedy) from None
    except (OSError, ValueError) as problem:
        raise Refusal("audit", str(folder / AUDIT_TERMS), f"cannot be read ({problem})") from problem


def _coins(folder: Path, terms: AuditTerms, fields: dict[str, Any]) -> np.ndarray:
    if not terms.canaries:
        return np.zeros(0, np.bool_)
    if "opened" not in fields:
        raise Refusal(
            "audit", str(folder), "the canaries' coins are not opened before the run is over; resume it"
        )
    seed = bytes.fromhex(fields["opened"]["seed"])
    coins = coins_of(seed, terms.canaries)
    if commitment(seed, coins) != fields["commitment"]:
        remedy = (
            "its coins are not those that were committed to before the first round; nothing follows from it"
        )
        raise Refusal("audit", str(folder), remedy)
    return coins


def _in_words(
    folder: Path, terms: AuditTerms, summary: Summary, raised: list[Raised], rounds: int
) -> list[str]:
    clients = f", {terms.canaries} canary clients" if terms.canaries else ""
    claim = f"; epsilon at delta {terms.delta:g}" if terms.delta else ""
    lines = [f"{folder}: {rounds} rounds{clients}{claim}"]
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
    lines += [_line("alarm", f"round {each.round}, {in_words(each.alarm)}") for each in raised]
    return [*lines, f"{summary.verdict or 'nothing to tell'}: {summary.said}"]


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
