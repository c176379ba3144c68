"""Result of an audit: the coins that it keeps, opens and checks against their commitment."""

import json
from pathlib import Path

import pytest
from shared.audits import noise_halved, run_audited

from fedveil.audit.result import memorised
from fedveil.base.refusal import Refusal
from fedveil.cli.audit import audit_run
from fedveil.privacy.audit.memorisation import MemorisationResult

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


def test_memorisation_is_printed_from_the_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_audited(tmp_path / "run", "audit=full", "audit.canaries=40")
    assert memorised(tmp_path / "run") == []
    path = tmp_path / "run" / "result.json"
    content = json.loads(path.read_text())
    figures = {"bits": 6.25, "unplanted": 1.5, "limit": 9.966}
    row = {"name": "exposure_x16", "p_value": 0.002, "shown": figures, "refutes": False}
    content["audit"]["memorisation"] = [row]
    path.write_text(json.dumps(content))
    assert memorised(tmp_path / "run") == [MemorisationResult("exposure_x16", 0.002, figures)]
    capsys.readouterr()
    audit_run(tmp_path / "run")
    line = next(line for line in capsys.readouterr().out.splitlines() if "exposure" in line)
    assert line.split(maxsplit=1) == ["exposure_x16", "p = 0.002, bits 6.25, unplanted 1.5, limit 9.97"]
    audit_run(tmp_path / "run", as_json=True)
    (shown,) = json.loads(capsys.readouterr().out)["memorisation"]
    assert shown == {name: row[name] for name in ("name", "p_value", "shown")}
    (tmp_path / "run" / "result.json").unlink()
    assert memorised(tmp_path / "run") == []
