"""Gate of a next release: it decides as epsilon does, and composes seldom."""

import os
from collections import Counter
from typing import Any

import numpy as np
import pytest
from dp_accounting import (
    DpEvent,
    GaussianDpEvent,
    NonPrivateDpEvent,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
)

from fedveil.privacy.accounting import epsilon as accounting
from fedveil.privacy.accounting import gate as gate_module
from fedveil.privacy.accounting import loss_distributions
from fedveil.privacy.accounting.epsilon import (
    GATE_INTERVAL,
    epsilon,
    within,
)
from fedveil.privacy.accounting.gate import GATE, Gate
from fedveil.privacy.budget import Adjacency, Budget, Unit


def sampled(rate: float, noise: float) -> DpEvent:
    return PoissonSampledDpEvent(rate, GaussianDpEvent(noise))


@pytest.mark.parametrize("adjacency", [Adjacency.ZERO_OUT, Adjacency.REPLACE_ONE])
@pytest.mark.parametrize("target", [0.08, 0.6, 3.0])
def test_the_gate_decides_as_epsilon_does(target: float, adjacency: Adjacency) -> None:
    budget = Budget(Unit.CLIENT, target, 1e-5, adjacency)
    event, gate = sampled(0.05, 4.0 if target < 1 else 1.5), Gate()
    admitted = 0
    while gate.fits({event: admitted}, event, budget):
        admitted += 1
    assert not gate.fits([event] * admitted, event, budget)
    assert epsilon({event: admitted + 1}, 1e-5, adjacency, GATE_INTERVAL) > target
    assert not admitted or epsilon({event: admitted}, 1e-5, adjacency, GATE_INTERVAL) <= target


def test_fit_of_one_ledger_needs_no_composition_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    budget, event, gate = Budget(Unit.RECORD, 2.0, 1e-5), sampled(0.05, 1.1), Gate()
    admitted = [next(n for n in range(1000) if not gate.fits({event: n}, event, budget))]
    compose = loss_distributions.distribution
    composed: list[int] = []

    def counting(*arguments: Any) -> Any:
        composed.append(1)
        return compose(*arguments)

    monkeypatch.setattr(loss_distributions, "distribution", counting)
    for _ in range(5):
        admitted.append(next(n for n in range(1000) if not gate.fits({event: n}, event, budget)))
    assert len(set(admitted)) == 1 and admitted[0] > 3 and not composed
    less = Budget(Unit.RECORD, 1.0, 1e-5)
    assert next(n for n in range(1000) if not gate.fits({event: n}, event, less)) < admitted[0]


def test_rounds_of_many_ledgers_need_few_computations(monkeypatch: pytest.MonkeyPatch) -> None:
    budget, gate, by_renyi = Budget(Unit.RECORD, 3.0, 1e-5), Gate(), gate_module._by_renyi
    computed: list[int] = []
    monkeypatch.setattr(gate_module, "_by_renyi", lambda *args: computed.append(1) or by_renyi(*args))
    kinds = [sampled(1 / size, 2.0) for size in range(20, 60)]
    for number in range(30):
        assert all(gate.fits({event: number}, event, budget) for event in kinds for _ in range(3))
    assert len(computed) < 10 * len(kinds)  # of 90 for each


def test_a_forked_process_waits_for_no_thread_of_its_parent() -> None:
    with GATE._lock:
        child = os.fork()
        if child == 0:
            os._exit(0 if GATE._lock.acquire(timeout=5) else 1)
        _, status = os.waitpid(child, 0)
    assert status == 0


def test_the_gate_decides_as_epsilon_does_on_mixed_events() -> None:
    budget = Budget(Unit.CLIENT, 1.2, 1e-5)
    kinds = [sampled(0.2, 2.0), sampled(0.004, 1.0), GaussianDpEvent(6.0)]
    draw, gate = np.random.default_rng(7), Gate()
    spent: list[DpEvent] = []
    refused = 0
    for _ in range(12):
        event = kinds[int(draw.integers(3))]
        fits = gate.fits(spent, event, budget)
        assert fits == (epsilon([*spent, event], 1e-5, interval=GATE_INTERVAL) <= 1.2)
        assert fits == within([*spent, event], budget)
        spent += [event] if fits else []
        refused += not fits
    assert 0 < refused < 12


