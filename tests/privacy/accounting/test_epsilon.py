"""Epsilon against numbers that others arrived at, its invariants, the traps of dp_accounting, the gate, the codec."""

import json
import math
import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dp_accounting import (
    ComposedDpEvent,
    DpEvent,
    GaussianDpEvent,
    LaplaceDpEvent,
    NonPrivateDpEvent,
    NoOpDpEvent,
    PoissonSampledDpEvent,
    RandomizedResponseDpEvent,
    SampledWithoutReplacementDpEvent,
    SelfComposedDpEvent,
    UnsupportedDpEvent,
    ZCDpEvent,
    get_epsilon_gaussian,
)
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp.rdp_privacy_accountant import DEFAULT_RDP_ORDERS
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.base.refusal import Refusal
from fedveil.privacy.accounting import epsilon as accounting
from fedveil.privacy.accounting import loss_distributions
from fedveil.privacy.accounting.epsilon import (
    FINEST_INTERVAL,
    GATE_INTERVAL,
    PUBLISH_INTERVAL,
    accountant_name,
    by_distribution,
    epsilon,
    within,
)
from fedveil.privacy.accounting.events import Counts, event_from_json
from fedveil.privacy.accounting.renyi import by_renyi, relation_of, renyi_vector
from fedveil.privacy.budget import Adjacency, Budget, Unit

ORACLE = runpy.run_path(str(Path(__file__).parents[2] / "oracles" / "accountant.py"))
RANDOM_PLANS = runpy.run_path(str(Path(__file__).parents[2] / "oracles" / "random_plans.py"))
ROWS = {row.name: row for row in ORACLE["ROWS"]}
ADD_REMOVE = Adjacency.ADD_OR_REMOVE_ONE


def sampled(rate: float, noise: float) -> DpEvent:
    return PoissonSampledDpEvent(rate, GaussianDpEvent(noise))


def renyi(rate: float, noise: float, rounds: int) -> np.ndarray:
    return sum(n * renyi_vector(leaf, ADD_REMOVE) for leaf, n in grouped(rate, noise, rounds))


def grouped(rate: float, noise: float, rounds: int) -> Counts:
    return accounting.grouped({sampled(rate, noise): rounds})


# --- numbers of others


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_epsilon_lies_where_the_other_accountants_say(row) -> None:
    ours = epsilon({sampled(row.sample_rate, row.noise_multiplier): row.rounds}, row.delta, ADD_REMOVE)
    # One unit of the bracket's last printed digit; the finest grid sharpens H and I below the printed PLD.
    assert row.lowest - 1e-4 <= ours <= row.highest + 1e-4
    assert ours <= row.pld + 1e-4
    assert ours >= row.pld - max(2e-3 * row.pld, 1e-3)
    assert -1e-4 <= row.opacus_prv - ours <= 0.0125


@pytest.mark.parametrize("name", ["A", "L", "Q"])
def test_rdp_agrees_with_the_table_and_with_opacus(name: str) -> None:
    from opacus.accountants.analysis import rdp as opacus_rdp

    row = ROWS[name]
    counts = grouped(row.sample_rate, row.noise_multiplier, row.rounds)
    ours = by_renyi(counts, row.delta, ADD_REMOVE)
    assert ours == pytest.approx(row.rdp, abs=1e-4)
    orders = [1 + x / 10 for x in range(7, 100)] + list(range(12, 64))
    theirs = opacus_rdp.compute_rdp(
        q=row.sample_rate, noise_multiplier=row.noise_multiplier, steps=row.rounds, orders=orders
    )
    assert ours == pytest.approx(
        opacus_rdp.get_privacy_spent(orders=orders, rdp=theirs, delta=row.delta)[0], abs=0.03
    )


def test_epsilon_brackets_opacus_prv_freshly_computed() -> None:
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(3.22, 0.25, 100)]
    ours = epsilon({sampled(0.25, 3.22): 100}, 1e-4)
    assert 0 <= accountant.get_epsilon(1e-4) - ours <= 0.012
    assert ours == pytest.approx(3.0, abs=0.01)


@pytest.mark.parametrize("published", ORACLE["PUBLISHED"], ids=lambda p: f"{p.source}: {p.epsilon}")
def test_published_values_by_the_classic_conversion(published) -> None:
    rdp = renyi(published.sample_rate, published.noise_multiplier, published.rounds)
    classic = [
        cost - math.log(published.delta) / (order - 1)
        for order, cost in zip(DEFAULT_RDP_ORDERS, rdp, strict=True)
        if not published.integer_orders or float(order).is_integer()
    ]
    digits = len(str(published.epsilon).split(".")[1])
    assert round(min(classic), digits) == published.epsilon


