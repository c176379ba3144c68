"""The project runs, learns, stays within its budget, and gives scikit-learn a model that predicts the same."""

import json
import subprocess
import sys
from pathlib import Path

from cells import Cells, as_sklearn

COMMAND = [sys.executable, "-m", "fedveil", "simulate", "--config-dir", ".", "--config-name", "project", "--json"]
BUDGET = 3.0


def test_it_learns_within_its_budget(tmp_path: Path) -> None:
    command = [*COMMAND, "num_rounds=5", f"hydra.run.dir={tmp_path / 'run'}"]
    process = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout)
    assert result["metrics"]["accuracy"] > 0.7
    assert all(row["epsilon"] <= BUDGET for row in result["privacy"])
    held_out = Cells().held_out()
    score = as_sklearn(tmp_path / "run").score(held_out.inputs.numpy(), held_out.targets.numpy())
    assert abs(score - result["metrics"]["accuracy"]) < 0.01
