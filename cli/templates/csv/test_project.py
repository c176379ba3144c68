"""The project runs, learns, and stays within its budget."""

import json
import subprocess
import sys
from pathlib import Path

from fedveil.tasks import load_task

COMMAND = [sys.executable, "-m", "fedveil", "simulate", "--config-dir", ".", "--config-name", "project", "--json"]
BUDGET = 3.0


def test_every_file_is_a_client_and_none_is_empty() -> None:
    task = load_task("csv", {"folder": "data", "schema": "schema.yaml", "simulated": True})
    assert task.num_clients == 8
    assert all(len(task.client_data(client)) for client in range(task.num_clients))


def test_it_learns_within_its_budget(tmp_path: Path) -> None:
    command = [*COMMAND, "num_rounds=3", f"hydra.run.dir={tmp_path / 'run'}"]
    process = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout)
    assert result["metrics"]["accuracy"] > 0.6
    assert all(row["epsilon"] <= BUDGET for row in result["privacy"])
