"""Time and energy that a run's process used on its machine."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

# Linux's counters of energy (RAPL): one of each processor, and parts of it.
POWERCAP = Path("/sys/class/powercap")
PACKAGE = re.compile(r"intel-rapl:\d+")  # AMD's processors use the same name
MAX_WATTS = 1000.0  # of one processor: a counter that could have wrapped at this power is ignored
MICRO = 1e-6


@dataclass(frozen=True)
class Counter:
    """Counter of a processor's energy, in joules: its value, and where it wraps."""

    value: float
    modulus: float


@dataclass(frozen=True)
class MachineTime:
    """Time since an earlier moment, in seconds, and energy.

    Attributes:
      wall: seconds by the clock.
      cpu: seconds on all cores together, in the process and its finished workers.
      joules: energy of the machine's processors, for other programs too; None where it cannot be read.
    """

    wall: float
    cpu: float
    joules: float | None = None


@dataclass(frozen=True)
class Moment:
    """Readings of the machine's clocks and counters."""

    wall: float
    cpu: float
    counters: Mapping[str, Counter] = field(default_factory=dict[str, Counter])


def machine_time(powercap: Path = POWERCAP) -> Moment:
    """Return the current readings of the machine's clocks and counters."""
    now = os.times()
    cpu = now.user + now.system + now.children_user + now.children_system
    return Moment(now.elapsed, cpu, _counters(powercap))


def time_since(begin: Moment, powercap: Path = POWERCAP) -> MachineTime:
    """Return the time and the energy since an earlier `machine_time` of this process, by the counters in a folder."""
    now = machine_time(powercap)
    wall = now.wall - begin.wall
    return MachineTime(wall, now.cpu - begin.cpu, _joules(begin.counters, now.counters, wall))


def _counters(powercap: Path) -> dict[str, Counter]:
    """Return the counters of all processors; empty if one cannot be read, as is usual without root."""
    counters: dict[str, Counter] = {}
    try:
        for package in sorted(powercap.iterdir()):
            if PACKAGE.fullmatch(package.name):
                value, modulus = (
                    int((package / name).read_text()) * MICRO for name in ("energy_uj", "max_energy_range_uj")
                )
                counters[package.name] = Counter(value, modulus)
    except (OSError, ValueError):
        return {}
    return counters


def _joules(before: Mapping[str, Counter], now: Mapping[str, Counter], seconds: float) -> float | None:
    """Return the energy between two readings of the counters by name; None where they may have wrapped more than once."""
    if not now or set(before) != set(now):
        return None
    if any(seconds * MAX_WATTS >= each.modulus for each in now.values()):
        return None
    return sum((each.value - before[name].value) % each.modulus for name, each in now.items())
