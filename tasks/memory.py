"""Memory of a training process: settings of the C library's allocator and of the garbage collector."""

import ctypes
import gc
from collections.abc import Mapping
from contextlib import suppress
from functools import cache

# glibc's mallopt: parameters of malloc.h, with values that let a process reuse its memory for the next client instead
# of returning it and faulting it in again page by page. 32 MiB is the largest threshold that glibc accepts.
MALLOC_KEEPS = {-1: 1 << 30, -3: 32 << 20}  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
# glibc grows them itself until one is set. Arrays composed at the end of a run are larger, and are returned at once.
MALLOC_GIVES_BACK = {-1: 16 << 20, -3: 8 << 20}


def keep_memory() -> None:
    """Keep freed memory in this process, and exclude its loaded modules from garbage collection."""
    gc.freeze()
    keep_freed()


@cache
def keep_freed() -> None:
    """Let glibc's malloc keep freed memory in this process; a second call does nothing until `stop_keeping`."""
    _set(MALLOC_KEEPS)


def stop_keeping() -> None:
    """Return freed memory to the system now and later: allocations after training are large and rare."""
    keep_freed.cache_clear()
    _set(MALLOC_GIVES_BACK)
    give_back()


def _set(parameters: Mapping[int, int]) -> None:
    """Set parameters of glibc's malloc; another C library has none."""
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in parameters.items():
            mallopt(parameter, value)


def give_back() -> None:
    """Return the memory that this process has freed until now to the system; without glibc, do nothing."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
