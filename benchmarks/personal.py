"""Personal models against the released one and models of one client alone: three figures by partition and privacy.

``python -m fedveil.benchmarks.personal --json FILE`` trains digits on 100 clients, seed by seed, and prints the table. Each run is
written to FILE as it ends; the same command again goes on where it stopped. Further words are keys of fedveil simulate, such as
``personal=ditto``, or with ``--columns natural/none`` those of another task: ``task=heart``. ``--hospitals FOLDER`` writes the
tables of five hospitals that differ, for ``task=csv``.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..configs.settings import settings_from_overrides
from ..run.build import build
from ..simulations.simulate import run_simulation
from .tables import Row, as_table, found_in, keep

PARTITIONS = {
    "shards": ["partition=shards"],
    "dirichlet .3": ["partition=dirichlet", "partition.alpha=0.3"],
    "dirichlet .1": ["partition=dirichlet", "partition.alpha=0.1"],
    "iid": ["partition=iid"],
    "natural": ["partition=natural"],
}
PRIVACY = {
    "none": ["privacy=none"],
    **{
        f"epsilon {epsilon}": [
            "privacy=client_central",
            f"privacy.target_epsilon={epsilon}",
            "privacy.target_delta=1e-3",
            "privacy.allow_large_delta=true",
        ]
        for epsilon in (3, 8)
    },
}
COLUMNS = [f"{partition}/{privacy}" for partition in [*PARTITIONS][:4] for privacy in PRIVACY]
DIGITS = [
    *("task=digits", "task.num_clients=100", "cohort=all", "num_rounds=60", "local_epochs=5"),
    *("learning_rate=1.0", f"task.model={__name__}:Perceptron", f"allow_modules=[{__name__}]"),
]
NAMES = ("shared", "personal", "local_only")
HOSPITALS, PATIENTS = 5, 300
SCHEMA = """\
label: outcome
columns:
  age: {low: 20, high: 90}
  pressure: {low: 80, high: 200}
  marker: {low: 0, high: 10}
  outcome: {categories: [died, lived]}
"""


def write_hospitals(folder: Path) -> None:
    """Write a schema and tables of hospitals at which the same measurements mean different things into a new folder."""
    rows = np.random.default_rng(7)
    folder.mkdir()
    (folder / "schema.yaml").write_text(SCHEMA)
    for hospital in range(HOSPITALS):
        slopes = rows.normal([1.0, 0.5, 0.0], [0.3, 0.5, 1.5])  # of the hospital's own device and patients
        values = rows.normal(size=(PATIENTS, 3))
        chances = 1 / (1 + np.exp(-2 * (values @ slopes) - rows.normal()))
        died = rows.random(PATIENTS) < chances
        inputs = (values * (12, 18, 1.5) + (55, 130, 5)).clip((20, 80, 0), (90, 200, 10))
        with (folder / f"hospital-{hospital}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["age", "pressure", "marker", "outcome"])
            for line, outcome in zip(inputs, died, strict=True):
                writer.writerow([*(f"{value:.2f}" for value in line), ("lived", "died")[int(outcome)]])


class Perceptron(nn.Sequential):
    """Digits' inputs, 32 hidden units, 10 classes; the same values at every call."""

    def __init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            super().__init__(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def main(argv: Sequence[str] | None = None) -> int:
    """Run what FILE lacks, seed by seed, and print the table."""
    parser = argparse.ArgumentParser("python -m fedveil.benchmarks.personal", description=__doc__)
    parser.add_argument("--columns", nargs="+", default=COLUMNS, metavar="PARTITION/PRIVACY")
    parser.add_argument("--seeds", type=int, default=5, help="from 0 on")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--hospitals", type=Path, metavar="FOLDER")
    parser.add_argument("keys", nargs="*", metavar="KEY=VALUE", help="of fedveil simulate")
    arguments = parser.parse_args(argv)
    if arguments.hospitals:
        write_hospitals(arguments.hospitals)
        return 0
    if not arguments.json:
        parser.error("name a FILE with --json")
    keys = (
        arguments.keys if any(key.startswith("task=") for key in arguments.keys) else DIGITS + arguments.keys
    )
    results = found_in(arguments.json) | {"keys": keys}
    finished = {(run["column"], run["seed"]) for run in results["runs"]}
    for seed in range(arguments.seeds):
        for column in arguments.columns:
            if (column, seed) not in finished:
                keep(results, _run(column, seed, keys), arguments.json)
    print(as_table(rows_of(results["runs"])))
    return 0


def _run(column: str, seed: int, keys: Sequence[str]) -> Row:
    """Return the metrics of one run on the clients' own rows, and how many clients chose which model."""
    partition, _, privacy = column.partition("/")
    way = [*PARTITIONS[partition], *PRIVACY[privacy], "personal=after", "audit=off", f"seed={seed}"]
    if privacy == "none" or any(key.startswith("privacy=") for key in keys):
        way = [key for key in way if not key.startswith("privacy.")]
    federation = build(settings_from_overrides([*way, *keys]))
    with tempfile.TemporaryDirectory() as folder:
        result = run_simulation(federation, Path(folder) / "run", quiet=True).result
    if result["status"] != "completed":
        raise SystemExit(f"a run has not completed: {result['reason']}")
    metrics = {name: result["metrics"][f"{name}/accuracy"] for name in NAMES}
    return {"column": column, "seed": seed, **metrics, "clients": result["personal"]["clients"]}


def rows_of(runs: Sequence[Row]) -> list[Row]:
    """Return a row for each column: mean accuracy of the three models over the seeds in percent, and what is gained or lost.

    Args:
      runs: of all seeds.
    """
    groups: dict[str, list[Row]] = {}
    for run in runs:
        groups.setdefault(run["column"], []).append(run)
    return [_row(column, each) for column, each in groups.items()]


def _row(column: str, runs: Sequence[Row]) -> Row:
    means: dict[str, Any] = {name: 100 * statistics.fmean(run[name] for run in runs) for name in NAMES}
    gain = means["personal"] - max(means["shared"], means["local_only"])
    rounded = {name: round(value, 1) for name, value in means.items()}
    return {"column": column, **rounded, "personal - best": round(gain, 1), "seeds": len(runs)}


if __name__ == "__main__":
    sys.exit(main())
