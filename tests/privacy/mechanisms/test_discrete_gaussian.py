"""The sampler's law, against the definition computed term by term."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal, localcontext
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from fedveil.privacy.mechanisms import discrete_gaussian
from fedveil.privacy.mechanisms.discrete_gaussian import (
    add_on_lattice,
    add_rows_on_lattice,
    sample,
    sample_rows,
)
from fedveil.privacy.mechanisms.randomness import Randomness, Stream, Streams

DRAWS = 400_000


def law(sigma: int, reach: int) -> np.ndarray:
    x = np.arange(-reach, reach + 1)
    weights = np.exp(-(x.astype(float) ** 2) / (2 * sigma**2))
    return weights / weights.sum()


@pytest.mark.parametrize("sigma", [1, 2, 3, 10, 63, 64, 100, 1000])
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


@pytest.mark.parametrize("sigma", [1, 5, 63, 64, 300])
def test_table_and_rest_are_the_law_to_the_last_digit(sigma: int) -> None:
    """What the sampler does with uniform reals, summed up for every integer without drawing any."""
    table = discrete_gaussian._table(sigma)  # in the usual context, of 28 digits
    with localcontext(prec=80):
        check_law(table, sigma)


def check_law(table: discrete_gaussian._Table, sigma: int) -> None:
    owned = Counter(table.starts[: table.owned].tolist())
    chances = [after - before for before, after in pairwise((Decimal(0), *table.exact))]
    reach = discrete_gaussian.largest(sigma)
    weights = {x: (Decimal(-x * x) / (2 * sigma**2)).exp() for x in range(-reach, reach)}
    kept: dict[int, Decimal] = {}
    for near, chance, given in zip(table.peak.tolist(), chances, table.acceptance_exact, strict=True):
        start = near if near >= 0 else near - table.stride + 1
        for x in range(start, start + table.stride):
            part = (weights[x] / weights[near] - given) / (1 - given) if table.stride > 1 else Decimal(1)
            assert part >= 0
            kept[x] = chance / table.stride * part
    rest = 1 - Decimal(table.owned) / 2**16
    whole, proposals = sum(weights.values()), sum(kept.values())
    assert abs(proposals - Decimal(table.residual_acceptance)) < 1e-12
    for x, weight in weights.items():
        looked_up = Decimal(owned[x // table.stride * table.stride]) / 2**16 / table.stride
        assert abs(looked_up + rest * kept[x] / proposals - weight / whole) < Decimal(2) ** -140


def test_recursive_weights_preserve_their_digits() -> None:
    made = discrete_gaussian._weights(1, 2**35, 900, 2**40)[-1]
    with localcontext(prec=120):
        right = (Decimal(-((1 + 899 * 2**35) ** 2)) / 2**81).exp()
        assert abs(made / right - 1) < Decimal(10) ** -discrete_gaussian.PRECISION


def test_every_entry_that_no_block_owns_leads_to_the_rest() -> None:
    table = discrete_gaussian._table(100)
    entries = np.arange(2**16, dtype=np.uint32)
    found = discrete_gaussian._look_up(
        table, out := np.empty(2**16, np.int32), Scripted((entries << 16) + 2, b"")
    )
    assert found.tolist() == list(range(table.owned, 2**16))
    assert (out[: table.owned] == table.starts[: table.owned] + 2 % table.stride).all()


class Scripted(Stream):
    """A stream whose words are given, to force the comparisons that their bits cannot decide."""

    def __init__(self, words: Sequence[int] | np.ndarray, rest: bytes) -> None:
        self.words, self.rest = list(words), rest

    def uint64(self, n: int) -> np.ndarray:
        return np.array([self.words.pop(0) for _ in range(n)], np.uint64)

    def uint32(self, n: int) -> np.ndarray:
        return self.uint64(n).astype(np.uint32)

    def bytes(self, n: int) -> bytes:
        return self.rest[:n]


def test_the_guide_leads_to_the_block_of_every_word() -> None:
    """Of words on both sides of each bound, and of each where the guide's next entry begins."""
    for sigma in (1, 300):
        table = discrete_gaussian._table(sigma)
        near = [
            table.words + np.uint64(1),
            table.words - np.uint64(1),
            np.arange(0, 2**16, 9, dtype="u8") << 48,
        ]
        words = np.setdiff1d(np.concatenate(near), table.words)
        found = discrete_gaussian._invert(table, words.size, Scripted(words, b""))
        assert (found == np.searchsorted(table.words, words, side="right")).all()


