"""A plan's noise is the least that fits, and what it promises is what the accountant and the gate say."""

import math
from dataclasses import FrozenInstanceError, dataclass, replace

import pytest
from dp_accounting import DpEvent, GaussianDpEvent, NonPrivateDpEvent, PoissonSampledDpEvent

from fedveil.base.refusal import Refusal
from fedveil.privacy.accounting.epsilon import GATE_INTERVAL, epsilon
from fedveil.privacy.accounting.gate import Gate
from fedveil.privacy.budget import Adjacency, Budget, Unit
from fedveil.privacy.mechanisms.correlated_noise import Correlation
from fedveil.privacy.plan import Plan
from fedveil.strategies.cohorts import MinSeparation


@dataclass(frozen=True)
class Drawn:
    rate: float
    name: str = "poisson"

    def event(self, mechanism: DpEvent) -> DpEvent:
        return PoissonSampledDpEvent(self.rate, mechanism)


@dataclass(frozen=True)
class Everyone:
    name: str = "all"

    def event(self, mechanism: DpEvent) -> DpEvent:
        return mechanism


PLAN = Plan(Unit.CLIENT, Adjacency.ZERO_OUT, Drawn(0.25), clipping_norm=0.5, num_rounds=100)
BUDGET = Budget(Unit.CLIENT, 3.0, 1e-4)


def test_the_default_run_needs_the_published_noise() -> None:
    plan = PLAN.calibrate(BUDGET)
    assert plan.noise_multiplier == pytest.approx(3.22, abs=0.005)
    assert plan.noise_std == pytest.approx(0.5 * plan.noise_multiplier)
    assert PLAN.noise_multiplier is None


def test_a_run_with_correlated_noise_is_one_gaussian() -> None:
    correlation = Correlation(100, separation=4, max_participations=25, bands=4)
    plan = replace(PLAN, sampling=MinSeparation(100, 4, 25), mechanism=correlation).calibrate(BUDGET)
    (alone,) = {plan.epsilon(1e-4, rounds) for rounds in (1, 50, 100)}
    assert alone == epsilon([plan.event()], 1e-4) <= 3.0
    assert plan.noise_multiplier == pytest.approx(1.223, abs=0.002)
    assert plan.noise_std == pytest.approx(0.5 * correlation.sensitivity * plan.noise_multiplier)
    assert plan.event() == plan.event_of(1) == GaussianDpEvent(plan.noise_multiplier)
    assert epsilon([plan.event_of(row) for row in range(1, 101)], 1e-4) == alone
    assert plan.affordable_rounds(BUDGET) == 100
    assert replace(plan, adjacency=Adjacency.REPLACE_ONE).noise_std == 2 * plan.noise_std


CASES = [
    (PLAN, 3.0, 1e-4, []),
    (PLAN, 0.05, 1e-5, []),
    (replace(PLAN, adjacency=Adjacency.REPLACE_ONE), 3.0, 1e-4, []),
    (replace(PLAN, sampling=Everyone()), 2.0, 1e-5, []),
    (replace(PLAN, num_rounds=10), 3.0, 1e-14, []),
    (PLAN, 3.0, 1e-4, [GaussianDpEvent(2.0)]),
    (replace(PLAN, sampling=Drawn(4e-3), num_rounds=300), 0.5, 1e-6, []),
    (PLAN, 3000.0, 1e-4, []),
]


@pytest.mark.parametrize(("plan", "target", "delta", "prior"), CASES)
def test_calibrated_noise_spends_the_budget_and_no_more(
    plan: Plan, target: float, delta: float, prior: list
) -> None:
    budget = Budget(Unit.CLIENT, target, delta, plan.adjacency)
    calibrated = plan.calibrate(budget, prior)
    assert 0.99 * target <= calibrated.epsilon(delta, prior=prior) <= target
    # The coarser grid of the gate lets every planned round through as well.
    spent = [*prior, *[calibrated.event()] * (plan.num_rounds - 1)]
    assert Gate().fits(spent, calibrated.event(), budget)
    less = replace(calibrated, noise_multiplier=calibrated.noise_multiplier * (1 - 3e-4))
    assert epsilon([*prior, *[less.event()] * plan.num_rounds], delta, plan.adjacency, GATE_INTERVAL) > target


