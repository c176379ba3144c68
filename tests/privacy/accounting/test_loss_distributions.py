"""Composed loss distributions are those of dp_accounting, whose own code would load half of SciPy for them."""

import copy
import itertools
import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from dp_accounting.dp_event import DpEvent, GaussianDpEvent, LaplaceDpEvent, PoissonSampledDpEvent
from dp_accounting.pld.pld_pmf import SparsePLDPmf

from fedveil.privacy.accounting import loss_distributions
from fedveil.privacy.accounting.epsilon import GATE_INTERVAL, epsilon, forget_distributions
from fedveil.privacy.accounting.loss_distributions import (
    _Repeated,  # pyright: ignore[reportPrivateUsage]
    distribution,
    losses_once,
)
from fedveil.privacy.accounting.renyi import relation_of
from fedveil.privacy.accounting.sampled_gaussian import distribution as sampled
from fedveil.privacy.budget import Adjacency, Adversary, Budget, Unit
from fedveil.privacy.plan import Plan
from fedveil.strategies.cohorts import Poisson

INTERVAL = 1e-3
LEAVES: tuple[DpEvent, ...] = (
    GaussianDpEvent(0.9),
    PoissonSampledDpEvent(0.2, GaussianDpEvent(1.1)),
    PoissonSampledDpEvent(0.01, GaussianDpEvent(3.0)),
    PoissonSampledDpEvent(0.5, LaplaceDpEvent(2.0)),
)


def losses_of(*leaves: Any) -> Any:
    counts: Any = tuple((leaf, 1) for leaf in leaves)
    return distribution(counts, relation_of(Adjacency.ADD_OR_REMOVE_ONE), INTERVAL)


def test_composition_is_dp_accountings_own_bit_for_bit() -> None:
    for first, second in itertools.permutations(LEAVES, 2):
        theirs, ours = losses_of(first).compose(losses_of(second)), losses_of(first, second)
        for side in ("_pmf_remove", "_pmf_add"):
            one, other = vars(theirs)[side], vars(ours)[side]
            assert one._lower_loss == other._lower_loss and np.array_equal(one._probs, other._probs)
            # Beside theirs, what rounding may take: a gate composes one round after the other.
            rounded = loss_distributions.ROUNDED
            assert other._infinity_mass == pytest.approx(one._infinity_mass + rounded, rel=1e-9, abs=0)


@pytest.mark.parametrize("times", [2, 60, 2000])
def test_an_epsilon_is_that_of_the_larger_side_whichever_it_is(times: int) -> None:
    """A side whose largest loss is less is not composed; the other one may be either."""
    once: Any = sampled(0.01, 0.7, INTERVAL)
    added = copy.copy(once._pmf_add)
    added._infinity_mass = once._pmf_remove._infinity_mass  # by which the sides would else be told apart
    turned = type(once)(added, once._pmf_remove)
    both = once.self_compose(times).get_epsilon_for_delta(1e-6)
    for each in (once, turned):
        found = loss_distributions.epsilon(_Repeated(each, times), 1e-6)
        assert found == pytest.approx(both, rel=1e-6)


def delta_by_tilting(rate: float, noise: float, times: int, interval: float, size: float) -> float:
    """Return the delta at an epsilon of so many samples: masses are weighed by e^(t loss), so that what counts is large.

    The tilt is that of Chernoff's bound; afterwards it is taken back, and a mass that is rounded counts as little as it is.
    """
    pmf: Any = vars(sampled(rate, noise, interval))["_pmf_remove"]
    losses = (np.arange(pmf.size) + pmf._lower_loss) * interval
    tilts = np.linspace(0.5, 60, 120)
    means = np.array([np.log(np.sum(pmf._probs * np.exp(np.clip(t * losses, -700, 600)))) for t in tilts])
    tilt, mean = min(zip(tilts, means, strict=True), key=lambda each: times * each[1] - each[0] * size)
    length = 1 << 20  # in places: longer than all losses that are not negligible
    spectrum = np.fft.rfft(pmf._probs * np.exp(tilt * losses - mean), length)
    masses = np.fft.irfft(spectrum**times, length)
    first = times * pmf._lower_loss
    # On a circle a place stands for the loss nearest to the size.
    place = np.arange(length) + round(size / interval) - length // 2
    found = masses[(place - first) % length]
    beyond = place * interval > size
    loss = place[beyond] * interval
    return float(np.sum(np.exp(times * mean - tilt * loss) * found[beyond] * -np.expm1(size - loss)))