def test_a_word_on_a_boundary_is_decided_by_more_bits() -> None:
    table = discrete_gaussian._table(3)
    boundary = int(table.words[20])
    low = discrete_gaussian._invert(table, 1, Scripted([boundary], bytes(32)))
    high = discrete_gaussian._invert(table, 1, Scripted([boundary], b"\xff" * 32))
    assert (low[0], high[0]) == (20, 21)


def test_the_keeping_chance_is_decided_by_more_bits() -> None:
    table = discrete_gaussian._table(1000)
    blocks = np.array([len(table.peak) // 2 + 40])
    near, given = int(table.peak[blocks[0]]), table.acceptance_exact[blocks[0]]
    chance = (Decimal(-7 * (2 * near + 7)) / (2 * 1000**2)).exp()
    leading = int((chance - given) / (1 - given) * 2**53)
    verdicts = [
        bool(
            discrete_gaussian._accept(table, blocks, np.array([near + 7]), Scripted([leading << 11], rest))[0]
        )
        for rest in (bytes(32), b"\xff" * 32)
    ]
    assert verdicts == [True, False]


def test_a_seed_gives_these_draws_on_every_machine() -> None:
    drawn = sample(820, 1 << 16, Stream(bytes(32)))
    assert drawn.dtype == np.int32
    digest = hashlib.sha256(drawn.astype("<i4").tobytes()).hexdigest()
    assert digest[:16] == "6926283537fd23be"


@pytest.mark.parametrize("sigma", [1, 63, 64, 820, 2**20, 2**22 - 1, 2**22, 2**40])
@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 33_333])
def test_compiled_numbers_are_those_of_numpy(
    sigma: int, count: int, compiled_package: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The draws, what is added of them to values of either width and layout, and where the stream is afterwards."""
    found: list[list[bytes]] = []
    for package in (compiled_package, None):
        monkeypatch.setattr(discrete_gaussian, "compiled", lambda package=package: package)
        stream = Stream(bytes([count % 256]) * 32)
        values = np.random.default_rng(count).normal(size=2 * count).astype(np.float32)
        wide = values[:count].astype(np.float64)
        drawn = sample(sigma, count, stream)
        for each in (values[:count], values[::2], wide):
            add_on_lattice(each, sigma, 0.3 / sigma, stream)
        found.append([each.tobytes() for each in (drawn, values, wide)] + [stream.bytes(8)])
    assert found[0] == found[1]


@pytest.mark.parametrize("sigma", [1, 63, 820, 2**22, 2**40])
@pytest.mark.parametrize("count", [0, 1, 650, 5000, 33_333])
def test_rows_are_the_draws_of_their_streams(
    sigma: int, count: int, compiled_package: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the residual is asked again, what is added of it, and where each stream is afterwards."""
    monkeypatch.setattr(discrete_gaussian, "_SPARE", 0.2)
    for package in (compiled_package, None):
        monkeypatch.setattr(discrete_gaussian, "compiled", lambda package=package: package)
        found: list[list[bytes]] = []
        values = np.random.default_rng(count).normal(size=(5, count)).astype(np.float32)
        for at_once in (True, False):
            streams, sums = [Stream(bytes([row]) * 32) for row in range(5)], values.copy()
            if at_once:
                rows = sample_rows(sigma, count, streams)
                add_rows_on_lattice(sums, sigma, 0.3 / sigma, streams)
            else:
                rows = np.stack([sample(sigma, count, each) for each in streams])
                for row, each in zip(sums, streams, strict=True):
                    add_on_lattice(row, sigma, 0.3 / sigma, each)
            found.append([rows.tobytes(), sums.tobytes(), *(each.bytes(8) for each in streams)])
        assert found[0] == found[1]


def test_a_tie_takes_bits_of_its_own_stream() -> None:
    table = discrete_gaussian._table(3)
    boundary = int(table.words[20])
    low, high = Scripted([5, boundary], bytes(32)), Scripted([boundary], b"\xff" * 32)
    found = discrete_gaussian._invert(table, 3, Streams([low, high], [2, 1]))
    assert found[1:].tolist() == [20, 21]


def test_the_compiled_package_draws_the_numbers_that_it_should(
    compiled_package: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discrete_gaussian, "_installed", compiled_package)
    discrete_gaussian.compiled.cache_clear()
    assert discrete_gaussian.compiled() is compiled_package
    discrete_gaussian.compiled.cache_clear()


@pytest.mark.parametrize("step", [0.5, 1e-3, 3e-7])
def test_values_are_rounded_and_added_to_as_numpy_does(step: float, compiled_package: Any) -> None:
    """Halves, numbers that no double holds, and sums that a float holds no more."""
    rng = np.random.default_rng(5)
    values = np.concatenate([rng.integers(-999, 999, 5000) / 4, rng.normal(size=5003), [0, -0.0, 1e38]])
    values, noise = values.astype(np.float32), rng.integers(-(2**31), 2**31, values.size, np.int32)
    expected = values.copy()
    discrete_gaussian._add_to_rounded(expected, noise, step)
    compiled_package.add_on_lattice(values, noise, step)
    assert values.tobytes() == expected.tobytes()


@pytest.mark.parametrize("wrong", [None, "entry", "low bits", "places", "noise", "rounding"])
def test_compiled_noise_that_is_other_noise_is_not_used(
    wrong: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look_up(words: Any, starts: Any, low: int, owned: int, out: Any, left: Any) -> int:
        starts, low = starts * (wrong != "entry"), low * (wrong != "low bits")
        return discrete_gaussian._look_words_up(words, starts, low, owned, out, left) - (wrong == "places")

    def add(values: Any, noise: Any, step: float) -> None:
        if wrong == "rounding":
            values += noise * step
        else:
            discrete_gaussian._add_to_rounded(values, noise * (wrong != "noise"), step)

    package = SimpleNamespace(look_up=look_up, add_on_lattice=add)
    monkeypatch.setattr(discrete_gaussian, "_installed", package)
    discrete_gaussian.compiled.cache_clear()
    assert discrete_gaussian.compiled() is (package if wrong is None else None)
    discrete_gaussian.compiled.cache_clear()


def test_the_compiled_parts_take_as_many_of_each(compiled_package: Any) -> None:
    words, starts = np.zeros(8, np.uint32), np.zeros(2**16, np.int32)
    for sizes in ((7, 2**16, 8), (8, 2**16 - 1, 8), (8, 2**16, 7)):
        out, left = np.ones(sizes[0], np.int32), np.ones(sizes[2], np.int32)
        with pytest.raises(ValueError, match="65536 entries"):
            compiled_package.look_up(words, starts[: sizes[1]], 0, 0, out, left)
        assert out.all() and left.all()
    for values, noise in ((np.ones(8, np.float32), np.ones(7, np.int32)), (bytearray(5), bytes(5))):
        with pytest.raises(ValueError, match="each value"):
            compiled_package.add_on_lattice(values, noise, 1.0)


@pytest.mark.parametrize("sigma", [0, -1, 2**40 + 1])
def test_sigma_out_of_range_is_refused(sigma: int) -> None:
    with pytest.raises(ValueError, match="sigma"):
        sample(sigma, 1, Stream(None))


def test_no_draws() -> None:
    assert sample(10, 0, Stream(None)).shape == (0,)
