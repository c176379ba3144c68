"""The rotation is orthogonal, is undone, and spreads a coordinate."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.privacy.mechanisms import rotation
from fedveil.privacy.mechanisms.rotation import rotate, unrotate

SEED = bytes(range(32))


@given(st.integers(1, 5000), st.integers(0, 2**32), st.binary(min_size=32, max_size=32))
@settings(max_examples=60)
def test_the_rotation_is_orthogonal_and_is_undone(size: int, key: int, seed: bytes) -> None:
    first, second = np.random.default_rng(key).normal(size=(2, size))
    rotated, other = first.copy(), second.copy()
    rotate(rotated, seed)
    rotate(other, seed)
    assert np.dot(rotated, other) == pytest.approx(np.dot(first, second), abs=1e-9 * size)
    unrotate(rotated, seed)
    assert np.abs(rotated - first).max() < 1e-12


@pytest.mark.parametrize("position", [0, 700, 1023, 1024, 1500])
def test_the_rotation_spreads_one_coordinate_over_all_it_mixes_with(position: int) -> None:
    vector = np.zeros(1501)
    vector[position] = 1.0
    rotate(vector, SEED)
    assert np.abs(vector).max() < 6 / math.sqrt(1024)
    assert np.count_nonzero(vector) > 900


def test_the_second_pass_has_signs_of_its_own() -> None:
    first, second = (rotation._signs(1024, start, SEED) for start in rotation._starts(1501))
    assert 0.4 < (first != second).mean() < 0.6


def test_another_seed_is_another_rotation() -> None:
    first, second = np.ones(64), np.ones(64)
    rotate(first, SEED)
    rotate(second, bytes(32))
    assert np.abs(first - second).max() > 0.1
