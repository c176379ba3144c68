"""The RDP filter: its order, its budget, and a ledger that goes by it from the first adaptive release on."""

import json
from pathlib import Path
from typing import Any

import pytest
from dp_accounting import GaussianDpEvent, NonPrivateDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.privacy import Adversary, Budget, BudgetExhausted, Ledger, Plan, Refusal, Release, Unit, epsilon
from fedveil.privacy.accounting.epsilon import within
from fedveil.privacy.accounting.renyi_filter import accountant, admits, best_order, spent_epsilon
from fedveil.privacy.budget import Adjacency
from fedveil.privacy.ledger.ledger import read_entries, verify
from fedveil.strategies.cohorts import Poisson

ROUND = PoissonSampledDpEvent(0.05, GaussianDpEvent(1.0))
BUDGET = Budget(Unit.CLIENT, 8.0, 1e-5)
COSTLY = PoissonSampledDpEvent(0.5, GaussianDpEvent(1.0))  # a few of it fit


def times(event: Any, count: int) -> list[Any]:
    return [SelfComposedDpEvent(event, count)]


# --- the filter itself -------------------------------------------------------------------------------------------


def test_it_stops_where_the_published_one_does_and_pld_later() -> None:
    """Rate .05, z 1, epsilon 8, delta 1e-5: 464 rounds at order 3.4 by the filter, 561 by PLD."""
    order = best_order(ROUND, BUDGET)
    assert order == 3.4
    assert admits(times(ROUND, 464), BUDGET, order) and not admits(times(ROUND, 465), BUDGET, order)
    assert within(times(ROUND, 561), BUDGET) and not within(times(ROUND, 562), BUDGET)


def test_every_other_order_affords_no_more() -> None:
    others = [admits(times(ROUND, 465), BUDGET, order) for order in (2.0, 3.3, 3.5, 8.0, 32.0)]
    assert not any(others)


def test_order_takes_account_of_spending() -> None:
    assert best_order(ROUND, BUDGET, times(COSTLY, 3)) < best_order(ROUND, BUDGET)


@settings(max_examples=25)
@given(
    st.floats(0.01, 1), st.floats(0.6, 20), st.integers(1, 200), st.sampled_from([1.5, 3.4, 8.0, 24.0, 63.0])
)
def test_spending_of_the_filter_is_never_below_epsilon(
    rate: float, noise: float, count: int, order: float
) -> None:
    """At one order it counts more than RDP at the best one, which is more than the smaller of RDP and PLD."""
    events = times(PoissonSampledDpEvent(rate, GaussianDpEvent(noise)), count)
    assert spent_epsilon(events, 1e-5, Adjacency.ZERO_OUT, order) >= epsilon(events, 1e-5, interval=1e-3) * (
        1 - 1e-9
    )


def test_nothing_counts_nothing_and_non_private_counts_everything() -> None:
    assert spent_epsilon([], 1e-5, Adjacency.ZERO_OUT, 3.4) == 0.0
    assert spent_epsilon([ROUND, NonPrivateDpEvent()], 1e-5, Adjacency.ZERO_OUT, 3.4) == float("inf")


def test_event_beyond_the_filter_is_refused() -> None:
    with pytest.raises(Refusal, match="does not cover"):
        spent_epsilon([ROUND], 1e-5, Adjacency.REPLACE_ONE, 3.4)
    with pytest.raises(Refusal, match="orders"):
        spent_epsilon([ROUND], 1e-5, Adjacency.ZERO_OUT, 1.0)
    with pytest.raises(Refusal, match="no RDP filter"):
        best_order(GaussianDpEvent(0.01), BUDGET)


def test_reports_name_the_filter_and_its_order() -> None:
    assert accountant(1e-5, Adjacency.ZERO_OUT, 3.4).startswith("RDP filter at order 3.4, dp_accounting ")
    assert "PLD" in accountant(1e-5, Adjacency.ZERO_OUT, None)


# --- a plan that goes by it --------------------------------------------------------------------------------------

PLAN = Plan(Unit.CLIENT, Adjacency.ZERO_OUT, Poisson(0.25), 2.0, 40)


