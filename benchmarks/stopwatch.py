"""Wall time, CPU time and memory of a process and all its descendants, read from /proc."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

BEGAN = "FEDVEIL_BENCHMARK_BEGAN"  # when the contender's process was started, in seconds since the epoch
SAMPLE_SECONDS = 0.01  # between two looks at a process's peak of memory
_TICK = os.sysconf("SC_CLK_TCK")
_MEBI = 1024.0  # /proc counts in KiB


@dataclass
class Stopwatch:
    """What one contender took for each of its rounds.

    Attributes:
      first: seconds from the start of the process to the end of its first round, imports and all; where
        nobody said when that was, from the making of the stopwatch.
      wall: seconds of each later round.
      cpu: CPU seconds of each later round, the process and its descendants together.
      memory: proportional set size in MiB, the process and its descendants together, after the last round.
    """

    first: float = 0.0
    wall: list[float] = field(default_factory=list[float])
    cpu: list[float] = field(default_factory=list[float])
    memory: float = 0.0
    _made: float = field(default_factory=time.time)
    _laps: int = 0
    _wall: float = 0.0
    _cpu: float = 0.0

    def lap(self) -> None:
        """Note that a round has ended."""
        now = time.perf_counter()
        cpu = cpu_seconds(_root())
        if self._laps == 0:
            self.first = time.time() - float(os.environ.get(BEGAN, self._made))
        else:
            self.wall.append(now - self._wall)
            self.cpu.append(cpu - self._cpu)
        self.memory = memory(_root())
        self._laps += 1
        self._wall, self._cpu = time.perf_counter(), cpu_seconds(_root())

    def to_json(self) -> str:
        """Return what was measured as one line."""
        return json.dumps({key: value for key, value in asdict(self).items() if not key.startswith("_")})


@dataclass(frozen=True)
class Process:
    """What a process took from its start to its end: seconds by the clock, of CPU, and its peak of memory in MiB."""

    wall: float
    cpu: float
    peak: float


def run_fedveil(*arguments: str) -> Process:
    """Run a command of fedveil in a process of its own, and return what it took."""
    return run_process(sys.executable, "-m", "fedveil", *arguments)


def run_process(*command: str) -> Process:
    """Run a command, and return what it took with the processes that it waited for.

    Raises:
      RuntimeError: it failed.
    """
    # Compiled modules are cached, as those of an installed package are.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    begin, before, ended, peaks = time.perf_counter(), _ended_cpu(), threading.Event(), [0.0]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)

    def watch() -> None:
        while not ended.wait(SAMPLE_SECONDS):
            peaks.append(peak_of(child.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    status = child.wait()
    taken = time.perf_counter() - begin
    ended.set()
    watcher.join()
    if status:
        raise RuntimeError(f"failed: {' '.join(command)}")
    return Process(taken, _ended_cpu() - before, max(peaks))


def _ended_cpu() -> float:
    """Return the CPU seconds of all processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def peak_of(process: int) -> float:
    """Return the peak of a process's resident memory so far, in MiB; 0 if it is gone.

    That of getrusage begins with the memory of the process that started it.
    """
    with suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / _MEBI
    return 0.0


def cpu_milliseconds(ways: Mapping[str, Callable[[], object]], turns: int) -> dict[str, list[float]]:
    """Return the CPU milliseconds of each call of each way, in turns, after one in vain.

    Args:
      ways: what is called, by name.
      turns: how often each is.
    """
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 1):
        for name, way in ways.items():
            begin = time.process_time()
            way()
            if turn > 0:
                taken[name].append(1000 * (time.process_time() - begin))
    return taken


def _root() -> int:
    """Return the process that stands for the whole contender: torchrun where that started this one."""
    return os.getppid() if "LOCAL_RANK" in os.environ else os.getpid()


def family(process: int) -> list[int]:
    """Return a process and its living descendants."""
    found = [process]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            with suppress(OSError):
                found += [int(child) for child in task.read_text().split()]
    return found


def cpu_seconds(process: int) -> float:
    """Return the CPU time that a process, its descendants and those that it has outlived have used."""
    ticks = 0
    for member in family(process):
        with suppress(OSError):
            ticks += sum(
                int(n) for n in Path(f"/proc/{member}/stat").read_text().rpartition(")")[2].split()[11:15]
            )
    return ticks / _TICK


def memory(process: int) -> float:
    """Return the proportional set size of a process and its descendants, in MiB: what is shared counts once."""
    total = 0
    for member in family(process):
        with suppress(OSError):
            for line in Path(f"/proc/{member}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1])
    return total / _MEBI
