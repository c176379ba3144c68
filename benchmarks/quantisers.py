"""Quantisers of NVFLARE and APPFL on the updates of a run without privacy: bytes, relative error, and accuracy at the end.

``python -m fedveil.benchmarks.quantisers --peers-python PATH --json FILE`` trains `mnist5k` without privacy, each time with
all updates sent through one of the peers' own quantisers. PATH is a Python with nvflare 2.9, bitsandbytes 0.50, appfl
1.12 and zfpy. Each run is written to FILE as it ends; the same command again goes on where it stopped.
"""

from __future__ import annotations

import argparse
import io
import os
import struct
import subprocess
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
from ..run.build import build
from ..simulations.simulate import run_simulation
from .error_feedback import TRAIN
from .tables import Row, as_table, found_in, keep

WHOLE = "none"
WAYS = (
    WHOLE,
    *(f"NVFLARE:{kind}" for kind in ("float16", "blockwise8", "float4", "normfloat4", "adaquant")),
    *(f"APPFL:{bound:g}" for bound in (0.01, 0.1, 0.3)),
)
LENGTH = struct.Struct("<q")
Run = dict[str, Any]  # way, seed, bytes of an update, relative error, accuracy


class Peer:
    """Process that quantises updates and gives them back; its methods stand in for the cohort's training.

    Args:
      python: that has the peers.
      way: of `WAYS`.
    """

    def __init__(self, python: str, way: str) -> None:
        script = Path(__file__).with_name("peer_quantisers.py")
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.way, self.train = way, getattr(cohort_training, TRAIN)
        self.sizes, self.errors = list[float](), list[float]()
        self.process = None
        if way != WHOLE:
            command = [python, str(script), way]
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
            )

    @contextmanager
    def in_place(self) -> Generator[None]:
        """Let cohorts train with it, as long as the block lasts."""
        try:
            with mock.patch.object(cohort_training, TRAIN, self.trained):
                yield
        finally:
            if self.process is not None and self.process.stdin is not None:
                self.process.stdin.close()
                self.process.wait()

    def trained(self, *given: Any) -> tuple[NDArray[Any], Any]:
        """Return the updates of a group of clients as they come back."""
        update, scalars = self.train(*given)
        back, sizes = self.through(update)
        lengths = np.linalg.norm(update, axis=1).clip(1e-12)
        self.sizes.append(float(sizes.mean()))
        self.errors.append(float((np.linalg.norm(back - update, axis=1) / lengths).mean()))
        return back, scalars

    def through(self, updates: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return what comes back of updates, shape (clients, coordinates), and the bytes of each, shape (clients,)."""
        if self.process is None:
            return updates, np.full(len(updates), 4 * updates.shape[1])
        assert self.process.stdin is not None and self.process.stdout is not None
        packed = io.BytesIO()
        np.save(packed, updates)
        self.process.stdin.write(LENGTH.pack(packed.tell()) + packed.getvalue())
        self.process.stdin.flush()
        back, sizes = (self._read(self.process.stdout) for _ in range(2))
        return back.astype(updates.dtype), sizes

    @staticmethod
    def _read(pipe: Any) -> NDArray[Any]:
        head = pipe.read(LENGTH.size)
        if len(head) < LENGTH.size:
            raise SystemExit("the peer's process has ended; run peer_quantisers.py by hand to see why")
        return np.load(io.BytesIO(pipe.read(LENGTH.unpack(head)[0])))


def main(argv: Sequence[str] | None = None) -> int:
    """Run what FILE lacks and print the table."""
    parser = argparse.ArgumentParser("python -m fedveil.benchmarks.quantisers", description=__doc__)
    parser.add_argument(
        "--peers-python", metavar="PATH", required=True, help="a Python with nvflare and appfl"
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--seeds", type=int, default=1, help="from 0 on")
    parser.add_argument("--json", type=Path, metavar="FILE", required=True)
    parser.add_argument("keys", nargs="*", metavar="KEY=VALUE", help="of fedveil simulate")
    given = parser.parse_args(argv)
    found = found_in(given.json)
    runs: list[Run] = found["runs"]
    known = {(run["way"], run["seed"]) for run in runs}
    for way, seed in [(way, seed) for seed in range(given.seeds) for way in given.ways]:
        if (way, seed) in known:
            continue
        asked = ["privacy=none", f"seed={seed}", "audit=off", *given.keys]
        peer = Peer(given.peers_python, way)
        with peer.in_place(), tempfile.TemporaryDirectory() as folder:
            federation = build(settings_from_overrides(asked))
            result = run_simulation(federation, Path(folder) / "run", quiet=True).result
        run: Run = {
            "way": way,
            "seed": seed,
            "bytes": float(np.mean(peer.sizes)),
            "error": float(np.mean(peer.errors)),
            "accuracy": 100 * float(result["metrics"]["accuracy"]),
        }
        keep(found, run, given.json)
    print(as_table(rows_of(runs)))
    return 0


def rows_of(runs: Sequence[Run]) -> list[Row]:
    """Return a row for each way: bytes of an update, relative error, and mean accuracy.

    Args:
      runs: of all seeds.
    """
    ways = dict.fromkeys(run["way"] for run in runs)
    groups = {way: [run for run in runs if run["way"] == way] for way in ways}
    return [
        {
            "quantiser": way.replace(":", ", "),
            "bytes up": round(float(np.mean([run["bytes"] for run in each]))),
            "relative error": f"{np.mean([run['error'] for run in each]):.2g}",
            "accuracy": f"{np.mean([run['accuracy'] for run in each]):.1f}",
            "seeds": len(each),
        }
        for way, each in groups.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
