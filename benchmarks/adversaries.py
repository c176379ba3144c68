"""Accuracy of encrypted sums some of whose members pull the wrong way with all that the norm allows.

``python -m fedveil.benchmarks.adversaries [OVERRIDE ...]`` prints a table. An adversary trains as everybody does, turns its
update around and makes it as long as the clipping norm: the strongest vector of its own that no bound on a sum can see.
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
from ..client.secure_update import TrainingJob
from ..configs.settings import settings_from_overrides
from ..privacy.secagg.attempt import Work
from ..privacy.secagg.client import Participant
from ..simulations.simulate import simulate
from ..strategies.identity import FIRST_NODE

SHARES = (0.0, 0.1, 0.2)
SEEDS = (1, 2, 3)
CLIENTS = 20
SHARED = ("task=digits", f"task.num_clients={CLIENTS}", "cohort=all", "num_rounds=20", "audit=off")
MODES = {
    "encryption alone": ("privacy=record", "secagg=masked", "privacy.target_epsilon=8"),
    "encryption alone, norm of 10": (
        "privacy=record",
        "secagg=masked",
        "privacy.target_epsilon=8",
        "task.longest_update=10",
    ),
    "noise of the clients": (
        "privacy=client_distributed",
        "privacy.target_epsilon=8",
        "privacy.allow_large_delta=true",
    ),
}
LONG = 1e6  # times an update, which is then clipped to the norm


@contextmanager
def adversaries(count: int) -> Generator[None]:
    """Let the first so many clients turn their updates around, as long as the block lasts."""
    work, honest, node = TrainingJob.work, secure_update.encode_share, [0]

    def asked(job: TrainingJob, participant: Participant) -> Work:
        node[0] = job.identity.node
        return work(job, participant)

    def encode(update: dict[str, np.ndarray], *given: Any, **options: Any) -> Any:
        turned = node[0] < FIRST_NODE + count
        sent = {name: value * -LONG for name, value in update.items()} if turned else update
        return honest(sent, *given, **options)

    patched = ((TrainingJob, "work", asked, work), (secure_update, "encode_share", encode, honest))
    for owner, name, replaced, _ in patched:
        setattr(owner, name, replaced)
    try:
        yield
    finally:
        for owner, name, _, true in patched:
            setattr(owner, name, true)


def accuracy(overrides: Sequence[str], share: float, seed: int) -> tuple[float, int]:
    """Return the accuracy that a run ends with, and in how many rounds a sum could not be true.

    Args:
      overrides: of the configuration.
      share: of the clients that are adversaries.
      seed: of the run.
    """
    settings = settings_from_overrides([*SHARED, *overrides, f"seed={seed}"])
    with tempfile.TemporaryDirectory() as folder, adversaries(round(CLIENTS * share)):
        result = simulate(settings, Path(folder) / "run", quiet=True).result
    return float(result["metrics"]["accuracy"]), int(result["rounds_untrue"])


def main(more: Sequence[str]) -> None:
    """Print a row for each mode and share of adversaries.

    Args:
      more: overrides of the configuration.
    """
    print("| mode | adversaries | accuracy, median of 3 | least | untrue rounds |\n|---|---|---|---|---|")
    for name, overrides in MODES.items():
        for share in SHARES:
            runs = [accuracy([*overrides, *more], share, seed) for seed in SEEDS]
            reached = [each for each, _ in runs]
            untrue = sum(count for _, count in runs)
            row = (name, f"{share:.0%}", f"{statistics.median(reached):.3f}", f"{min(reached):.3f}", untrue)
            print(f"| {' | '.join(map(str, row))} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
