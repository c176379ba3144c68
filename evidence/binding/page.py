"""Page of a run or of answers, against the report that it shows: its values, its bytes, and what in it could act."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...base.refusal import Refusal
from ...run.files import PAGE, REPORT
from ..card import contradicts
from ..page_text import active_parts, differences, references

ANOTHER = f"it is not the page that {REPORT} makes: fedveil report makes it again"
UNMADE = "jinja2, which is not installed, would make the page again"


def require_page(
    folder: Path, result: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]], bound: Callable[[], bool]
) -> tuple[str, str]:
    """Return a clause on how a run's page is the one that its report makes, and why that is open; empty if it is not.

    Args:
      folder: of PAGE and REPORT.
      result: of the run.
      rounds: its lines of METRICS.
      bound: whether something outside the page binds its hash.

    Raises:
      ValueError: page, report and result differ, or a part of the page may act.
    """
    report, html = json.loads((folder / REPORT).read_bytes()), (folder / PAGE).read_bytes().decode()
    clause = f"{require_values(html, report)} values match {REPORT}"
    claims = {(row["unit"], row["adversary"]): row["epsilon"] for row in result["privacy"]}
    for row in report["privacy"]:
        if claims.get((row["unit"], row["adversary"])) != row["epsilon"]:
            reason = f"epsilon {row['epsilon']} against the {row['adversary']} is in the report and not in the result"
            raise ValueError(reason)
    for name, report_value, result_value in _common(report, result, rounds):
        if report_value != result_value:
            raise ValueError(f"{name} is {report_value!r} in the report and {result_value!r} in the result")
    if contradicts(folder, report):
        raise ValueError(f"the guarantee in the card is not that of {REPORT}; make the report again")
    again = page_again(report)
    if again == html:
        return f"{clause}, which makes this page", ""
    if again is None:
        if bound():
            return f"{clause}, and its hash is bound; {UNMADE}", ""
        return "", "its values match; jinja2 is not installed, and its hash is bound by nothing"
    if bound():
        return "", "its values match and its hash is bound, but this release makes another page of them"
    raise ValueError(ANOTHER)


def require_values(html: str, report: Mapping[str, Any]) -> int:
    """Return the number of a page's values, if all are the report's and no part of the page may act.

    Raises:
      ValueError: one differs, there is none, or a part may run, load or send something.
    """
    if wrong := differences(html, report):
        raise ValueError(f"{len(wrong)} values differ: {wrong[0]}")
    count = len(references(html))
    if not count:
        raise ValueError("no value of the page refers to the report")
    if acts := active_parts(html):
        raise ValueError(f"the page has an element that may act: {acts[0]}")
    return count


def page_again(report: Mapping[str, Any]) -> str | None:
    """Return the page that a report makes; None without jinja2, empty for a report of another release."""
    try:
        import jinja2

        from ..page import page_of
    except ImportError:
        return None
    try:
        return page_of(report)
    except (Refusal, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
        return ""
    except jinja2.TemplateError:
        return ""


def _common(
    report: Mapping[str, Any], result: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, Any, Any]]:
    """Yield the name of each value that report and result both hold, and both values."""
    stamps, audit = report["stamps"], result["audit"] or {}
    yield "status", report["run"]["status"], result["status"]
    yield "verdict", stamps["verdict"], audit.get("verdict")
    row = {} if stamps["row"] is None else report["privacy"][stamps["row"]]
    for name in ("epsilon", "delta"):
        yield f"claimed {name}", (stamps["claimed"] or {}).get(name), row.get(name)
    unit_audit = (audit.get("records") if row.get("unit", "client") != "client" else None) or audit
    for name in ("epsilon", "low", "high"):
        measured = (unit_audit.get("measured") or {}).get(name)
        yield f"measured {name}", (stamps["measured"] or {}).get(name), measured
    yield "ceiling", stamps["ceiling"], unit_audit.get("ceiling")
    lost, stated = (each.get("record_by_sums") or {} for each in (report, result))
    for name in ("epsilon", "delta") if lost else ():
        yield f"{name} of a record by sums of whole clients", lost[name], stated.get(name)
    metrics = result["metrics"] or (rounds[-1] if rounds else {})
    for each in report["metrics"]:
        yield each["name"], each["value"], metrics.get(each["name"])
    if confused := report.get("model", {}).get("confusion"):
        yield "confusion matrix", [row["counts"] for row in confused], result.get("confusion")