@pytest.fixture
def composed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many kinds of leaves each composition took."""
    kinds: list[int] = []
    exact = loss_distributions.distribution
    monkeypatch.setattr(loss_distributions, "distribution", lambda *a: kinds.append(len(a[0])) or exact(*a))
    return kinds


def test_the_gate_composes_seldom_over_thousands_of_equal_rounds(composed: list[int]) -> None:
    budget, event, gate = Budget(Unit.RECORD, 2.0, 1e-5), sampled(0.01, 1.3), Gate()
    admitted = 0
    while gate.fits({event: admitted}, event, budget):
        admitted += 1
    assert admitted > 1500
    assert epsilon({event: admitted}, 1e-5, interval=GATE_INTERVAL) <= 2.0
    assert epsilon({event: admitted + 1}, 1e-5, interval=GATE_INTERVAL) > 2.0
    assert len(composed) < 130


def test_gate_gives_nothing_to_less_noise_than_it_looked_ahead_for() -> None:
    budget, event, gate = Budget(Unit.RECORD, 2.0, 1e-5), sampled(0.01, 1.3), Gate()
    loud, wide = sampled(0.01, 0.2), sampled(1.0, 1.3)
    assert epsilon([loud], 1e-5) > 2 and epsilon([wide], 1e-5) > 2
    admitted = ahead = 0
    while gate.fits({event: admitted}, event, budget):
        admitted += 1
        if any(history.times > 1 for history in gate._histories):
            ahead += 1
            assert not gate.fits({event: admitted}, loud, budget)
            assert not gate.fits({event: admitted}, wide, budget)
    assert ahead > 100, "the gate looked ahead, or this tests nothing"


def test_gate_composes_only_new_parts_of_rounds_of_many_noises(composed: list[int]) -> None:
    kinds = [sampled(0.05, float(noise)) for noise in np.linspace(2, 3, 12)]
    budget, gate, spent = Budget(Unit.RECORD, 1.5, 1e-5), Gate(), Counter[DpEvent]()
    for number in range(10_000):
        event = kinds[number % len(kinds)]
        if not gate.fits([SelfComposedDpEvent(e, n) for e, n in spent.items()], event, budget):
            break
        spent[event] += 1
    assert spent.total() > 250
    assert len(composed) < 250
    assert composed.count(len(kinds)) < 60
    assert epsilon(spent, 1e-5, interval=GATE_INTERVAL) <= 1.5
    assert epsilon({**spent, event: spent[event] + 1}, 1e-5, interval=GATE_INTERVAL) > 1.5


def test_many_kinds_of_noise_cost_little_more_than_each_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events = {sampled(0.1, float(noise)): 3 for noise in np.linspace(2, 2.5, 24)}
    exact = epsilon(events, 1e-5, interval=GATE_INTERVAL)
    monkeypatch.setattr(accounting, "MAX_KINDS", 12)
    accounting.by_distribution.cache_clear()
    accounting._composed.cache_clear()
    coarse = accounting.coarsened(dict(accounting.grouped(events)), accounting.rounded)
    assert len(coarse) <= 12
    assert sum(coarse.values()) == 72
    assert exact < epsilon(events, 1e-5, interval=GATE_INTERVAL) < 1.03 * exact
    accounting.by_distribution.cache_clear()
    accounting._composed.cache_clear()


def test_the_gate_keeps_budgets_apart() -> None:
    gate, event = Gate(), GaussianDpEvent(5.0)
    assert gate.fits([event] * 9, event, Budget(Unit.CLIENT, 8.0, 1e-5))
    assert not gate.fits([event] * 9, event, Budget(Unit.CLIENT, 0.5, 1e-5))
    assert not gate.fits([], NonPrivateDpEvent(), Budget(Unit.CLIENT, 8.0, 1e-5))
