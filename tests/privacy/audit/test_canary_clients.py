"""Canary clients and the free noise checks: what they see, what they must not, and their ceiling."""

import math
from unittest.mock import patch

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
from fedveil.privacy.audit.free_checks import (
    cosine,
    draw_p,
    norm_p,
    outside,
    reuse_p,
    run_p,
    visible_shortfall,
)
from fedveil.privacy.audit.interference import Interference
from fedveil.privacy.audit.normality import estimate, separation
from fedveil.privacy.audit.round_rows import LAYERS, stack_rows
from fedveil.privacy.audit.sum_audit import NO_MEMORY, noise_p, watch
from fedveil.privacy.mechanisms.randomness import Randomness
from fedveil.privacy.mechanisms.released_sum import ReleasedSum

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


# --- scores -----------------------------------------------------------------------------------------------------


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


# --- the ceiling ------------------------------------------------------------------------------------------------


def ceiling_mu(released: np.ndarray, rounds: int, noise: float) -> float:
    """Return the ceiling of canaries in the sum of so many rounds, in one block."""
    gram = np.array([[released @ released / released.size]])
    return Interference(gram, np.array([rounds * noise**2]), np.array([rounds]), released.size).ceiling_mu()


@pytest.mark.parametrize("noise", [1e-6, 0.3])
def test_ceiling_foretells_a_run_without_noise(noise: float) -> None:
    """Updates that persist over rounds mask the canaries, whatever noise is claimed and added."""
    rng, rounds, dimension = np.random.default_rng(0), 8, 5000
    drawn = directions(Randomness(9).stream("canaries"), 400, dimension, dimension)
    coins = rng.random(400) < 0.5
    persistent = 60 * rng.standard_normal(dimension) / math.sqrt(dimension)
    signal = drawn.values[coins].sum(axis=0) + persistent
    silent = np.array([drawn.along(signal)] * rounds)
    scores = round_scores(silent, np.full(rounds, np.linalg.norm(signal)), dimension)
    measured = separation(scores[coins], scores[~coins]).mu * 1  # the mask is the same in every round
    released = rounds * signal + math.sqrt(rounds) * noise * rng.standard_normal(dimension)
    ceiling = ceiling_mu(released, rounds, noise)
    assert 0.6 * measured < ceiling < 1.25 * measured


def test_ceiling_of_a_run_of_noise_is_far_above_its_claim() -> None:
    released = np.random.default_rng(0).standard_normal(DIMENSION)
    assert ceiling_mu(released, 1, 1.0) > 3


# --- noise checks -----------------------------------------------------------------------------------------------


