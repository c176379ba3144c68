"""Correlated noise is an exact Gaussian mechanism: its sensitivity, its law, and that what leaves follows from it."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.base.refusal import Refusal
from fedveil.privacy.mechanisms.correlated_noise import SCALE_BITS, Correlation, NoiseRows
from fedveil.privacy.mechanisms.discrete_gaussian import sample
from fedveil.privacy.mechanisms.randomness import Randomness, Stream
from fedveil.privacy.mechanisms.sum_spec import SumSpec

FIVE_TIMES = Correlation(500, separation=100, max_participations=5)
SPEC = SumSpec(1.0)


def stream_of(row: int) -> Stream:
    return Randomness(7).stream("noise", row)


def matrix(correlation: Correlation) -> np.ndarray:
    """A, whole numbers, as the module's text has it."""
    n, column = correlation.num_rounds, correlation.coefficients
    return np.array([[column[i - j] if 0 <= i - j < len(column) else 0 for j in range(n)] for i in range(n)])


def error_of(column: np.ndarray, separation: int, most: int) -> float:
    """Sensitivity times prefix-sum error of a lower-triangular Toeplitz matrix, by dense linear algebra."""
    n = len(column)
    c = np.array([[column[i - j] if i >= j else 0.0 for j in range(n)] for i in range(n)])
    moved = np.linalg.norm(c[:, ::separation][:, :most].sum(axis=1))
    return float(moved * np.linalg.norm(np.linalg.solve(c.T, np.tril(np.ones((n, n))).T)) / math.sqrt(n))


@pytest.mark.parametrize(("bands", "share"), [(1, 1.0), (4, 0.562), (16, 0.327), (100, 0.196)])
def test_the_published_share_of_the_error_of_independent_noise(bands: int, share: float) -> None:
    correlation = Correlation(500, 100, 5, bands)
    assert correlation.error / FIVE_TIMES.error == pytest.approx(share, abs=6e-4)
    column = np.zeros(500)
    column[:bands] = correlation.coefficients / 2**SCALE_BITS
    assert correlation.error == pytest.approx(error_of(column, 100, 5), rel=1e-9)


def test_omitted_bands_err_no_less() -> None:
    """The full square root, and the banded inverse square root (its first coefficients are those of (1-x)^(1/2))."""
    best = FIVE_TIMES.with_best_bands().error / FIVE_TIMES.error
    steps = np.arange(1, 500)
    full = np.cumprod(np.concatenate([[1.0], (2 * steps - 1) / (2 * steps)]))
    assert error_of(full, 100, 5) / FIVE_TIMES.error == pytest.approx(0.237, abs=6e-4)
    for bands, share in ((4, 0.407), (16, 0.2405), (64, 0.206)):
        inverse = np.zeros(500)
        inverse[:bands] = np.cumprod(np.concatenate([[1.0], (2 * steps - 3) / (2 * steps)]))[:bands]
        column = np.zeros(500)
        for t in range(500):
            column[t] = (t == 0) - inverse[1 : t + 1] @ column[:t][::-1]
        assert error_of(column, 100, 5) / FIVE_TIMES.error == pytest.approx(share, abs=6e-4)
        assert share > best


def test_the_best_bands_are_the_best_and_few_rounds_need_few() -> None:
    assert FIVE_TIMES.with_best_bands().bands == 100
    for separation, most in ((1, 100), (4, 25), (20, 5)):
        best = Correlation(100, separation, most).with_best_bands()
        assert best.error == min(
            Correlation(100, separation, most, p).error for p in (1, 2, 4, 8, 16, separation)
        )
    assert Correlation(100, 1, 100).with_best_bands().bands == 1
    assert Correlation(1, 1, 1).with_best_bands().bands == 1


