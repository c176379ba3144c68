"""Cost of a step of local training in bfloat16 beside float32, on one thread in CPU time, and accuracy of runs in both."""

from __future__ import annotations

from functools import partial

import torch

from ..client.training.sgd import train, with_fast_kernels
from ..messages.local_training import LocalTraining
from ..simulations.simulate import restoring_state
from ..tasks.data import Examples
from ..tasks.hardware import CPU, precision
from ..tasks.memory import keep_memory
from . import accuracies
from .engines import Options
from .made_task import Made
from .stopwatch import cpu_milliseconds
from .tables import Row, conditions, ratio, result_of, wide
from .workload import LEARNING_RATE, build, examples_of

BATCHES = (10, 64)
STEPS = 8  # of a turn
DTYPES = ("float32", "bfloat16")
SEEDS = range(3)


def run_precision(options: Options) -> Row:
    """Measure each workload and batch in both precisions, in turns, and the accuracy of each task."""
    before, turns = conditions(), options.size.rounds * options.repeats
    trained = [name for name in options.workloads if name in accuracies.TASKS]
    with restoring_state():
        torch.set_num_threads(1)
        keep_memory()  # as the engine's processes do
        timed = [name for name in options.workloads if name not in trained]
        rows = [_measure(name, batch, turns) for name in timed for batch in BATCHES]
    notes = [f"the fastest of {turns} turns of {STEPS} steps, client by client; bfloat16: torch's autocast"]
    wide_rows = wide(rows, ["workload"], "batch", [*DTYPES, "ratio"])
    tables = {"Milliseconds of CPU: a step in each precision and batch": wide_rows}
    if trained:
        runs = [_accuracy(name, seed) for name in trained for seed in SEEDS]
        tables["Held-out accuracy in each precision and seed, percent"] = wide(runs, ["task"], "seed", DTYPES)
    return result_of("precision", before, tables, notes)


def _accuracy(task: str, seed: int) -> Row:
    both = {dtype: float(f"{accuracies.accuracy_of(task, dtype, seed):.4g}") for dtype in DTYPES}
    return {"task": task, "seed": seed, **both}


def _measure(workload: str, batch: int, turns: int) -> Row:
    inputs, targets = (
        torch.cat(parts) for parts in zip(*(examples_of(workload, n) for n in range(8)), strict=True)
    )
    examples, task = Examples(inputs[:batch], targets[:batch]), Made(workload, 1)
    training = LocalTraining(LEARNING_RATE, STEPS, batch)
    models = {dtype: with_fast_kernels(build(workload)) for dtype in DTYPES}
    ways = {
        dtype: partial(train, model, task, examples, training, 0, 0, partial(precision, CPU, dtype))
        for dtype, model in models.items()
    }
    taken = cpu_milliseconds(ways, turns)
    fastest = {dtype: float(f"{min(times) / STEPS:.3g}") for dtype, times in taken.items()}
    return {
        "workload": workload,
        "batch": batch,
        **fastest,
        "ratio": ratio(fastest["bfloat16"], fastest["float32"]),
    }
