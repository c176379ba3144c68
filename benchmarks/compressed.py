"""Accuracy that compression may cost: every case of the frontier that has a bound, five seeds each, beside that bound.

``python -m fedveil.benchmarks.compressed --folder FOLDER`` runs the frontier for each case, with a JSON file each, and
prints what the better kind loses beside what it may. The same command again goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import frontier
from .tables import Row, as_table

Run = dict[str, Any]  # as the frontier keeps it
WHOLE = "none"


@dataclass(frozen=True)
class Case:
    """A task under one or several epsilons at one ratio, and how many points of accuracy it may lose.

    Attributes:
      task: of the shipped ones, or custom.
      epsilons: at each of which the bound holds.
      ratio: of the coordinates that are sent.
      points: of accuracy that may be lost.
      keys: of `fedveil simulate`, beside these.
    """

    task: str
    epsilons: tuple[float, ...]
    ratio: float
    points: float
    keys: tuple[str, ...] = ()


CNN = (
    "task.target=fedveil.benchmarks.digits_cnn:load",
    "allow_modules=[fedveil.benchmarks.digits_cnn]",
    "privacy=record_distributed",
    "num_rounds=150",
    "learning_rate=0.5",
)
SHIPPED = ("mnist5k", "fashion_mnist")
CASES: Mapping[str, tuple[Case, ...]] = {
    **{
        task: (
            Case(task, (3.0, 8.0), 0.25, 0.3),
            Case(task, (1.0,), 0.25, 1.0),
            Case(task, (3.0,), 0.1, 0.6),
        )
        for task in SHIPPED
    },
    "cnn-100k": (Case("custom", (3.0,), 0.25, 0.5, CNN),),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the folder lacks and print the table; 1 where a case loses more than it may."""
    parser = argparse.ArgumentParser("python -m fedveil.benchmarks.compressed", description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seeds", type=int, default=5, help="from 0 on")
    parser.add_argument("--folder", type=Path, required=True, help="of a JSON file for each case")
    given = parser.parse_args(argv)
    given.folder.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for name in given.cases:
        file = given.folder / f"{name}.json"
        for case in CASES[name]:
            asked = ["--task", case.task, "--epsilons", *map(str, case.epsilons)]
            size = ["--ratios", str(case.ratio), "--seeds", str(given.seeds), "--json", str(file)]
            frontier.main([*asked, *size, *case.keys])
            rows += rows_of(name, case, json.loads(file.read_text())["runs"])
    print(as_table(rows))
    return int(any(not row["within"] for row in rows))


def rows_of(name: str, case: Case, runs: Sequence[Run]) -> Iterator[Row]:
    """Yield a row for each epsilon and kind of a case: mean accuracies, what is lost, and what may be.

    Args:
      name: of the case.
      case: with the bound.
      runs: of the frontier, all seeds.
    """
    for epsilon in case.epsilons:
        whole = _accuracies(runs, epsilon, WHOLE, 1.0)
        for kind in frontier.KINDS:
            found = _accuracies(runs, epsilon, kind, case.ratio)
            seeds = sorted(whole.keys() & found.keys())
            if not seeds:
                continue
            before, after = (100 * statistics.fmean(each[seed] for seed in seeds) for each in (whole, found))
            yield {
                "case": name,
                "epsilon": f"{epsilon:g}",
                "compress": f"{kind} {case.ratio:g}",
                "whole": round(before, 2),
                "compressed": round(after, 2),
                "lost": round(before - after, 2),
                "may lose": case.points,
                "within": before - after <= case.points,
                "seeds": len(seeds),
            }


def _accuracies(runs: Sequence[Run], epsilon: float, kind: str, ratio: float) -> dict[int, float]:
    wanted = (epsilon, kind, ratio)
    plain = [run for run in runs if not run["cells"] and not run.get("down")]
    return {
        run["seed"]: run["accuracy"] for run in plain if (run["epsilon"], run["kind"], run["ratio"]) == wanted
    }


if __name__ == "__main__":
    sys.exit(main())
