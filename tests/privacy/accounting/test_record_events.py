"""Cost of a client's release to one of its records: an attack, and oracles for the client's vector exchanged."""

import math
import runpy
from pathlib import Path

import numpy as np
import pytest
from dp_accounting import dp_event as dp
from dp_accounting.pld import PLDAccountant
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
from dp_accounting.privacy_accountant import NeighboringRelation
from scipy import fft
from scipy.stats import norm

from fedveil.base.refusal import Refusal
from fedveil.privacy.accounting.curve import privacy_curve
from fedveil.privacy.accounting.custom_events import ExchangedDpEvent
from fedveil.privacy.accounting.epsilon import epsilon, within
from fedveil.privacy.accounting.events import event_from_json, event_to_json
from fedveil.privacy.accounting.gate import Gate
from fedveil.privacy.accounting.record_events import record_event
from fedveil.privacy.budget import Adjacency, Adversary, Budget, Release, Unit
from fedveil.privacy.ledger.hash_chain import canonical
from fedveil.privacy.ledger.ledger import Ledger, verify

RECOMPUTE = runpy.run_path(str(Path(__file__).parents[3] / "evidence" / "binding" / "recompute_ledger.py"))
DELTA = 1e-5


def of_records(
    event: dp.DpEvent, adjacency: Adjacency = Adjacency.ZERO_OUT, secret: bool = True
) -> dp.DpEvent:
    return event_from_json(record_event(event_to_json(event), adjacency, secret))


def best_attack(noise: float, delta: float) -> float:
    """Return the epsilon of one record between two vectors at opposite ends of the clip, from its exact profile."""

    def profile(
        size: float,
    ) -> float:  # the best test answers "first" above the point where the odds are e^size
        point = size * noise**2 / 2
        return float(norm.sf(point, 1, noise) - math.exp(size) * norm.sf(point, -1, noise))

    low, high = 0.0, 100.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if profile(middle) > delta else (low, middle)
    return high


@pytest.mark.parametrize("noise", [0.8, 2.0, 6.0])
def test_record_turning_its_clients_vector_shows_at_half_the_noise(noise: float) -> None:
    found = best_attack(noise, DELTA)
    whole, half = (epsilon([dp.GaussianDpEvent(each)], DELTA) for each in (noise, noise / 2))
    assert found > 1.5 * whole  # so the client's own event would be too little
    assert found == pytest.approx(half, rel=2e-4)
    assert epsilon([of_records(dp.GaussianDpEvent(noise))], DELTA) == half
    oracle = from_gaussian_mechanism(noise, sensitivity=2.0).get_epsilon_for_delta(DELTA)
    assert half == pytest.approx(oracle, rel=2e-4)


def test_under_replace_one_accountants_read_the_distance_themselves() -> None:
    event, replaced = dp.GaussianDpEvent(2.0), Adjacency.REPLACE_ONE
    assert of_records(event, replaced) == event
    assert epsilon([event], DELTA, replaced) == pytest.approx(best_attack(2.0, DELTA), rel=2e-4)


