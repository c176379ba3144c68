"""CPU time of a simulated client's round in each mode, by whole runs from the command line."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

from .engines import Options
from .stopwatch import run_fedveil
from .tables import Row, conditions, median, result_of, spread

FEW = 3  # rounds of the shorter of two runs, whose difference is rounds alone
FASTER = 10  # rounds of sums in the open for one that is encrypted
CLIENTS = 100  # all of them in each round; the model of digits has 650 parameters
JOBS = {
    "none": ("privacy=none",),
    "client_central": ("privacy=client_central",),
    "client_distributed, encrypted": ("privacy=client_distributed", "secagg=masked"),
    "record": ("privacy=record",),
    "record_and_client": ("privacy=record_and_client",),
    "record_distributed": ("privacy=record_distributed",),
    "record_distributed, encrypted": ("privacy=record_distributed", "secagg=masked"),
}


def run_modes(options: Options) -> Row:
    """Measure the modes in turns, each repeat with two processes of its own."""
    before, taken = conditions(), {name: list[float]() for name in JOBS}
    for _ in range(options.repeats):
        for name, job in JOBS.items():
            more = options.size.rounds
            if "secagg=masked" in job:
                more = math.ceil(more / FASTER)
            few, many = (_cpu_seconds(job, rounds) for rounds in (FEW, FEW + more))
            taken[name].append(1000 * (many - few) / more / CLIENTS)
    rows = [
        {"mode": name, "cpu ms": median(values), "spread %": spread(values)} for name, values in taken.items()
    ]
    rounds = f"{FEW} and {FEW + options.size.rounds} rounds, of encrypted sums a {FASTER}th as many more"
    notes = [
        f"task=digits, {CLIENTS} clients of 14 or 15 examples, all in each round; one worker",
        f"differences of runs of {rounds}; medians of {options.repeats}",
    ]
    return result_of("modes", before, {"Milliseconds of CPU: a client's round": rows}, notes)


def _cpu_seconds(job: tuple[str, ...], rounds: int) -> float:
    said = ["task=digits", f"task.num_clients={CLIENTS}", "cohort=all", "engine.workers=1", "seed=1"]
    with tempfile.TemporaryDirectory() as folder:
        run = f"hydra.run.dir={Path(folder) / 'run'}"
        return run_fedveil("simulate", *said, *job, f"num_rounds={rounds}", run).cpu
