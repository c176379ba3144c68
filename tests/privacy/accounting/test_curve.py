"""The curve of a guarantee, against closed forms, dp_accounting, and tests between two neighbours."""

import math
from statistics import NormalDist

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, LaplaceDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant

from fedveil.privacy.accounting.curve import (
    DELTAS,
    FALSE_POSITIVES,
    filter_curve,
    largest,
    privacy_curve,
    worst,
)
from fedveil.privacy.accounting.epsilon import epsilon
from fedveil.privacy.accounting.loss_distributions import ROUNDED
from fedveil.privacy.accounting.renyi import relation_of
from fedveil.privacy.budget import Adjacency, Budget, Unit
from fedveil.privacy.plan import Plan
from fedveil.strategies.cohorts import All

ZERO_OUT = Adjacency.ZERO_OUT
SAMPLED = PoissonSampledDpEvent(0.25, GaussianDpEvent(3.2192))


def test_gaussians_have_mu_rho_and_the_analytic_curve() -> None:
    # Balle and Wang 2018: sigma 3.7307 has epsilon 1 at delta 1e-5. T releases are sqrt(T) / z Gaussian DP.
    once = privacy_curve([GaussianDpEvent(3.7307)], ZERO_OUT)
    assert dict(once.epsilon)[1e-5] == pytest.approx(1.0, abs=1e-4)
    many = privacy_curve({GaussianDpEvent(5.0): 36}, ZERO_OUT)
    assert many.mu == pytest.approx(6 / 5) and many.rho == pytest.approx(36 / (2 * 25))
    replaced = privacy_curve({GaussianDpEvent(5.0): 36}, Adjacency.REPLACE_ONE)
    assert replaced.mu == pytest.approx(12 / 5)
    normal = NormalDist()
    for rate, missed in many.trade_off:
        assert missed == pytest.approx(normal.cdf(normal.inv_cdf(1 - rate) - 6 / 5))


@pytest.mark.parametrize("adjacency", [ZERO_OUT, Adjacency.ADD_OR_REMOVE_ONE])
def test_each_point_is_dp_accountings(adjacency: Adjacency) -> None:
    accountant = PLDAccountant(relation_of(adjacency), 1e-4)
    accountant.compose(SelfComposedDpEvent(SAMPLED, 100))
    found = privacy_curve({SAMPLED: 100}, adjacency)
    assert [delta for delta, _ in found.epsilon] == list(DELTAS)
    for delta, ours in found.epsilon:
        counted = delta - 100 * ROUNDED  # what rounding may have taken
        assert ours == pytest.approx(accountant.get_epsilon(counted), rel=1e-6)
    assert found.mu is None and found.rho is None


def test_one_composition_serves_all_deltas(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedveil.privacy.accounting import loss_distributions

    composed, real = [], loss_distributions.distribution
    monkeypatch.setattr(
        loss_distributions, "distribution", lambda *args: composed.append(args) or real(*args)
    )
    privacy_curve({PoissonSampledDpEvent(0.25, GaussianDpEvent(3.21)): 77}, ZERO_OUT)
    assert len(composed) == 1


@pytest.mark.parametrize("noise", [0.6, 1.5, 6.0])
def test_the_trade_off_of_a_composition_is_that_of_its_gaussian(noise: float) -> None:
    # Laplace noise that tells nothing makes the composition go by PLD; the trade-off must be the closed form's.
    beside = privacy_curve({GaussianDpEvent(noise): 1, LaplaceDpEvent(1e7): 1}, ZERO_OUT, 1e-3)
    exact = privacy_curve([GaussianDpEvent(noise)], ZERO_OUT)
    assert beside.mu is None
    for (rate, bound), (same, truth) in zip(beside.trade_off, exact.trade_off, strict=True):
        assert rate == same and bound <= truth + 1e-9
        assert bound == pytest.approx(truth, abs=1e-4)


def test_no_test_between_two_neighbours_beats_the_trade_off() -> None:
    # The best test of one sampled release is the likelihood ratio's, which rises with the output.
    rate, noise, normal = 0.3, 0.8, NormalDist()
    bound = privacy_curve([PoissonSampledDpEvent(rate, GaussianDpEvent(noise))], ZERO_OUT)
    for false_positive, missed in bound.trade_off:
        threshold = normal.inv_cdf(1 - false_positive) * noise
        truth = (1 - rate) * (1 - false_positive) + rate * normal.cdf((threshold - 1) / noise)
        other = _other_side(rate, noise, false_positive)
        assert missed <= min(truth, other) + 1e-9
        assert missed == pytest.approx(min(truth, other), abs=0.02)


def _other_side(rate: float, noise: float, false_positive: float) -> float:
    """Return what a test misses that takes presence for the rule and calls low outputs absence."""
    normal = NormalDist()
    grid = np.linspace(-8 * noise, 8 * noise + 1, 20_001)
    called = np.array([(1 - rate) * normal.cdf(x / noise) + rate * normal.cdf((x - 1) / noise) for x in grid])
    return 1 - normal.cdf(float(grid[called.searchsorted(false_positive) - 1]) / noise)


def test_filter_promises_its_budget_and_its_orders_curve() -> None:
    budget = Budget(Unit.CLIENT, 3.0, 1e-4)
    found = filter_curve(budget, 4.0)
    assert dict(found.epsilon)[1e-4] == pytest.approx(3.0)
    # Canonne et al. 2020, proposition 12, at the same B: a factor of 10 of delta costs ln 10 / (alpha - 1).
    assert dict(found.epsilon)[1e-6] == pytest.approx(3.0 + 2 * math.log(10) / 3)
    assert found.mu is None and found.trade_off[0][1] > 0.9
    plan = Plan(Unit.CLIENT, ZERO_OUT, All(), 1.0, 10).calibrate_for_filter(budget)
    assert plan.filter_order is not None and plan.curve(budget) == filter_curve(budget, plan.filter_order)


def test_the_curve_of_several_units_is_above_each() -> None:
    units = [{GaussianDpEvent(4.0): 9}, {GaussianDpEvent(4.0): 4}, {SAMPLED: 50}]
    assert len(largest(units)) == 2
    together = worst(privacy_curve(each, ZERO_OUT) for each in units)
    for each in units:
        for (_, above), (delta, _) in zip(together.epsilon, together.epsilon, strict=True):
            assert above >= epsilon(each, delta, ZERO_OUT) - 1e-4
    assert together.mu is None
    assert worst(privacy_curve(each, ZERO_OUT) for each in units[:2]).mu == pytest.approx(3 / 4)


def test_nothing_reveals_nothing_and_no_noise_everything() -> None:
    nothing = privacy_curve([], ZERO_OUT)
    assert nothing.mu == 0 and set(dict(nothing.epsilon).values()) == {0.0}
    assert [missed for _, missed in nothing.trade_off] == pytest.approx([1 - r for r in FALSE_POSITIVES])
    everything = privacy_curve([GaussianDpEvent(0.0)], ZERO_OUT)
    assert everything.to_json()["epsilon"][0] == [1e-3, "infinity"]
    assert {missed for _, missed in everything.trade_off} == {0.0}