def test_replace_one_doubles_the_noise_behind_one_multiplier() -> None:
    zero_out = replace(PLAN, noise_multiplier=2.0)
    replaced = replace(zero_out, adjacency=Adjacency.REPLACE_ONE)
    assert zero_out.event() == PoissonSampledDpEvent(0.25, GaussianDpEvent(2.0))
    assert replaced.event() == PoissonSampledDpEvent(0.25, GaussianDpEvent(4.0))
    assert (zero_out.noise_std, replaced.noise_std) == (1.0, 2.0)
    whole = replace(replaced, sampling=Everyone(), num_rounds=4)
    unsampled = replace(zero_out, sampling=Everyone(), num_rounds=4)
    assert whole.epsilon(1e-5) == pytest.approx(unsampled.epsilon(1e-5), abs=1e-3)


def test_a_sliver_of_a_budget_is_no_budget() -> None:
    plan = PLAN.calibrate(BUDGET)
    with pytest.raises(Refusal, match="already spent"):
        plan.calibrate(BUDGET, [plan.event()] * PLAN.num_rounds)


@pytest.mark.parametrize("prior", [[], [GaussianDpEvent(2.0)]], ids=["fresh", "spent"])
def test_affordable_rounds_are_those_of_the_gate(prior: list) -> None:
    plan = replace(PLAN, noise_multiplier=4.0)
    gate, rounds = Gate(), 0
    while gate.fits([*prior, *[plan.event()] * rounds], plan.event(), BUDGET):
        rounds += 1
    assert plan.affordable_rounds(BUDGET, prior) == rounds > 50


def test_no_round_is_affordable_without_noise_enough() -> None:
    plan = replace(PLAN, noise_multiplier=0.1)
    assert plan.affordable_rounds(BUDGET) == 0
    assert plan.epsilon(1e-4, rounds=0) == 0.0
    assert math.isinf(plan.epsilon(1e-4, prior=[NonPrivateDpEvent()]))


def test_a_spent_budget_is_refused() -> None:
    with pytest.raises(Refusal, match="spent"):
        PLAN.calibrate(BUDGET, prior=[GaussianDpEvent(0.5)])
    with pytest.raises(Refusal, match="spent"):
        PLAN.calibrate(BUDGET, prior=[NonPrivateDpEvent()])


def test_a_mechanism_without_noise_cannot_be_calibrated() -> None:
    class Leaking(Everyone):
        def event(self, mechanism: DpEvent) -> DpEvent:
            return NonPrivateDpEvent()

    with pytest.raises(Refusal, match="no noise"):
        replace(PLAN, sampling=Leaking()).calibrate(BUDGET)


@pytest.mark.parametrize(
    "budget", [Budget(Unit.RECORD, 3.0, 1e-4), Budget(Unit.CLIENT, 3.0, 1e-4, Adjacency.REPLACE_ONE)]
)
def test_plan_and_budget_must_speak_of_the_same(budget: Budget) -> None:
    with pytest.raises(Refusal):
        PLAN.calibrate(budget)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("clipping_norm", 0.0),
        ("clipping_norm", math.nan),
        ("noise_multiplier", 0.0),
        ("noise_multiplier", -1.0),
        ("num_rounds", 0),
        ("num_rounds", 1.5),
        ("unit", "user"),
        ("adjacency", "swap"),
    ],
)
def test_values_out_of_range_are_refused(field: str, value) -> None:
    with pytest.raises(Refusal, match=field):
        replace(PLAN, **{field: value})


def test_a_plan_is_frozen_and_uncalibrated_until_it_is_calibrated() -> None:
    with pytest.raises(FrozenInstanceError):
        PLAN.noise_multiplier = 1.0  # type: ignore[misc]
    for ask in (PLAN.event, lambda: PLAN.noise_std, lambda: PLAN.epsilon(1e-5)):
        with pytest.raises(Refusal, match="noise_multiplier"):
            ask()
