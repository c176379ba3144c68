"""Draws of few among many: the law of coins and of subsets, and that nothing is made for those who are not drawn."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from scipy import stats

from fedveil.privacy.mechanisms.randomness import Randomness, Stream
from fedveil.strategies.cohorts import CyclicPoisson, Fixed, MinSeparation, Poisson
from fedveil.strategies.draws import BLOCK, SPARSE, _heads, coins, subset

MANY = 3 * BLOCK + 1234


def streams(count: int) -> Iterator[Stream]:
    return (Randomness(8).stream("draw", number) for number in range(count))


@pytest.mark.parametrize("rate", [1 / SPARSE, 0.01, 1e-4, 1e-7])
def test_heads_of_a_block_are_binomial(rate: float) -> None:
    table = _heads(rate)
    np.testing.assert_allclose(
        table / 2**64, stats.binom.cdf(np.arange(len(table)), BLOCK, rate), rtol=1e-9, atol=2**-63
    )
    assert table[-1] == 2**64 - 1 and (np.diff(table.astype(float)) >= 0).all()


@pytest.mark.parametrize("rate", [0.005, 3e-5])
def test_coins_of_many_come_up_as_those_of_few(rate: float) -> None:
    drawn = [coins(MANY, rate, stream) for stream in streams(400)]
    sizes = np.array([len(each) for each in drawn])
    law = stats.binom(MANY, rate)
    assert abs(sizes.mean() - law.mean()) < 5 * law.std() / len(sizes) ** 0.5
    assert 0.75 < sizes.var() / law.var() < 1.3
    for each in drawn:
        assert (np.diff(each) > 0).all() and (not len(each) or 0 <= each[0] <= each[-1] < MANY)
    parts = np.histogram(np.concatenate(drawn), bins=40, range=(0, MANY))[0]
    assert stats.chisquare(parts).pvalue > 1e-4
    halves = np.array([[np.sum(each < MANY / 2), np.sum(each >= MANY / 2)] for each in drawn])
    assert abs(np.corrcoef(halves.T)[0, 1]) < 5 / len(drawn) ** 0.5


def test_a_subset_of_many_is_any_with_the_same_probability() -> None:
    taken = range(0, 200, 2)
    hits = np.zeros(20_000)
    for stream in streams(600):
        drawn = subset(20_000, 150, stream, taken)
        assert len(drawn) == len(set(drawn.tolist())) == 150 and (np.diff(drawn) > 0).all()
        hits[drawn] += 1
    assert not hits[list(taken)].any()
    hits = np.delete(hits, taken)
    assert stats.chisquare(hits[:19_900].reshape(100, -1).sum(1)).pvalue > 1e-4
    assert hits.var() / hits.mean() == pytest.approx(1, abs=0.08)


class Registered(Sequence[int]):
    """A million clients of whom no list can be made."""

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, place: int) -> int:  # type: ignore[override]
        return place + 2

    def __iter__(self) -> Iterator[int]:
        raise AssertionError("everybody was looked at")


class Counting(Stream):
    """A stream that counts the bytes that are drawn."""

    drawn = 0

    def _fill(self, out: np.ndarray) -> np.ndarray:
        self.drawn += out.nbytes
        return super()._fill(out)


@pytest.mark.parametrize(
    "cohort", [Poisson(1e-4), Fixed(100), CyclicPoisson(2.5e-5, 4)], ids=["poisson", "fixed", "cyclic"]
)
def test_draw_has_the_size_of_its_cohort(cohort: Poisson | Fixed | CyclicPoisson) -> None:
    stream = Counting(bytes(32))
    drawn = cohort.draw(Registered(), stream)
    assert 5 < len(drawn) < 200 and min(drawn) >= 2 and all(type(client) is int for client in drawn)
    assert stream.drawn < 4000


def test_separation_holds_among_many() -> None:
    cohorts: list[list[int]] = []
    clients = range(2, 10_002)
    for stream in streams(30):
        cohorts.append(MinSeparation(40, 250, 1).draw(clients, stream, cohorts))
    everybody = [client for cohort in cohorts for client in cohort]
    assert {len(cohort) for cohort in cohorts} == {40} and len(set(everybody)) == 1200
    assert set(everybody) <= set(clients)
