"""The project runs, learns, and stays within its budget."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from network import Shops

COMMAND = [sys.executable, "-m", "fedveil", "simulate", "--config-dir", ".", "--config-name", "project", "--json"]
BUDGET = 3.0


def test_the_model_is_the_same_on_every_call() -> None:
    first, second = (Shops().model().state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_it_learns_within_its_budget(tmp_path: Path) -> None:
    command = [*COMMAND, "num_rounds=3", f"hydra.run.dir={tmp_path / 'run'}"]
    process = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout)
    assert result["metrics"]["accuracy"] > 0.6
    model = next(row for row in result["privacy"] if row["adversary"] == "model")
    assert model["epsilon"] <= BUDGET
