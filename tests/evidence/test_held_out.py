"""Figures with intervals on a report's page: reliability, coefficients and bands on shapes."""

from typing import Any

import pytest

from fedveil.evidence.held_out import bands, reliability
from fedveil.evidence.page import page_of
from fedveil.evidence.page_text import differences

BIN = {"count": 8, "predicted": 0.25, "observed": 0.375, "low": 0.14, "high": 0.69}
AUC = {"name": "auc", "value": 0.875, "low": 0.8125, "high": 0.9375}
HELD_OUT = {"rows": 16, "confidence": 0.95, "figures": [AUC], "reliability": {"of": "ill", "bins": [BIN]}}


def coefficient(of: str, value: float | None) -> dict[str, Any]:
    ends = {} if value is None else {"low": value - 0.5, "high": value + 0.5}
    return {"score": "ill", "column": "age", "of": of, "value": value, "low": None, "high": None, **ends}


@pytest.fixture
def report(golden: dict[str, Any]) -> dict[str, Any]:
    rows = [coefficient("20 to 40", -1.0), coefficient("40 to 60", None), coefficient("60 to 80", 1.0)]
    table = {"confidence": 0.95, "rows": 16, "clipped": 0.25, "information": 1.0, "coefficients": rows}
    return {**golden, "held_out": HELD_OUT, "coefficients": table}


def test_page_has_the_figures_and_the_coefficients(report: dict[str, Any]) -> None:
    page = page_of(report)
    assert differences(page, report) == []
    assert 'id="chart-reliability-title"' in page and "no public row has it" in page
    assert 'data-ref="/held_out/figures/0/low"' in page
    assert 'data-ref="/coefficients/coefficients/2/high"' in page


def test_page_says_why_there_are_no_intervals(report: dict[str, Any]) -> None:
    page = page_of({**report, "coefficients": {"reason": "updates were compressed"}})
    assert (
        "updates were compressed" in page
        and differences(page, report | {"coefficients": {"reason": "updates were compressed"}}) == []
    )


def test_reliability_has_a_point_with_its_interval_by_bin(report: dict[str, Any]) -> None:
    chart = reliability(report)
    assert chart is not None and [(each.x, each.y) for each in chart.marks] == [(0.25, 0.375)]
    assert (chart.intervals[0].low, chart.intervals[0].high) == (0.14, 0.69)
    assert reliability({}) is None


def test_bands_have_the_shift_of_the_shape(report: dict[str, Any]) -> None:
    shape = {"column": "age", "score": "ill", "values": [-0.5, 0.0, 1.5]}
    assert bands(report, shape) == [(-0.5, -1.0, 0.0), None, (1.5, 1.0, 2.0)]
    assert bands({}, shape) == []