def test_gboard_by_rdp_and_exactly() -> None:
    rho, delta = ORACLE["GBOARD_RHO"], ORACLE["GBOARD_DELTA"]
    assert epsilon([ZCDpEvent(rho, 0.0)], delta) == pytest.approx(ORACLE["GBOARD_RDP"], abs=1e-3)
    exact = epsilon([GaussianDpEvent((2 * rho) ** -0.5)], delta)
    assert exact == pytest.approx(ORACLE["GBOARD_EXACT"], abs=1e-3)


def test_a_mixed_ledger_in_any_order() -> None:
    events = [SelfComposedDpEvent(sampled(rate, noise), n) for rate, noise, n in ORACLE["MIXED"]]
    forward, backward = (epsilon(order, 1e-5, ADD_REMOVE) for order in (events, events[::-1]))
    assert forward == backward == pytest.approx(ORACLE["MIXED_PLD"], abs=1e-4)
    rdp = by_renyi(accounting.grouped(events), 1e-5, ADD_REMOVE)
    assert rdp == pytest.approx(ORACLE["MIXED_RDP"], abs=1e-4)


# --- invariants


@settings(max_examples=5)
@given(
    rate=st.floats(0.01, 1.0),
    noise=st.floats(0.7, 20.0),
    rounds=st.integers(1, 60),
    delta=st.sampled_from([1e-8, 1e-5, 1e-3]),
    adjacency=st.sampled_from(list(Adjacency)),
)
def test_epsilon_is_monotone(
    rate: float, noise: float, rounds: int, delta: float, adjacency: Adjacency
) -> None:
    def cost(rate: float, noise: float, rounds: int, delta: float) -> float:
        return epsilon({sampled(rate, noise): rounds}, delta, adjacency, GATE_INTERVAL)

    here, slack = cost(rate, noise, rounds, delta), 1e-7
    assert cost(rate, noise, rounds + 1, delta) >= here - slack
    assert cost(rate, noise * 1.2, rounds, delta) <= here + slack
    assert cost(rate, noise, rounds, delta * 2) <= here + slack
    assert cost(rate * 0.8, noise, rounds, delta) <= here * 1.01 + slack
    appended = {sampled(rate, noise): rounds, GaussianDpEvent(15.0): 1}
    assert epsilon(appended, delta, adjacency, GATE_INTERVAL) >= here - slack


@settings(max_examples=5)
@given(st.lists(st.sampled_from([sampled(0.1, 2.0), sampled(0.2, 3.0), GaussianDpEvent(9.0)]), max_size=6))
def test_grouping_nesting_and_order_do_not_matter(events: list[DpEvent]) -> None:
    here = epsilon(events, 1e-5, interval=GATE_INTERVAL)
    assert epsilon(events[::-1], 1e-5, interval=GATE_INTERVAL) == here
    assert epsilon([ComposedDpEvent(events)], 1e-5, interval=GATE_INTERVAL) == here
    halves = [SelfComposedDpEvent(ComposedDpEvent(events[:2]), 1), *events[2:]]
    assert epsilon(halves, 1e-5, interval=GATE_INTERVAL) == here
    assert (here == 0) == (not events)


def test_unsampled_gaussians_match_the_exact_formula() -> None:
    exact = get_epsilon_gaussian(10 / math.sqrt(100), 1e-5)
    for events in ({sampled(1.0, 10.0): 100}, {GaussianDpEvent(10.0): 50, GaussianDpEvent(10.0 + 1e-9): 50}):
        assert epsilon(events, 1e-5) == pytest.approx(exact, abs=1e-3)


def test_one_kind_of_event_is_dp_accountings_own_number() -> None:
    theirs = PLDAccountant(relation_of(ADD_REMOVE), 1e-4).compose(sampled(0.5, 5.0), 50).get_epsilon(1e-5)
    assert epsilon({sampled(0.5, 5.0): 50}, 1e-5, ADD_REMOVE) == pytest.approx(theirs, abs=1e-9)


