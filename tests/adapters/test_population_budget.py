"""Budget of a population behind another framework: what a plan has after earlier releases, and a round's line."""

from pathlib import Path

import pytest

from fedveil.adapters.population_budget import ADVERSARIES, fitted, ledger_path, open_ledger, round_line
from fedveil.base.refusal import Refusal
from fedveil.privacy.budget import Budget, Release
from fedveil.privacy.ledger.acts import acting_user
from fedveil.privacy.ledger.ledger import read_entries
from fedveil.privacy.plan import Plan
from fedveil.run.audit_trail import audit_trail
from fedveil.strategies.cohorts import All

BUDGET = Budget("client", 8.0, 1e-2)  # pyright: ignore[reportArgumentType]


def test_a_plan_has_what_earlier_releases_leave(tmp_path: Path) -> None:
    plan = Plan(BUDGET.unit, BUDGET.adjacency, All(), 1.0, 2, adversaries=ADVERSARIES).calibrate(BUDGET)
    path = ledger_path("shops", tmp_path)
    with open_ledger(path, "shops", BUDGET) as ledger:
        assert fitted(plan, BUDGET, ledger, []) == plan
        events = dict.fromkeys(ADVERSARIES, plan.event())
        ledger.reserve_new(Release(plan.unit, "run", 1, "private_sum", events, "system"))
        later = fitted(plan, BUDGET, ledger, [])
        assert later.noise > plan.noise and later.epsilon(1e-2, prior=[plan.event()]) <= 8.0
        assert round_line(1, 3, BUDGET, ledger).startswith("round 1: 3 clients planned; epsilon 4.9")
        with (
            pytest.raises(Refusal, match="in use by process"),
            open_ledger(path, "shops", BUDGET),
        ):
            pass


def test_an_app_has_its_origin_on_the_ledger(tmp_path: Path) -> None:
    path = ledger_path("shops", tmp_path)
    plan = Plan(BUDGET.unit, BUDGET.adjacency, All(), 1.0, 2, adversaries=ADVERSARIES).calibrate(BUDGET)
    with open_ledger(path, "shops", BUDGET) as ledger:
        events = dict.fromkeys(ADVERSARIES, plan.event())
        ledger.reserve_new(Release(plan.unit, "run", 1, "private_sum", events, "system"))
    assert audit_trail(read_entries(path))[-1].origin == {"who": acting_user(), "data": "shops"}
