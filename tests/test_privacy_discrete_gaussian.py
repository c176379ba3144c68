"""The sampler's law, against the definition computed term by term."""

import numpy as np
import pytest
from scipy import stats

from fedveil.privacy.mechanisms import discrete_gaussian
from fedveil.privacy.mechanisms.discrete_gaussian import sample
from fedveil.privacy.mechanisms.randomness import Randomness, Stream

DRAWS = 400_000


def law(sigma: int, reach: int) -> np.ndarray:
    x = np.arange(-reach, reach + 1)
    weights = np.exp(-(x.astype(float) ** 2) / (2 * sigma**2))
    return weights / weights.sum()


@pytest.mark.parametrize("sigma", [1, 2, 3, 10, 31, 32, 100, 1000])
def test_the_law_is_the_discrete_gaussian(sigma: int) -> None:
    drawn = sample(sigma, DRAWS, Randomness(7).stream("chi square", sigma))
    reach = 14 * sigma
    expected = law(sigma, reach) * DRAWS
    observed = np.bincount(drawn + reach, minlength=2 * reach + 1)
    # Cells with fewer than five expected draws are pooled into their neighbours.
    edges = np.flatnonzero(np.diff(np.floor(np.cumsum(expected) / max(5, expected.max())), prepend=-1))
    statistic, p_value = stats.chisquare(np.add.reduceat(observed, edges), np.add.reduceat(expected, edges))
    assert p_value > 1e-4, statistic


def test_a_wrong_scale_fails_the_same_check() -> None:
    drawn = sample(102, DRAWS, Randomness(7).stream("wrong"))
    chi = (DRAWS * drawn.var() / 100.0**2 - DRAWS) / np.sqrt(2 * DRAWS)
    assert chi > 5


@pytest.mark.parametrize("sigma", [1, 64, 2**18, 2**34])
def test_moments(sigma: int) -> None:
    scaled = sample(sigma, DRAWS, Randomness(3).stream("moments", sigma)) / sigma
    assert abs(scaled.mean()) < 5 / np.sqrt(DRAWS)
    assert abs(scaled.var() - 1) < 5 * np.sqrt(2 / DRAWS)
    assert abs(stats.kurtosis(scaled)) < 0.05


def test_low_bits_are_uniform_when_sigma_is_wide() -> None:
    drawn = sample(2**20, DRAWS, Randomness(5).stream("bits"))
    counts = np.bincount(drawn % 64, minlength=64)
    assert stats.chisquare(counts).pvalue > 1e-4


class Scripted(Stream):
    """A stream whose words are given, to force the comparisons that 64 bits cannot decide."""

    def __init__(self, words: list[int], rest: bytes) -> None:
        self.words, self.rest = words, rest

    def uint64(self, n: int) -> np.ndarray:
        return np.array([self.words.pop(0) for _ in range(n)], np.uint64)

    def bytes(self, n: int) -> bytes:
        return self.rest[:n]


def test_a_word_on_a_boundary_is_decided_by_more_bits() -> None:
    table = discrete_gaussian._table(3)
    boundary = int(table.words[2])
    low = discrete_gaussian._invert(table, 1, Scripted([boundary], bytes(32)))
    high = discrete_gaussian._invert(table, 1, Scripted([boundary], b"\xff" * 32))
    assert (low[0], high[0]) == (2, 3)


def test_the_keeping_chance_is_decided_by_more_bits() -> None:
    table = discrete_gaussian._table(1000)
    coarse, fine = np.array([40]), np.array([7])
    product = (2 * table.stride * 40 + 7) * 7
    chance = np.exp(-product / (2 * 1000**2))
    leading = int(chance * 2**53)
    verdicts = [
        bool(discrete_gaussian._keep(table, coarse, fine, Scripted([leading << 11], rest))[0])
        for rest in (bytes(32), b"\xff" * 32)
    ]
    assert verdicts == [True, False]


@pytest.mark.parametrize("sigma", [0, -1, 2**40 + 1])
def test_sigma_out_of_range_is_refused(sigma: int) -> None:
    with pytest.raises(ValueError, match="sigma"):
        sample(sigma, 1, Stream(None))


def test_no_draws() -> None:
    assert sample(10, 0, Stream(None)).shape == (0,)
