"""Adaptive clipping: the norm goes to the quantile from both sides, and the bit is paid for by the same Gaussian."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.privacy.mechanisms.adaptive_clipping import MAX_NORM, MAX_SHARE, MIN_NORM, AdaptiveClipping
from fedveil.privacy.mechanisms.private_sum import UNCLIPPED, add_noise, decode, encode, encode_rows
from fedveil.privacy.mechanisms.randomness import Randomness
from fedveil.privacy.mechanisms.sum_spec import Segment, SumSpec

COORDINATES, CLIENTS = 4, 100
LOSS = Segment("loss", 5.0)


def spec_of(norm: float, noise: float, clipping: AdaptiveClipping, expected: float = CLIENTS) -> SumSpec:
    return SumSpec(norm, (LOSS, clipping.bit(noise, expected)), 0.02)


def updates(norms: np.ndarray) -> np.ndarray:
    directions = np.random.default_rng(1).normal(size=(len(norms), COORDINATES))
    return directions / np.linalg.norm(directions, axis=1, keepdims=True) * norms[:, None]


def one_round(rows: np.ndarray, spec: SumSpec, noise: float, number: int, expected: float = CLIENTS) -> float:
    """The noised fraction of a round in which these clients reply."""
    total = encode_rows(rows, {"loss": np.ones(len(rows))}, spec).sum(axis=0)
    noised, _ = add_noise(total, noise, spec, Randomness(0).stream("noise", number))
    return decode(noised, {"w": (COORDINATES,)}, spec, expected)[1][UNCLIPPED]


@pytest.mark.parametrize("start", [10.0, 0.01], ids=["from above", "from below"])
@pytest.mark.parametrize("quantile", [0.5, 0.8])
def test_the_norm_goes_to_the_quantile(start: float, quantile: float) -> None:
    """Norms of median 1; the update's share of the clipping norm ends at their quantile."""
    norms = np.exp(np.random.default_rng(0).normal(0, 0.5, CLIENTS))
    clipping, norm, noise = AdaptiveClipping(quantile), start, 1.0
    reached: list[float] = []
    for number in range(150):
        spec = spec_of(norm, noise, clipping)
        reached.append(spec.update_norm)
        norm = clipping.next_norm(norm, one_round(updates(norms), spec, noise, number))
    assert np.mean(reached[-40:]) == pytest.approx(np.quantile(norms, quantile), rel=0.1)


def test_the_step_is_that_of_the_paper() -> None:
    rule = AdaptiveClipping()
    assert rule.next_norm(2.0, 1.0) == 2.0 * math.exp(-0.2 * 0.5)
    assert rule.next_norm(2.0, 0.0) == 2.0 * math.exp(0.2 * 0.5)
    assert rule.next_norm(2.0, 0.5) == 2.0
    assert rule.next_norm(MIN_NORM, 1.0) == MIN_NORM and rule.next_norm(MAX_NORM, 0.0) == MAX_NORM


@pytest.mark.parametrize(("noise", "expected"), [(1.0, 100.0), (3.2, 250.0), (0.5, 40.0)])
def test_bit_and_update_together_cost_one_gaussian(noise: float, expected: float) -> None:
    """z_delta = (z^-2 - (2 sigma_b)^-2)^(-1/2) with sigma_b = qN / 20, both read off the spec."""
    spec = SumSpec(1.7, (AdaptiveClipping().bit(noise, expected),))
    sigma = noise * 1.7 / (2 * spec.clip(spec.segments[0]))
    assert sigma == pytest.approx(expected / 20)
    z_delta = noise * 1.7 / spec.update_norm
    assert z_delta == pytest.approx((noise**-2 - (2 * sigma) ** -2) ** -0.5)
    assert z_delta**-2 + (2 * sigma) ** -2 == pytest.approx(noise**-2)


def test_the_published_example() -> None:
    spec = SumSpec(1.0, (AdaptiveClipping().bit(1.0, 100.0),))
    assert 1 / spec.update_norm == pytest.approx(1.00504, abs=1e-5)


def test_a_small_cohort_leaves_the_update_its_norm() -> None:
    assert AdaptiveClipping().bit(8.0, 10.0).share == MAX_SHARE


@given(st.floats(1e-3, 1e3), st.lists(st.floats(-1e3, 1e3), min_size=4, max_size=4), st.floats(0, 10))
@settings(max_examples=100)
def test_with_its_bit_a_contribution_never_exceeds_the_norm(
    norm: float, update: list[float], loss: float
) -> None:
    spec = spec_of(norm, 8.0, AdaptiveClipping())
    vector, clipped = encode({"w": np.array(update)}, {"loss": loss}, spec)
    assert sum(int(v) ** 2 for v in vector) <= spec.cells**2
    assert (vector[-1] > 0) != clipped


def test_both_encodings_agree_on_the_clipping_bit() -> None:
    spec = spec_of(1.0, 1.0, AdaptiveClipping())
    edge = np.nextafter(spec.aim(COORDINATES), 2)
    rows = updates(np.array([0.0, 0.5, 0.9, edge + 1e-9, 1.1, 40.0]))
    lie = np.array([0.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    together = encode_rows(rows, {"loss": np.ones(6), UNCLIPPED: lie}, spec)
    alone = [encode({"w": row}, {"loss": 1.0, UNCLIPPED: lie[k]}, spec)[0] for k, row in enumerate(rows)]
    assert (np.sign(together[:, -1]) == [1, 1, 1, -1, -1, -1]).all()
    assert (together[:, -1] == np.array(alone)[:, -1]).all()


def test_dropout_counts_as_neither() -> None:
    """With half the cohort gone, all of it unclipped, the fraction is 1/2 + 1/4; with nobody left it is noise on 1/2."""
    clipping = AdaptiveClipping()
    spec = spec_of(1.0, 0.001, clipping, 1.0)
    close = 5 * 0.001 / (2 * CLIENTS * np.sqrt(spec.segments[-1].share))  # five standard deviations
    half = one_round(updates(np.full(CLIENTS // 2, 0.5)), spec, 0.001, 0)
    assert half == pytest.approx(0.75, abs=close)
    assert one_round(np.zeros((0, COORDINATES)), spec, 0.001, 0) == pytest.approx(0.5, abs=close)


def test_an_empty_cohort_still_gets_the_bits_noise() -> None:
    spec = spec_of(1.0, 1.0, AdaptiveClipping())
    fractions = [one_round(np.zeros((0, COORDINATES)), spec, 1.0, number) for number in range(300)]
    assert np.std(fractions) == pytest.approx(1 / 20, rel=0.15)
    assert np.mean(fractions) == pytest.approx(0.5, abs=0.01)
