"""Result of an audit: the coins that it keeps, opens and checks against their commitment."""

import json
from pathlib import Path

import pytest
from shared.audits import noise_halved, run_audited

from fedveil.base.refusal import Refusal
from fedveil.cli.audit import audit_run

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm", "fast_runs")


def test_a_run_that_is_not_over_keeps_its_coins_to_itself(tmp_path: Path) -> None:
    with noise_halved(since=2):
        run_audited(tmp_path / "run", "audit=full", "audit.canaries=40", "audit.on_alarm=pause")
    assert "opened" not in json.loads((tmp_path / "run" / "audit.json").read_text())
    with pytest.raises(Refusal, match="not opened before the run is over"):
        audit_run(tmp_path / "run")
    with pytest.raises(Refusal, match="holds no audit that is over"):
        audit_run(tmp_path)


def test_coins_that_were_not_committed_to_prove_nothing(tmp_path: Path) -> None:
    run_audited(tmp_path / "run", "audit=full", "audit.canaries=40")
    terms = tmp_path / "run" / "audit.json"
    fields = json.loads(terms.read_text())
    fields["opened"]["seed"] = "00" * 32
    terms.write_text(json.dumps(fields))
    with pytest.raises(Refusal, match="do not match the commitment"):
        audit_run(tmp_path / "run")
