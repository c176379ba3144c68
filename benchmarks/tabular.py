"""Real tables under privacy: `task=csv` beside central libraries, with and without privacy, on the same rows.

``python -m fedveil.benchmarks.tabular --json FILE --peers PYTHON`` trains each contender on each table, seed by seed, and prints
one table of means: area under the ROC curve (macro, one against the rest), R2 of a number, concordance of a time. Each figure
is written to FILE as it comes; the same command again goes on where it stopped. PYTHON is that of an environment with
``benchmarks/tabular_peers.txt``: ``uv venv peers && uv pip install --python peers -r benchmarks/tabular_peers.txt``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
import yaml

from ..face import FinishedRun, simulate
from ..run.released import task_of
from ..tasks.table_files import read_columns, read_rows
from ..tasks.table_schema import Schema, read_schema
from ..tasks.tables import tables_of
from .sources import SOURCES, schema_file, write_split
from .tables import Row, as_table, found_in, keep

# Delta as in the literature. 1e-5 of 114 825 rows of census is more than 1, which fedveil otherwise refuses.
LEVEL = {"target_delta": 1e-5, "allow_large_delta": True}
NONE = "none"
EPSILONS = ("1", "3", "8", NONE)
MARGIN = 0.003  # below the best central DP method at which a figure still counts as equal (issue 34)
LONGEST = 100_000  # rounds: the model is measured and saved at the end alone

# Our models: keys of the task, and the mode under privacy.
OURS: dict[str, tuple[dict[str, object], str]] = {
    "ours": ({}, "record_distributed"),
    "ours, linear": ({"model": "linear"}, "record_distributed"),
    "ours, gam": ({"model": "gam"}, "record_distributed"),
    "ours, noise apart": ({}, "record"),
}
PRIVATE_PEERS = ("DP-EBM", "DP linear", "AdaSSP")
OTHER_PEERS = ("LightGBM", "XGBoost", "EBM", "linear", "Cox")
CONTENDERS = (*OURS, *PRIVATE_PEERS, *OTHER_PEERS)


@dataclass(frozen=True)
class Cell:
    """One figure that is measured: a contender on one split of a table, with epsilon as a word."""

    table: str
    seed: int
    contender: str
    epsilon: str

    def row(self, **figures: object) -> Row:
        """Return the cell with its figures, as it is written down."""
        return {**vars(self), **figures}


def cells(
    tables: Iterable[str], seeds: int, contenders: Iterable[str], epsilons: Iterable[str]
) -> Iterator[Cell]:
    """Yield what there is to measure, all tables of a seed before the next: contenders with privacy at each epsilon."""
    names, levels = list(contenders), list(epsilons)
    for seed in range(seeds):
        for table in tables:
            for name in names:
                for epsilon in levels:
                    private = epsilon != NONE
                    if not (name in OTHER_PEERS and private) and (
                        private or name not in (*PRIVATE_PEERS, "ours, noise apart")
                    ):
                        yield Cell(table, seed, name, epsilon)


def our_figure(cell: Cell, folder: Path) -> Row:
    """Return what a model of ours reaches on the split in a folder, and the CPU seconds of it."""
    keys, mode = OURS[cell.contender]
    privacy = {**LEVEL, "name": mode, "target_epsilon": float(cell.epsilon)} if cell.epsilon != NONE else NONE
    files = {"folder": str(folder / "sites"), "held_out_file": str(folder / "held_out.csv")}
    task = {"name": "csv", "simulated": True, "schema": str(schema_file(cell.table)), **files, **keys}
    began = time.process_time()
    run = simulate(
        task,
        privacy=privacy,
        seed=cell.seed,
        quiet=True,
        audit="off",
        measure_every=LONGEST,
        checkpoint_every=LONGEST,
    )
    if run.status != "completed":
        return cell.row(reason=str(run.result["reason"]))
    seconds = round(time.process_time() - began, 1)
    return cell.row(value=_value(run, folder / "held_out.csv"), seconds=seconds, model=_model_of(run))


def _model_of(run: FinishedRun) -> str:
    task = yaml.safe_load((run.folder / "config.yaml").read_text())["task"]
    return f"{task['model']}, {task['bins']} bins" if task["model"] == "gam" else str(task["model"])


def _value(run: FinishedRun, held_out: Path) -> float:
    """Return concordance, R2 or area of a run; of several classes the mean of each against the rest."""
    for name in ("concordance", "r2", "auc"):
        if name in run.metrics:
            return run.metrics[name]
    task = tables_of(task_of(run.folder))
    with torch.no_grad():
        chances = run.model(task.encode(str(held_out))).softmax(1).double()
    targets = read_rows(held_out, task.schema).targets
    chances /= chances.sum(1, keepdim=True)
    return float(import_module("sklearn.metrics").roc_auc_score(targets, chances.numpy(), multi_class="ovr"))


def write_for_peers(table: str, folder: Path) -> Path:
    """Write the split in a folder as `tabular_peers` reads it, and return the folder of that."""
    schema, target = read_schema(schema_file(table)), folder / "peers"
    target.mkdir()
    pandas, arrays = import_module("pandas"), dict[str, object]()
    for part, path in (("train", folder / "sites"), ("test", folder / "held_out.csv")):
        columns = read_columns(path, schema)
        rows = read_rows(path, schema)
        arrays |= {f"{part}_inputs": rows.inputs, f"{part}_targets": rows.targets}
        frame = {column.name: columns[column.name] for column in schema.inputs}
        pandas.DataFrame(frame).to_csv(target / f"{part}.csv", index=False)
    np.savez(target / "inputs.npz", **arrays)  # pyright: ignore[reportArgumentType]
    described = [
        {"name": column.name, "low": column.low, "high": column.high, "words": column.words}
        for column in schema.inputs
    ]
    (target / "columns.json").write_text(json.dumps({"kind": _kind(schema), "columns": described}))
    return target


def _kind(schema: Schema) -> str:
    return str(schema.outcome.keys.get("kind") or ("classes" if schema.outcome.words else "number"))


def peer_figures(cells: Sequence[Cell], folder: Path, python: Path) -> Iterator[Row]:
    """Yield what the peers reach on the split in a folder, as each ends.

    Args:
      cells: of one split.
      folder: of the split.
      python: of the environment that has the peers.

    Raises:
      RuntimeError: the process of the peers failed.
    """
    first, words = cells[0], [f"{cell.contender}/{cell.epsilon}" for cell in cells]
    script = Path(__file__).with_name("tabular_peers.py")
    command = [str(python), str(script), str(write_for_peers(first.table, folder)), str(first.seed), *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                yield {"table": first.table, "seed": first.seed, **json.loads(line)}
    if process.returncode:
        raise RuntimeError(f"the peers ended with {process.returncode}: {' '.join(command)}")


def figures(wanted: Sequence[Cell], python: Path | None) -> Iterator[Row]:
    """Yield the figures of cells of one split, as each ends; without a Python of the peers only ours."""
    peers = [cell for cell in wanted if cell.contender not in OURS and python is not None]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_split(wanted[0].table, wanted[0].seed, folder)
        if peers and python is not None:
            yield from peer_figures(peers, folder, python)
        for cell in wanted:
            if cell.contender in OURS:
                yield our_figure(cell, folder)


def by_seed(runs: Sequence[Row]) -> dict[tuple[str, str], dict[str, dict[int, float]]]:
    """Return figures by table and epsilon, then by contender, then by seed; cells without a figure are left out."""
    figures: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
    for run in runs:
        if "value" in run:
            cell = figures.setdefault((run["table"], run["epsilon"]), {})
            cell.setdefault(run["contender"], {})[run["seed"]] = run["value"]
    return figures


def means(cell: Mapping[str, Mapping[int, float]]) -> tuple[dict[str, float], int]:
    """Return the contenders' means over the seeds that all of them have, whose splits differ, and how many these are."""
    seeds = set[int].intersection(*(set(each) for each in cell.values()))
    if not seeds:
        return {}, 0
    return {name: statistics.fmean(each[seed] for seed in seeds) for name, each in cell.items()}, len(seeds)