@settings(max_examples=60)
@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 4), st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_no_client_moves_the_protected_rows_further(n: int, b: int, k: int, bands: int, seed: int) -> None:
    """Over every pattern that the cohort allows, and any directions of the contributions."""
    correlation = Correlation(n, b, k, min(bands, n))
    a = matrix(correlation) / 2**SCALE_BITS
    patterns = [
        rounds
        for size in range(1, k + 1)
        for rounds in itertools.combinations(range(n), size)
        if all(later - earlier >= b for earlier, later in itertools.pairwise(rounds))
    ]
    furthest = max(np.linalg.norm(a[:, list(rounds)].sum(axis=1)) for rounds in patterns)
    assert correlation.sensitivity == pytest.approx(furthest, rel=1e-12)
    directions = np.random.default_rng(seed).normal(size=(n, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    for rounds in patterns:
        assert np.linalg.norm(a[:, list(rounds)] @ directions[list(rounds)]) <= correlation.sensitivity * (
            1 + 1e-12
        )


def test_bands_within_the_separation_cost_the_root_of_participations() -> None:
    correlation = Correlation(500, 100, 5, 100)
    column = np.linalg.norm(correlation.coefficients) / 2**SCALE_BITS
    assert correlation.sensitivity == pytest.approx(math.sqrt(5) * column)
    assert FIVE_TIMES.sensitivity == pytest.approx(math.sqrt(5))


def test_released_values_follow_from_the_protected_rows_alone() -> None:
    """In Python's own integers: M = A X + Z is formed first, and Y from M without another look at X or Z."""
    correlation, size, z = Correlation(12, 3, 4, 5), 3, 0.7
    sums = np.random.default_rng(3).integers(-(2**20), 2**20, size=(12, size))
    rows = NoiseRows(correlation, stream_of)
    released = [rows.add(sums[t].astype(np.float64), t + 1, z, SPEC)[0] for t in range(12)]
    sigma = math.ceil(z * correlation.sensitivity * SPEC.cells * 2**SCALE_BITS)
    noise = np.array([sample(sigma, size, stream_of(row)) for row in range(1, 13)])
    protected = (matrix(correlation) @ sums + noise).astype(object)
    coefficients = [int(a) for a in correlation.coefficients]
    expected: list[np.ndarray] = []
    for t in range(12):
        rest = protected[t] - sum(coefficients[j] * expected[t - j] for j in range(1, min(t, 4) + 1))
        expected.append(np.array([(value + 2 ** (SCALE_BITS - 1)) // 2**SCALE_BITS for value in rest]))
    for got, wanted in zip(released, expected, strict=True):
        assert got.tolist() == wanted.tolist()


def test_protected_noise_has_the_claimed_scale_and_independent_rows() -> None:
    correlation = Correlation(6, 2, 3, 4)
    rows = NoiseRows(correlation, stream_of)
    sums = np.zeros(40_000)
    noise, events = zip(*[rows.add(sums, t, 0.5, SPEC) for t in range(1, 7)], strict=True)
    assert {event.noise_multiplier for event in events} == {0.5}
    protected = matrix(correlation) @ np.array(noise) / 2**SCALE_BITS / SPEC.cells
    assert protected.std(axis=1) == pytest.approx(0.5 * correlation.sensitivity, rel=0.02)
    assert np.abs(np.corrcoef(protected) - np.eye(6)).max() < 0.03
    assert np.corrcoef(noise[0], noise[1])[0, 1] < -0.3  # a later round takes a part back


def test_any_row_can_be_had_again() -> None:
    correlation, sums = Correlation(9, 3, 3, 4), np.arange(70_000.0)
    through = NoiseRows(correlation, stream_of)
    rows = [through.add(sums, t, 1.0, SPEC)[0] for t in range(1, 10)]
    resumed = NoiseRows(correlation, stream_of)
    for t in (6, 7, 7, 2, 9):
        assert np.array_equal(resumed.add(sums, t, 1.0, SPEC)[0], rows[t - 1])


def test_row_outside_the_plan_is_refused() -> None:
    rows = NoiseRows(Correlation(3, 1, 3), stream_of)
    for row in (0, 4):
        with pytest.raises(ValueError, match="must lie in"):
            rows.add(np.zeros(2), row, 1.0, SPEC)
    with pytest.raises(ValueError, match="clipping norm"):
        rows.add(np.zeros(2), 1, 1.0, SumSpec(None))
    with pytest.raises(Refusal, match="raise the budget"):
        rows.add(np.zeros(2), 1, 1e6, SPEC)
    with pytest.raises(Refusal, match="bands=5"):
        Correlation(4, 1, 4, bands=5)
    with pytest.raises(Refusal, match="separation=0"):
        Correlation(4, 0, 4)
