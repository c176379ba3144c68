"""The sampled Gaussian for many numbers at once is dp_accounting's, which takes them one at a time."""

import math

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
from dp_accounting.pld.pld_pmf import create_pmf_pessimistic_connect_dots_fixed_gap
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution, from_gaussian_mechanism
from dp_accounting.rdp import RdpAccountant
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.special import ndtr

from fedveil.privacy.accounting import sampled_gaussian
from fedveil.privacy.accounting.renyi import orders, quiet_orders

RELATION = NeighboringRelation.REPLACE_SPECIAL
SCALES = [
    (0.25, 3.2),
    (0.25, 0.8),
    (0.01, 0.6),
    (1e-12, 1.0),
    (0.999, 5.0),
    (0.5, 0.3),
    (1e-3, 30.0),
    (0.1, 200.0),
]


def same(ours: PrivacyLossDistribution, theirs: PrivacyLossDistribution) -> None:
    for side in ("_pmf_remove", "_pmf_add"):
        mine, other = (getattr(each, side).to_dense_pmf() for each in (ours, theirs))
        assert (mine._lower_loss, mine.size) == (other._lower_loss, other.size)
        assert np.allclose(mine._probs, other._probs, rtol=1e-7, atol=1e-12)
        assert mine._infinity_mass == pytest.approx(other._infinity_mass, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize(("rate", "noise"), SCALES)
def test_the_distribution_is_that_of_dp_accounting(rate: float, noise: float) -> None:
    theirs = from_gaussian_mechanism(
        noise, value_discretization_interval=1e-3, sampling_prob=rate, neighboring_relation=RELATION
    )
    ours = sampled_gaussian.distribution(rate, noise, 1e-3)
    same(ours, theirs)
    for delta in (1e-3, 1e-6):
        mine, other = (each.self_compose(20).get_epsilon_for_delta(delta) for each in (ours, theirs))
        assert mine == pytest.approx(other, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("rate", "noise"), [*SCALES[:2], (1e-4, 0.47), (0.01, 0.6), (0.5, 0.3)])
def test_small_masses_of_an_added_unit_are_not_rounding_errors(rate: float, noise: float) -> None:
    added = sampled_gaussian.distribution(rate, noise, 1e-4)._pmf_add.to_dense_pmf()  # type: ignore[attr-defined]
    masses, losses = added._probs, (np.arange(added.size) + added._lower_loss) * 1e-4
    assert math.fsum(masses) + added._infinity_mass == pytest.approx(1, abs=1e-14)
    assert math.fsum(masses * np.exp(-losses)) == pytest.approx(1, abs=1e-12)
    far = losses < losses[0] / 3
    output = sampled_gaussian._outputs(-1.0, rate, noise, losses[far][-1:])
    assert math.fsum(masses[far]) == pytest.approx(float(ndtr(-output[0])), rel=1e-2)


@settings(max_examples=30)
@given(st.floats(1e-6, 0.9999), st.floats(0.2, 50.0))
@example(0.5, 0.03125)  # losses beyond what a float's exponential holds
def test_so_are_distributions_of_any_rate_and_noise(rate: float, noise: float) -> None:
    theirs = from_gaussian_mechanism(
        noise, value_discretization_interval=1e-2, sampling_prob=rate, neighboring_relation=RELATION
    )
    same(sampled_gaussian.distribution(rate, noise, 1e-2), theirs)


@pytest.mark.parametrize("noise", [0.1, 0.3, 1.0, 3.2, 40.0, 2000.0])
@pytest.mark.parametrize(
    ("relation", "moved"), [(RELATION, 1.0), (NeighboringRelation.REPLACE_ONE, 2.0)], ids=["blank", "replace"]
)
def test_unsampled_event_is_that_of_dp_accounting_as_well(
    noise: float, relation: NeighboringRelation, moved: float
) -> None:
    interval = max(1e-4, 1e-2 / noise**2)
    theirs = from_gaussian_mechanism(
        noise, value_discretization_interval=interval, neighboring_relation=relation
    )
    ours = sampled_gaussian.unsampled(moved / noise, interval)
    for delta in (1e-3, 1e-6, 1e-10):
        mine, other = (each.get_epsilon_for_delta(delta) for each in (ours, theirs))
        assert mine == pytest.approx(other, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("places", [2, 900, 1000, 1001, 30_001])
def test_dots_are_connected_bit_for_bit_as_by_dp_accounting(places: int) -> None:
    deltas = np.sort(np.random.default_rng(places).uniform(0, 0.9, places))[::-1] ** 3
    theirs = create_pmf_pessimistic_connect_dots_fixed_gap(1e-3, -40, places - 41, deltas)
    ours = sampled_gaussian.connected(1e-3, -40, deltas)
    assert type(ours) is type(theirs)
    mine, other = ours.to_dense_pmf(), theirs.to_dense_pmf()
    assert mine._lower_loss == other._lower_loss and mine._infinity_mass == other._infinity_mass
    assert np.array_equal(mine._probs, other._probs)


def test_a_divergence_that_rises_is_refused() -> None:
    with pytest.raises(ValueError, match="rises"):
        sampled_gaussian.connected(1e-3, 0, np.linspace(0.1, 0.2, 2000))


def by_dp_accounting(rate: float, noise: float) -> np.ndarray:
    with quiet_orders():
        return (
            RdpAccountant(neighboring_relation=RELATION)
            .compose(PoissonSampledDpEvent(rate, GaussianDpEvent(noise)))
            .rdp
        )


@pytest.mark.parametrize(("rate", "noise"), [*SCALES, (0.9, 40.0), (0.3, 0.05)])
def test_renyi_at_every_order_is_that_of_dp_accounting(rate: float, noise: float) -> None:
    ours, theirs = sampled_gaussian.renyi(rate, noise, orders()), by_dp_accounting(rate, noise)
    assert np.array_equal(np.isinf(ours), np.isinf(theirs))
    known = np.isfinite(theirs)
    assert np.allclose(ours[known], theirs[known], rtol=1e-9, atol=1e-12)


def test_order_with_an_endless_series_is_left_out() -> None:
    assert math.isinf(sampled_gaussian.renyi(0.5, 200.0, np.array([1.5]))[0])
    assert math.isinf(by_dp_accounting(0.5, 200.0)[4])