def test_small_epsilons_are_refined_until_the_grid_no_longer_matters() -> None:
    event = sampled(1e-4, 1.0)
    ours = epsilon({event: 1500}, 1e-6)
    finer = PLDAccountant(relation_of(Adjacency.ZERO_OUT), 5e-6).compose(event, 1500).get_epsilon(1e-6)
    assert ours == pytest.approx(finer, rel=0.01)
    assert epsilon({event: 1500}, 1e-6, interval=GATE_INTERVAL) == pytest.approx(ours, rel=0.01)


def grids_of(
    event: DpEvent, rounds: int, delta: float, monkeypatch: pytest.MonkeyPatch
) -> dict[float, float]:
    """Return the grids on which rounds are composed to be published, each with its bound."""
    found: dict[float, float] = {}

    def spy(counts: Any, delta: float, adjacency: Adjacency, interval: float) -> float:
        return found.setdefault(interval, by_distribution(counts, delta, adjacency, interval))

    with monkeypatch.context() as patched:
        patched.setattr("fedveil.privacy.accounting.epsilon.by_distribution", spy)
        assert epsilon({event: rounds}, delta) == min(found.values())
    return found


def test_small_rates_are_refined_until_a_finer_grid_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for rate, noise, rounds, delta in ((1e-4, 0.47, 1000, 1e-7), (1e-6, 0.45, 10**5, 1e-8)):
        found = grids_of(sampled(rate, noise), rounds, delta, monkeypatch)
        assert {1e-3, 1e-4} <= set(found) <= {1e-3, 1e-4, 1e-5}
        finest, most = (
            by_distribution(grouped(rate, noise, rounds), at, Adjacency.ZERO_OUT, interval)
            for at, interval in (
                (delta, FINEST_INTERVAL),
                (delta - 2 * loss_distributions.ROUNDED * rounds, 1e-4),
            )
        )
        assert finest <= most * (1 + 1e-9) and found[1e-4] == pytest.approx(finest, rel=2e-3)
    found = grids_of(sampled(1e-4, 1.5), 10**5, 1e-6, monkeypatch)  # many quiet rounds
    assert found[1e-3] > found[1e-4] > 1.1 * found[FINEST_INTERVAL]


@settings(max_examples=5)
@given(
    rate=st.floats(0.02, 0.9),
    noise=st.floats(0.8, 8.0),
    first=st.integers(1, 40),
    then=st.integers(1, 40),
    adjacency=st.sampled_from(list(Adjacency)),
)
def test_so_many_and_then_so_many_are_all_of_them(
    rate: float, noise: float, first: int, then: int, adjacency: Adjacency
) -> None:
    event = sampled(rate, noise)
    parts = [SelfComposedDpEvent(event, first), ComposedDpEvent([SelfComposedDpEvent(event, then)])]
    whole = epsilon({event: first + then}, 1e-5, adjacency, GATE_INTERVAL)
    assert epsilon(parts, 1e-5, adjacency, GATE_INTERVAL) == whole
    gathered = loss_distributions.distribution(((event, first),), relation_of(adjacency), GATE_INTERVAL)
    gathered = loss_distributions.distribution(
        ((event, then),), relation_of(adjacency), GATE_INTERVAL, gathered
    )
    at_once = loss_distributions.distribution(((event, first + then),), relation_of(adjacency), GATE_INTERVAL)
    assert gathered.get_epsilon_for_delta(1e-5) == pytest.approx(
        at_once.get_epsilon_for_delta(1e-5), abs=1e-6
    )
    for losses in (gathered, at_once):
        theirs = losses.get_epsilon_for_delta(1e-5)
        assert loss_distributions.epsilon(losses, 1e-5) == pytest.approx(theirs, rel=1e-9, abs=1e-12)
    vector = renyi_vector(event, adjacency)
    assert np.allclose(first * vector + then * vector, (first + then) * vector, rtol=1e-12)


@settings(max_examples=6)
@given(
    rate=st.floats(1e-3, 1.0),
    noise=st.floats(0.6, 10.0),
    rounds=st.integers(1, 400),
    delta=st.sampled_from([1e-12, 1e-9, 1e-5]),
)
def test_the_distribution_is_never_above_rdp(rate: float, noise: float, rounds: int, delta: float) -> None:
    counts = grouped(rate, noise, rounds)
    by_rdp, *by_grids = accounting.bounds(counts, delta, ADD_REMOVE, GATE_INTERVAL)
    assert by_rdp == by_renyi(counts, delta, ADD_REMOVE)
    # Where all that is told is a few steps of the finest grid, the grid is what is seen.
    assert min(by_grids) <= by_rdp * (1 + 1e-6) + accounting.FINEST_INTERVAL


