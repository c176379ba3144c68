"""Questions to clients on this machine: their columns."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from shared.questions import FREE, ROWS, Ages, federation, inquiry

from fedveil.__main__ import run
from fedveil.base.refusal import Refusal
from fedveil.privacy.statistics.columns import Numbers
from fedveil.questions.simulated import ask_here, require_columns


class Words(Ages):
    """The same, whose ages are words."""

    def columns(self, client: int) -> Mapping[str, np.ndarray]:
        return {"age": np.array(["old"] * ROWS)}


def test_a_column_that_nobody_has_is_refused_before_it_is_charged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Refusal, match=re.escape("of='agee': is no column; there are age")):
        ask_here(federation(), inquiry(of="agee"), FREE, tmp_path / "into")
    assert not (tmp_path / "into").exists() and not caplog.records


def test_only_the_names_of_columns_are_looked_at() -> None:
    """A refusal for what a row holds would tell it."""
    with patch.object(Numbers, "read", autospec=True, side_effect=Numbers.read) as read:
        require_columns(Words(), inquiry(), None)
    assert read.call_count and all(not len(call.args[1]["age"]) for call in read.call_args_list)


STUDY = {
    "name": "time",
    "records": 130,
    "noise_multiplier": 0.1,
    "ask": [
        {
            "kind": "survival",
            "of": "days",
            "edges": [0, 10, 20, 30],
            "event": "died",
            "event_categories": ["no", "yes"],
            "by": "arm",
            "by_categories": ["new", "old"],
        }
    ],
}


@pytest.mark.parametrize("privacy", ["client_central", "client_distributed", "record", "record_distributed"])
def test_survival_is_answered_by_the_command_in_every_mode(
    privacy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wards").mkdir()
    for ward in range(3):
        rows = [
            f"{(row * 7) % 33},{'no' if row % 4 == 0 else 'yes'},{'new' if row % 3 else 'old'}"
            for row in range(400)
        ]
        text = "\n".join(["days,died,arm", *rows])
        (tmp_path / "wards" / f"{ward}.csv").write_text(text + "\n")
    (tmp_path / "q.yaml").write_text(json.dumps(STUDY))
    table = ("task=csv", "task.folder=wards", "task.label=died", "task.simulated=true")
    loose = ("privacy.target_epsilon=1e7", "privacy.allow_large_delta=true", f"privacy={privacy}")
    assert run(["ask", "q.yaml", "--json", *table, *loose]) == 0
    record = json.loads(capsys.readouterr().out)
    figures = {each["name"]: each for each in record["answers"][0]["figures"]}
    assert abs(figures["rows, old"]["value"] - 402) < 170 and abs(figures["rows, new"]["value"] - 798) < 170
    assert "of freedom" in figures["log-rank p"]["said"]
    curve = [figures[f"survival at {end}, new"] for end in (10, 20, 30)]
    assert all(each["low"] <= each["value"] <= each["high"] for each in curve)
    assert 1 > curve[0]["value"] > curve[1]["value"] > curve[2]["value"] > 0
    assert run(["ask", "q.yaml", *table, *loose]) == 0
    shown = capsys.readouterr().out
    assert figures["log-rank p"]["said"] in shown and "survival at 30, old" in shown
