"""Share of a round that privacy costs, stage by stage, at the sizes of the models, and what one durable reservation costs."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..client.private_update import difference
from ..messages.flower_adapter import claim_identity, name_message
from ..messages.wire import add_reply, instruct, layout_of, memory_arrays, reply_with
from ..privacy.budget import Adjacency, Adversary, Budget, Release, Unit
from ..privacy.ledger.ledger import Ledger
from ..privacy.mechanisms.private_sum import CohortSum, add_noise, add_update, decode, encode
from ..privacy.mechanisms.randomness import Randomness
from ..privacy.mechanisms.sum_spec import SumSpec, cells_for
from ..privacy.plan import Plan
from ..strategies.cohorts import Fixed
from ..tasks.arrays import read_arrays
from ..tasks.memory import keep_memory
from .contenders import measure
from .engines import OURS, Options
from .stopwatch import cpu_milliseconds
from .tables import Row, conditions, median, result_of
from .workload import CLIPPING_NORM, NOISE_MULTIPLIER, build

_REPEATS = 15
_SEED = 3
_MILLI = 1000.0


def run_privacy(options: Options) -> Row:
    """Measure each stage alone, in CPU time, and put them beside the whole round of one worker."""
    from flwr.app import Message, RecordDict

    before = conditions()
    claim_identity(run_id=1)
    keep_memory()  # as the engine's processes do
    rows: list[Row] = []
    by_message: list[Row] = []
    for workload in options.workloads:
        start = read_arrays(build(workload))
        layout = layout_of(memory_arrays(start))
        spec = SumSpec(CLIPPING_NORM, cells=cells_for(sum(value.size for value in start.values())))
        received = memory_arrays(start)
        moved = {name: np.add(value, _step(value.shape), dtype=np.float32) for name, value in start.items()}
        trained = memory_arrays(moved)
        update = difference(trained, received)
        vector, _ = encode(update, {}, spec)
        request = Message(instruct(RecordDict({"arrays": received}), spec, "run", 1), 2, "train")
        name_message(request, "1")
        reply = reply_with(vector, spec, request)
        total = CohortSum(np.zeros(vector.size))
        noise = Randomness(1).stream("noise")
        flat = np.concatenate([value.ravel() for value in update.values()])
        client = {"clip, lattice, add": milliseconds(lambda t=total, u=flat, s=spec: add_update(t, u, {}, s))}
        by_message.append(
            {
                "workload": workload,
                "difference": milliseconds(lambda t=trained, r=received: difference(t, r)),
                "clip and lattice": milliseconds(lambda u=update, s=spec: encode(u, {}, s)),
                "reply": milliseconds(lambda v=vector, s=spec, q=request: reply_with(v, s, q)),
                "check and add": milliseconds(lambda t=total, r=reply, s=spec: add_reply(t, r, s)),
            }
        )
        server = {
            "noise": milliseconds(
                lambda t=total, s=spec, n=noise: add_noise(t.total, NOISE_MULTIPLIER, s, n)
            ),
            "decode": milliseconds(lambda t=total, y=layout, s=spec: decode(t.total, y, s, 100.0)),
        }
        rows.append(_share(workload, client, server, options))
    tables = {
        "Milliseconds of CPU: per client that is trained in place, and once a round": rows,
        "Milliseconds of CPU: per client that answers by a message": by_message,
        "Ledger, milliseconds a round": [_ledger()],
    }
    cohort = f"share: of the CPU time of a round of {options.size.cohort} clients on one worker"
    notes = [f"{cohort}; without the ledger, and without the difference, which all averaging takes"]
    return result_of("privacy", before, tables, notes)


def _share(workload: str, client: Row, server: Row, options: Options) -> Row:
    whole = median(measure(OURS, workload, options.size).cpu) * _MILLI
    privacy = options.size.cohort * sum(client.values()) + sum(server.values())
    return {
        "workload": workload,
        **client,
        **server,
        "privacy, round": round(privacy, 1),
        "whole round": round(whole, 1),
        "share": round(privacy / whole, 3) if whole else None,
    }


def _step(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(_SEED).normal(0.0, 0.01, shape)


def milliseconds(stage: Callable[[], object]) -> float:
    """Return the median CPU time of calling this, after once in vain."""
    return median(cpu_milliseconds({"": stage}, _REPEATS)[""])


def _ledger() -> Row:
    """Return the wall time of a reservation that is on disk before it returns, beside one that is not."""
    plan = Plan(Unit.CLIENT, Adjacency.ZERO_OUT, Fixed(1), CLIPPING_NORM, _REPEATS, NOISE_MULTIPLIER)
    budget = Budget(Unit.CLIENT, 1e9, 1e-5)
    row: Row = {}
    with tempfile.TemporaryDirectory() as folder:
        for durable in (True, False):
            path = Path(folder) / f"ledger-{durable}"
            taken: list[float] = []
            with Ledger.open(path, budget, owner="made", simulated=True, durable=durable) as ledger:
                for number in range(_REPEATS):
                    release = Release(
                        Unit.CLIENT,
                        "run",
                        number,
                        "sum",
                        dict.fromkeys([Adversary.MODEL], plan.event()),
                        "seeded",
                    )
                    begin = time.perf_counter()
                    ledger.reserve(release)
                    ledger.commit(release.key, durable=False)
                    taken.append((time.perf_counter() - begin) * _MILLI)
            row["reserve and commit, fsynced" if durable else "the same, not fsynced"] = median(taken)
        row["bare fsync of 4 KiB"] = _fsync(Path(folder) / "bare")
    return row


def _fsync(path: Path) -> float:
    taken: list[float] = []
    with open(path, "wb") as file:
        for _ in range(_REPEATS):
            begin = time.perf_counter()
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
            taken.append((time.perf_counter() - begin) * _MILLI)
    return median(taken)
