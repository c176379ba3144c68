"""Result of an audit: the coins that it keeps, opens and checks against their commitment."""

import json
import runpy
from pathlib import Path

import pytest
from shared.runs import run_quietly

from fedveil.base.refusal import Refusal
from fedveil.cli.audit import audit_run
from fedveil.run.run import RunResult

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm", "fast_runs")


noise_halved = runpy.run_path(str(Path(__file__).parents[1] / "faults" / "halved_noise.py"))["noise_halved"]


ROUNDS = 5


SMALL = ("task=digits", "task.num_clients=20", f"num_rounds={ROUNDS}", "cohort.rate=0.5", "batch_size=100")


NOISE = ("privacy.noise_multiplier=2", "privacy.target_epsilon=null", "privacy.target_delta=0.01")


def run(folder: Path, *overrides: str) -> RunResult:
    return run_quietly([*SMALL, *NOISE, *overrides], folder)


def test_a_run_that_is_not_over_keeps_its_coins_to_itself(tmp_path: Path) -> None:
    with noise_halved(since=2):
        run(tmp_path / "run", "audit=full", "audit.canaries=40", "audit.on_alarm=pause")
    assert "opened" not in json.loads((tmp_path / "run" / "audit.json").read_text())
    with pytest.raises(Refusal, match="not opened before the run is over"):
        audit_run(tmp_path / "run")
    with pytest.raises(Refusal, match="holds no audit that is over"):
        audit_run(tmp_path)


def test_coins_that_were_not_committed_to_prove_nothing(tmp_path: Path) -> None:
    run(tmp_path / "run", "audit=full", "audit.canaries=40")
    terms = tmp_path / "run" / "audit.json"
    fields = json.loads(terms.read_text())
    fields["opened"]["seed"] = "00" * 32
    terms.write_text(json.dumps(fields))
    with pytest.raises(Refusal, match="do not match the commitment"):
        audit_run(tmp_path / "run")
