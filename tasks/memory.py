"""Memory of a process that trains: what the C library keeps of it, and what the garbage collector leaves out."""

import ctypes
import gc
from collections.abc import Mapping
from contextlib import suppress
from functools import cache

# glibc's mallopt: parameters of malloc.h, and values that let a process reuse its memory for the next client instead
# of giving it back and taking it page by page again. 32 MiB is the largest threshold that glibc accepts.
MALLOC_KEEPS = {-1: 1 << 30, -3: 32 << 20}  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
# glibc grows them by itself until one of them is set. What is composed at the end of a run is larger, and goes back at once.
MALLOC_GIVES_BACK = {-1: 16 << 20, -3: 8 << 20}


def keep_memory() -> None:
    """Let this process keep the memory it frees, and spare its modules the garbage collector's walks."""
    gc.freeze()
    keep_freed()


@cache
def keep_freed() -> None:
    """Let this process keep the memory it frees; where the C library is not glibc, malloc stays as it is."""
    _set(MALLOC_KEEPS)


def stop_keeping() -> None:
    """Let the system have what this process has freed, and frees from now on: what comes after training is large and rare."""
    keep_freed.cache_clear()
    _set(MALLOC_GIVES_BACK)
    give_back()


def _set(parameters: Mapping[int, int]) -> None:
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in parameters.items():
            mallopt(parameter, value)


def give_back() -> None:
    """Give what this process has freed back to the system, where the C library is glibc: for models that it seldom makes."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
