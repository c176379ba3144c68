"""Frontier of accuracy against bytes: a shipped task under the same epsilon, with updates and models whole and compressed.

``python -m fedveil.benchmarks.frontier --task mnist5k --epsilons 1 3 8 --down 8 4 --json FILE`` prints a row for each epsilon
and way of compressing. Bytes of a run are those that the tally of the simulation counts, by the encoders of link=grpc. Each
run is written to FILE as it ends; the same command again goes on where it stopped, and prints the table of what there is.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from ..configs.settings import settings_from_overrides
from ..privacy.mechanisms.packing import packed_size, width_of
from ..privacy.mechanisms.sum_spec import SumSpec, cells_for
from ..run.build import build
from ..simulations.simulate import run_simulation
from ..tasks.arrays import dimension_of
from .tables import Row, as_table, found_in, keep

KINDS, RATIOS = ("mask", "project"), (0.5, 0.25, 0.1)
Run = dict[str, Any]  # of one seed: kind, ratio, cells, down, epsilon, seed, accuracy, bytes_down, bytes_up


def main(argv: Sequence[str] | None = None) -> int:
    """Run what FILE lacks, seed by seed, and print the table."""
    parser = argparse.ArgumentParser("python -m fedveil.benchmarks.frontier", description=__doc__)
    parser.add_argument("--task", default="mnist5k")
    parser.add_argument("--epsilons", type=float, nargs="+", default=[1.0, 3.0, 8.0])
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--ratios", type=float, nargs="*", default=list(RATIOS))
    parser.add_argument("--cells", type=int, nargs="*", default=[], help="of a coarser grid, with project")
    parser.add_argument(
        "--down", nargs="*", default=[], help="values of compress.down, beside the whole model"
    )
    parser.add_argument("--seeds", type=int, default=5, help="from 0 on")
    parser.add_argument("--json", type=Path, metavar="FILE", required=True)
    parser.add_argument(
        "keys", nargs="*", metavar="KEY=VALUE", help="of fedveil simulate, beside task and epsilon"
    )
    given = parser.parse_args(argv)
    ways: list[tuple[str, float, int | None]] = [("none", 1.0, None)]
    for ratio in given.ratios:
        ways += [(kind, ratio, None) for kind in given.kinds] + [("project", ratio, c) for c in given.cells]
    fixed = [f"task={given.task}", *given.keys]
    found = found_in(given.json) | {"task": given.task, "keys": given.keys}
    runs: list[Run] = found["runs"]
    known = {_key(run) for run in runs}
    for seed in range(given.seeds):
        for epsilon in given.epsilons:
            for (kind, ratio, cells), down in product(ways, (None, *given.down)):
                way = {"kind": kind, "ratio": ratio, "cells": cells, "down": down}
                run: Run = {**way, "epsilon": epsilon, "seed": seed}
                if _key(run) not in known:
                    keep(found, run | _measured(fixed, run), given.json)
    print(as_table(rows_of(runs, _dimension(fixed))))
    return 0


def _key(run: Run) -> tuple[Any, ...]:
    return tuple(run.get(name) for name in ("kind", "ratio", "cells", "down", "epsilon", "seed"))


def _measured(fixed: Sequence[str], run: Run) -> dict[str, float]:
    """Return the accuracy of a run, and the bytes of all its instructions and replies."""
    way = [] if run["kind"] == "none" else [f"compress={run['kind']}", f"compress.ratio={run['ratio']}"]
    way += [] if run["cells"] is None else [f"compress.cells={run['cells']}"]
    way += [] if run["down"] is None else [f"compress.down={run['down']}"]
    settings = [*fixed, *way, f"privacy.target_epsilon={run['epsilon']}", f"seed={run['seed']}"]
    federation = build(settings_from_overrides([*settings, "audit=off"]))
    with tempfile.TemporaryDirectory() as folder:
        done = run_simulation(federation, Path(folder) / "run", quiet=True)
    if done.result["status"] != "completed":
        raise SystemExit(f"a run has not completed: {done.result['reason']}")
    down, up = (sum(each.values()) for each in (done.carried.down, done.carried.up))
    return {"accuracy": float(done.result["metrics"]["accuracy"]), "bytes_down": down, "bytes_up": up}


def rows_of(runs: Sequence[Run], dimension: int) -> list[Row]:
    """Return a row for each epsilon and way of compressing: mean, lowest and highest accuracy, and what is lost.

    Args:
      runs: of all seeds.
      dimension: of the model.
    """
    by_way: dict[tuple[float, float, str, int, str], list[Run]] = {}
    for run in runs:
        way = (run["epsilon"], -run["ratio"], run["kind"], run["cells"] or 0, run.get("down") or "")
        by_way.setdefault(way, []).append(run)
    accuracies = {way: [100 * run["accuracy"] for run in each] for way, each in by_way.items()}
    rows: list[Row] = []
    for way, found in sorted(accuracies.items()):
        epsilon, ratio, kind, cells, down = way
        whole = accuracies.get((epsilon, -1.0, "none", 0, ""), [])[: len(found)]
        kept = max(1, round(-ratio * dimension))
        width = width_of(SumSpec(1.0, cells=cells or cells_for(kept)))
        rows.append(
            {
                "epsilon": f"{epsilon:g}",
                "compress": kind
                + ("" if kind == "none" else f" {-ratio:g}")
                + (f", {cells} cells" if cells else "")
                + (f", down={down}" if down else ""),
                "bytes up": packed_size(kept, width) if width else 4 * kept,
                "MB down": _megabytes(by_way[way], "bytes_down"),
                "MB up": _megabytes(by_way[way], "bytes_up"),
                "accuracy": f"{statistics.mean(found):.2f}",
                "lowest to highest": f"{min(found):.1f} to {max(found):.1f}",
                "lost": f"{statistics.mean(whole) - statistics.mean(found):.2f}" if whole else None,
                "seeds": str(len(found)),
            }
        )
    return rows


def _megabytes(runs: Sequence[Run], direction: str) -> str | None:
    """Return the bytes of a run on average; None where a run of an earlier release has not counted them."""
    found = [run[direction] for run in runs if direction in run]
    return f"{statistics.mean(found) / 1e6:.2f}" if len(found) == len(runs) else None


def _dimension(fixed: Sequence[str]) -> int:
    return dimension_of(build(settings_from_overrides(list(fixed))).task)


if __name__ == "__main__":
    sys.exit(main())
