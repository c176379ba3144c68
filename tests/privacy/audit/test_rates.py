"""Exact limits of a rate."""

import pytest

from fedveil.privacy.audit.rates import rate_above, rate_below


@pytest.mark.parametrize(
    ("hits", "trials", "alpha", "limit"), [(0, 100, 0.05, 0.029513), (50, 1000, 0.001, 0.074953)]
)
def test_clopper_pearson(hits: int, trials: int, alpha: float, limit: float) -> None:
    assert rate_above(hits, trials, alpha) == pytest.approx(limit, abs=5e-7)
    assert rate_below(trials - hits, trials, alpha) == pytest.approx(1 - limit, abs=5e-7)
