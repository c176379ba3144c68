"""What a model remembers of each record: kept by its owner, sent by nobody, and changing nothing."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from shared.runs import run_quietly

from fedveil.base.refusal import Refusal
from fedveil.cli.audit_records import show_records
from fedveil.configs.settings import settings_from_overrides
from fedveil.privacy.audit.client_rows import trace
from fedveil.run.client_instructions import traces_of

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")

SMALL = ["task=digits", "task.num_clients=5", "cohort=all", "privacy=none", "audit=full", "audit.looks=1"]


def test_traces_stay_with_the_client_and_change_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, kept in (("with", "true"), ("without", "false")):
        overrides = [*SMALL, "num_rounds=4", "audit.on_alarm=note", f"audit.loss_traces={kept}"]
        assert run_quietly(overrides, tmp_path / name).exit_code == 0
    metrics = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("with", "without")]
    losses = [[json.loads(line)["loss"] for line in lines] for lines in metrics]
    assert losses[0] == pytest.approx(
        losses[1], rel=1e-4
    )  # clients trained at once are equal to float rounding
    found = trace(tmp_path / "with" / "client_traces" / "0.losses")
    assert found.shape[0] == 4 and np.isfinite(found).all() and found[-1].mean() < found[0].mean()
    assert not (tmp_path / "without" / "client_traces").exists()
    assert show_records(tmp_path / "with", as_json=True) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [each["client"] for each in shown["clients"]] == [0, 1, 2, 3, 4]
    assert len(shown["clients"][0]["scores"]) == found.shape[1] and 0 <= shown["planted_auc"]["value"] <= 1
    assert show_records(tmp_path / "with") == 0
    assert "planted with a random label" in capsys.readouterr().out
    with pytest.raises(Refusal, match="no traces of losses"):
        show_records(tmp_path / "without")


def test_real_data_leave_no_trace(tmp_path: Path) -> None:
    asked = settings_from_overrides(["audit=full", "audit.loss_traces=true"])
    with pytest.raises(Refusal, match=r"audit\.loss_traces.*only its owner may see"):
        traces_of(SimpleNamespace(settings=asked, simulated=False), tmp_path)
    assert traces_of(SimpleNamespace(settings=asked, simulated=True), tmp_path)
