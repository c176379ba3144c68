"""Cyclic Poisson: turns are kept, coins amplify them, and a cycle of rounds is one release."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from dp_accounting.dp_event import GaussianDpEvent, NoOpDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

import fedveil as fv
from fedveil.base.refusal import Refusal
from fedveil.configs.settings import settings_from_overrides
from fedveil.privacy.budget import Adjacency, Budget, Unit
from fedveil.privacy.ledger.ledger import Ledger
from fedveil.privacy.mechanisms.correlated_noise import Correlation
from fedveil.privacy.mechanisms.mechanism import mechanism_of
from fedveil.privacy.mechanisms.randomness import Randomness, Stream
from fedveil.privacy.plan import Plan
from fedveil.run.build import build
from fedveil.server.accounts import MECHANISM
from fedveil.strategies.cohorts import (
    CyclicPoisson,
    Poisson,
    likely_participations,
    with_label,
)

ASKED = (
    "cohort=cyclic_poisson",
    "privacy.noise=correlated",
    "num_rounds=40",
    "privacy.allow_large_delta=true",
)
BUDGET = Budget(Unit.CLIENT, 3.0, 1e-5)


def stream(number: int) -> Stream:
    return Randomness(5).stream("cohort", number)


def plan_of(cohort: CyclicPoisson, num_rounds: int, bands: int | None = None) -> Plan:
    law = mechanism_of("correlated", cohort.turns, num_rounds, bands)
    return Plan(Unit.CLIENT, Adjacency.ZERO_OUT, cohort, 1.0, num_rounds, 1.0, mechanism=law)


# --- the draw -----------------------------------------------------------------------------------------------------


def drawn(cohort: CyclicPoisson, clients: list[int], rounds: int) -> list[list[int]]:
    cohorts: list[list[int]] = []
    for number in range(1, rounds + 1):
        cohorts.append(cohort.draw(clients, stream(number), cohorts))
    return cohorts


def test_client_takes_part_in_its_turns_by_a_coin_of_the_right_rate() -> None:
    cohorts = drawn(CyclicPoisson(0.1, 5), list(range(400)), 200)
    turns = {
        client: {number % 5 for number, who in enumerate(cohorts) if client in who} for client in range(400)
    }
    assert max(len(each) for each in turns.values()) == 1
    took_part = sum(map(len, cohorts))
    assert took_part == pytest.approx(200 * 40, abs=6 * math.sqrt(200 * 40 * 0.5))
    sizes = np.bincount([min(each) for each in turns.values() if each], minlength=5)
    assert sizes.min() > 40  # of 80 expected


def test_newcomers_and_leavers_move_nobody_elses_turn() -> None:
    cohort = CyclicPoisson(1 / 4, 4)  # with certainty in its turn
    all_turns = [set(cohort.draw(range(100), stream(1), [[]] * turn)) for turn in range(4)]
    some = [set(cohort.draw(range(0, 100, 3), stream(1), [[]] * turn)) for turn in range(4)]
    assert all(few <= many for few, many in zip(some, all_turns, strict=True))
    assert set.union(*all_turns) == set(range(100))


def test_with_one_group_it_is_todays_poisson() -> None:
    cyclic, today = CyclicPoisson(0.25, 1), Poisson(0.25)
    for number in range(1, 4):
        assert cyclic.draw(range(50), stream(number), [[]] * number) == today.draw(range(50), stream(number))
    ours = plan_of(cyclic, 100).calibrate(BUDGET)
    theirs = Plan(Unit.CLIENT, Adjacency.ZERO_OUT, today, 1.0, 100).calibrate(BUDGET)
    assert ours.noise_multiplier == theirs.noise_multiplier
    assert [ours.event_of(row) for row in (1, 2, 100)] == [theirs.event_of(row) for row in (1, 2, 100)]
    assert ours.epsilon(1e-5) == theirs.epsilon(1e-5)
    assert ours.affordable_rounds(BUDGET) == 100
    assert (cyclic.name, ours.mechanism.described) == ("poisson with probability 0.25, every round", "")


def test_cohort_has_the_event_and_the_size_of_its_coins() -> None:
    cohort = CyclicPoisson(0.05, 8)
    assert cohort.event(GaussianDpEvent(2.0)) == PoissonSampledDpEvent(0.4, GaussianDpEvent(2.0))
    assert with_label(cohort, "none: seen").event(GaussianDpEvent(2.0)) == GaussianDpEvent(2.0)
    assert with_label(cohort, "none: seen").name == "none: seen"
    assert cohort.expected_size(1000) == 50
    assert 5 <= likely_participations(cohort, 1000, 80) <= 10
    with pytest.raises(Refusal, match=r"groups=21: .* at most 20"):
        CyclicPoisson(0.05, 21)
    with pytest.raises(Refusal, match="at least 1"):
        CyclicPoisson(0.05, 0)


# --- what it is worth ---------------------------------------------------------------------------------------------


@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1))
@settings(max_examples=60)
def test_turns_move_rows_of_their_own_by_at_most_the_sensitivity(
    n: int, b: int, bands: int, seed: int
) -> None:
    law = Correlation(n, b, 1, min(bands, b, n), cycle=b)
    column = np.concatenate([law.coefficients / law.coefficients[0], np.zeros(n)])
    a = np.array([[column[i - j] if i >= j else 0.0 for j in range(n)] for i in range(n)])
    sums = np.random.default_rng(seed).uniform(
        -1, 1, n
    )  # a client's contribution in each round, of norm at most 1
    for first in range(min(b, n)):
        moved = [a[:, turn] * sums[turn] for turn in range(first, n, b)]
        assert all(np.linalg.norm(each) <= law.sensitivity + 1e-12 for each in moved)
        assert all(np.all(one * other == 0) for one, other in itertools.combinations(moved, 2))


def test_the_event_is_that_of_dp_accounting() -> None:
    plan = plan_of(CyclicPoisson(0.05, 8), 100)
    accountant = PLDAccountant()
    accountant.compose(PoissonSampledDpEvent(0.4, GaussianDpEvent(1.0)), 13)
    assert plan.epsilon(1e-5) == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-3)
    assert [row for row in range(1, 101) if plan.event_of(row) != NoOpDpEvent()] == list(range(1, 101, 8))
    assert plan.epsilon(1e-5, 8) == plan.epsilon(1e-5, 1) < plan.epsilon(1e-5, 9)


def test_no_likelihood_of_all_rows_together_says_more() -> None:
    """The hockey stick of the joint law of M, by its density over all coins, against the plan's."""
    cohort, rounds, noise, samples = CyclicPoisson(0.1, 4), 8, 0.8, 200_000
    law = Correlation(rounds, 4, 1, 4, cycle=4)
    column = np.concatenate([law.coefficients / law.coefficients[0], np.zeros(rounds)])
    a = np.array([[column[i - j] if i >= j else 0.0 for j in range(rounds)] for i in range(rounds)])
    std, generator = noise * law.sensitivity, np.random.default_rng(0)
    coins = np.array(list(itertools.product((0, 1), repeat=2)))
    chances = np.prod(np.where(coins == 1, 0.4, 0.6), axis=1)
    shifts = coins @ a[:, [0, 4]].T  # of the client whose turns are rounds 1 and 5
    rows = generator.normal(0, std, (samples, rounds)) + shifts[generator.choice(4, samples, p=chances)]
    ratios = np.exp((rows @ shifts.T - (shifts**2).sum(1) / 2) / std**2) @ chances
    plan = Plan(Unit.CLIENT, Adjacency.ZERO_OUT, cohort, 1.0, rounds, noise, mechanism=law)
    for delta in (0.2, 0.05):
        claimed = plan.epsilon(delta)
        lost = np.maximum(0, 1 - math.exp(claimed) / ratios)
        assert lost.mean() == pytest.approx(delta, abs=5 * lost.std() / math.sqrt(samples))


