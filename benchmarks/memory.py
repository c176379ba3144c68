"""Memory against the cohort and the population, and time against the population: all of them should be flat."""

from __future__ import annotations

from dataclasses import replace

from .contenders import measure
from .engines import OURS, Options
from .tables import Row, conditions, median, result_of
from .workload import Size

COHORTS = (10, 100, 1000)
POPULATIONS = (100, 1000, 10_000, 100_000)


def run_memory(options: Options) -> Row:
    """Measure one worker, with the workloads asked for."""
    before = conditions()
    cohorts = [
        _row(workload, replace(options.size, cohort=cohort))
        for workload in options.workloads
        for cohort in COHORTS
        if cohort <= options.size.clients
    ]
    populations = [
        _row(workload, replace(options.size, clients=clients))
        for workload in options.workloads
        for clients in POPULATIONS
        if clients >= options.size.cohort
    ]
    tables = {"Against the cohort": cohorts, "Against the population": populations}
    return result_of(
        "memory", before, tables, ["MiB: proportional set size of the whole program, PyTorch included"]
    )


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