def mixtures(rate: float, noise: float, times: int, delta: float) -> tuple[float, float]:
    """Return bounds on the epsilon of so many sums of secret draws, of a client with one vector or its opposite.

    The losses of both mixtures are rounded down and up on a grid, and composed by a Fourier transform.
    """
    step, size = 2e-4, 1 << 19
    places = np.linspace(-12 * noise - 1, 12 * noise + 1, 400_001)
    density = [
        np.logaddexp(
            math.log1p(-rate) + norm.logpdf(places, 0, noise), math.log(rate) + norm.logpdf(places, at, noise)
        )
        for at in (1, -1)
    ]
    losses, masses = density[0] - density[1], np.exp(density[0]) * (places[1] - places[0])
    found = []
    for rounded in (np.floor, np.ceil):
        grid = rounded(losses / step).astype(int)
        once = np.bincount(grid % size, masses, size)
        many = np.maximum(fft.irfft(fft.rfft(once) ** times, size), 0)
        steps = (np.arange(size) + size // 2) % size - size // 2
        low, high = 0.0, 50.0
        while high - low > 1e-6:
            middle = (low + high) / 2
            above = steps * step > middle
            told = float(np.sum(many[above] * -np.expm1(middle - steps[above] * step)))
            low, high = (middle, high) if told > delta else (low, middle)
        found.append(high)
    return found[0], found[1]


@pytest.mark.parametrize(("rate", "noise", "times"), [(0.25, 3.0, 20), (0.05, 1.0, 50)])
def test_a_secret_draw_hides_the_exchange_as_two_mixtures_do(rate: float, noise: float, times: int) -> None:
    drawn = dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(noise))
    ours = epsilon({of_records(drawn): times}, 1e-4)
    low, high = mixtures(rate, noise, times, 1e-4)
    assert low * (1 - 1e-3) <= ours <= high * (1 + 1e-2)
    assert ours > 1.2 * epsilon({drawn: times}, 1e-4)  # the client's own event would be too little
    oracle = PLDAccountant(NeighboringRelation.REPLACE_ONE, 1e-4).compose(drawn, times)
    assert ours == pytest.approx(oracle.get_epsilon(1e-4), rel=2e-3)
    assert ours < epsilon({of_records(drawn, secret=False): times}, 1e-4)


def test_exchange_is_composed_with_events_of_records() -> None:
    drawn = dp.PoissonSampledDpEvent(0.1, dp.GaussianDpEvent(1.0))
    swapped, own = ExchangedDpEvent(drawn), dp.PoissonSampledDpEvent(0.02, dp.GaussianDpEvent(0.9))
    assert event_from_json(event_to_json(swapped)) == swapped
    both = epsilon({swapped: 10, own: 100}, DELTA)
    assert both > max(epsilon({swapped: 10}, DELTA), epsilon({own: 100}, DELTA))
    events = [swapped] * 10 + [own] * 100
    for size in (both * 0.99, both * 1.01):
        budget = Budget(Unit.RECORD, size, DELTA)
        assert within(events, budget) == Gate().fits(events[1:], swapped, budget) == (size > both)
    curve = privacy_curve({swapped: 10, own: 100}, Adjacency.ZERO_OUT, 1e-3)
    assert curve.mu is None and dict(curve.epsilon)[DELTA] == pytest.approx(both, rel=1e-2)


@pytest.mark.parametrize("adjacency", list(Adjacency))
def test_auditors_script_recomputes_exchanges_and_record_steps(tmp_path: Path, adjacency: Adjacency) -> None:
    budget = Budget(Unit.RECORD, 1e6, DELTA, adjacency)
    swapped = of_records(dp.PoissonSampledDpEvent(0.1, dp.GaussianDpEvent(2.0)), adjacency)
    step = dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(0.05, dp.GaussianDpEvent(1.0)), 10)
    with Ledger.open(tmp_path / "x.ledger", budget, owner="a", simulated=False) as ledger:
        for number in range(30):
            event = step if number % 3 else swapped
            ledger.reserve(Release(Unit.RECORD, "run", number + 1, "sum", {Adversary.MODEL: event}, "system"))
    found = verify(tmp_path / "x.ledger")
    oracle = RECOMPUTE["main"](str(tmp_path / "x.ledger"))["model"]
    assert found.ok and found.epsilon == pytest.approx(oracle["epsilon"], rel=5e-3)


def test_auditors_script_composes_nested_samples_with_other_events(tmp_path: Path) -> None:
    steps = dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(0.05, dp.GaussianDpEvent(1.0)), 10)
    events = [dp.PoissonSampledDpEvent(0.2, steps), steps, dp.GaussianDpEvent(20.0)]
    budget = Budget(Unit.RECORD, 1e6, DELTA, Adjacency.ZERO_OUT)
    with Ledger.open(tmp_path / "x.ledger", budget, owner="a", simulated=False) as ledger:
        for number, event in enumerate(events * 5):
            ledger.reserve(Release(Unit.RECORD, "run", number + 1, "sum", {Adversary.MODEL: event}, "system"))
    oracle = RECOMPUTE["main"](str(tmp_path / "x.ledger"))["model"]
    assert verify(tmp_path / "x.ledger").epsilon == pytest.approx(oracle["epsilon"], rel=5e-3)


