"""Adaptive noise: it is saved while the loss falls, and spent once the loss stalls."""

from dataclasses import replace

import pytest

from fedveil.privacy import Budget, Plan, Unit
from fedveil.privacy.accounting.renyi_filter import spent_epsilon
from fedveil.privacy.adaptation import LATEST, SAVING, WINDOW, AdaptiveNoise, stalled
from fedveil.privacy.budget import Adjacency
from fedveil.strategies.cohorts import Poisson

BUDGET = Budget(Unit.CLIENT, 8.0, 1e-5)
PLAN = Plan(Unit.CLIENT, Adjacency.ZERO_OUT, Poisson(0.25), 2.0, 40)


def noise_of(losses: list[float], plan: Plan) -> list[float]:
    """The noise multiplier of each round, given the losses that rounds release."""
    schedule = AdaptiveNoise(plan, BUDGET, "loss")
    chosen = [schedule.first]
    for number in range(1, plan.num_rounds):
        chosen.append(schedule.next_noise(chosen[-1], number, losses[:number][-2 * WINDOW :]))
    return chosen


@pytest.mark.parametrize(
    ("losses", "saving"),
    [([1.0] * 40, 2 * WINDOW), ([0.9**n for n in range(40)], int(LATEST * 40))],
    ids=["stalled", "falling"],
)
def test_noise_is_saved_until_the_loss_stalls_and_then_spent(losses: list[float], saving: int) -> None:
    plan = PLAN.calibrate_for_filter(BUDGET)
    noise = noise_of(losses, plan)
    assert noise[:saving] == [SAVING * plan.noise_multiplier] * saving  # type: ignore[operator]
    assert len(set(noise[saving:])) == 1 and noise[-1] < plan.noise_multiplier  # type: ignore[operator]
    events = [replace(plan, noise_multiplier=each).event() for each in noise]
    spent = spent_epsilon(events, 1e-5, Adjacency.ZERO_OUT, plan.filter_order)
    assert 0.99 * BUDGET.target_epsilon < spent <= BUDGET.target_epsilon


def test_a_loss_that_falls_has_not_stalled() -> None:
    assert not stalled([0.9**n for n in range(2 * WINDOW)])
    assert stalled([1.0] * 2 * WINDOW)
    assert not stalled([1.0] * (2 * WINDOW - 1))
