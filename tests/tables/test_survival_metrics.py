"""Tests of tables/survival_metrics.py against published curves and lifelines."""

import numpy as np
import pytest

from fedveil.tables.survival_metrics import concordance, integrated_brier, kaplan_meier

# Weeks in remission with 6-mercaptopurine (Freireich et al. 1963), as of Klein and Moeschberger 2003, table 4.1A.
WEEKS = np.array([6, 6, 6, 6, 7, 9, 10, 10, 11, 13, 16, 17, 19, 20, 22, 23, 25, 32, 32, 34, 35.0])
RELAPSES = np.array([1, 1, 1, 0, 1, 0, 1, 0, 0, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0], bool)


def test_curve_of_remissions_is_the_published_one() -> None:
    found = kaplan_meier(WEEKS, RELAPSES, np.array([6, 6.5, 8, 12, 14, 18, 22.5, 40]))
    assert found == pytest.approx([1, 0.857, 0.807, 0.753, 0.690, 0.627, 0.538, 0.448], abs=5e-4)


def test_concordance_is_that_of_lifelines_with_ties() -> None:
    """`concordance_index(WEEKS, -RISKS, RELAPSES)` of lifelines 0.30.3."""
    risks = np.round(np.cos(np.arange(21)), 1)
    assert concordance(WEEKS, RELAPSES, risks) == pytest.approx(0.5086206896551724, abs=1e-12)


def test_concordance_of_many_rows_is_a_count_of_pairs() -> None:
    draw = np.random.default_rng(0)
    times, events = draw.integers(1, 400, 1500).astype(float), draw.random(1500) < 0.6
    risks = np.round(draw.normal(size=1500) - times / 200, 1)
    later = (times[None] > times[:, None]) | ((times[None] == times[:, None]) & ~events[None])
    comparable = later & events[:, None]
    wins = (risks[:, None] > risks[None]) + 0.5 * (risks[:, None] == risks[None])
    assert concordance(times, events, risks) == pytest.approx(wins[comparable].mean(), abs=1e-12)


def test_concordance_without_an_event_is_undefined() -> None:
    assert np.isnan(concordance(np.array([1.0, 2.0]), np.array([False, False]), np.zeros(2)))


def test_brier_score_is_that_of_scikit_survival() -> None:
    """Trapezoids over `brier_score(y, y, CURVES, ENDS)` of scikit-survival 0.28.0, from time 0."""
    draw = np.random.default_rng(3)
    times, events = draw.exponential(5, 200), draw.random(200) < 0.6
    ends = [1.0, 2.0, 4.0, 8.0]
    curves = np.exp(-np.outer(draw.uniform(0.5, 1.5, 200), ends) / 5)
    assert integrated_brier(times, events, curves, ends) == pytest.approx(0.2208202778353998, abs=1e-9)


def test_a_row_that_is_censored_at_the_last_time_has_survived() -> None:
    times, events = np.array([5.0, 5.0, 2.0]), np.array([False, False, True])
    perfect = np.array([[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    assert integrated_brier(times, events, perfect, [3.0, 5.0]) == 0