def test_responses_at_random_are_counted_each() -> None:
    # dp_accounting 0.6 composes them once, however many there were.
    once = RandomizedResponseDpEvent(0.5, 2)
    assert epsilon([SelfComposedDpEvent(once, 10)], 1e-5) > 5 * epsilon([once], 1e-5)
    assert epsilon([SelfComposedDpEvent(once, 10)], 1e-5) == pytest.approx(epsilon([once] * 10, 1e-5))


# --- traps


@pytest.mark.parametrize(
    "noise", [1, np.float32(1), np.int64(1), np.float64(1)], ids=lambda n: type(n).__name__
)
def test_the_type_of_a_number_does_not_change_epsilon(noise) -> None:
    def steps(value) -> dict[DpEvent, int]:
        return {PoissonSampledDpEvent(0.01, SelfComposedDpEvent(GaussianDpEvent(value), 4)): 1000}

    ours = epsilon(steps(noise), 1e-5)
    assert ours == epsilon(steps(1.0), 1e-5)
    # One sample, four queries: one query at half the noise. Dropping the composition gives 1.83.
    assert ours == epsilon({sampled(0.01, 0.5): 1000}, 1e-5) > 12


def test_replace_one_costs_like_twice_the_sensitivity() -> None:
    ours = epsilon({GaussianDpEvent(4.0): 10}, 1e-5, Adjacency.REPLACE_ONE)
    assert ours == pytest.approx(get_epsilon_gaussian(2.0 / math.sqrt(10), 1e-5), abs=1e-3)
    tiny = epsilon({GaussianDpEvent(1.0): 10}, 1e-14, "replace-one")
    assert tiny == epsilon({GaussianDpEvent(0.5): 10}, 1e-14)


@pytest.mark.parametrize("event", [sampled(0.1, 2.0), GaussianDpEvent(9.0)], ids=["sampled", "whole"])
def test_replace_one_never_costs_less_than_zero_out(event: DpEvent) -> None:
    zero_out, replace_one = (
        epsilon({event: 20}, 1e-5, a) for a in (Adjacency.ZERO_OUT, Adjacency.REPLACE_ONE)
    )
    assert replace_one > zero_out == epsilon({event: 20}, 1e-5, ADD_REMOVE)


def test_sampled_replace_one_does_not_go_to_rdp() -> None:
    ours = epsilon({sampled(0.01, 1.0): 1000}, 1e-5, Adjacency.REPLACE_ONE)
    assert ours == pytest.approx(2.843, abs=2e-3)
    with pytest.raises(Refusal, match="RDP"):
        epsilon([sampled(0.01, 1.0)], 1e-13, Adjacency.REPLACE_ONE)


def test_below_the_smallest_delta_of_pld_rdp_alone_answers() -> None:
    events = {sampled(0.01, 1.0): 1000}
    assert epsilon(events, 1e-14) == pytest.approx(4.98, abs=0.01)
    assert math.isfinite(epsilon(events, 1e-30))


@pytest.mark.parametrize(
    "event",
    [
        NonPrivateDpEvent(),
        GaussianDpEvent(0.0),
        sampled(0.1, 0.0),
        LaplaceDpEvent(0),
        PoissonSampledDpEvent(0.5, NonPrivateDpEvent()),
        sampled(0.5, 5e-4),
    ],
    ids=repr,
)
@pytest.mark.parametrize("adjacency", list(Adjacency))
def test_no_noise_costs_infinity(event: DpEvent, adjacency: Adjacency) -> None:
    assert epsilon([GaussianDpEvent(5.0), event], 1e-5, adjacency) == math.inf


@pytest.mark.parametrize(
    "event", [NoOpDpEvent(), sampled(0.0, 1.0), SelfComposedDpEvent(GaussianDpEvent(1.0), 0)]
)
def test_absent_event_is_free(event: DpEvent) -> None:
    assert epsilon([event], 1e-5) == epsilon([], 1e-5) == 0.0


