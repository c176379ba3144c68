"""Tests of ``sum_plan``."""

import pytest

from fedveil.configs.settings import settings_from_overrides
from fedveil.privacy.budget import Adjacency, Budget, Unit
from fedveil.privacy.mechanisms.mechanism import mechanism_of
from fedveil.privacy.plan import Plan
from fedveil.run.sum_plan import best_groups
from fedveil.strategies.cohorts import CyclicPoisson


@pytest.mark.parametrize("target", [1.0, 3.0, 8.0])
def test_the_planned_groups_err_no_more_than_either_extreme(target: float) -> None:
    rate, num_rounds, budget = 0.02, 300, Budget(Unit.CLIENT, target, 1e-5)

    def error(cohort: CyclicPoisson) -> float:
        law = mechanism_of("correlated", cohort.turns, num_rounds, None)
        plan = Plan(Unit.CLIENT, Adjacency.ZERO_OUT, cohort, 1.0, num_rounds, mechanism=law).calibrate(budget)
        return plan.noise_over_clip * plan.mechanism.error  # type: ignore[attr-defined]

    keys = (f"privacy.target_epsilon={target}", "privacy.target_delta=1e-5", f"num_rounds={num_rounds}")
    settings = settings_from_overrides(
        ["cohort=cyclic_poisson", "privacy.noise=correlated", f"cohort.rate={rate}", *keys]
    )
    least = error(CyclicPoisson(rate, best_groups(settings, rate)))
    assert least <= error(CyclicPoisson(rate, 1)) and least <= error(CyclicPoisson(rate, 50))
    if target == 8:
        assert least < 0.75 * error(CyclicPoisson(rate, 1))
