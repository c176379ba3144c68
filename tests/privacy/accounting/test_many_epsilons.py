"""Epsilons of many rounds at once are those that are computed one by one."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from dp_accounting.dp_event import GaussianDpEvent, LaplaceDpEvent, PoissonSampledDpEvent

from fedveil.privacy.accounting import many_epsilons
from fedveil.privacy.accounting.epsilon import GATE_INTERVAL, epsilon, grouped
from fedveil.privacy.accounting.many_epsilons import epsilons
from fedveil.privacy.budget import Adjacency

Times = Callable[[int], dict[Any, int]]  # how often each event happened after a round


def sampled(rate: float, noise: float) -> PoissonSampledDpEvent:
    return PoissonSampledDpEvent(rate, GaussianDpEvent(noise))


def of_rounds(times: Times, rounds: range, delta: float, adjacency: Adjacency, off: float) -> tuple[Any, Any]:
    """Return epsilons one by one, and those together whose search begins off by this share."""
    alone = np.array([epsilon(times(n), delta, adjacency, GATE_INTERVAL) for n in rounds])
    compositions = [grouped(times(n)) for n in rounds]
    return alone, epsilons(compositions, delta, adjacency, alone * (1 + off))


@pytest.mark.parametrize(
    ("times", "rounds", "delta"),
    [
        (lambda n: {sampled(0.2, 20.0): n}, range(5, 900, 37), 1e-4),  # on a fine grid, epsilon being small
        (lambda n: {sampled(0.2, 20.0): n}, range(3_000, 100_000, 9_000), 1e-5),
        (lambda n: {sampled(0.01, 1.5): n}, range(50, 5_000, 450), 1e-6),  # its two sides differ
        (lambda n: {sampled(0.01, 10.0): n}, range(500, 5_000, 1_500), 1e-5),  # a round's loss is small
        (lambda n: {sampled(0.1, 8.0): n, sampled(0.05, 5.0): n // 10 + 1}, range(100, 900, 70), 1e-5),
        (lambda n: {PoissonSampledDpEvent(0.1, LaplaceDpEvent(2.0)): n}, range(300, 900, 97), 1e-5),
    ],
)
@pytest.mark.parametrize("off", [0.0, -0.01, 0.01])
def test_epsilons_of_many_rounds_are_those_of_each(
    times: Times, rounds: range, delta: float, off: float
) -> None:
    alone, together = of_rounds(times, rounds, delta, Adjacency.ZERO_OUT, off)
    assert np.isfinite(together).all()
    assert together == pytest.approx(alone, rel=1e-7, abs=1e-7)


@pytest.mark.parametrize(
    ("times", "delta", "adjacency"),
    [
        (lambda n: {GaussianDpEvent(20.0): n}, 1e-5, Adjacency.ZERO_OUT),  # one other Gaussian each
        (lambda n: {sampled(0.2, 20.0): n}, 1e-5, Adjacency.REPLACE_ONE),
        (lambda n: {sampled(0.2, 20.0): n}, 1e-11, Adjacency.ZERO_OUT),  # rounding would show
        (lambda n: {sampled(0.2, 20.0): n}, 1e-13, Adjacency.ZERO_OUT),  # by RDP alone
    ],
)
def test_an_unreachable_epsilon_is_no_number(times: Times, delta: float, adjacency: Adjacency) -> None:
    _, together = of_rounds(times, range(1_000, 1_003), delta, adjacency, 0.0)
    assert np.isnan(together).all()


def test_a_search_that_begins_far_off_ends_right_or_nowhere() -> None:
    for off in (-1.0, -0.9, -0.3, 0.3, 2.0, 50.0, 1e6):
        alone, together = of_rounds(
            lambda n: {sampled(0.2, 20.0): n}, range(500, 4_000, 500), 1e-5, Adjacency.ZERO_OUT, off
        )
        reached = np.isfinite(together)
        assert together[reached] == pytest.approx(alone[reached], rel=1e-7)


def test_epsilons_are_those_of_the_larger_side_whichever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    once = many_epsilons.losses_once

    def turned(*leaf: Any) -> Any:
        pair: Any = copy.copy(once(*leaf))
        pair._pmf_remove, pair._pmf_add = pair._pmf_add, pair._pmf_remove
        return pair

    def times(n: int) -> dict[Any, int]:
        return {sampled(0.1, 8.0): n}

    rounds = range(1_000, 3_000, 700)
    compositions = [grouped(times(n)) for n in rounds]
    _, expected = of_rounds(times, rounds, 1e-5, Adjacency.ZERO_OUT, 0.0)
    monkeypatch.setattr(many_epsilons, "losses_once", turned)
    together = epsilons(compositions, 1e-5, Adjacency.ZERO_OUT, expected)
    assert np.isfinite(expected).all()
    assert together == pytest.approx(expected, rel=1e-7)
