"""Tests of ``deadline``."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from fedveil.simulations.deadline import PastDeadline, limited_to

pytestmark = pytest.mark.usefixtures("fast_runs")


SLOW = "import time\nfor _ in range(20):\n    time.sleep(0.01)\n"


def test_a_deadline_lets_an_import_end_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a module would stay in the process, and fail whoever imports it later."""
    (tmp_path / "slow_to_import.py").write_text(f"{SLOW}whole = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PastDeadline), limited_to(0.01):
        import_module("slow_to_import")
        while True:
            pass
    assert sys.modules["slow_to_import"].whole


def test_a_deadline_holds_in_a_program_that_is_itself_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "from fedveil.simulations.deadline import limited_to\nwith limited_to(0.01):\n    while True:\n        pass\n"
    (tmp_path / "imported_program.py").write_text(lines)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PastDeadline):
        import_module("imported_program")


def test_imports_of_a_training_precede_the_first_clock(tmp_path: Path) -> None:
    """In a process of its own, which has imported nothing yet."""
    program = (
        "import sys\nfrom fedveil.configs.settings import settings_from_overrides\n"
        "from fedveil.simulations import in_process\nfrom fedveil.simulations.simulate import simulate\n"
        "true, before, after = in_process.limited_to, [], []\n"
        "def noted(seconds):\n    before.append(set(sys.modules))\n    return true(seconds)\n"
        "in_process.limited_to = noted\n"
        "asked = ['task=digits', 'task.num_clients=4', 'privacy=record', 'privacy.gradients=book_keeping', 'cohort=all', 'num_rounds=1', 'engine.workers=1']\n"
        "simulate(settings_from_overrides(asked), __import__('pathlib').Path('run'), quiet=True)\n"
        "print(sorted({each for each in before[-1] - before[0] if each.startswith(('fedveil', 'opacus', 'torch'))}))\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert said.returncode == 0 and said.stdout.splitlines()[-1] == "[]", said.stdout + said.stderr
