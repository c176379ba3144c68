"""Cost of exact noise: a draw, and the layers of noise that a server takes out of a sum, in CPU time."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np

from ..privacy.mechanisms import discrete_gaussian, randomness
from ..privacy.mechanisms.discrete_gaussian import sample
from ..privacy.mechanisms.distributed import encode_share, take_back
from ..privacy.mechanisms.private_sum import SumSpec
from ..privacy.mechanisms.randomness import Randomness
from ..privacy.mechanisms.sizing import Attendance, ShareSpec, size_shares
from ..tasks.memory import keep_memory
from .engines import Options
from .stopwatch import cpu_milliseconds
from .tables import Row, conditions, result_of

COORDINATES = 10**6
ATTENDANCE = Attendance(100, 60, 10)  # a cohort of 100 with the usual dropout and collusion
NOISE_MULTIPLIER = 7.0  # about what epsilon 3 takes in 100 rounds without amplification
_SIGMAS = (1, 100, 1000, 2**20, 2**30)
_REPEATS = 5
_SEED = bytes(32)


def run_noise(options: Options) -> Row:
    """Measure draws, one client's vector, and the layers of a whole cohort at full attendance."""
    del options
    before = conditions()
    keep_memory()
    spec = size_shares(SumSpec(1.0), COORDINATES, ATTENDANCE, NOISE_MULTIPLIER, layered=True)
    with by_numpy():
        draws: list[Row] = [{"sigma": sigma, "ns": _nanoseconds(sigma)} for sigma in _SIGMAS]
        layers = [{"by": "NumPy", **_layers(spec)}]
    if discrete_gaussian.compiled():
        draws = [{**row, "compiled, ns": _nanoseconds(row["sigma"])} for row in draws]
        layers.append({"by": "fedveil-compiled", **_layers(spec)})
    notes = [
        "CPU time, the fastest of several turns; layers: of all 100 clients, none of whom failed to open"
    ]
    tables = {"A draw": draws, "A million coordinates": layers}
    return result_of("noise", before, tables, notes)


@contextmanager
def by_numpy() -> Generator[None]:
    """Keep what is drawn meanwhile, from streams made meanwhile, from the compiled package."""
    with (
        patch.object(discrete_gaussian, "compiled", lambda: None),
        patch.object(randomness, "compiled", lambda: None),
    ):
        yield


def _nanoseconds(sigma: int) -> float:
    stream = Randomness(1).stream("noise", sigma)
    return round(1e9 * _fastest(lambda: sample(sigma, 1 << 16, stream)) / (1 << 16), 2)


def _layers(spec: ShareSpec) -> Row:
    update = {"w": np.full(COORDINATES, 1e-4)}
    seeds = [_SEED] * len(spec.layers)
    stream = Randomness(1).stream("client")
    total, clients = np.zeros(spec.size, spec.dtype), ATTENDANCE.most
    server = _fastest(lambda: take_back(total, clients, spec, [seeds] * clients))
    client = _fastest(lambda: encode_share(update, {}, spec, stream, _SEED, seeds))
    return {
        "bits": spec.bits,
        "layers": len(spec.layers),
        "a client's vector, ms": round(1e3 * client, 1),
        "the server's layers, s": round(server, 2),
        "a coordinate, client and layer, ns": round(
            1e9 * server / (COORDINATES * clients * len(spec.layers)), 2
        ),
    }


def _fastest(work: Callable[[], object]) -> float:
    return min(cpu_milliseconds({"": work}, _REPEATS)[""]) / 1000
