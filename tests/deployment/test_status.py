"""Status of a server as it is printed."""

import json
from pathlib import Path

import pytest

from fedveil.deployment.status import show
from fedveil.deployment.watch import rounds_of


def test_a_status_shows_brackets_of_a_reason_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = {**rounds_of([]), "num_rounds": 3, "clients": [], "privacy": [], "audit": {"said": ["[/b]"]}}
    said = {"federation": "hearts", "run": "spring", "state": "failed", "reason": "[red] is no [/value]"}
    (tmp_path / "status.json").write_text(json.dumps({**status, **said}))
    show(tmp_path, as_json=False)
    out = capsys.readouterr().out
    assert "hearts, run spring: failed: [red] is no [/value]" in out and "audit: [/b]" in out


@pytest.mark.parametrize(("left", "said"), [(0.0004, ", nothing left"), (0.0006, ", 0.001 left")])
def test_status_reports_an_empty_budget_and_no_enrolment(
    left: float, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"unit": "client", "target": 3.0, "spent": 3.0 - left, "left": left, "delta": 1e-4}
    status = {**rounds_of([]), "num_rounds": 3, "clients": [], "privacy": [{**row, "own_ledgers": False}]}
    about = {"federation": "hearts", "run": "spring", "state": "completed", "reason": ""}
    (tmp_path / "status.json").write_text(json.dumps({**status, **about}))
    assert show(tmp_path, as_json=False) == 0
    out = capsys.readouterr().out
    assert f"of 3 spent at delta 0.0001{said}\n" in out and "no client is on the roster" in out
