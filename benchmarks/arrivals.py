"""Virtual time to an accuracy with clients of uneven speed: cohorts of the first that answer, beside drawn ones.

``python -m fedveil.benchmarks.arrivals --json FILE`` runs what FILE lacks and prints the table of docs/evidence/accuracy.md. Times are
virtual: 1 is the median client's. Each arm has the same rounds, epsilon and expected cohort.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from ..configs.settings import settings_from_overrides
from ..simulations.simulate import simulate
from .tables import as_table

CLIENTS, SIZE, ROUNDS = 300, 30, 100
COMMON = (
    f"task.num_clients={CLIENTS}",
    f"num_rounds={ROUNDS}",
    *("speed.sigma=1", "speed.slow=0.1", "speed.slow_factor=10", "audit=off"),
)
RATE = f"cohort.rate={SIZE / CLIENTS}"
FIRST = ("cohort=first", f"cohort.size={SIZE}")
SEPARATED = ("cohort=min_separation", f"cohort.size={SIZE}")
CORRELATED = "privacy.noise=correlated"
ARMS: dict[str, tuple[str, ...]] = {
    "`poisson`, waits for all": (RATE,),
    "`poisson`, 1.3 times, deadline 3": (RATE, "cohort.over_selection=1.3", "speed.deadline=3"),
    "`poisson`, twice, deadline 1": (RATE, "cohort.over_selection=2", "speed.deadline=1"),
    "`fixed`, 1.3 times, deadline 3": (
        "cohort=fixed",
        f"cohort.size={SIZE}",
        "cohort.over_selection=1.3",
        "speed.deadline=3",
    ),
    "`min_separation`, correlated, waits for all": (*SEPARATED, CORRELATED),
    "`first`, `staleness=0`": (*FIRST, "cohort.staleness=0"),
    "`first`": FIRST,
    "`first`, correlated": (*FIRST, CORRELATED),
    "`first`, twice, correlated": (*FIRST, "cohort.over_selection=2", CORRELATED),
    "`first`, twice, `separation=4`, correlated": (
        *FIRST,
        "cohort.over_selection=2",
        "cohort.separation=4",
        CORRELATED,
    ),
}
Run = dict[str, Any]  # arm, epsilon, seed, times and accuracies of all rounds


def main(argv: Sequence[str] | None = None) -> int:
    """Run what FILE lacks and print the table."""
    parser = argparse.ArgumentParser("python -m fedveil.benchmarks.arrivals")
    parser.add_argument("--task", default="mnist5k")
    parser.add_argument("--goal", type=float, default=0.9, help="accuracy, in (0, 1)")
    parser.add_argument("--seeds", type=int, default=2, help="from 0 on")
    parser.add_argument("--json", type=Path, metavar="FILE", required=True)
    options = parser.parse_args(argv)
    runs: list[Run] = json.loads(options.json.read_text()) if options.json.exists() else []
    done = {(run["arm"], run["epsilon"], run["seed"]) for run in runs}
    cases = [(arm, epsilon, seed) for epsilon in (3, 8) for seed in range(options.seeds) for arm in ARMS]
    for arm, epsilon, seed in cases:
        if (arm, epsilon, seed) not in done:
            runs.append(measured(options.task, arm, epsilon, seed))
            options.json.write_text(json.dumps(runs))
            print(arm, epsilon, seed, summary(runs[-1:], options.goal), file=sys.stderr, flush=True)
    print(as_table([row(runs, arm, options.goal) for arm in ARMS]))
    return 0


def measured(task: str, arm: str, epsilon: int, seed: int) -> Run:
    """Return the times and accuracies of one run's rounds."""
    argv = [f"task={task}", *COMMON, *ARMS[arm], f"privacy.target_epsilon={epsilon}", f"seed={seed}"]
    with tempfile.TemporaryDirectory() as folder:
        rows = (
            simulate(settings_from_overrides(argv), Path(folder) / "run", quiet=True).folder / "metrics.jsonl"
        )
        lines = [json.loads(line) for line in rows.read_text().splitlines()]
    times, accuracies = ([line[name] for line in lines] for name in ("virtual_time", "accuracy"))
    return {"arm": arm, "epsilon": epsilon, "seed": seed, "times": times, "accuracies": accuracies}


def row(runs: Sequence[Run], arm: str, goal: float) -> dict[str, str]:
    """Return the row of one arm."""
    cells = {"cohort": arm}
    time = ""
    for epsilon in (3, 8):
        of_arm = [run for run in runs if (run["arm"], run["epsilon"]) == (arm, epsilon)]
        reached, accuracy, time = summary(of_arm, goal)
        cells |= {f"epsilon {epsilon}: to {goal:.0%}": reached, f"epsilon {epsilon}: accuracy": accuracy}
    return {**cells, "all rounds": time}


def summary(runs: Sequence[Run], goal: float) -> tuple[str, str, str]:
    """Return the mean time to a goal, the accuracy of the last ten rounds, and the time of all rounds, over seeds."""
    reached = [time for run in runs if (time := time_to(run, goal)) is not None]
    mean = f"{statistics.fmean(reached):.0f}" if len(reached) == len(runs) else "never"
    last = statistics.fmean(statistics.fmean(run["accuracies"][-10:]) for run in runs)
    return mean, f"{last:.1%}", f"{statistics.fmean(sum(run['times']) for run in runs):.0f}"


def time_to(run: Run, goal: float) -> float | None:
    """Return the virtual time after which a run first has this accuracy; None if it never has."""
    passed = accumulate(run["times"])
    return next((time for time, each in zip(passed, run["accuracies"], strict=True) if each >= goal), None)


if __name__ == "__main__":
    sys.exit(main())
