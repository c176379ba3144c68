"""Tuning by arms against the best fixed value: accuracy at the same epsilon, and that epsilon by the independent recomputation.

``python -m fedveil.benchmarks.tuning --json FILE`` trains a task with each value alone and with arms that try all of them, seed
by seed, and prints the table. Each run is written to FILE as it ends; the same command again goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..configs.settings import settings_from_overrides
from ..evidence.binding.recompute_ledger import main as recomputed
from ..privacy.budget import Adversary
from ..run.build import build
from ..simulations.simulate import run_simulation
from .tables import Row, as_table, found_in, keep

# Of one seed: value, or rounds of each arm; accuracy, epsilon, and of arms the winner and the scores.
Run = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run what FILE lacks, seed by seed, and print the table."""
    parser = argparse.ArgumentParser("python -m fedveil.benchmarks.tuning", description=__doc__)
    parser.add_argument("--values", type=float, nargs="+", default=[1.0, 5.0, 20.0, 80.0])
    parser.add_argument("--rounds", type=int, nargs="*", default=[20], help="of each arm")
    parser.add_argument(
        "--scores", nargs="+", choices=("public", "clients"), default=["public"], help="of arms"
    )
    parser.add_argument("--seeds", type=int, default=5, help="from 0 on")
    parser.add_argument("--json", type=Path, metavar="FILE", required=True)
    parser.add_argument("keys", nargs="*", metavar="KEY=VALUE", help="of fedveil simulate, beside the rate")
    given = parser.parse_args(argv)
    found = found_in(given.json) | {"keys": given.keys, "values": given.values}
    runs: list[Run] = found["runs"]
    ways: list[Run] = [{"value": value} for value in given.values]
    ways += [{"rounds": rounds, "score": score} for rounds in given.rounds for score in given.scores]
    known = {_key(run) for run in runs}
    for seed in range(given.seeds):
        for way in ways:
            run = way | {"seed": seed}
            if _key(run) not in known:
                told = _outcome([*given.keys, f"seed={seed}"], way, given.values)
                keep(found, run | told, given.json)
    print(as_table(rows_of(runs)))
    return 0


def _key(run: Run) -> tuple[Any, ...]:
    score = run.get("score", "public") if "rounds" in run else None
    return (run.get("value"), run.get("rounds"), score, run["seed"])


def _outcome(fixed: Sequence[str], way: Run, values: Sequence[float]) -> Run:
    if "value" in way:
        asked = [f"learning_rate={way['value']}"]
    else:
        asked = ["tune=learning_rate", f"tune.values={list(values)}", f"tune.rounds={way['rounds']}"]
        asked.append(f"tune.score={way['score']}")
    federation = build(settings_from_overrides([*fixed, *asked, "audit=off"]))
    with tempfile.TemporaryDirectory() as folder:
        result = run_simulation(federation, Path(folder) / "run", quiet=True).result
        epsilon = recomputed(result["ledger"])[str(Adversary.MODEL)]["epsilon"]
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    if result["status"] != "completed":
        raise SystemExit(f"a run has not completed: {result['reason']}")
    told: Run = {"accuracy": float(result["metrics"]["accuracy"]), "epsilon": epsilon}
    if result["tuning"] is not None:
        rows = [json.loads(line) for line in lines]
        arms = range(1, len(values) + 1)
        curves = [[row["accuracy"] for row in rows if row.get("arm") == arm] for arm in arms]
        told |= {"winner": result["tuning"]["value"], "curves": curves}
        told["arms"] = result["tuning"]["arms"]
    return told


def rows_of(runs: Sequence[Run]) -> list[Row]:
    """Return a row for each fixed value and each number of an arm's rounds: accuracy, and what is lost to the best value.

    Args:
      runs: of all seeds.
    """
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(_key(run)[:3], []).append(run)
    means = {way: statistics.fmean(run["accuracy"] for run in each) for way, each in groups.items()}
    best = max(mean for (value, *_), mean in means.items() if value is not None)
    return [
        {
            "way": f"rate {way[0]:g}" if way[0] is not None else f"arms, {way[1]} rounds, {way[2]}",
            "accuracy": round(100 * means[way], 2),
            "lowest": round(100 * min(run["accuracy"] for run in each), 1),
            "lost": round(100 * (best - means[way]), 2),
            "epsilon": f"{max(run['epsilon'] for run in each):.9f}",
            "chosen": " ".join(f"{run['winner']:g}" for run in each if "winner" in run),
            "seeds": len(each),
        }
        for way, each in groups.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
