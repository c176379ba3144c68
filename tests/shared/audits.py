"""Audited runs on a small task, and runs whose noise is halved."""

import runpy
from pathlib import Path

from fedveil.run.run import RunResult

from .runs import run_quietly

noise_halved = runpy.run_path(str(Path(__file__).parents[1] / "faults" / "halved_noise.py"))["noise_halved"]

ROUNDS = 5
SMALL = ("task=digits", "task.num_clients=20", f"num_rounds={ROUNDS}", "cohort.rate=0.5", "batch_size=100")
NOISE = ("privacy.noise_multiplier=2", "privacy.target_epsilon=null", "privacy.target_delta=0.01")


def run_audited(folder: Path, *overrides: str) -> RunResult:
    """Run `ROUNDS` rounds whose noise an audit can judge."""
    return run_quietly([*SMALL, *NOISE, *overrides], folder)
