"""Audit of one released sum: layers, and the rows that pool them."""

from unittest.mock import patch

import numpy as np
import pytest

from fedveil.privacy.audit.free_checks import (
    run_p,
)
from fedveil.privacy.audit.round_rows import LAYERS
from fedveil.privacy.audit.sum_audit import NO_MEMORY, noise_p, noise_sums, watch
from fedveil.privacy.mechanisms.released_sum import ReleasedSum


def watched_rounds(of_biases: float, seed: int, persists: float = 0.0, rounds: int = 20) -> np.ndarray:
    """Rows of 300 weights with noise 1 and 10 biases of this std, behind an update of std `persists` that stays."""
    rng = np.random.default_rng(seed)
    memory, rows, update = NO_MEMORY, [], persists * rng.standard_normal(10)
    for number in range(1, rounds + 1):
        arrays = [rng.standard_normal((30, 10)), update + of_biases * rng.standard_normal(10)]
        row, memory = watch(ReleasedSum(number, arrays, 1.0, 1.0, 1.0), memory, None, 0, 0)
        rows.append(row)
    return np.stack(rows)


def test_rounds_together_show_a_small_layer_without_noise() -> None:
    rows = watched_rounds(of_biases=0.6, seed=10)
    assert rows["norm_p"].min() > 1e-3 and run_p(rows["energy"], rows["dimensions"]) > 1e-3
    assert noise_p(noise_sums(rows)) < 1e-9
    assert noise_p(noise_sums(watched_rounds(of_biases=0.6, seed=11, persists=2.0))) < 1e-4
    with patch("fedveil.privacy.audit.sum_audit.WATCHED", 100):  # the model is larger than what is kept of it
        assert noise_p(noise_sums(watched_rounds(of_biases=0.6, seed=10))) < 1e-9
        assert noise_p(noise_sums(watched_rounds(of_biases=0.6, seed=11, persists=2.0))) > 1e-3


def test_layer_mean_shows_its_missing_noise_behind_zero_sum_updates() -> None:
    rng, memory, rows = np.random.default_rng(12), NO_MEMORY, []
    for number in range(1, 11):
        weights, update = 2 * rng.standard_normal((30, 10)), 2 * rng.standard_normal(10)
        released = ReleasedSum(number, [weights, update - update.mean()], 1.0, 1.0, 1.0)
        row, memory = watch(released, memory, None, 0, 0)
        rows.append(row)
    found = np.stack(rows)
    assert run_p(found["layer_energies"], found["layer_dimensions"]) > 0.9
    assert noise_p(noise_sums(found)) < 1e-9


@pytest.mark.parametrize(("persists", "least"), [(0.0, 36), (2.0, 0)])
def test_small_layers_keep_the_level(persists: float, least: int) -> None:
    """The smallest of three p-values lies below 0.05 in 15 % of correct runs at most."""
    found = [noise_p(noise_sums(watched_rounds(1.0, seed, persists, rounds=5))) < 0.05 for seed in range(400)]
    assert least <= sum(found) <= 60 + 21


def test_smallest_of_many_layers_stay_and_one_number_has_all_energy() -> None:
    arrays = [np.full(1000, 2.0), *[np.ones(5)] * LAYERS, np.array(3.0)]
    row, memory = watch(ReleasedSum(1, arrays, 1.0, 1.0, 1.0), NO_MEMORY, None, 0, 0)
    assert row["layer_dimensions"].tolist() == [1, *[5] * (LAYERS - 1)]
    row, _ = watch(ReleasedSum(2, arrays, 2.0, 1.0, 1.0), memory, None, 0, 0)
    assert row["layer_dimensions"].tolist() == [1, *[4] * (LAYERS - 1)]
    assert row["layer_energies"].tolist() == [9 / 4, *[0.0] * (LAYERS - 1)]
    assert row["layer_means"].tolist() == [9 / 4, *[5 / 4] * (LAYERS - 1)]
