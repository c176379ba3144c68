"""Error feedback inside the client, tried under a private sum: what compression left out is added to the client's next update.

``python -m fedveil.benchmarks.error_feedback --json FILE`` prints accuracy without and with it. It is no part of fedveil, since it gains
nothing (docs/evidence/benchmarks.md); this keeps the figure repeatable. Epsilon is that of the run without it: what is sent is clipped as
before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from ..client.training import cohort_training
from ..configs.settings import settings_from_overrides
from ..privacy.mechanisms.compression import Sketch
from ..run.build import build
from ..simulations.simulate import run_simulation
from .tables import as_table

TRAIN = "_train_group"  # of the cohort's training
KINDS, SHARES = ("mask", "project"), (0.0, 0.5, 1.0)
Run = dict[str, Any]  # kind, share of the residual that is kept, seed, accuracy


class Feedback:
    """What each client keeps of what it did not send; its methods stand in for those of the cohort's training.

    Args:
      share: of what is kept that is added to the next update.
    """

    def __init__(self, share: float) -> None:
        self.share, self.residuals = share, dict[int, NDArray[np.float64]]()
        self.clients: list[int] = []
        self.train = getattr(cohort_training, TRAIN)
        self.sketch_of = Sketch.of

    @contextmanager
    def in_place(self) -> Generator[None]:
        """Let cohorts train with it, as long as the block lasts."""

        def of(sketch: Sketch, vectors: NDArray[np.floating]) -> NDArray[np.floating]:
            return self.compressed(sketch, vectors)

        with mock.patch.object(cohort_training, TRAIN, self.trained), mock.patch.object(Sketch, "of", of):
            yield

    def trained(self, bench: Any, group: Any, *more: Any) -> Any:
        """Return the updates of a group of clients, each with what it kept from its round before."""
        update, scalars = self.train(bench, group, *more)
        self.clients = [client for client, _ in group]
        kept = [self.residuals.get(client, np.zeros(update.shape[1])) for client in self.clients]
        return update + self.share * np.array(kept), scalars

    def compressed(self, sketch: Sketch, vectors: NDArray[np.floating]) -> NDArray[np.floating]:
        """Return what is sent, and keep what it leaves out of each vector."""
        sent = self.sketch_of(sketch, vectors)
        for client, vector, each in zip(self.clients, vectors, sent, strict=True):
            self.residuals[client] = vector - sketch.back(each)
        return sent


def main(argv: Sequence[str] | None = None) -> int:
    """Run what FILE lacks and print the table."""
    parser = argparse.ArgumentParser("python -m fedveil.benchmarks.error_feedback", description=__doc__)
    parser.add_argument("--ratio", type=float, default=0.1)
    parser.add_argument("--seeds", type=int, default=3, help="from 0 on")
    parser.add_argument("--json", type=Path, metavar="FILE", required=True)
    given = parser.parse_args(argv)
    runs: list[Run] = json.loads(given.json.read_text()) if given.json.is_file() else []
    known = {(run["kind"], run["share"], run["seed"]) for run in runs}
    ways = [(kind, share, seed) for seed in range(given.seeds) for kind in KINDS for share in SHARES]
    for kind, share, seed in ways:
        if (kind, share, seed) in known:
            continue
        asked = [f"compress={kind}", f"compress.ratio={given.ratio}", f"seed={seed}", "audit=off"]
        with Feedback(share).in_place(), tempfile.TemporaryDirectory() as folder:
            federation = build(settings_from_overrides(asked))
            result = run_simulation(federation, Path(folder) / "run", quiet=True).result
        accuracy = 100 * float(result["metrics"]["accuracy"])
        runs.append({"kind": kind, "share": share, "seed": seed, "accuracy": accuracy})
        given.json.write_text(json.dumps(runs, indent=1) + "\n")
        print(runs[-1], file=sys.stderr, flush=True)
    found = {
        way: [r["accuracy"] for r in runs if (r["kind"], r["share"]) == way]
        for way in dict.fromkeys((r["kind"], r["share"]) for r in runs)
    }
    print(as_table([
        {"compress": kind, "kept of the residual": share, "accuracy": f"{statistics.mean(each):.2f}", "seeds": len(each)}
        for (kind, share), each in found.items()
    ]))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