def layers(noise: float, seed: int, shift: float = 0.0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    sizes = ((784, 128), (128,), (128, 10), (10,))
    return [noise * rng.standard_normal(size) + shift * rng.standard_normal(size) for size in sizes]


def test_shortfall_of_two_percent_is_detected_in_one_round() -> None:
    assert norm_p(layers(1.0, 0), 1.0) > 0.01
    assert norm_p(layers(0.98, 0), 1.0) < 1e-15
    assert norm_p(layers(0.5, 0), 1.0) == 0


@pytest.mark.parametrize("layer", range(4))
def test_layer_without_noise_is_detected(layer: int) -> None:
    released = layers(1.0, 1)
    released[layer] = 1e-3 * released[layer]
    assert norm_p(released, 1.0) < 1e-9


def test_correct_noise_keeps_the_level_with_and_without_updates_in_it() -> None:
    rng = np.random.default_rng(2)
    plain = [norm_p([rng.standard_normal(50), rng.standard_normal(5)], 1.0) for _ in range(1000)]
    assert sum(p < 0.05 for p in plain) <= 50 + 3 * math.sqrt(1000 * 0.05 * 0.95)
    assert sum(p < 0.05 for p in plain) >= 10
    shifted = [norm_p([rng.standard_normal(50) + 1, rng.standard_normal(5)], 1.0) for _ in range(200)]
    assert sum(p < 0.05 for p in shifted) <= 20


def test_a_short_layer_may_be_zero_on_a_lattice() -> None:
    """Two whole numbers of noise 20 are both zero once in 2 500 draws, which is no alarm."""
    rng, noise = np.random.default_rng(3), 20.0
    assert norm_p([np.zeros(2)], noise) == 0
    assert norm_p([np.zeros(2)], noise, step=1.0) > 1 / 2500
    drawn = np.rint(noise * rng.standard_normal((100_000, 2)))
    found = np.array([norm_p([each], noise, step=1.0) for each in drawn])
    for level in (0.1, 0.01, 0.002):
        assert (found < level).mean() <= level + 3 * math.sqrt(level / len(found))


def pooled(noise: float, seed: int, rounds: int = 100, size: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """Energies and dimensions of rounds whose updates persist and hold more than 2 % of noise lacks."""
    rng = np.random.default_rng(seed)
    update, total = 0.2 * rng.standard_normal(size), np.zeros(0)
    found: list[tuple[float, int]] = []
    for _ in range(rounds):
        released = update + noise * rng.standard_normal(size)
        found.append(outside(released, total))
        total = total + released if total.size else released
    energies, dimensions = zip(*found, strict=True)
    return np.array(energies), np.array(dimensions)


def test_rounds_show_two_percent_of_missing_noise_behind_updates() -> None:
    right, wrong = pooled(1.0, 6), pooled(0.98, 6)
    assert run_p(*right) > 0.01 and run_p(*wrong) < 1e-4
    assert right[1].tolist() == [1000, *[999] * 99]
    hidden = pooled(0.98, 6)[0][:1]  # one round alone
    assert run_p(hidden, wrong[1][:1]) > 0.01


def test_rounds_together_keep_the_level() -> None:
    p_values = [run_p(*pooled(1.0, seed, rounds=4, size=40)) for seed in range(400)]
    assert sum(p < 0.05 for p in p_values) <= 20 + 3 * math.sqrt(400 * 0.05 * 0.95)
    rng = np.random.default_rng(7)
    sums = [np.cumsum(rng.standard_normal((5, 20)), axis=0) for _ in range(1000)]
    pairs = [[outside(whole[k] - whole[k - 1], whole[k - 1]) for k in range(1, 5)] for whole in sums]
    plain = [run_p(*map(np.array, zip(*each, strict=True))) for each in pairs]
    assert abs(sum(p < 0.05 for p in plain) - 50) <= 3 * math.sqrt(1000 * 0.05 * 0.95)


def watched_rounds(of_biases: float, seed: int, persists: float = 0.0, rounds: int = 20) -> np.ndarray:
    """Rows of 300 weights with noise 1 and 10 biases of this std, behind an update of std `persists` that stays."""
    rng = np.random.default_rng(seed)
    memory, rows, update = NO_MEMORY, [], persists * rng.standard_normal(10)
    for number in range(1, rounds + 1):
        layers = [rng.standard_normal((30, 10)), update + of_biases * rng.standard_normal(10)]
        row, memory = watch(ReleasedSum(number, layers, 1.0, 1.0, 1.0), memory, None, 0, 0)
        rows.append(row)
    return stack_rows(rows, 0)


def test_rounds_together_show_a_small_layer_without_noise() -> None:
    rows = watched_rounds(of_biases=0.6, seed=10)
    assert rows["norm_p"].min() > 1e-3 and run_p(rows["energy"], rows["dimensions"]) > 1e-3
    assert noise_p(rows) < 1e-9
    assert noise_p(watched_rounds(of_biases=0.6, seed=11, persists=2.0)) < 1e-4
    with patch("fedveil.privacy.audit.sum_audit.WATCHED", 100):  # the model is larger than what is kept of it
        assert noise_p(watched_rounds(of_biases=0.6, seed=10)) < 1e-9
        assert noise_p(watched_rounds(of_biases=0.6, seed=11, persists=2.0)) > 1e-3


def test_layer_mean_shows_its_missing_noise_behind_zero_sum_updates() -> None:
    rng, memory, rows = np.random.default_rng(12), NO_MEMORY, []
    for number in range(1, 11):
        weights, update = 2 * rng.standard_normal((30, 10)), 2 * rng.standard_normal(10)
        released = ReleasedSum(number, [weights, update - update.mean()], 1.0, 1.0, 1.0)
        row, memory = watch(released, memory, None, 0, 0)
        rows.append(row)
    found = stack_rows(rows, 0)
    assert run_p(found["layer_energies"], found["layer_dimensions"]) > 0.9
    assert noise_p(found) < 1e-9


def test_the_shortest_of_several_layers_pays_for_their_number() -> None:
    energies, dimensions = np.array([[1.0, 9.0, 0.0]]), np.array([[10, 10, 0]])
    assert run_p(energies, dimensions) == pytest.approx(2 * run_p(energies[:, 0], dimensions[:, 0]))


@pytest.mark.parametrize(("persists", "least"), [(0.0, 36), (2.0, 0)])
def test_small_layers_keep_the_level(persists: float, least: int) -> None:
    """The smallest of three p-values lies below 0.05 in 15 % of correct runs at most."""
    found = [noise_p(watched_rounds(1.0, seed, persists, rounds=5)) < 0.05 for seed in range(400)]
    assert least <= sum(found) <= 60 + 21


def test_smallest_of_many_layers_stay_and_one_number_has_all_energy() -> None:
    layers = [np.full(1000, 2.0), *[np.ones(5)] * LAYERS, np.array(3.0)]
    row, memory = watch(ReleasedSum(1, layers, 1.0, 1.0, 1.0), NO_MEMORY, None, 0, 0)
    assert row["layer_dimensions"].tolist() == [1, *[5] * (LAYERS - 1)]
    row, _ = watch(ReleasedSum(2, layers, 2.0, 1.0, 1.0), memory, None, 0, 0)
    assert row["layer_dimensions"].tolist() == [1, *[4] * (LAYERS - 1)]
    assert row["layer_energies"].tolist() == [9 / 4, *[0.0] * (LAYERS - 1)]
    assert row["layer_means"].tolist() == [9 / 4, *[5 / 4] * (LAYERS - 1)]


def test_the_shortfall_that_is_called_visible_is() -> None:
    energies, dimensions = pooled(1.0, 8)
    visible = visible_shortfall(energies, dimensions, 1e-4)
    assert 0.005 < visible < 0.02
    less = energies - (1 - (1 - visible) ** 2) * dimensions
    assert run_p(less, dimensions) == pytest.approx(1e-4, rel=0.05)
    assert visible_shortfall(3 * energies, dimensions, 1e-4) == 1.0
    assert visible_shortfall(energies[:0], dimensions[:0], 1e-4) == 1.0


def test_noise_that_was_there_before_is_detected_under_any_updates() -> None:
    rng = np.random.default_rng(3)
    noise, fresh = rng.standard_normal(5000), rng.standard_normal(5000)
    updates = [0.3 * rng.standard_normal(5000) for _ in range(2)]
    before, again = noise + updates[0], noise + updates[1]
    assert reuse_p(again, before, 1.0) < 1e-100
    assert cosine(again, before) > 0.9
    assert reuse_p(fresh + updates[1], before, 1.0) > 0.01
    half = math.sqrt(0.5) * (noise + fresh) + updates[1]
    assert reuse_p(half, before, 1.0) < 1e-30
    assert reuse_p(fresh, np.zeros(5000), 1.0) > 0.01


def test_updates_that_point_the_same_way_are_no_reuse() -> None:
    rng = np.random.default_rng(4)
    same = 5 * rng.standard_normal(300)
    p_values = [
        reuse_p(rng.standard_normal(300) + same, rng.standard_normal(300) + same, 1.0) for _ in range(300)
    ]
    assert sum(p < 0.05 for p in p_values) <= 15 + 3 * math.sqrt(15)


# --- the draw ---------------------------------------------------------------------------------------------------


def test_counts_of_a_poisson_draw_keep_the_level() -> None:
    rng = np.random.default_rng(6)
    p_values = [draw_p(rng.binomial(400, 0.25, 20), 400, 0.25) for _ in range(1000)]
    assert sum(p < 0.05 for p in p_values) <= 50 + 3 * math.sqrt(1000 * 0.05 * 0.95)
    for rounds in (1, 2, 3):  # a count is whole, and may well meet its mean
        found = np.array([draw_p(rng.binomial(400, 0.25, rounds), 400, 0.25) for _ in range(1000)])
        assert (found < 0.05).sum() <= 50 + 3 * math.sqrt(1000 * 0.05 * 0.95) and found.min() > 1e-6
    small = [draw_p(rng.binomial(10, 0.3, 20), 10, 0.3) for _ in range(500)]
    assert sum(p < 0.05 for p in small) <= 25 + 3 * 5


def test_too_large_or_too_even_draw_is_detected() -> None:
    rng = np.random.default_rng(7)
    assert draw_p(rng.binomial(400, 0.30, 20), 400, 0.25) < 1e-6
    assert draw_p(np.full(10, 100), 400, 0.25) < 1e-9
    assert draw_p(rng.binomial(400, 0.20, 20), 400, 0.25) > 0.9  # fewer than accounted leak less


def test_a_population_that_grows_is_no_larger_draw() -> None:
    population = np.repeat([400, 900], 10)
    counts = np.random.default_rng(8).binomial(population, 0.25)
    assert draw_p(counts, population, 0.25) > 0.01
    assert draw_p(counts, 400, 0.25) < 1e-9
