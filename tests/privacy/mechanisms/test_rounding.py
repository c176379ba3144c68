"""Rounding keeps the mean and a limit on the norm."""

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.privacy.mechanisms.randomness import Randomness
from fedveil.privacy.mechanisms.rounding import blocks_of, limit_for, round_within


@given(st.integers(1, 3000), st.integers(1, 5000), st.integers(0, 2**32), st.sampled_from([0.02, 1.0, 50.0]))
@settings(max_examples=150)
def test_the_norm_after_rounding_keeps_to_the_limit(size: int, cells: int, key: int, spike: float) -> None:
    vector = np.random.default_rng(key).standard_t(spike + 0.1, size=size)
    vector *= cells / np.linalg.norm(vector)
    whole = round_within(blocks_of(vector), limit_for(cells, size), Randomness(key).stream("rounding"))
    assert sum(int(v) ** 2 for v in whole) <= limit_for(cells, size)
    assert np.abs(whole - vector).max() <= 1


def test_halves_everywhere_are_rounded_anew_until_they_fit() -> None:
    """The hardest vector there is: every try adds 1/4 to the squared norm of every coordinate, on average."""
    vector = np.full(10_000, 0.5)
    limit = limit_for(50, 10_000)
    for key in range(50):
        whole = round_within(blocks_of(vector), limit, Randomness(key).stream("rounding"))
        assert int(np.dot(whole.astype(np.int64), whole)) <= limit
        assert abs(whole.mean() - 0.5) < 0.03


def test_a_vector_that_cannot_be_rounded_at_random_goes_towards_zero() -> None:
    vector = np.array([0.9, -1.9, 2.0])
    assert round_within(blocks_of(vector), 5, Randomness(1).stream("rounding")).tolist() == [0, -1, 2]


def test_rounding_keeps_the_mean() -> None:
    vector = np.repeat([0.1, -0.3, 7.75, -2.5], 50_000)
    whole = round_within(blocks_of(vector), 2**40, Randomness(2).stream("rounding"))
    means = whole.reshape(4, -1).mean(axis=1)
    assert np.abs(means - [0.1, -0.3, 7.75, -2.5]).max() < 5 * 0.5 / math.sqrt(50_000)
