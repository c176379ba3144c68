"""A run is the same bits with any number of workers."""

from pathlib import Path

import pytest
from shared.runs import json_lines, run_quietly

MADE = (
    "task=custom",
    "task.target=fedveil.benchmarks.made_task:Made",
    "allow_modules=[fedveil.benchmarks.made_task]",
)
DIGITS = ("task=digits", "task.num_clients=12", "cohort=all")
STACKED = ("task=digits", "task.num_clients=140", "cohort.rate=0.96")  # more than one stack
EPSILON = ("privacy.target_epsilon=20",)

JOBS = {
    "stacked": STACKED,
    "stacked, uneven": (*MADE, "task.args.workload=tiny-power", "task.args.num_clients=150", "cohort=all"),
    "stacked, not hidden": (*STACKED, "privacy=none"),
    "stacked, compressed": (*STACKED, "compress=project"),
    "stacked, audited": (*STACKED, "audit=full", "audit.canaries=20", "audit.looks=1", "audit.on_alarm=note"),
    "stacked, images": (*MADE, "task.args.workload=cnn-100k", "task.args.num_clients=40", "cohort=all"),
    "one by one": (*MADE, "task.args.workload=cnn-1m", "task.args.num_clients=4", "cohort=all"),
    "one by one, adam": (*DIGITS, "optimizer=adamw"),
    "faults": (*DIGITS, "faults.dropout=0.2", "faults.corrupt=0.2"),
    "record": (*DIGITS, "privacy=record"),
    "record and client": (*DIGITS, "privacy=record_and_client"),
    "records of all": (*DIGITS, "privacy=record_distributed"),
    "records of many": ("task=digits", "task.num_clients=140", "cohort=all", "privacy=record_distributed"),
    "encrypted": (*DIGITS, "privacy=client_distributed"),
    "layers that stay": (*DIGITS, "personal=layers", "personal.layers=[*bias]"),
    "table": ("task=heart", "cohort=all"),
    "evaluated by clients": (*DIGITS, "evaluate.clients=every:1"),
}


@pytest.mark.parametrize("job", JOBS)
def test_a_run_is_the_same_bits_with_any_number_of_workers(job: str, tmp_path: Path) -> None:
    results = []
    for workers in (1, 2, 3):
        folder = tmp_path / str(workers)
        outcome = run_quietly([*JOBS[job], "num_rounds=2", "seed=1", f"engine.workers={workers}"], folder)
        assert outcome.result["status"] == "completed"
        rows = [{**row, "seconds": 0} for row in json_lines(folder / "metrics.jsonl")]
        results.append(((folder / "model.safetensors").read_bytes(), rows, outcome.result["metrics"]))
    assert results[0] == results[1] == results[2]
