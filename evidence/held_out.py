"""Figures of a released model with intervals for its page: on public held-out rows, and of its coefficients."""

from __future__ import annotations

from typing import Any

from ..base.charts import Chart, Line, Mark, Whisker
from ..run.run_files import Fields, RunFiles

Band = tuple[float, float, float] | None  # estimate, low and high of what a bin adds; None where unsaid
MAX_COEFFICIENTS = 40  # on the page; the JSON has all of them


def intervals_of(run: RunFiles) -> dict[str, Any]:
    """Return the fields `held_out` and `coefficients` of a run's report; without those that its result lacks."""
    names = {"held_out": "held_out", "coefficients": "intervals"}
    return {name: run.result[key] for name, key in names.items() if key in run.result}


def reliability(report: Fields) -> Chart | None:
    """Return the share of hits by predicted probability, with intervals, beside equality; None without such figures."""
    fields: Fields = report.get("held_out", {}).get("reliability", {})
    bins: list[Fields] = fields.get("bins", [])
    if not bins:
        return None
    points = [(each["predicted"], each["observed"]) for each in bins]
    intervals = [Whisker(each["predicted"], each["low"], each["high"], "measured") for each in bins]
    lines = [Line([(0.0, 0.0), (1.0, 1.0)], "plan"), Line(points, "accuracy")]
    marks = [Mark(*point, "measured") for point in points]
    title = f"Share of public rows that are {fields['of']}, by predicted probability"
    across, up = "predicted probability", "share of rows"
    return Chart("chart-reliability", title, across, up, lines, intervals, marks, top=1.0, shares=True)


def bands(report: Fields, shape: Fields) -> list[Band]:
    """Return estimate, low and high of what each bin of a number adds, as a shape of the report is shifted; None where unsaid.

    A shape sums to 0 over its declared bins, and the coefficients over those that public rows have.

    Args:
      report: with `coefficients`.
      shape: one of its `shapes`.
    """
    rows = [
        each
        for each in report.get("coefficients", {}).get("coefficients", [])
        if each["column"] == shape["column"] and each["score"] == shape["score"] and each["of"] != "missing"
    ]
    if len(rows) != len(shape["values"]):
        return []
    present = [value for value, each in zip(shape["values"], rows, strict=True) if each["value"] is not None]
    shift = sum(present) / len(present) if present else 0.0
    return [
        None if each["value"] is None else (each["value"] + shift, each["low"] + shift, each["high"] + shift)
        for each in rows
    ]
