"""Warmup of a simulation in one process: its first second of training, which shows whether more processes pay.

More processes pay where training lasts longer than they take to start, on cores that are idle. Neither is known before.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

WARMUP_SECONDS = 1.0  # of training; a process takes about a tenth of it to start, and to train at full speed
_ALMOST = 0.25  # of a core, by which the idle time of a core may fall short
_STAT = Path("/proc/stat")
_IDLE = (4, 5)  # columns of proc(5): idle, and idle while it waits for a disk


@dataclass
class Warmup:
    """Time of training in this process so far.

    Attributes:
      most: processes that could share the work; 1 for no warmup.
      seconds: time of training.
      idle: seconds for which cores were idle meanwhile, all of them together.
    """

    most: int = 1
    seconds: float = 0.0
    idle: float = 0.0

    @contextmanager
    def timed(self) -> Generator[None]:
        """Add the time of the block, which trains in this process."""
        if self.most == 1:
            yield
            return
        start, idle = perf_counter(), idle_seconds()
        yield
        self.seconds += perf_counter() - start
        self.idle += idle_seconds() - idle

    @property
    def workers(self) -> int:
        """Number of processes that pay by now: 1 until the warmup is over, then one more for each core that was idle.

        It stays 1 beside other threads of this process, since a lock of theirs would stay closed in a forked one.
        """
        if self.most == 1 or self.seconds < WARMUP_SECONDS or threading.active_count() > 1:
            return 1
        return min(self.most, 1 + int(self.idle / self.seconds + _ALMOST))


def can_fork() -> bool:
    """Return whether a process may be forked after it has trained on the processor, and idle cores can be read.

    That is on Linux with a readable /proc/stat, and without a GPU for torch, whose automatic differentiation starts threads
    where it sees one, and does not work in forked processes then.
    """
    import torch

    return sys.platform == "linux" and os.access(_STAT, os.R_OK) and torch.cuda.device_count() == 0


def idle_seconds() -> float:
    """Return the seconds since the start of Linux for which the cores that this process may use were idle, together."""
    usable, jiffies = {f"cpu{number}" for number in os.sched_getaffinity(0)}, 0
    for line in _STAT.read_text().splitlines():
        name, *_ = columns = line.split()
        if name in usable:
            jiffies += sum(int(columns[index]) for index in _IDLE)
    return jiffies / os.sysconf("SC_CLK_TCK")
