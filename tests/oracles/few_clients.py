"""Accuracy of `client_central` with few clients, by the noise of a whole run over the length of all its updates.

python tests/oracles/few_clients.py --seeds 3
"""

import argparse
import itertools
import json
import math
import os
import runpy
import tempfile
import warnings
from pathlib import Path

from fedveil.configs.settings import settings_from_overrides
from fedveil.run.build import build
from fedveil.simulations.simulate import simulate
from fedveil.tasks.arrays import dimension_of

FITS = runpy.run_path(str(Path(__file__).with_name("central_fits.py")))
TABLES, CLIENTS, EPSILONS, ROUNDS = ("wine", "cancer"), (5, 10, 20, 30), (1, 3, 8), 20
BINS = (0.0, 0.25, 0.4, 0.8, math.inf)  # ends of the rows that are printed


def one(keys: list[str], clients: int, privacy: list[str], seed: int) -> tuple[float, float]:
    """Return noise over the length of all updates, and accuracy."""
    asked = ["task=csv", "task.simulated=true", "audit=off", "accept_vacuous=true", f"num_rounds={ROUNDS}"]
    settings = settings_from_overrides([*asked, *privacy, f"seed={seed}", *keys])
    with tempfile.TemporaryDirectory() as folder:
        simulate(settings, Path(folder) / "run", quiet=True)
        result = json.loads((Path(folder) / "run" / "result.json").read_text())
    noise = (result["noise_multiplier"] or 0.0) / clients
    return noise * math.sqrt(dimension_of(build(settings).task) / ROUNDS), result["metrics"]["accuracy"]


def of_budget(epsilon: int) -> list[str]:
    budget = [f"privacy.target_epsilon={epsilon}", "privacy.target_delta=0.01"]
    return ["privacy=client_central", *budget, "privacy.allow_large_delta=true"]


def percents(scores: list[float]) -> str:
    return f"{100 * min(scores):.0f} to {100 * max(scores):.0f} %"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(parser.parse_args().seeds)
    warnings.simplefilter("ignore")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    clear: list[float] = []
    noised: list[tuple[float, float]] = []
    for name in TABLES:
        for clients in CLIENTS:
            with tempfile.TemporaryDirectory() as folder:
                FITS["write"](Path(folder), name, clients)
                keys = FITS["keys"](Path(folder), name, "linear")
                clear += [one(keys, clients, ["privacy=none"], seed)[1] for seed in seeds]
                noised += [one(keys, clients, of_budget(each), seed) for each in EPSILONS for seed in seeds]
    print(f"| noise over the length of all updates | accuracy, without noise {percents(clear)} |\n|---|---|")
    for low, high in itertools.pairwise(BINS):
        row = [each for each in noised if low <= each[0] < high]
        if row:
            noises = [each for each, _ in row]
            print(f"| {min(noises):.2f} to {max(noises):.2f} | {percents([each for _, each in row])} |")


if __name__ == "__main__":
    main()
