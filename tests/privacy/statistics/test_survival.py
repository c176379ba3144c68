"""Survival questions: lifelines' curves and log-rank tests without noise, and intervals that hold with it."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedveil.base.refusal import Refusal
from fedveil.privacy.statistics.columns import Bins
from fedveil.privacy.statistics.figure import Figure
from fedveil.privacy.statistics.inquiry import read_inquiry
from fedveil.privacy.statistics.survival import CENSORED_SHARES, Survival

ORACLE = json.loads((Path(__file__).parents[2] / "oracles" / "survival_curves.json").read_text())
EVENT = Bins("died", words=("0", "1"))
ARMS = Bins("arm", words=("a", "b"))
MONTHS = Survival(Bins("months", edges=tuple(range(0, 61, 5))), EVENT, (ARMS,))
MEAN = 30.0  # months of survival, exponential


def by_name(figures: list[Figure]) -> dict[str, Figure]:
    return {each.name: each for each in figures}


def study(rows: int, draw: np.random.Generator, ratio: float = 1.0) -> dict[str, NDArray[Any]]:
    """Return times of two arms, whose means have this ratio, censored at any time from 0 to 80 months."""
    arm = draw.random(rows) < 0.5
    time, censoring = draw.exponential(np.where(arm, MEAN * ratio, MEAN)), draw.uniform(0, 80, rows)
    return {
        "months": np.minimum(time, censoring),
        "died": (time <= censoring).astype(int),
        "arm": np.where(arm, "b", "a"),
    }


@pytest.mark.parametrize("case", ORACLE["cases"], ids=lambda case: f"{case['data']}-{case['censoring']}")
def test_figures_without_noise_are_those_of_lifelines(case: dict[str, Any]) -> None:
    rows = [row[:3] for row in case["rows"] for _ in range(row[3])]
    groups, times, events = (np.array(each) for each in zip(*rows, strict=True))
    kind = Survival(
        Bins("time", edges=tuple(case["edges"])),
        Bins("event", words=("0", "1")),
        (Bins("group", words=tuple(case["groups"])),),
        CENSORED_SHARES[case["censoring"]],
    )
    figures = by_name(kind.answer(kind.count({"time": times, "event": events, "group": groups})[0], 0.0))
    test = figures["log-rank p"]
    assert test.value == pytest.approx(case["p"], rel=1e-6)
    assert f"chi-square {case['chi_square']:.4g}" in test.words
    for group, curve, median in zip(case["groups"], case["curves"], case["median_bins"], strict=True):
        for edge, value in zip(case["edges"][1:], curve, strict=True):
            figure = figures[f"survival at {edge}, {group}"]
            assert value == 0 if not figure.has_value else figure.value == pytest.approx(value, abs=1e-9)
        figure = figures[f"median, {group}"]
        if median is None:
            assert not figure.has_value and "not reached" in figure.words
        else:
            end = int(median)
            assert case["edges"][end - 1] <= figure.value <= case["edges"][end]


@pytest.mark.parametrize(("rows", "sigma"), [(400, 0.0), (2000, 5.0), (5000, 20.0)])
def test_intervals_cover_the_populations_curve(rows: int, sigma: float) -> None:
    """The intervals are right for 95 % of the populations: 300 draws of up to 24 dependent figures."""
    draw, within, size = np.random.default_rng(3), 0, 0
    truth = [math.exp(-end / MEAN) for end in MONTHS.time.edges[1:]] * 2
    for _ in range(300):
        cells = MONTHS.count(study(rows, draw))[0]
        figures = MONTHS.answer(cells + sigma * draw.normal(size=cells.shape), sigma)
        curve = [each for each in figures if each.name.startswith("survival")]
        for figure, value in zip(curve, truth, strict=True):
            size += figure.has_value
            within += figure.low <= value <= figure.high
    assert size > 3000 and 0.93 < within / size < 0.97


@pytest.mark.parametrize(("ratio", "low", "high"), [(1.0, 0.01, 0.09), (2.0, 0.95, 1.0)])
def test_log_rank_rejects_at_its_level_and_sees_a_difference(ratio: float, low: float, high: float) -> None:
    draw, differ = np.random.default_rng(4), 0
    for _ in range(400):
        cells = MONTHS.count(study(2000, draw, ratio))[0]
        figure = MONTHS.log_rank(cells + 8 * draw.normal(size=cells.shape), 8.0)
        differ += "curves differ" in figure.words
        assert figure.low == figure.value == figure.high
    assert low <= differ / 400 <= high


def test_row_is_in_one_cell_and_late_times_are_at_risk() -> None:
    table = {
        "months": np.array([2.0, 2.0, 61.0, 900.0, math.nan, -1.0, 3.0]),
        "died": np.array([1, 0, 1, 0, 1, 1, 2]),
        "arm": np.array(["a"] * 7),
    }
    cells, outside = MONTHS.count(table)
    assert cells.shape == MONTHS.shape == (2, 25)
    assert cells[0, 0] == 2 and cells[0, 12] == 1 and cells[0, 24] == 2 and cells.sum() == 5
    assert outside == pytest.approx(
        2 / 7
    )  # the time below the first edge, and the word of neither event nor censoring
    assert MONTHS.row_norm == 1


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0, 1e4])
def test_figure_is_a_finite_interval_or_says_why_not(scale: float) -> None:
    draw = np.random.default_rng(5)
    for rows in (0, 1, 40, 3000):
        cells = MONTHS.count(study(rows, draw))[0]
        for figure in MONTHS.answer(cells + scale * draw.normal(size=cells.shape), scale):
            plain = figure.plain
            if plain["value"] is None:
                assert plain["said"]
            else:
                assert all(math.isfinite(plain[key]) for key in ("value", "low", "high"))
                assert plain["low"] <= plain["value"] <= plain["high"]


def test_curve_of_all_rows_has_no_groups_and_no_test() -> None:
    kind = Survival(MONTHS.time, EVENT)
    names = [each.name for each in kind.answer(np.ones(kind.shape), 0.0)]
    assert names[:3] == ["rows", "median", "survival at 5"] and len(names) == 14


def test_planned_width_bounds_that_of_an_answer() -> None:
    draw, sigma = np.random.default_rng(6), 10.0
    table = study(4000, draw)
    table = {**table, "months": draw.exponential(MEAN, 4000), "died": np.ones(4000, int)}
    cells = MONTHS.count(table)[0]
    figures = MONTHS.answer(cells + sigma * draw.normal(size=cells.shape), sigma)
    widest = max(
        (each.high - each.low) / 2 for each in figures if each.name.startswith("survival") and each.has_value
    )
    assert widest < MONTHS.planned(sigma, 4000.0) < 3 * widest


QUESTION: dict[str, Any] = {
    "kind": "survival",
    "of": "months",
    "edges": [0, 12, 24],
    "event": "died",
    "event_categories": ["0", "1"],
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "cox"}, "kind='cox': Cox's likelihood .* ask kind=survival"),
        ({"censoring": "start"}, "censoring='start': choose one of middle, end"),
        ({"event_categories": ["0", "1", "2"]}, "event=.*: give two event_categories"),
        ({"edges": None, "categories": ["a"]}, "there is no such key"),
        ({"edges": None}, "give edges of numbers"),
    ],
)
def test_wrong_question_is_refused_by_its_key(change: dict[str, Any], words: str) -> None:
    with pytest.raises(Refusal, match=words):
        read_inquiry({"name": "s", "records": 10, "ask": [{**QUESTION, **change}]})


def test_question_reads_groups_and_censoring() -> None:
    plain = {**QUESTION, "by": "arm", "by_categories": ["a", "b"], "censoring": "end"}
    (question,) = read_inquiry({"name": "s", "records": 10, "ask": [plain]}).questions
    kind = question.statistic
    assert isinstance(kind, Survival) and kind.groups == ("a", "b") and kind.censored_share == 1.0
    assert question.name == "survival months"