def test_settings_that_break_the_claim_are_refused() -> None:
    law = Correlation(40, 4, 1, 4, cycle=4)
    with pytest.raises(Refusal, match=r"bands=8: give at most 4"):
        Correlation(40, 4, 1, 8, cycle=4)
    for cohort in (Poisson(0.1), CyclicPoisson(0.1, 3)):
        with pytest.raises(Refusal, match="its turn every 4 rounds"):
            Plan(Unit.CLIENT, Adjacency.ZERO_OUT, cohort, 1.0, 40, 1.0, mechanism=law)
    with pytest.raises(Refusal, match="adjacency"):
        Plan(Unit.CLIENT, Adjacency.REPLACE_ONE, CyclicPoisson(0.1, 4), 1.0, 40, 1.0, mechanism=law)
    with pytest.raises(Refusal, match="does not promise"):
        whole = Correlation(40, 4, 10, 4)
        Plan(Unit.CLIENT, Adjacency.ZERO_OUT, CyclicPoisson(0.1, 4), 1.0, 40, 1.0, mechanism=whole)


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        (["cohort.groups=21"], r"cohort\.groups=21: with cohort\.rate=0\.05 give at most 20"),
        (["privacy.bands=32"], r"privacy\.bands=32: a client's turns are at most 20 rounds"),
        (["cohort.groups=2", "privacy.bands=4"], r"bands=4: give at most 2"),
        (
            ["privacy.target_epsilon=null", "privacy.noise_multiplier=1"],
            r"cohort\.groups=None: .* set it, or give a budget",
        ),
        (["audit=full"], "use light"),
    ],
)
def test_unplannable_run_is_refused(said: list[str], remedy: str) -> None:
    with pytest.raises(Refusal, match=remedy):
        _ = build(settings_from_overrides([*ASKED, *said])).mode.mechanism


# --- a run --------------------------------------------------------------------------------------------------------


def test_run_pays_once_a_cycle_and_its_ledger_names_no_participant(tmp_path: Path) -> None:
    run = fv.simulate(
        "digits",
        privacy=fv.ClientCentral(noise="correlated", target_epsilon=8.0),
        cohort=fv.CyclicPoisson(0.2, 3),
        num_rounds=7,
        folder=tmp_path / "run",
        quiet=True,
    )
    assert run.status == "completed" and run.epsilon == pytest.approx(8.0, rel=0.01)
    spent = [row["epsilon_client"] for row in run.history]
    assert spent[0] == spent[2] < spent[3] == spent[5] < spent[6]
    budget, owner = Budget(Unit.CLIENT, 8.0, 1e-4), "simulated digits"
    with Ledger.open(tmp_path / "run" / "ledger", budget, owner=owner, simulated=True) as ledger:
        assert (
            ledger.cohorts(json.loads((tmp_path / "run" / "run.json").read_text())["run"], MECHANISM)
            == [[]] * 7
        )
