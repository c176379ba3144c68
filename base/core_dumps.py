"""Core dumps, disabled for processes that hold keys, seeds or data."""

import ctypes
import resource
import sys

PR_SET_DUMPABLE = 4  # prctl(2)


def without_core_dumps() -> None:
    """Prevent core dumps of this process, and reads of its memory by other processes of its user.

    With a limit of 0 alone the system would still pipe a dump to a program such as systemd-coredump (core(5)), so Linux
    is told that the process is not dumpable.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
