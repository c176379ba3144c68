"""Free checks of the noise and of the draw: what they detect, and the level that they keep."""

import math

import numpy as np
import pytest

from fedveil.privacy.audit.free_checks import (
    cosine,
    draw_p,
    draw_sums,
    norm_p,
    outside,
    reuse_p,
    run_p,
    visible_shortfall,
)


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
    sums = np.rint(noise * rng.standard_normal((100_000, 2)))
    found = np.array([norm_p([each], noise, step=1.0) for each in sums])
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


def test_the_shortest_of_several_layers_pays_for_their_number() -> None:
    energies, dimensions = np.array([[1.0, 9.0, 0.0]]), np.array([[10, 10, 0]])
    assert run_p(energies, dimensions) == pytest.approx(2 * run_p(energies[:, 0], dimensions[:, 0]))


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


def test_counts_of_a_poisson_draw_keep_the_level() -> None:
    rng = np.random.default_rng(6)
    p_values = [draw_p(draw_sums(rng.binomial(400, 0.25, 20), 400, 0.25), 0.25) for _ in range(1000)]
    assert sum(p < 0.05 for p in p_values) <= 50 + 3 * math.sqrt(1000 * 0.05 * 0.95)
    for rounds in (1, 2, 3):  # a count is whole, and may well meet its mean
        found = np.array(
            [draw_p(draw_sums(rng.binomial(400, 0.25, rounds), 400, 0.25), 0.25) for _ in range(1000)]
        )
        assert (found < 0.05).sum() <= 50 + 3 * math.sqrt(1000 * 0.05 * 0.95) and found.min() > 1e-6
    small = [draw_p(draw_sums(rng.binomial(10, 0.3, 20), 10, 0.3), 0.3) for _ in range(500)]
    assert sum(p < 0.05 for p in small) <= 25 + 3 * 5


def test_too_large_or_too_even_draw_is_detected() -> None:
    rng = np.random.default_rng(7)
    assert draw_p(draw_sums(rng.binomial(400, 0.30, 20), 400, 0.25), 0.25) < 1e-6
    assert draw_p(draw_sums(np.full(10, 100), 400, 0.25), 0.25) < 1e-9
    assert (
        draw_p(draw_sums(rng.binomial(400, 0.20, 20), 400, 0.25), 0.25) > 0.9
    )  # fewer than accounted leak less


def test_a_population_that_grows_is_no_larger_draw() -> None:
    population = np.repeat([400, 900], 10)
    counts = np.random.default_rng(8).binomial(population, 0.25)
    assert draw_p(draw_sums(counts, population, 0.25), 0.25) > 0.01
    assert draw_p(draw_sums(counts, 400, 0.25), 0.25) < 1e-9
