"""Norms of honest updates where encryption alone clips them, and the accuracy at norms that are smaller.

``python -m fedveil.benchmarks.update_norms TASK [NORM ...] [OVERRIDE ...]`` prints a row for each privacy and norm: without noise and
at four epsilons of records, three seeds each. Without a norm the shipped one is taken.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..client import secure_update
from ..configs.settings import settings_from_overrides
from ..simulations.simulate import simulate

SEEDS = (1, 2, 3)
SHARED = ("cohort=all", "num_rounds=20", "audit=off", "secagg=masked")
PRIVACY = {
    "none": ("privacy=none",),
    **{
        f"record, epsilon {epsilon:g}": ("privacy=record", f"privacy.target_epsilon={epsilon:g}")
        for epsilon in (8.0, 3.0, 1.0, 0.5)
    },
}


@contextmanager
def seen_norms() -> Generator[list[float]]:
    """Give a list that the L2 norm of each update is put into, before it is clipped."""
    honest, norms = secure_update.encode_share, list[float]()

    def encode(update: dict[str, np.ndarray], *given: Any, **options: Any) -> Any:
        squares = (float(np.sum(np.square(part, dtype=np.float64))) for part in update.values())
        norms.append(sum(squares) ** 0.5)
        return honest(update, *given, **options)

    secure_update.encode_share = encode
    try:
        yield norms
    finally:
        secure_update.encode_share = honest


def run(overrides: Sequence[str], seed: int) -> tuple[float, list[float]]:
    """Return the accuracy that a run ends with, and the norms of its updates.

    Args:
      overrides: of the configuration.
      seed: of the run.
    """
    settings = settings_from_overrides([*SHARED, *overrides, f"seed={seed}"])
    with tempfile.TemporaryDirectory() as folder, seen_norms() as norms:
        result = simulate(settings, Path(folder) / "run", quiet=True).result
    return float(result["metrics"]["accuracy"]), norms


def main(arguments: Sequence[str]) -> None:
    """Print a row for each privacy and norm.

    Args:
      arguments: the task, norms, and overrides of the configuration.
    """
    task, *rest = arguments
    more = [each for each in rest if "=" in each]
    norms = [f"task.longest_update={each}" for each in rest if "=" not in each] or [""]
    print("| privacy | norm | accuracy, median of 3 | least | median update | 99 % | longest | clipped |")
    print("|---|---|---|---|---|---|---|---|")
    for name, overrides in PRIVACY.items():
        for norm in norms:
            asked = [f"task={task}", *overrides, *([norm] if norm else []), *more]
            masked = settings_from_overrides([*SHARED, *asked]).secagg
            assert masked is not None
            clip = masked.clipping_norm
            runs = [run(asked, seed) for seed in SEEDS]
            reached, seen = [each for each, _ in runs], np.concatenate([each for _, each in runs])
            row = (
                name,
                f"{clip:g}",
                f"{statistics.median(reached):.3f}",
                f"{min(reached):.3f}",
                *(f"{float(np.quantile(seen, part)):.3g}" for part in (0.5, 0.99, 1.0)),
                f"{float(np.mean(seen > clip)):.2%}",
            )
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
