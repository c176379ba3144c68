"""Tests of ``unit_plan``."""

import json

import pytest

from fedveil.cli.simulate import plan

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm", "fast_runs")


def test_plan_shows_the_cost_of_one_run_and_of_all(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["task=digits", "num_rounds=10", "budget.runs=12"]
    assert plan(asked) == 0
    (said,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Each of")]
    once, together = (
        float(word.strip(".,")) for word in said.split() if word[0].isdigit() and "." in word[:-1]
    )
    assert 3 / 12 < once < 3 and together == pytest.approx(3, abs=0.01)
    assert plan(asked, as_json=True) == 0
    (shown,) = json.loads(capsys.readouterr().out)
    assert shown["runs"] == 12 and shown["epsilon"][-1][1] == pytest.approx(once, abs=0.001)