def rows_of(runs: Sequence[Row], contenders: Sequence[str] = CONTENDERS) -> list[Row]:
    """Return a row for each table and epsilon: means over the seeds that all contenders have, the best in bold."""
    groups = by_seed([run for run in runs if run["contender"] in contenders])
    order = sorted(groups, key=lambda cell: (list(SOURCES).index(cell[0]), EPSILONS.index(cell[1])))
    columns = [name for name in contenders if any(name in cell for cell in groups.values())]
    return [_row(cell, *means(groups[cell]), columns) for cell in order]


def _row(cell: tuple[str, str], values: Mapping[str, float], seeds: int, columns: Sequence[str]) -> Row:
    words = {name: f"{value:.3f}" if value >= -1 else "below -1" for name, value in values.items()}
    best = f"{max(values.values()):.3f}" if values else ""
    bold = {name: f"**{word}**" if word == best else word for name, word in words.items()}
    table, epsilon = cell
    return {"table": table, "epsilon": epsilon, **{name: bold.get(name) for name in columns}, "seeds": seeds}


def verdict(runs: Sequence[Row], ours: str = "ours") -> str:
    """Return in how many cells with privacy a model of ours equals, and is better than, the best central one.

    Args:
      runs: of all seeds.
      ours: name of our contender.
    """
    names = (ours, *PRIVATE_PEERS)
    private = [run for run in runs if run["epsilon"] != NONE and run["contender"] in names]
    cells = [means(cell)[0] for cell in by_seed(private).values() if ours in cell and len(cell) > 1]
    gaps = [values[ours] - max(values[name] for name in values if name != ours) for values in cells if values]
    equal, better = sum(gap >= -MARGIN for gap in gaps), sum(gap > 0 for gap in gaps)
    return (
        f"{ours}: at least the best central method with privacy minus {MARGIN} in {equal} of {len(gaps)} cells, "
        f"better in {better}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what FILE lacks, and print the table."""
    parser = argparse.ArgumentParser("python -m fedveil.benchmarks.tabular", description=__doc__)
    parser.add_argument("--tables", nargs="+", default=list(SOURCES), choices=list(SOURCES))
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--epsilons", nargs="+", default=EPSILONS, choices=EPSILONS)
    parser.add_argument("--seeds", type=int, default=5, help="from 0 on")
    parser.add_argument(
        "--json", type=Path, nargs="+", metavar="FILE", required=True, help="further ones are read only"
    )
    parser.add_argument("--peers", type=Path, metavar="PYTHON", help="without it only ours are measured")
    arguments = parser.parse_args(argv)
    file, *others = arguments.json
    results = found_in(file)
    runs = [*results["runs"], *(run for each in others for run in found_in(each)["runs"])]
    finished = {(run["table"], run["seed"], run["contender"], run["epsilon"]) for run in runs}
    splits: dict[tuple[int, str], list[Cell]] = {}
    for cell in cells(arguments.tables, arguments.seeds, arguments.contenders, arguments.epsilons):
        if tuple(vars(cell).values()) not in finished:
            splits.setdefault((cell.seed, cell.table), []).append(cell)
    for split in splits.values():
        for row in figures(split, arguments.peers):
            runs.append(row)
            keep(results, row, file)
    print(report(runs))
    return 0


def report(runs: Sequence[Row]) -> str:
    """Return the table of the figures, what the figures say of ours, and which cells have none and why."""
    reasons = {
        f"{run['table']}, {run['contender']}, epsilon {run['epsilon']}": run.get("reason")
        or f"{run['missing']} is not installed"
        for run in runs
        if "value" not in run
    }
    lines = [f"- {where}: {reason}" for where, reason in reasons.items()]
    ours = [name for name in OURS if any(run["contender"] == name for run in runs)]
    return "\n".join([as_table(rows_of(runs)), "", *(verdict(runs, name) for name in ours), "", *lines])


if __name__ == "__main__":
    sys.exit(main())
