"""New mode of privacy: a diff of three Python files and one YAML file adds it, and the copy that has it runs by its name."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DIFF = Path(__file__).parents[1] / "fixtures" / "new_mode.diff"
OUTSIDE = ("tests", "docs", "benchmarks", "compiled", "typings", "build", ".*", "*.egg-info", "__pycache__")
RUN = ("task=digits", "num_rounds=2", "seed=0", "privacy=client_model", "privacy.target_epsilon=40")


def test_a_mode_is_added_in_four_files_and_runs_by_its_name(tmp_path: Path) -> None:
    names = re.findall(r"^\+\+\+ b/(\S+)$", DIFF.read_text(), re.MULTILINE)
    assert sorted(names) == [
        "configs/privacy/client_model.yaml",
        "configs/privacy_settings.py",
        "messages/training_order.py",
        "modes/client_model.py",
    ]
    copy = tmp_path / "fedveil"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*OUTSIDE))
    subprocess.run(["git", "apply", "--directory=fedveil", str(DIFF)], cwd=tmp_path, check=True)
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}

    def fedveil(*argv: str) -> str:
        command = [sys.executable, "-m", "fedveil", *argv]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert fedveil("plan", *RUN).startswith("Unit: one client")
    fedveil("simulate", *RUN, "accept_vacuous=true", "hydra.run.dir=run")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["status"], result["rounds_completed"]) == ("completed", 2)
    assert [(each["adversary"], each["epsilon"] == "infinity") for each in result["privacy"]] == [
        ("server", True),
        ("model", False),
    ]
    fedveil("verify", "run")
    fedveil("report", "run")
    (row,) = (
        each
        for each in json.loads((tmp_path / "run" / "report.json").read_text())["privacy"]
        if each["relies_on"]
    )
    assert row["adversary"] == "model" and "added at the server" in row["mechanism"]
