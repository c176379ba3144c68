"""Results as they are written down: one JSON object, and the same rows as a table."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
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


def spread(values: Sequence[float]) -> float:
    """Return how far the values lie apart, in percent of their median."""
    return float(f"{100 * (max(values) - min(values)) / statistics.median(values):.2g}")


def ratio(one: float | None, other: float | None) -> float | None:
    """Return one / other, or None where either was not measured."""
    return float(f"{one / other:.3g}") if one is not None and other else None


def as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as a Markdown table, with the first row's keys as its columns."""
    if not rows:
        return "(nothing was measured)"
    columns = list(rows[0])
    cells = [columns, *[[spelled(row.get(column)) for column in columns] for row in rows]]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    lines = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def wide(rows: Sequence[Row], keys: Sequence[str], by: str, values: Sequence[str]) -> list[Row]:
    """Return one row for the rows that have the same keys, with their values beside each other.

    Args:
      rows: of a long table.
      keys: columns that stay.
      by: column whose cells name the new columns, after the name of the value if there are several.
      values: columns of which each new one has one.
    """
    joined: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        line = joined.setdefault(tuple(row[key] for key in keys), {key: row[key] for key in keys})
        for value in values:
            line[f"{value} {row[by]}" if len(values) > 1 else str(row[by])] = row.get(value)
    return list(joined.values())


def spelled(value: object) -> str:
    """Return a value as a cell of a table has it."""
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) and value < 1000 else str(value)


def tables_of(results: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the tables of some results by title, the rows of one title behind each other."""
    titles = dict.fromkeys(title for result in results for title in result["tables"])
    return {title: [row for result in results for row in result["tables"].get(title, [])] for title in titles}


def load_of(results: Sequence[Row]) -> str:
    """Return the load averages of some results as one sentence."""
    loads = [f"{each['conditions']['load_before']} before and {each['load_after']} after" for each in results]
    return f"Load average {'; '.join(loads)}, on {results[0]['conditions']['cores']} cores."


def as_markdown(results: Sequence[Row]) -> str:
    """Return some results as they stand on the page of the benchmarks: the load, the tables, the notes."""
    parts = [load_of(results)]
    parts += [f"**{title}**\n\n{as_table(rows)}" for title, rows in tables_of(results).items()]
    notes = dict.fromkeys(note for result in results for note in result["notes"])
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in notes)])


def found_in(path: Path) -> Row:
    """Return what an interrupted benchmark has written, or the conditions of one that begins; `runs` lists its runs.

    Args:
      path: of its JSON file.
    """
    found: Row = json.loads(path.read_text()) if path.is_file() else {"conditions": conditions()}
    return {"runs": [], **found}


def keep(found: Row, run: Row, path: Path) -> None:
    """Add a run to what was found, write that down, and show the run.

    Args:
      found: as `found_in` returns it; changed in place.
      run: that has ended.
      path: of the JSON file.
    """
    found["runs"].append(run)
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(run, file=sys.stderr, flush=True)


def publish(result: Row, path: Path | None) -> None:
    """Print the result as Markdown, and write it as JSON.

    Args:
      result: as `result_of` returns it.
      path: of the JSON file; None writes none.
    """
    print(as_markdown([result]))
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
