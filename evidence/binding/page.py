"""Page of a run or of answers, against the report that it shows: its values, its bytes, and what in it could act."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from ...base.refusal import Refusal
from ...run.files import PAGE, REPORT
from ...run.manifest import sha256_of
from ..card import contradicts
from ..page_text import active_parts, differences, references
from .bound_folder import BoundFolder, NotShown, Wrong

ANOTHER = f"it is not the page that {REPORT} makes: fedveil report makes it again"
UNMADE = "jinja2, which is not installed, would make the page again"


def check_page(folder: BoundFolder) -> str:
    """Check that the page is the one that the report makes, and that the report agrees with the result."""
    page, report_file = folder.path / PAGE, folder.path / REPORT
    if not report_file.exists() and not page.exists():
        raise NotShown("there is no page; fedveil report makes it")
    for path in (report_file, page):
        if not path.exists():
            raise Wrong(f"{path.name} is missing beside the other")
    report, html = json.loads(report_file.read_bytes()), page.read_bytes().decode()
    finding = f"{require_values(html, report)} values match {REPORT}"
    _require_result(folder, report)
    if contradicts(folder.path, report):
        raise Wrong(f"the guarantee in the card is not that of {REPORT}; make the report again")
    again = page_again(report)
    if again == html:
        return f"{finding}, which makes this page"
    if _is_bound(folder):
        if again is None:
            return f"{finding}, and its hash is bound; {UNMADE}"
        raise NotShown("its values match and its hash is bound, but this release makes another page of them")
    if again is None:
        raise NotShown("its values match; jinja2 is not installed, and its hash is bound by nothing")
    raise Wrong(ANOTHER)


def _is_bound(folder: BoundFolder) -> bool:
    """Return whether the manifest, or the signed list of a bundle, has the hash of the page."""
    digests = {folder.manifest.files.get(PAGE)}
    if folder.signatures:
        digests.add(folder.listing.files.get(PAGE))
    return sha256_of(folder.path / PAGE) in digests


def _require_result(folder: BoundFolder, report: Mapping[str, Any]) -> None:
    """Require that a report states what the result states."""
    result = folder.result
    claims = {(row["unit"], row["adversary"]): row["epsilon"] for row in result["privacy"]}
    for row in report["privacy"]:
        if claims.get((row["unit"], row["adversary"])) != row["epsilon"]:
            reason = f"epsilon {row['epsilon']} against the {row['adversary']} is in the report and not in the result"
            raise Wrong(reason)
    last_round = folder.rounds[-1] if folder.rounds else {}
    for name, report_value, result_value in _common_values(report, result, result["metrics"] or last_round):
        if report_value != result_value:
            raise Wrong(f"{name} is {report_value!r} in the report and {result_value!r} in the result")


def require_values(html: str, report: Mapping[str, Any]) -> int:
    """Return the number of a page's values; require that all are the report's, and that no part can run, load or send."""
    if wrong := differences(html, report):
        raise ValueError(f"{len(wrong)} values differ: {wrong[0]}")
    count = len(references(html))
    if not count:
        raise ValueError("no value of the page refers to the report")
    if acts := active_parts(html):
        raise ValueError(f"the page has an element that may act: {acts[0]}")
    return count


def page_again(report: Mapping[str, Any]) -> str | None:
    """Return the page that a report makes; None without jinja2, empty where the report, as of another release, fails."""
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


def _common_values(
    report: Mapping[str, Any], result: Mapping[str, Any], metrics: Mapping[str, float]
) -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, value in the report, value in the result) of what both state; `metrics` are the run's last ones."""
    stamps, audit = report["stamps"], result["audit"] or {}
    yield "status", report["run"]["status"], result["status"]
    yield "verdict", stamps["verdict"], audit.get("verdict")
    row = {} if stamps["row"] is None else report["privacy"][stamps["row"]]
    for name in ("epsilon", "delta"):
        yield f"claimed {name}", (stamps["claimed"] or {}).get(name), row.get(name)
    hides_records = row.get("unit", "client") != "client"
    unit_audit = (hides_records and audit.get("records")) or audit  # the audit of the unit that is hidden
    measured = unit_audit.get("measured") or {}
    for name in ("epsilon", "low", "high"):
        yield f"measured {name}", (stamps["measured"] or {}).get(name), measured.get(name)
    yield "ceiling", stamps["ceiling"], unit_audit.get("ceiling")
    lost, stated = (each.get("record_by_sums") or {} for each in (report, result))
    for name in ("epsilon", "delta") if lost else ():
        yield f"{name} of a record by sums of whole clients", lost[name], stated.get(name)
    own, columns = report.get("personal"), (result.get("personal") or {}).get("columns", {})
    for each in own["columns"] if own else ():
        name = each["name"]
        yield f"{name} of personal models", each["values"], [means.get(name) for means in columns.values()]
    for each in report["metrics"]:
        yield each["name"], each["value"], metrics.get(each["name"])
    for name, key in (("held_out", "held_out"), ("coefficients", "intervals")):
        yield f"{name} with intervals", report.get(name), result.get(key)
    if confusion := report.get("model", {}).get("confusion"):
        yield "confusion matrix", [row["counts"] for row in confusion], result.get("confusion")
