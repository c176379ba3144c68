"""Memory against the cohort, the population and the model, and time against the population.

Against cohort and population all of them should be flat, and against the model memory should be few models.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from .contenders import measure
from .engines import OURS, Options
from .stopwatch import Process, run_fedveil
from .tables import Row, conditions, median, result_of
from .workload import WIDE, Size, build

COHORTS = (10, 100, 1000)
POPULATIONS = (1000, 10_000, 100_000, 1_000_000)
MORE_ROUNDS = 200  # of the longer of two runs, whose difference is rounds alone
FEW = 4  # clients of a large model
DELTA = 1e-7  # below one over each population
_MODULE = "fedveil.benchmarks.made_task"


def run_memory(options: Options) -> Row:
    """Measure one worker, with the workloads asked for."""
    before = conditions()
    cohorts = [
        _row(workload, replace(options.size, cohort=cohort))
        for workload in options.workloads
        for cohort in COHORTS
        if cohort <= options.size.clients
    ]
    populations = [_by_command(clients, options.size) for clients in POPULATIONS]
    tables = {
        "Against the model, `fedveil simulate`": _by_model(),
        "Against the cohort": cohorts,
        "Against the population, `fedveil simulate`, tiny": populations,
    }
    notes = [
        "MiB: proportional set size of the whole program, PyTorch included; of a command its peak",
        "models: the peak over the model's float32 parameters; beside: over the peak of the command with tiny",
        f"privacy=client_central, delta {DELTA:g}, a cohort of {options.size.cohort} by coins",
        f"a round: the difference of runs of {options.size.rounds} and {options.size.rounds + MORE_ROUNDS} rounds",
    ]
    return result_of("memory", before, tables, notes)


def _by_model() -> list[Row]:
    smallest = _run("tiny", FEW, 1.0, 3).peak
    rows: list[Row] = []
    for workload in WIDE:
        parameters = sum(each.numel() for each in build(workload).parameters())
        peak, model = _run(workload, FEW, 1.0, 3).peak, 4 * parameters / 2**20
        row = {"workload": workload, "parameters": parameters, "model MiB": round(model), "MiB": round(peak)}
        rows.append(row | {"models": round(peak / model, 2), "beside": round((peak - smallest) / model, 2)})
    return rows


def _by_command(clients: int, size: Size) -> Row:
    few, many = (
        _run("tiny", clients, size.cohort / clients, rounds)
        for rounds in (size.rounds, size.rounds + MORE_ROUNDS)
    )
    return {
        "clients": clients,
        "cpu s, few rounds": round(few.cpu, 2),
        "wall ms a round": round(1000 * (many.wall - few.wall) / MORE_ROUNDS, 1),
        "cpu ms a round": round(1000 * (many.cpu - few.cpu) / MORE_ROUNDS, 1),
        "MiB": round(many.peak),
    }


def _run(workload: str, clients: int, rate: float, rounds: int) -> Process:
    """Return what one run from the command line took."""
    said = [f"task.target={_MODULE}:Made", f"allow_modules=[{_MODULE}]", f"task.args.num_clients={clients}"]
    asked = [
        "engine.workers=1",
        f"cohort.rate={rate}",
        f"privacy.target_delta={DELTA}",
        f"num_rounds={rounds}",
        "seed=1",
    ]
    with tempfile.TemporaryDirectory() as folder:
        said += ["task=custom", f"task.args.workload={workload}", "privacy=client_central"]
        return run_fedveil("simulate", *said, *asked, f"hydra.run.dir={Path(folder) / 'run'}")


def _row(workload: str, size: Size) -> Row:
    watch = measure(OURS, workload, size)
    return {
        "workload": workload,
        "clients": size.clients,
        "cohort": size.cohort,
        "MiB": round(watch.memory, 1),
        "wall s": median(watch.wall),
        "cpu s": median(watch.cpu),
        "ms/client": round(median(watch.wall) * 1000 / size.cohort, 3),
    }
