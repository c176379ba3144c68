"""A GPU's time and memory beside plain torch and Opacus: steps of larger models with and without DP-SGD, and whole rounds.

It runs on the processor too (`--device cpu`), to try it; figures of interest are those of a GPU.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, cast
from unittest.mock import patch

import torch
from torch import nn

from ..client.dp_sgd.train import chosen_engine
from ..client.training.sgd import with_fast_kernels
from ..deployment.device.device import ACCELERATOR
from ..simulations.simulate import restoring_state
from ..tasks.data import Examples
from ..tasks.hardware import check_device, device_of, placed
from .dp_sgd import (
    BATCHES,
    MEASURED,
    PLAIN,
    by_opacus,
    draw_noise,
    loop,
    made_examples,
    model_of,
    take_steps,
    trains,
)
from .engines import Options
from .lean import run_lean
from .ours import run_ours
from .stopwatch import Stopwatch
from .tables import Row, conditions, median, ratio, result_of
from .workload import LEARNING_RATE, Size

ROUNDS = ("tiny", "cnn-1m")  # workloads of whole rounds
TORCH = "plain torch"
OURS = {f"fedveil, {engine}": engine for engine in (PLAIN, *MEASURED)}
OPACUS = {"Opacus, hooks": "hooks", "Opacus, ghost": "ghost"}
MEBI = 1 << 20


class Turn(NamedTuple):
    """What one turn took."""

    milliseconds: float
    mebi: float


class Processor:
    """Functions of `torch.cuda` for the processor, where nothing runs behind the clock and no peak is known."""

    @staticmethod
    def synchronize(device: torch.device) -> None:
        """Return: all is done."""

    @staticmethod
    def reset_peak_memory_stats(device: torch.device) -> None:
        """Return: there are none."""

    @staticmethod
    def memory_allocated(device: torch.device) -> int:
        """Return 0."""
        return 0

    max_memory_allocated = memory_allocated

    @staticmethod
    def get_device_name(device: torch.device) -> str:
        """Return the kind of processor."""
        return platform.machine()


UNITS: dict[str, Any] = {"cuda": torch.cuda, "cpu": Processor}  # by the device's type


def run_gpu(options: Options) -> Row:
    """Measure each model and batch in turns, and rounds of a cohort; refuse a device that is not there."""
    check_device(options.device, "--device")
    device, before, turns = device_of(options.device), conditions(), options.size.rounds * options.repeats
    unit = UNITS[device.type]
    before["device"] = unit.get_device_name(device)
    with restoring_state(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Opacus' hooks, and of its noise, which is not secure
        pairs = [_steps(name, batch, turns, device) for name in options.workloads for batch in BATCHES]
    times, peaks = ([pair[index] for pair in pairs] for index in range(2))
    rounds = [_round(name, options.size, device) for name in ROUNDS]
    tables: dict[str, list[Row]] = {
        "Milliseconds of a step": times,
        "Steps over those of plain torch": [_ratios(row) for row in times],
        "Seconds of a round": rounds,
    }
    if unit is not Processor:
        tables["MiB of a step above the models at rest"] = peaks
    steps = ", ".join(f"{number} at batch {batch}" for batch, number in BATCHES.items())
    notes = [
        f"device: {before['device']}; wall time, medians of {turns} turns after one in vain; steps of a turn: {steps}",
        f"plain: what privacy=none trains by; noise: part of each step of {', '.join(MEASURED)}, drawn on the processor",
        f"rounds: {options.size.cohort} of {options.size.clients} clients, {options.size.rounds} after a first, in one process",
    ]
    return result_of("gpu", before, tables, notes)


def _steps(name: str, batch: int, turns: int, device: torch.device) -> tuple[Row, Row]:
    """Return the milliseconds of a step in each way, and its peak of memory in MiB."""
    examples, steps = made_examples(name, batch), BATCHES[batch]
    there = cast(Examples, placed(examples, device))
    ways: dict[str, Callable[[], object]] = {TORCH: _plain(name, there, steps)}
    for way, engine in OURS.items():
        if trains(engine, name, examples):
            model = with_fast_kernels(model_of(name)).to(device)  # as clients lay it out
            ways[way] = partial(take_steps, engine, model, there, steps)
    for way, mode in OPACUS.items():
        ways[way] = by_opacus(name, there, steps, mode)
    model = model_of(name)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    kept = {"model": name, "batch": batch, "parameters": trained}
    kept["auto"] = chosen_engine("auto", model, examples)
    taken = _turns(ways, turns, device)
    columns = (TORCH, *OURS, *OPACUS)
    times: Row = {way: _step(taken.get(way, []), steps) for way in columns}
    begin = time.perf_counter()
    draw_noise(trained)
    times["noise"] = float(f"{1000 * (time.perf_counter() - begin):.3g}")
    peaks = {way: max((each.mebi for each in taken.get(way, [])), default=None) for way in columns}
    return kept | times, kept | peaks


def _step(taken: list[Turn], steps: int) -> float | None:
    if not taken:
        return None
    return float(f"{statistics.median(each.milliseconds for each in taken) / steps:.3g}")


def _turns(
    ways: Mapping[str, Callable[[], object]], turns: int, device: torch.device
) -> dict[str, list[Turn]]:
    """Return each way's turns after one in vain, none of a way whose memory the device does not have."""
    unit, taken = UNITS[device.type], {name: list[Turn]() for name in ways}
    for turn in range(turns + 1):
        for name, way in ways.items():
            held = unit.memory_allocated(device)
            unit.reset_peak_memory_stats(device)
            unit.synchronize(device)
            begin = time.perf_counter()
            with suppress(torch.OutOfMemoryError):
                way()
                unit.synchronize(device)
                milliseconds = 1000 * (time.perf_counter() - begin)
                mebi = round((unit.max_memory_allocated(device) - held) / MEBI, 1)
                if turn > 0:
                    taken[name].append(Turn(milliseconds, mebi))
    return taken


def _plain(name: str, examples: Examples, steps: int) -> Callable[[], None]:
    """Return the function that takes the steps of a turn as torch's documents write them."""
    model = model_of(name).to(examples.targets.device).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    return partial(loop, model, optimizer, nn.functional.cross_entropy, examples, steps)


def _ratios(row: Row) -> Row:
    named = {key: row[key] for key in ("model", "batch", "auto")}
    return named | {way: ratio(row[way], row[TORCH]) for way in (*OURS, *OPACUS)}


def _round(workload: str, size: Size, device: torch.device) -> Row:
    """Return the seconds of a round: of fedveil, with clipping, exact noise and ledger, and of the lean loop."""
    ours, lean = Stopwatch(), Stopwatch()
    with restoring_state(), patch.dict(os.environ, {ACCELERATOR: str(device)}):
        run_ours(workload, size, ours, workers=1)
    with restoring_state():
        run_lean(workload, size, lean, channels_last=False, device=device)
    seconds = {"fedveil": median(ours.wall), "lean loop": median(lean.wall)}
    return {"workload": workload, **seconds, "ratio": ratio(*seconds.values())}
