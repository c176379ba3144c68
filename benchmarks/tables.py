"""Results as they are written down: one JSON object, and the same rows as a table."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Row = dict[str, Any]

_PACKAGES = ("fedveil", "flwr", "ray", "torch", "numpy")


def conditions() -> Row:
    """Return what a figure must be read with: the machine's size, its load before the run, and the versions."""
    return {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "load_before": round(os.getloadavg()[0], 2),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def median(values: Sequence[float]) -> float:
    """Return the median, rounded to what was measured."""
    return float(f"{statistics.median(values):.4g}")


def ratio(one: float | None, other: float | None) -> float | None:
    """Return one / other, or None where either was not measured."""
    return float(f"{one / other:.3g}") if one is not None and other else None


def as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as a Markdown table, with the first row's keys as its columns."""
    if not rows:
        return "(nothing was measured)"
    columns = list(rows[0])
    cells = [columns, *[[_spelled(row.get(column)) for column in columns] for row in rows]]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def _spelled(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) and value < 1000 else str(value)


def publish(result: Row, path: Path | None) -> None:
    """Print the result's tables, and write it as JSON.

    Args:
      result: as `result_of` returns it.
      path: of the JSON file; None writes none.
    """
    for title, rows in result["tables"].items():
        print(f"{title}\n{as_table(rows)}\n")
    for note in result["notes"]:
        print(note)
    print(f"load before {result['conditions']['load_before']}, after {result['load_after']}")
    if path is not None:
        path.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")


def result_of(benchmark: str, before: Row, tables: Mapping[str, Sequence[Row]], notes: Sequence[str]) -> Row:
    """Return one benchmark's result, ready for `publish`.

    Args:
      benchmark: its name.
      before: the conditions as it began.
      tables: rows by title.
      notes: lines that are printed below the tables.
    """
    return {
        "benchmark": benchmark,
        "conditions": before,
        "load_after": round(os.getloadavg()[0], 2),
        "tables": {title: list(rows) for title, rows in tables.items()},
        "notes": list(notes),
    }
