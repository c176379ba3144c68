"""Cost of a cohort of small models, stacked and client by client, in CPU time and in turns in one process."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import numpy as np
import torch
from flwr.app import ConfigRecord, RecordDict

from ..client.training.cohort_training import sum_cohort
from ..client.training.in_place import begin
from ..client.workbench import Workbench
from ..messages.flower_adapter import claim_identity, quiet_flower
from ..messages.wire import instruct, memory_arrays
from ..privacy.mechanisms.private_sum import CohortSum
from ..privacy.mechanisms.sum_spec import SumSpec
from ..simulations.simulate import restoring_state
from ..tasks.arrays import read_arrays
from ..tasks.memory import keep_memory
from .engines import Options
from .ours import settings_of
from .stopwatch import cpu_milliseconds
from .tables import Row, conditions, ratio, result_of
from .workload import BY_POWER, CLIPPING_NORM, EQUAL

KINDS = ("", BY_POWER, EQUAL)
_SPEC = SumSpec(CLIPPING_NORM)


def run_stacks(options: Options) -> Row:
    """Measure one cohort of each workload both ways."""
    before, turns = conditions(), options.size.rounds * options.repeats
    with restoring_state():
        torch.set_num_threads(1)
        quiet_flower()
        claim_identity(run_id=1)
        keep_memory()
        rows = [_measured(name, options, turns) for name in options.workloads]
    notes = [f"medians of {turns} turns; one process; training, clipping, lattice and sum"]
    return result_of("stacks", before, {f"A cohort of {options.size.cohort}, ms of CPU": rows}, notes)


def _measured(name: str, options: Options, turns: int) -> Row:
    bench, clients = Workbench(settings_of(name, options.size)), list(range(options.size.cohort))
    arrays = read_arrays(bench.model)
    size = sum(value.size for value in arrays.values())
    content = RecordDict({"arrays": memory_arrays(arrays), "config": ConfigRecord({})})
    content = instruct(content, _SPEC, "run", 1)
    ways: dict[str, Callable[[], object]] = {
        "stacked": lambda: sum_cohort(bench, content, clients, _SPEC, size),
        "client by client": lambda: _one_by_one(bench, content, clients, size),
    }
    stacked, single = map(statistics.median, cpu_milliseconds(ways, turns).values())
    row = {"workload": name, "stacked": stacked, "client by client": single}
    return {**row, "ratio": ratio(single, stacked)}


def _one_by_one(bench: Workbench, content: RecordDict, clients: list[int], size: int) -> None:
    begun, total = begin(bench, content), CohortSum(np.zeros(size))
    for client in clients:
        scalars = begun.train(client)
        assert isinstance(scalars, dict)
        begun.add(total, scalars, _SPEC)
