"""Tests of ``promise``."""

import json
from pathlib import Path

import pytest

from fedveil.run.promise import recognised

RUN = Path(__file__).parents[1] / "fixtures" / "reported_run"


def test_one_point_bounds_a_test_no_better_than_the_curve() -> None:
    for row in json.loads((RUN / "result.json").read_text())["privacy"]:
        if row["curve"]:
            point = recognised({**row, "curve": None})
            assert recognised(row) <= point <= 1
    assert recognised({"epsilon": 0.0, "delta": 0.0}) == pytest.approx(0.05)
    assert recognised({"epsilon": 50.0, "delta": 0.0}) == pytest.approx(1.0)
