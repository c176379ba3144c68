import numpy as np
import pytest
from dp_accounting.dp_event import GaussianDpEvent, PoissonSampledDpEvent
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedveil.base.refusal import Refusal
from fedveil.privacy.mechanisms.randomness import Randomness
from fedveil.strategies.cohorts import All, Fixed, MinSeparation, Poisson, likely_participations

POPULATION = list(range(100, 500))
GAUSSIAN = GaussianDpEvent(1.0)


def sizes(cohort: Poisson | Fixed, rounds: int = 2000) -> list[int]:
    return [len(cohort.draw(POPULATION, Randomness(1).stream("cohort", r))) for r in range(rounds)]


def test_poisson_sizes_are_binomial_and_fixed_sizes_are_not() -> None:
    drawn = sizes(Poisson(0.25))
    expected = stats.binom(400, 0.25)
    assert abs(np.mean(drawn) - 100) < 5 * expected.std() / np.sqrt(len(drawn))
    assert 0.9 < np.var(drawn) / expected.var() < 1.1
    assert set(sizes(Fixed(100))) == {100}


def test_poisson_clients_are_drawn_independently() -> None:
    hits = np.zeros((3000, 2), bool)
    for r in range(3000):
        chosen = Poisson(0.3).draw(POPULATION, Randomness(2).stream("cohort", r))
        hits[r] = [100 in chosen, 101 in chosen]
    assert abs(hits.mean() - 0.3) < 0.03
    assert abs(np.corrcoef(hits.T)[0, 1]) < 0.08


def test_a_poisson_cohort_may_be_empty() -> None:
    assert [] in [Poisson(0.01).draw([1], Randomness(0).stream("c", r)) for r in range(20)]


def test_fixed_is_uniform_without_replacement() -> None:
    counts = np.zeros(10)
    for r in range(4000):
        chosen = Fixed(3).draw(list(range(10)), Randomness(3).stream("cohort", r))
        assert len(set(chosen)) == 3
        counts[chosen] += 1
    assert stats.chisquare(counts).pvalue > 1e-4


def test_only_a_poisson_draw_is_amplified() -> None:
    assert Poisson(0.25).event(GAUSSIAN) == PoissonSampledDpEvent(0.25, GAUSSIAN)
    assert Poisson(1.0).event(GAUSSIAN) == GAUSSIAN
    assert Fixed(3).event(GAUSSIAN) == GAUSSIAN
    assert All().event(GAUSSIAN) == GAUSSIAN


def test_denominators_are_fixed() -> None:
    assert (Poisson(0.25).expected_size(400), Fixed(7).expected_size(400), All().expected_size(400)) == (
        100,
        7,
        400,
    )


@settings(max_examples=100)
@given(st.integers(1, 20), st.integers(1, 8), st.integers(1, 6), st.integers(1, 5), st.integers(0, 9))
def test_separation_and_participations_hold(
    clients: int, size: int, separation: int, most: int, seed: int
) -> None:
    """Also where too few may take part: the cohort is then smaller, never the promise."""
    cohort, cohorts = MinSeparation(size, separation, most), list[list[int]]()
    last, count = dict[int, int](), dict.fromkeys(range(clients), 0)
    for number in range(12):
        drawn = cohort.draw(range(clients), Randomness(seed).stream("cohort", number), cohorts)
        assert len(set(drawn)) == len(drawn) <= size
        for client in drawn:
            assert number - last.get(client, -separation) >= separation
            last[client], count[client] = number, count[client] + 1
        cohorts.append(drawn)
    assert max(count.values()) <= most
    if separation * size <= clients and 12 * size <= most * clients:
        assert max(count.values()) - min(count.values()) <= 2
        assert {len(drawn) for drawn in cohorts} == {size}


def test_by_turns_everyone_has_one_before_anyone_has_two() -> None:
    cohorts: list[list[int]] = []
    for number in range(8):
        cohorts.append(MinSeparation(100, 4, 2).draw(POPULATION, Randomness(5).stream("c", number), cohorts))
    for turn in (cohorts[:4], cohorts[4:]):
        assert sorted(client for cohort in turn for client in cohort) == POPULATION
    assert MinSeparation(100, 4, 2).event(GAUSSIAN) == GAUSSIAN
    assert MinSeparation(100, 4, 2).expected_size(400) == 100
    assert likely_participations(MinSeparation(100, 4, 2), 400, 100) == 2
    with pytest.raises(Refusal, match=r"cohort\.separation=0"):
        MinSeparation(1, 0, 1)


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1, float("nan")])
def test_bad_rates(rate: float) -> None:
    with pytest.raises(Refusal, match=r"cohort\.rate"):
        Poisson(rate)


def test_more_than_there_are() -> None:
    with pytest.raises(Refusal, match=r"cohort\.size"):
        Fixed(5).draw([1, 2], Randomness(0).stream("c"))


def test_likely_participations() -> None:
    assert likely_participations(All(), 4, 30) == 30
    assert likely_participations(Poisson(0.25), 400, 100) == 38
    assert likely_participations(Fixed(100), 400, 100) == 38
