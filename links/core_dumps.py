"""Core dumps of processes that hold keys, seeds or data: there are none."""

from __future__ import annotations

import ctypes
import resource
import sys

PR_SET_DUMPABLE = 4  # prctl(2)


def without_core_dumps() -> None:
    """Keep a crash from writing what this process holds to disk, and other processes of its user from reading it.

    A limit of 0 does not keep the system from piping a dump to a program, as systemd-coredump is (core(5)).
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
