"""Time that a process of a run has taken of its machine."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class MachineTime:
    """Time since an earlier moment, in seconds.

    Attributes:
      wall: by the clock.
      cpu: of all cores together, in the process and in the workers that it has waited for.
    """

    wall: float
    cpu: float


def machine_time() -> MachineTime:
    """Return the time since a moment that is the same in one process."""
    now = os.times()
    cpu = now.user + now.system + now.children_user + now.children_system
    return MachineTime(now.elapsed, cpu)


def since(begin: MachineTime) -> MachineTime:
    """Return the time since an earlier moment of this process.

    Args:
      begin: what `machine_time` returned then.
    """
    now = machine_time()
    return MachineTime(now.wall - begin.wall, now.cpu - begin.cpu)