@pytest.mark.parametrize(
    ("rate", "noise", "times", "interval", "size"),
    [(0.01, 0.8, 10_000, 1e-3, 16.0), (0.01, 0.8, 10_000, 1e-3, 14.0), (1e-6, 0.3, 100_000, 1e-4, 10.0)],
)
def test_rounding_losses_of_many_rounds_count(
    rate: float, noise: float, times: int, interval: float, size: float
) -> None:
    """Where a delta is small, rounding of a Fourier transform left epsilon below the true one."""
    delta = delta_by_tilting(rate, noise, times, interval, size)
    counts: Any = ((PoissonSampledDpEvent(rate, GaussianDpEvent(noise)), times),)
    losses = distribution(counts, relation_of(Adjacency.ADD_OR_REMOVE_ONE), interval)
    (found,) = loss_distributions.deltas(losses, np.array([size]))
    assert delta < found < delta + 8 * loss_distributions.ROUNDED * times


def test_rounds_of_much_noise_compose_by_own_transforms(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round of few points was composed by dp_accounting, which computes logarithms of sums anew for every round."""
    step = PoissonSampledDpEvent(0.25, GaussianDpEvent(13.7))
    once: Any = sampled(0.25, 13.7, GATE_INTERVAL)
    theirs = once.self_compose(700).get_epsilon_for_delta(1e-4)
    monkeypatch.setattr(SparsePLDPmf, "self_compose", None)
    assert epsilon({step: 700}, 1e-4, interval=GATE_INTERVAL) == pytest.approx(theirs, rel=1e-9)


def test_round_of_a_small_rate_transforms_no_distribution_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    round_of = PoissonSampledDpEvent(1e-4, GaussianDpEvent(0.5))
    epsilon({round_of: 20}, 1e-7, interval=GATE_INTERVAL)
    sizes: list[int] = []
    rfft = loss_distributions.fft.rfft

    def noted(values: Any, length: int) -> Any:
        sizes.append(length)
        return rfft(values, length)

    monkeypatch.setattr(loss_distributions.fft, "rfft", noted)
    epsilon({round_of: 21}, 1e-7, interval=GATE_INTERVAL)
    assert sizes == []


def arrays_at_once(compute: Callable[[], Any], size: int) -> float:
    """Return the peak of memory in arrays of so many numbers."""
    tracemalloc.start()
    try:
        found = compute()
        assert found is not None
        return tracemalloc.get_traced_memory()[1] / (8 * size)
    finally:
        tracemalloc.stop()


def test_a_fine_grid_takes_few_arrays_at_once() -> None:
    rate, noise, interval = 1e-4, 0.5, 1e-5
    forget_distributions()
    made: Any = sampled(rate, noise, interval)
    size = made._pmf_remove.size
    assert size > loss_distributions.MAX_CACHED
    assert arrays_at_once(lambda: sampled(rate, noise, interval), size) < 5.5
    leaf, relation = PoissonSampledDpEvent(rate, GaussianDpEvent(noise)), relation_of(Adjacency.ZERO_OUT)
    composed: Any = loss_distributions.distribution(((leaf, 203),), relation, interval)
    whole: Any = _Repeated(made, 203)
    for found, expected in ((composed._pmf_remove, whole._pmf_remove), (composed._pmf_add, whole._pmf_add)):
        assert (found._lower_loss, found._infinity_mass) == (expected._lower_loss, expected._infinity_mass)
        np.testing.assert_array_equal(found._probs, expected._probs)
    del whole, composed
    compose = partial(loss_distributions.distribution, ((leaf, 203),), relation, interval)
    assert arrays_at_once(compose, size) < 3.5
    assert losses_once.cache_info().currsize == 0
    composed = compose()
    assert arrays_at_once(lambda: loss_distributions.epsilon(composed, 1e-7), size) < 1


def test_a_plan_keeps_no_distribution_of_the_noises_that_it_tried() -> None:
    forget_distributions()
    plan = Plan(Unit.CLIENT, Adjacency.ZERO_OUT, Poisson(1e-4), 1.0, 50, adversaries=(Adversary.MODEL,))
    plan.calibrate(Budget(Unit.CLIENT, 3.0, 1e-7))
    assert losses_once.cache_info().currsize <= 4
