"""Contenders that are measured, each started in a process of its own.

``python -m fedveil.benchmarks.contenders NAME WORKLOAD CLIENTS COHORT ROUNDS`` runs one and prints what
it took as its last line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from .stopwatch import BEGAN, Stopwatch
from .workload import Size

_TIMEOUT_SECONDS = 900.0
_ERROR_LINES = 12
_QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Missing(Exception):
    """A contender that this machine lacks, and why."""

    reason: str


def _ours(workers: int) -> Callable[[str, Size, Stopwatch], None]:
    def run(workload: str, size: Size, watch: Stopwatch) -> None:
        from .ours import run_ours

        run_ours(workload, size, watch, workers)

    return run


def _lean(channels_last: bool) -> Callable[[str, Size, Stopwatch], None]:
    def run(workload: str, size: Size, watch: Stopwatch) -> None:
        from .lean import run_lean

        run_lean(workload, size, watch, channels_last)

    return run


def _ray(stock: bool) -> Callable[[str, Size, Stopwatch], None]:
    def run(workload: str, size: Size, watch: Stopwatch) -> None:
        from .on_ray import run_same_apps, run_stock

        (run_stock if stock else run_same_apps)(workload, size, watch)

    return run


def _nvflare(workload: str, size: Size, watch: Stopwatch) -> None:
    from .nvflare_simulator import run_nvflare

    run_nvflare(workload, size, watch)


def _ours_on_ray(workload: str, size: Size, watch: Stopwatch) -> None:
    from .ours import run_on_ray

    run_on_ray(workload, size, watch, actors=2)


NVFLARE = "NVFLARE's simulator, 2 threads"
_HERE: dict[str, Callable[[str, Size, Stopwatch], None]] = {
    "fedveil, 1 worker": _ours(1),
    "fedveil, 2 workers": _ours(2),
    "fedveil on Ray, 2 actors": _ours_on_ray,
    "Flower on Ray, stock app": _ray(True),
    "Flower on Ray, our apps": _ray(False),
    "lean loop": _lean(False),
    "lean loop, channels-last": _lean(True),
    NVFLARE: _nvflare,
}
_PFL = {"pfl, 1 process": 1, "pfl, 2 processes": 2}
NAMED = (*_HERE, *_PFL)
ALL = tuple(name for name in NAMED if name != NVFLARE)  # which takes seconds for each client


def measure(name: str, workload: str, size: Size, pfl_python: str | None = None) -> Stopwatch:
    """Run one contender in its own process and return what it took.

    Args:
      name: one of `NAMED`.
      workload: a key of `workload.MODELS`.
      size: how much there is to do.
      pfl_python: a Python that has pfl 0.6 and torch.

    Raises:
      Missing: pfl, Ray or NVFLARE is not there, or NVFLARE would have to sample clients.
      RuntimeError: the contender failed.
    """
    if name == NVFLARE and size.clients != size.cohort:
        raise Missing("all its clients take part in each round; give as many --clients as --cohort")
    numbers = [str(n) for n in (size.clients, size.cohort, size.rounds)]
    command = [*_command(name, pfl_python), workload, *numbers]
    environment = {**os.environ, **_QUIET, BEGAN: repr(time.time())}
    done = subprocess.run(
        command, check=False, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"first"')]
    if not lines:
        raise RuntimeError(f"{name} failed:\n" + "\n".join(done.stderr.splitlines()[-_ERROR_LINES:]))
    return Stopwatch(**json.loads(lines[-1]))


def _command(name: str, pfl_python: str | None) -> list[str]:
    if name in _PFL:
        if pfl_python is None or not Path(pfl_python).exists():
            raise Missing("no Python with pfl; give --pfl-python PATH")
        script = str(Path(__file__).with_name("pfl_contender.py"))
        together = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={_PFL[name]}"]
        return [pfl_python, *(together if _PFL[name] > 1 else []), script]
    if "Ray" in name and find_spec("ray") is None:
        raise Missing("Ray is not installed; pip install 'fedveil[ray]'")
    if name == NVFLARE and find_spec("nvflare") is None:
        raise Missing("NVFLARE is not installed; pip install 'fedveil[nvflare]'")
    return [sys.executable, "-m", __spec__.name, name]


def main(arguments: list[str]) -> None:
    """Run the contender that the arguments name and print what it took."""
    name, workload, *numbers = arguments
    watch = Stopwatch()
    _HERE[name](workload, Size(*map(int, numbers)), watch)
    print("\n" + watch.to_json(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
