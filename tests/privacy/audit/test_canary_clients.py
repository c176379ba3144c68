"""Canary clients: their scores, directions and commitment, and what must be refused."""

import math

import dp_accounting as dp
import numpy as np
import pytest

from fedveil.base.refusal import Refusal
from fedveil.privacy.accounting.custom_events import OpenlySampledDpEvent
from fedveil.privacy.accounting.gaussian import gaussian_epsilon
from fedveil.privacy.audit.canary_clients import (
    Directions,
    KnownRounds,
    commitment,
    directions,
    round_scores,
)
from fedveil.privacy.audit.normality import estimate, separation
from fedveil.privacy.mechanisms.randomness import Randomness

DELTA, DIMENSION, CANARIES = 1e-5, 20_000, 600
FULL = dp.GaussianDpEvent(1.0)


@pytest.fixture(scope="module")
def drawn() -> Directions:
    return directions(Randomness(1).stream("canaries"), CANARIES, DIMENSION, DIMENSION)


def aggregates(
    drawn: Directions, coins: np.ndarray, taken: np.ndarray, noise: float, seed: int
) -> list[np.ndarray]:
    """Sums of the canaries that take part, at clip 1, with Gaussian noise."""
    rng = np.random.default_rng(seed)
    sums = [drawn.values[coins & row].sum(axis=0, dtype=np.float64) for row in taken]
    return [each + noise * rng.standard_normal(DIMENSION) for each in sums]


def scored(drawn: Directions, released: list[np.ndarray], rounds: KnownRounds | None) -> np.ndarray:
    along = np.array([drawn.along(each) for each in released])
    return round_scores(along, np.array([np.linalg.norm(each) for each in released]), DIMENSION, rounds)


def test_scores_of_canaries_that_were_out_are_standard_normal(drawn: Directions) -> None:
    none = np.zeros((4, CANARIES), bool)
    scores = scored(drawn, aggregates(drawn, none[0], none, 2.0, 0), None)
    assert abs(scores.mean()) < 4 / math.sqrt(CANARIES)
    assert 0.85 < scores.std() < 1.15


@pytest.mark.parametrize("noise", [1.0, 3.0])
def test_public_rounds_show_the_gaussian_mechanism(drawn: Directions, noise: float) -> None:
    """Each canary in two of four rounds: mu is sqrt(2) over the noise."""
    taken = np.arange(CANARIES) % 2 == np.arange(4)[:, None] % 2
    coins = np.random.default_rng(5).random(CANARIES) < 0.5
    released = aggregates(drawn, coins, taken, noise, 6)
    scores = scored(drawn, released, KnownRounds(taken, dp.GaussianDpEvent(noise)))
    found = estimate(separation(scores[coins], scores[~coins]), DELTA, 0.001)
    true = gaussian_epsilon(math.sqrt(2) / noise, DELTA)
    assert found.low < true < found.high
    assert found.high < 2 * true


def test_participation_aware_statistic_is_refused_under_amplification() -> None:
    """The accountant charges the secret draw; a statistic that knows it would refute a true claim."""
    taken = np.ones((3, 5), bool)
    for event in (
        dp.PoissonSampledDpEvent(0.1, FULL),
        dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(0.1, FULL), 3),
        OpenlySampledDpEvent(0.1, FULL),
        dp.TruncatedSubsampledGaussianDpEvent(100, 0.1, 20, 1.0),
    ):
        with pytest.raises(Refusal, match="score the sum of all rounds"):
            KnownRounds(taken, event)
    assert KnownRounds(taken, dp.PoissonSampledDpEvent(1.0, FULL)).included is taken


def test_round_without_noise_and_canary_without_rounds_are_refused() -> None:
    with pytest.raises(Refusal, match="not noised"):
        round_scores(np.ones((1, 2)), np.zeros(1), 10)
    with pytest.raises(Refusal, match="without a single round"):
        round_scores(np.ones((1, 2)), np.ones(1), 10, KnownRounds(np.array([[True, False]]), FULL))


@pytest.mark.parametrize("support", [500, 64])
def test_a_direction_has_length_one_and_stays_in_its_window(support: int) -> None:
    drawn = directions(Randomness(2).stream("canaries"), 7, 500, support)
    updates = drawn.updates(range(7), np.full(7, 3.0))
    assert np.linalg.norm(updates, axis=1) == pytest.approx(3.0)
    assert (np.count_nonzero(updates, axis=1) <= support).all()
    released = np.random.default_rng(0).standard_normal(500)
    assert drawn.along(released) == pytest.approx(updates @ released / 3, abs=1e-5)
    assert len({update.tobytes() for update in updates}) == 7
    with pytest.raises(Refusal, match="support"):
        directions(Randomness(2).stream("canaries"), 7, 500, 501)


def test_a_window_has_the_power_of_the_whole() -> None:
    drawn = directions(Randomness(3).stream("canaries"), CANARIES, DIMENSION, 1000)
    coins = np.random.default_rng(4).random(CANARIES) < 0.5
    rng = np.random.default_rng(5)
    inside = np.flatnonzero(coins)
    sent = drawn.updates(inside.tolist(), np.ones(len(inside)))
    released = rng.standard_normal(DIMENSION) + sent.sum(axis=0, dtype=np.float64)
    scores = scored(drawn, [released], None)
    found = estimate(separation(scores[coins], scores[~coins]), DELTA, 0.001)
    assert found.low < gaussian_epsilon(1.0, DELTA) < found.high


def test_a_commitment_binds_seed_and_coins() -> None:
    coins = np.array([True, False, True])
    shown = {
        commitment(bytes(32), coins),
        commitment(bytes(31) + b"1", coins),
        commitment(bytes(32), coins[:2]),
    }
    assert len(shown | {commitment(bytes(32), ~coins), commitment(bytes(32), np.append(coins, False))}) == 5
    with pytest.raises(Refusal, match="give 32"):
        commitment(b"short", coins)
