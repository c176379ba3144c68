"""Comparison of two reports: different settings and results, a row for each value that differs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..run.run_files import Fields
from .page_text import text_of

ABOUT = (
    "task",
    "data",
    "mode",
    "status",
    "reason",
    "rounds_completed",
    "clients",
    "cohort",
    "strategy",
    "partition",
)
OF_NO_PROMISE = ("run", "resume", "reason")  # keys that name a run, and change nothing in it


@dataclass(frozen=True)
class ComparedValue:
    """One value of two reports.

    Attributes:
      part: of the report that it belongs to.
      name: of the value.
      first, second: its text in each report, as by `text_of`; "not recorded" where a report lacks it.
    """

    part: str
    name: str
    first: str
    second: str


def compare_reports(first: Fields, second: Fields, *, everything: bool = False) -> list[ComparedValue]:
    """Return the values of two reports that differ, in the order of the page.

    Args:
      first: a report, by `report_of`.
      second: another report.
      everything: whether to return equal values too.
    """
    one, other = (dict(_values(report)) for report in (first, second))
    missing = text_of(None)
    rows = [
        ComparedValue(part, name, one.get((part, name), missing), other.get((part, name), missing))
        for part, name in {**one, **other}
    ]
    return [row for row in rows if everything or row.first != row.second]


def _values(report: Fields) -> Iterator[tuple[tuple[str, str], str]]:
    """Yield ((part, name), text) of each compared value."""
    for name in ABOUT:
        yield ("run", name.replace("_", " ")), text_of(report["run"][name])
    for row in report["privacy"]:
        subject = f"of one {row['unit']}, against {row['whom']}"
        yield ("promise", f"epsilon {subject}"), text_of(row["epsilon"], "epsilon")
        yield ("promise", f"delta {subject}"), text_of(row["delta"])
        yield ("promise", f"mechanism {subject}"), text_of(row["mechanism"])
    yield from _measured(report["stamps"])
    for each in report["metrics"]:
        yield ("quality", each["name"]), text_of(each["value"])
    tail = report["tail"]
    if tail is not None:
        mean = f"{text_of(tail['mean'])}, from {text_of(tail['low'])} to {text_of(tail['high'])}"
        yield ("quality", f"{report['metric']}, mean of the last {tail['rounds']} rounds"), mean
    for each in (*report["cost"]["bytes"], *report["cost"]["work"]):
        if each["value"] is not None:
            size = text_of(each["value"], "plain" if each.get("unit") else "bytes")
            yield ("cost", each["what"]), f"{size} {each['unit']}".strip()
    for each in report["cost"]["traffic"]["purposes"]:
        both = f"{text_of(each['down'], 'bytes')} down, {text_of(each['up'], 'bytes')} up"
        yield ("cost", f"bytes, {each['purpose']}"), both
    yield ("how", "noise over sensitivity"), text_of(report["noise_multiplier"])
    yield ("how", "seed that was used"), text_of(report["seed"])
    for each in report["config"]:
        if each["key"] not in OF_NO_PROMISE:
            yield ("how", each["key"]), text_of(each["value"])
    for name, version in report["versions"].items():
        yield ("how", f"version of {name}"), version


def _measured(stamps: Fields) -> Iterator[tuple[tuple[str, str], str]]:
    """Yield the values of the audit, as `_values` does."""
    measurement: dict[str, Any] | None = stamps["measured"]
    yield ("measured", "verdict"), text_of(stamps["verdict"])
    if measurement is not None:
        size, low, high = (text_of(measurement[name], "decimal") for name in ("epsilon", "low", "high"))
        yield ("measured", "epsilon"), f"{size}, from {low} to {high}"
        yield ("measured", "could have shown"), text_of(stamps["ceiling"], "decimal")
