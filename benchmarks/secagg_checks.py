"""Cost of the checks of shares: rounds by this fedveil and by an earlier one that had none, in turns, in CPU time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from .engines import Options
from .secagg_case import Case
from .tables import Row, conditions, ratio, result_of

REAL = (Case(20, 19, 12, 10**6, 0.1), Case(100, 99, 56, 10**6, 0.05), Case(100, 20, 12, 10**6, 0.05))
MADE = (Case(300, 60, 40, 10**4, 0.05),)  # above 128 clients the graph is a ring
NOW = Path(__file__).parents[1]
_SCRIPT = Path(__file__).with_name("secagg_round.py")
_TIMEOUT_SECONDS = 900.0

Taken = dict[str, float]


def run_checks(options: Options) -> Row:
    """Measure rounds with the checks and, where an earlier checkout is given, without them."""
    before = conditions()
    tables = {
        "Rounds": [_row("real", case, options) for case in REAL],
        "The server alone, its clients made": [_row("made", case, options) for case in MADE],
    }
    notes = [
        f"CPU ms, the least in {options.repeats} processes of four rounds or more, the two versions in turns",
        "upload: a client's bytes beside its vector",
    ]
    return result_of("secagg_checks", before, tables, notes)


def _row(kind: str, case: Case, options: Options) -> Row:
    versions = {"now": NOW} if options.before is None else {"before": Path(options.before), "now": NOW}
    taken: dict[str, list[Taken]] = {name: [] for name in versions}
    for _ in range(options.repeats):
        for name, checkout in versions.items():
            taken[name].append(_round(checkout, kind, case))
    least = {name: _least(each) for name, each in taken.items()}
    row: Row = {
        "n": case.clients,
        "k": case.neighbours,
        "t": case.threshold,
        "d": case.coordinates,
        "drop": case.dropout,
    }
    for part in least["now"]:
        row |= {f"{part} {name}": round(each[part], 1) for name, each in least.items()}
        if "before" in least and part != "upload":
            row[f"{part} x"] = ratio(least["now"][part], least["before"][part])
    return row


def _least(taken: list[Taken]) -> Taken:
    return {part: min(each[part] for each in taken) for part in taken[0]}


def _round(checkout: Path, kind: str, case: Case) -> Taken:
    sizes = (case.clients, case.neighbours, case.threshold, case.coordinates, case.dropout)
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve().parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(_SCRIPT), kind, *map(str, sizes)]
    done = subprocess.run(
        command, check=False, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS
    )
    if done.returncode:
        raise RuntimeError(f"{checkout} failed:\n{done.stderr[-1000:]}")
    return json.loads(done.stdout.splitlines()[-1])
