"""Long runs: time and memory of their rounds, and of the commands that read what they left."""

from __future__ import annotations

import tempfile
from pathlib import Path

from .engines import Options
from .stopwatch import run_fedveil
from .tables import Row, conditions, result_of

SHARES = (100, 10, 1)  # of the rounds that are asked for, so that growth shows
JOB = (
    "task=digits",
    "task.num_clients=20",
    "task.local_epochs=1",
    "cohort.rate=0.2",
    "privacy=client_central",
    "privacy.noise_multiplier=20",
    "privacy.target_epsilon=null",
    "privacy.target_delta=0.01",
    "seed=1",
)


def run_long(options: Options) -> Row:
    """Measure runs of a hundredth, a tenth and all of the rounds, and the reading of each."""
    before = conditions()
    rows = [_row(options.size.rounds // share) for share in SHARES]
    notes = ["20 clients, some 4 a round, light audit; seconds are of CPU; MiB: peak of the process"]
    return result_of("long_runs", before, {"Runs by their rounds": rows}, notes)


def _row(rounds: int) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        trained = run_fedveil("simulate", *JOB, f"num_rounds={rounds}", f"hydra.run.dir={run}")
        ledger = run_fedveil("ledger", "verify", str(run / "ledger"))
        report = run_fedveil("report", str(run))
        verified = run_fedveil("verify", str(run))
    return {
        "rounds": rounds,
        "run s": round(trained.cpu, 1),
        "run MiB": round(trained.peak),
        "ledger verify s": round(ledger.cpu, 2),
        "report s": round(report.cpu, 2),
        "verify s": round(verified.cpu, 2),
        "verify MiB": round(verified.peak),
    }
