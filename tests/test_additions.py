"""Additions that docs/architecture.md links as diffs: each applies alone, and a copy with all of them runs what they add."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
DIFFS = Path(__file__).parent / "fixtures" / "additions"
OUTSIDE = ("tests", "docs", "benchmarks", "compiled", "typings", "build", ".*", "*.egg-info", "__pycache__")
FILES = {  # as the page says
    "callback": ["base/extensions.py", "run/trackers.py"],
    "cohort": ["configs/cohort/in_order.yaml", "configs/task_settings.py", "strategies/cohorts.py"],
    "extension": ["archive/__init__.py", "archive/zip_file.py", "base/extensions.py", "pyproject.toml"],
    "mechanism": ["privacy/mechanisms/margin.py", "privacy/mechanisms/mechanism.py"],
    "mode": [
        "configs/privacy/client_model.yaml",
        "configs/privacy_settings.py",
        "messages/training_order.py",
        "modes/client_model.py",
    ],
    "order": [
        "deployment/device/order_policy.py",
        "messages/training_order.py",
        "run/client_instructions.py",
    ],
    "query": [
        "base/extensions.py",
        "configs/shared.yaml",
        "questions/headcount.py",
        "questions/settings.py",
    ],
}
RUN = (
    *("task=digits", "num_rounds=2", "seed=0", "accept_vacuous=true"),
    *("privacy=client_model", "privacy.target_epsilon=40", "privacy.allow_large_delta=true"),
    *("cohort=in_order", "cohort.size=20", "privacy.noise=margin"),
    *("evaluate.headcount=20", "callbacks=[progress,archive]"),
)
ORDER = """
from fedveil.messages.training_order import TrainingOrder, ModeName
from fedveil.messages.local_training import LocalTraining
order = TrainingOrder("run", ModeName.NONE, LocalTraining())
assert "purpose" not in order.to_json()
print(TrainingOrder.from_json(TrainingOrder("run", ModeName.NONE, LocalTraining(), purpose="beds").to_json()).purpose)
"""


@pytest.mark.parametrize("name", FILES)
def test_an_addition_touches_the_files_that_the_page_counts(name: str) -> None:
    diff = DIFFS / f"{name}.diff"
    assert sorted(re.findall(r"^\+\+\+ b/(\S+)$", diff.read_text(), re.MULTILINE)) == FILES[name]
    subprocess.run(["git", "apply", "--check", diff], cwd=ROOT, check=True)


def test_every_addition_is_linked() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    linked = re.findall(r"\(\.\./tests/fixtures/additions/(\w+)\.diff\)", page)
    assert sorted(linked) == sorted(FILES) == sorted(each.stem for each in DIFFS.glob("*.diff"))


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Python beside a copy of the package with every addition."""
    folder = tmp_path_factory.mktemp("additions")
    shutil.copytree(ROOT, folder / "fedveil", ignore=shutil.ignore_patterns(*OUTSIDE))
    diffs = sorted(DIFFS.glob("*.diff"))
    subprocess.run(["git", "apply", "--directory=fedveil", *diffs], cwd=folder, check=True)
    env = {**os.environ, "PYTHONPATH": str(folder), "GIT_CEILING_DIRECTORIES": str(folder.parent)}

    def run(*words: str) -> str:
        command = [sys.executable, *words]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="module")
def run(python: Callable[..., str]) -> Path:
    """The folder of a run with all of them."""
    python("-m", "fedveil", "simulate", *RUN, "hydra.run.dir=run")
    return Path(python("-c", "import os; print(os.getcwd())").strip()) / "run"


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_added_mode_gives_its_promise(run: Path) -> None:
    result = read(run / "result.json")
    assert (result["status"], result["rounds_completed"]) == ("completed", 2)
    assert [(each["adversary"], each["epsilon"] == "infinity") for each in result["privacy"]] == [
        ("server", True),
        ("model", False),
    ]


def test_a_mode_is_planned_verified_and_reported(run: Path, python: Callable[..., str]) -> None:
    plan = python("-m", "fedveil", "plan", *RUN)
    assert plan.startswith("Unit: one client") and "Before round 1 the clients are counted" in plan
    python("-m", "fedveil", "verify", "run")
    python("-m", "fedveil", "report", "run")
    (row,) = (each for each in read(run / "report.json")["privacy"] if each["relies_on"])
    assert row["adversary"] == "model" and "added at the server" in row["mechanism"]


def test_a_cohort_draws(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["invited"] for row in rows] == [20, 20]
    assert "in_order" in (run / "config.yaml").read_text()


def test_a_mechanism_is_charged_for_the_noise_that_it_adds(python: Callable[..., str]) -> None:
    script = "from fedveil.privacy.mechanisms.mechanism import mechanism_of as m; print(m('margin', None, 2, None).event(2))"
    assert "noise_multiplier=2.5" in python("-c", script)


def test_a_query_is_charged_before_the_first_round(run: Path) -> None:
    record = read(run / "headcount.json")
    assert record["epsilon_before"] == 0.0 < record["epsilon_after"] < 1.0
    (figure,) = record["answers"][0]["figures"]
    assert figure["low"] < 100 < figure["high"]


def test_callbacks_write_their_files(run: Path) -> None:
    assert read(run / "progress.json") == {"round": 2, "of": 2}
    assert run.with_suffix(".zip").exists()


def test_an_order_carries_a_new_field_only_if_it_is_set(python: Callable[..., str]) -> None:
    assert python("-c", ORDER) == "beds\n"
