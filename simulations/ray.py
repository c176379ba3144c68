"""Engine on Flower's own simulation runtime, Ray, on this machine or on a cluster."""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from flwr.clientapp import ClientApp

from ..configs.schema import Ray
from ..privacy.refusal import Refusal
from ..strategies.flower_adapter import Runtime, quiet_flower, start_runtime
from .flower_grid import FlowerGrid

STOP_SECONDS = 10.0  # for clients that are still at work when the run ends
# One actor for each CPU. Flower's pool keeps one that died: Ray starts it again, or all of its messages would fail.
CLIENT_RESOURCES = {"num_cpus": 1, "num_gpus": 0.0, "max_restarts": -1}

# Set before Ray is imported: it reports no usage, and does not warn of how it will treat missing accelerators.
RAY_DEFAULTS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
# Whoever reaches Ray's ports can run code. On one machine it listens on the loopback address only, as it does on
# macOS and Windows by default; without this it takes the address by which 8.8.8.8 would be reached.
RAY_ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


@contextmanager
def ray_grid(client_app: ClientApp, num_clients: int, settings: Ray) -> Generator[FlowerGrid]:
    """Start Ray and Flower's runtime on it, and end both with the block.

    Args:
      client_app: run by every client; what it refers to must be importable, or picklable, in Ray's workers.
      num_clients: the population.
      settings: address of a cluster or CPUs of this machine, and the clients' deadline.

    Raises:
      Refusal: Ray is not installed.
      RuntimeError: in the block, once the runtime has failed.
    """
    if find_spec("ray") is None:
        raise Refusal("engine", "ray", "it needs Ray: pip install 'fedveil[ray]'")
    quiet_flower(logging.CRITICAL)  # it logs every client's failure with its traceback; the round counts them
    handler = signal.getsignal(signal.SIGTERM)
    _start_ray(settings)
    import ray

    try:
        runtime = start_runtime(client_app, num_clients, {"client_resources": CLIENT_RESOURCES})
        try:
            yield FlowerGrid(runtime.grid, num_clients, settings.deadline, lambda: _check(runtime))
        finally:
            runtime.stop.set()
            runtime.thread.join(STOP_SECONDS)
    finally:
        ray.shutdown()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray puts its own in its place


def _start_ray(settings: Ray) -> None:
    for name, value in (RAY_DEFAULTS | ({} if settings.address else RAY_ON_LOOPBACK)).items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        return
    options: dict[str, Any] = {"include_dashboard": False, "logging_level": "ERROR", "log_to_driver": False}
    if settings.address is not None:
        ray.init(address=settings.address, **options)
        return
    cpus = math.ceil(settings.num_cpus or len(os.sched_getaffinity(0)))
    ray.init(address="local", num_cpus=cpus, **options)


def _check(runtime: Runtime) -> None:
    if runtime.failures:
        raise RuntimeError("Flower's simulation runtime failed") from runtime.failures[0]
    if not runtime.thread.is_alive():
        raise RuntimeError("Flower's simulation runtime ended early")
