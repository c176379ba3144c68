"""Time of commands from their start to their end, beside importing torch and flwr's own command."""

from __future__ import annotations

import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path

from .engines import Options
from .stopwatch import Process, run_fedveil, run_process
from .tables import Row, conditions, median, result_of, spread

FLWR = Path(sysconfig.get_path("scripts")) / "flwr"
COMMANDS: dict[str, Callable[[str], Process]] = {
    "import torch": lambda _: run_process(sys.executable, "-c", "import torch"),
    "flwr --version": lambda _: run_process(str(FLWR), "--version"),
    "fedveil --help": lambda _: run_fedveil("--help"),
    "fedveil simulate --help": lambda _: run_fedveil("simulate", "--help"),
    "fedveil plan": lambda _: run_fedveil("plan"),
    "fedveil simulate num_rounds=1": lambda folder: run_fedveil("simulate", "num_rounds=1", _into(folder)),
    "fedveil simulate": lambda folder: run_fedveil("simulate", _into(folder)),
}


def run_commands(options: Options) -> Row:
    """Measure the commands in turns, after one turn in vain that compiles and caches."""
    before, taken = conditions(), {name: list[Process]() for name in COMMANDS}
    for turn in range(options.repeats + 1):
        for name, command in COMMANDS.items():
            with tempfile.TemporaryDirectory() as folder:
                process = command(folder)
            taken[name] += [process] * (turn > 0)
    rows = [
        {
            "command": name,
            "wall s": median([each.wall for each in processes]),
            "cpu s": median([each.cpu for each in processes]),
            "spread %": spread([each.cpu for each in processes]),
            "MiB": round(median([each.peak for each in processes])),
        }
        for name, processes in taken.items()
    ]
    notes = [f"medians of {options.repeats} processes; spread of the CPU time; MiB: peak of the process"]
    return result_of("commands", before, {"Commands, from start to end": rows}, notes)


def _into(folder: str) -> str:
    return f"hydra.run.dir={Path(folder) / 'run'}"