@pytest.mark.parametrize(
    ("event", "adjacency"),
    [
        (UnsupportedDpEvent(), Adjacency.ZERO_OUT),
        (SampledWithoutReplacementDpEvent(100, 10, GaussianDpEvent(1.0)), Adjacency.REPLACE_ONE),
        (PoissonSampledDpEvent(0.1, SelfComposedDpEvent(sampled(0.1, 1.0), 2)), Adjacency.REPLACE_ONE),
        (PoissonSampledDpEvent(0.1, ZCDpEvent(0.1, 0.0)), Adjacency.ZERO_OUT),
        (LaplaceDpEvent(1.0), Adjacency.REPLACE_ONE),
        (ZCDpEvent(0.1, 0.0), Adjacency.REPLACE_ONE),
        (RandomizedResponseDpEvent(0.5, 2), ADD_REMOVE),
    ],
    ids=lambda value: str(value)[:30],
)
def test_event_beyond_every_accountant_is_refused_by_name(event: DpEvent, adjacency: Adjacency) -> None:
    with pytest.raises(Refusal) as refused:
        epsilon([GaussianDpEvent(1.0), event], 1e-5, adjacency)
    assert type(event).__name__ in str(refused.value)


@pytest.mark.parametrize("noise", [math.nan, -1.0, math.inf, "1", True, None])
def test_numbers_that_are_none_are_refused(noise) -> None:
    with pytest.raises(Refusal, match="noise_multiplier"):
        epsilon([GaussianDpEvent(noise)], 1e-5)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_delta_is_a_probability(delta: float) -> None:
    with pytest.raises(Refusal, match="delta"):
        epsilon([GaussianDpEvent(1.0)], delta)


def test_a_vacuous_epsilon_is_computed_in_bounded_memory() -> None:
    assert 1000 < epsilon({sampled(0.25, 0.1): 100}, 1e-4) < 3000


def test_the_accountants_name() -> None:
    name = accountant_name(1e-5)
    assert name.startswith("min(PLD 1e-4 connect-the-dots, RDP Canonne et al. 2020), dp_accounting 0.6")
    assert accountant_name(1e-5, interval=GATE_INTERVAL).startswith("min(PLD 1e-3")
    assert accountant_name(1e-5, Adjacency.REPLACE_ONE).count("where unsampled") == 1
    assert accountant_name(1e-13).startswith("RDP Canonne et al. 2020, dp_accounting")


# --- the gate


# --- the codec


def test_many_rounds_of_little_loss_are_refined() -> None:
    rounds = SelfComposedDpEvent(PoissonSampledDpEvent(1e-3, GaussianDpEvent(0.888)), 20_000)
    coarse = epsilon([rounds], 1e-6, interval=GATE_INTERVAL)
    fine = epsilon([rounds], 1e-6, interval=PUBLISH_INTERVAL)
    assert fine <= coarse <= 1.01 * fine


# --- random plans, against bounds on both sides

PLANS = json.loads((Path(__file__).parents[2] / "oracles" / "random_plans.json").read_text())


@pytest.mark.parametrize("plan", PLANS, ids=[f"{each['kind']}-{n % 10}" for n, each in enumerate(PLANS)])
def test_random_plan_costs_between_its_bounds(plan: dict[str, Any]) -> None:
    events: Counter[DpEvent] = Counter()
    for event, count in plan["events"]:
        events[event_from_json(event)] += count
    low, high = plan["bounds"]
    for adjacency in (Adjacency.ZERO_OUT, ADD_REMOVE):
        ours = epsilon(events, plan["delta"], adjacency)
        # Bounds are printed with six digits; the finest grid of a composition loses up to a tenth of a per cent.
        assert low - 1e-6 <= ours <= high * 1.001 + 1e-6
    assert within(events, Budget(Unit.CLIENT, high * 1.01, plan["delta"]))
    assert not within(events, Budget(Unit.CLIENT, low * 0.99, plan["delta"]))


def test_random_plans_are_sixty_of_six_kinds() -> None:
    assert Counter(each["kind"] for each in PLANS) == dict.fromkeys(RANDOM_PLANS["KINDS"], 10)
    drawn = [{key: each[key] for key in ("kind", "delta", "events")} for each in PLANS]
    assert json.loads(json.dumps(list(RANDOM_PLANS["plans"]()))) == drawn


@pytest.mark.parametrize("at", [3, 13, 25, 33, 45, 52])
def test_the_script_still_gives_the_bounds_of_its_table(at: int) -> None:
    assert RANDOM_PLANS["bracket"](PLANS[at]) == pytest.approx(PLANS[at]["bounds"], abs=1e-5)