def test_a_plan_for_the_filter_costs_more_noise_and_keeps_its_rounds() -> None:
    fixed, adaptive = PLAN.calibrate(BUDGET), PLAN.calibrate_for_filter(BUDGET)
    assert fixed.noise_multiplier and adaptive.noise_multiplier and adaptive.filter_order
    assert fixed.noise_multiplier < adaptive.noise_multiplier < 1.3 * fixed.noise_multiplier
    assert adaptive.affordable_rounds(BUDGET) == 40
    assert spent_epsilon(times(adaptive.event(), 40), 1e-5, Adjacency.ZERO_OUT, adaptive.filter_order) <= 8.0


# --- the ledger --------------------------------------------------------------------------------------------------


def opened(path: Path, budget: Budget = BUDGET) -> Ledger:
    return Ledger.open(path, budget, owner="x", simulated=True, durable=False)


def release(number: int, order: float | None, event: Any = COSTLY) -> Release:
    return Release(Unit.CLIENT, "r", number, "m", {Adversary.MODEL: event}, "seeded", order)


def fitting(ledger: Ledger, orders: list[float | None]) -> int:
    """How many releases fit, the n-th of them with the n-th order and the last order from there on."""
    for number in range(200):
        try:
            ledger.reserve(release(number, orders[min(number, len(orders) - 1)]))
        except BudgetExhausted:
            return number
    raise AssertionError


def test_the_gate_of_an_adaptive_release_is_the_filters(tmp_path: Path) -> None:
    order = best_order(COSTLY, BUDGET)
    with opened(tmp_path / "adaptive") as adaptive, opened(tmp_path / "fixed") as fixed:
        most = next(n for n in range(1, 200) if not admits(times(COSTLY, n + 1), BUDGET, order))
        assert fitting(adaptive, [order]) == most < fitting(fixed, [None])
        assert adaptive.filter_order == order and fixed.filter_order is None
        assert adaptive.epsilon() == spent_epsilon(times(COSTLY, most), 1e-5, Adjacency.ZERO_OUT, order)


def test_one_adaptive_release_puts_the_whole_ledger_under_the_filter(tmp_path: Path) -> None:
    order = best_order(COSTLY, BUDGET)
    with opened(tmp_path / "ledger") as mixed:
        most = fitting(mixed, [None, None, order, None])
    assert admits(times(COSTLY, most), BUDGET, order) and not admits(times(COSTLY, most + 1), BUDGET, order)
    with opened(tmp_path / "ledger") as again:
        assert again.filter_order == order
        with pytest.raises(BudgetExhausted):
            again.reserve(release(999, None))


def test_the_order_is_fixed_for_good(tmp_path: Path) -> None:
    with opened(tmp_path / "ledger") as ledger, opened(tmp_path / "other") as other:
        ledger.reserve(release(1, 3.4))
        with pytest.raises(Refusal, match=r"order 3\.4 for good"):
            ledger.reserve(release(2, 8.0))
        with pytest.raises(Refusal, match="orders"):
            other.reserve(release(1, 3.14159))


def test_verify_recomputes_by_the_filter_and_the_entry_says_so(tmp_path: Path) -> None:
    with opened(tmp_path / "ledger") as ledger:
        most = fitting(ledger, [3.4])
        spent = ledger.epsilon()
    entries = [json.loads(entry.payload) for entry in read_entries(tmp_path / "ledger")]
    assert [entry.get("filter_order") for entry in entries] == [None, *[3.4] * most]
    found = verify(tmp_path / "ledger")
    assert found.ok and found.filter_order == 3.4
    assert found.epsilon == spent and found.epsilon_pld is None
    assert found.epsilon_rdp == pytest.approx(spent, rel=1e-9)
    assert found.epsilon > epsilon(times(COSTLY, most), 1e-5)


def test_budget_allowed_by_pld_is_overspent_by_the_filter(tmp_path: Path, monkeypatch: Any) -> None:
    """A ledger filled by somebody who gates adaptive releases by PLD does not verify."""
    monkeypatch.setattr(
        "fedveil.privacy.ledger.ledger.admits", lambda events, budget, _: within(events, budget)
    )
    with opened(tmp_path / "ledger") as ledger:
        fitting(ledger, [best_order(COSTLY, BUDGET)])
    found = verify(tmp_path / "ledger")
    assert not found.ok and "more is spent" in str(found.problem)