@pytest.mark.parametrize("wrapped", [False, True])
def test_auditors_script_finds_no_bound_with_an_event_without_one(wrapped: bool) -> None:
    steps = dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(0.05, dp.GaussianDpEvent(1.0)), 10)
    open_event = dp.SelfComposedDpEvent(dp.NonPrivateDpEvent(), 2) if wrapped else dp.NonPrivateDpEvent()
    events = [dp.PoissonSampledDpEvent(0.2, steps), open_event]
    counts = {canonical(event_to_json(event)): 1 for event in events}
    assert RECOMPUTE["epsilon"](counts, "zero-out", DELTA, None) == math.inf


def test_the_auditors_own_script_knows_two_mixtures() -> None:
    low, high = mixtures(0.25, 3.0, 20, 1e-4)
    event = dp.PoissonSampledDpEvent(0.25, dp.GaussianDpEvent(3.0))
    text = canonical(event_to_json(ExchangedDpEvent(event)))
    for adjacency in ("zero-out", "replace-one"):
        found = RECOMPUTE["epsilon"]({text: 20}, adjacency, 1e-4, None)
        assert low * (1 - 1e-3) <= found <= high * (1 + 1e-2)
    nested = RECOMPUTE["nested_epsilon"]([(RECOMPUTE["Exchanged"](event), 20)], 1e-4)
    assert low * (1 - 1e-3) <= nested <= high * (1 + 1e-2)


@pytest.mark.parametrize("adjacency", list(Adjacency))
def test_a_ledger_with_exchanges_verifies(tmp_path, adjacency: Adjacency) -> None:
    budget = Budget(Unit.RECORD, 5.0, DELTA, adjacency)
    event = of_records(dp.PoissonSampledDpEvent(0.1, dp.GaussianDpEvent(2.0)), adjacency)
    with Ledger.open(tmp_path / "x.ledger", budget, owner="a", simulated=False) as ledger:
        for number in range(3):
            ledger.reserve(Release(Unit.RECORD, "run", number + 1, "sum", {Adversary.MODEL: event}, "system"))
    found = verify(tmp_path / "x.ledger")
    assert found.ok and found.epsilon == pytest.approx(epsilon({event: 3}, DELTA, adjacency), rel=1e-6)


def test_compositions_are_exchanged_by_part_and_unknown_ones_infinite() -> None:
    gaussian, nothing = dp.GaussianDpEvent(2.0), dp.NonPrivateDpEvent()
    half = dp.GaussianDpEvent(1.0)
    assert of_records(dp.SelfComposedDpEvent(gaussian, 3)) == dp.SelfComposedDpEvent(half, 3)
    assert of_records(dp.ComposedDpEvent([gaussian, dp.NoOpDpEvent()])).events == [half, dp.NoOpDpEvent()]
    assert of_records(dp.PoissonSampledDpEvent(1.0, gaussian)) == half
    twice = dp.PoissonSampledDpEvent(0.1, dp.SelfComposedDpEvent(gaussian, 2))
    assert of_records(twice) == dp.SelfComposedDpEvent(half, 2)
    for unknown in (dp.LaplaceDpEvent(2.0), dp.ZCDpEvent(1.0), nothing):
        assert of_records(unknown) == nothing and epsilon([of_records(unknown)], DELTA) == math.inf
    assert epsilon([ExchangedDpEvent(dp.LaplaceDpEvent(2.0))], DELTA) == math.inf
    with pytest.raises(Refusal, match="exactly the fields"):
        event_from_json({"kind": "Exchanged"})
