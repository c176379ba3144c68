"""Picture of a run, curve.svg: the held-out metric and epsilon by round and, with a guarantee, epsilon by delta."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..base.charts import Caption, Chart, Line, Mark, document
from ..base.durable_files import replace_file
from ..configs.round_line import AT_CLIENTS, main_metric

Rows = Iterable[Mapping[str, Any]]
LOOKS = {
    "client": "epsilon",
    "record": "epsilon record",
}  # classes of the style sheet, by the unit that has a line


@dataclass(frozen=True)
class Picture:
    """Picture as an SVG document, which a notebook shows.

    Attributes:
        svg: text of the document.
    """

    svg: str = field(repr=False)

    def save(self, path: Path | str) -> None:
        """Write the document to a file."""
        replace_file(Path(path), self.svg.encode(), mode=None)

    def _repr_svg_(self) -> str:
        return self.svg


def curve(history: Rows, privacy: Rows, title: str) -> Picture | None:
    """Return the picture of a run; None if no round has a figure.

    Args:
        history: lines of metrics.jsonl.
        privacy: as in result.json.
        title: above the charts.
    """
    charts = [*_metric(history), *_epsilon(history), *_deltas(privacy)]
    return Picture(document(title, charts)) if charts else None


def _metric(history: Rows) -> list[Chart]:
    """Return the chart of the main metric on held-out data or, without any, of the first that clients measured."""
    held_out = main_metric(history)
    at_clients = (key for row in history for key in row if key.startswith(AT_CLIENTS))
    name = held_out or next(at_clients, None)
    points = [(row["round"], row[name]) for row in history if _is_finite(row.get(name))] if name else []
    if not points:
        return []
    title = f"held-out {held_out}" if held_out else str(name)
    values = [value for _, value in points]
    top = 1.0 if min(values) >= 0 and max(values) <= 1 else None
    bottom = min(0.0, *values)
    marks = [Mark(*points[-1], "accuracy", Caption(f"{values[-1]:.4g}"))]
    lines = [Line(points, "accuracy")]
    return [Chart("metric", title, "round", title, lines, marks=marks, top=top, bottom=bottom, whole=True)]


def _epsilon(history: Rows) -> list[Chart]:
    """Return the chart of the epsilon of each unit with a guarantee in every round; nothing without any."""
    curves: dict[str, list[tuple[int, Any]]] = {
        unit: [(row["round"], row.get(f"epsilon_{unit}")) for row in history] for unit in LOOKS
    }
    finite = {unit: points for unit, points in curves.items() if _is_finite(*(each for _, each in points))}
    if not finite:
        return []
    lines = [Line(points, LOOKS[unit]) for unit, points in finite.items()]
    marks = [
        Mark(*points[-1], LOOKS[unit], Caption(f"{_rounded_up(points[-1][1])} of one {unit}"))
        for unit, points in finite.items()
    ]
    return [Chart("epsilon", "epsilon spent", "round", "epsilon spent", lines, marks=marks, whole=True)]


def _deltas(privacy: Rows) -> list[Chart]:
    """Return the chart of epsilon by delta, a line for each unit with a guarantee in the model; nothing without any."""
    rows = {row["unit"]: row for row in privacy if row["adversary"] == "model" and row.get("curve")}
    drawn = {unit: row for unit, row in rows.items() if unit in LOOKS}
    if not drawn:
        return []
    lines = [
        Line([(delta, float(each)) for delta, each in row["curve"]["epsilon"]], LOOKS[unit])
        for unit, row in drawn.items()
    ]
    marks = [
        Mark(
            row["delta"], row["epsilon"], LOOKS[unit], Caption(_rounded_up(row["epsilon"])), position="right"
        )
        for unit, row in drawn.items()
    ]
    title = "the guarantee at every delta"
    return [Chart("deltas", title, "delta", "epsilon", lines, marks=marks, logarithmic=True)]


def _rounded_up(epsilon: float) -> str:
    return f"{math.ceil(round(1000 * epsilon, 6)) / 1000:.3f}"


def _is_finite(*values: object) -> bool:
    """Return whether there are values, and all are finite numbers."""
    return bool(values) and all(isinstance(each, int | float) and math.isfinite(each) for each in values)
