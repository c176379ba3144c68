"""Alarms of a run: levels, the false-alarm budget that holds, and what must be refused."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedveil.base.refusal import Refusal
from fedveil.privacy.accounting.gaussian import gaussian_mu
from fedveil.privacy.audit.alarms import CANNOT_UNDO, CONFIRMED_BY, AlarmState, Check, Level, Look, look_at
from fedveil.privacy.audit.memorisation import fisher
from fedveil.privacy.audit.normality import accuracy_p, right_of_median, separation

PLAN = AlarmState(
    {Check.CANARIES: 10, Check.ACCURACY: 10, Check.NORM: 50, Check.REUSE: 50, Check.MEMORISATION: 10}
)
OF_RECORDS = AlarmState({**PLAN.planned, Check.RECORDS: 10, Check.RECORDS_ACCURACY: 10, Check.LOSSES: 10})


@given(
    st.dictionaries(
        st.sampled_from([t for t in Check if t not in (*CONFIRMED_BY.values(), Check.BOOKS)]),
        st.integers(1, 200),
        min_size=1,
    )
)
@settings(max_examples=30)
def test_all_looks_together_spend_alpha_and_no_more(planned: dict[Check, int]) -> None:
    state = AlarmState({**planned, Check.BOOKS: 10}, 0.02)
    assert sum(looks * state.threshold(test) for test, looks in planned.items()) == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("p_values", "levels"),
    [
        ({Check.CANARIES: 1e-5, Check.ACCURACY: 1e-5}, [Level.RED]),
        ({Check.CANARIES: 1e-5, Check.ACCURACY: 0.3}, [Level.ORANGE]),
        ({Check.CANARIES: 1e-5}, [Level.ORANGE]),
        ({Check.CANARIES: 0.3, Check.ACCURACY: 1e-5}, []),
        ({Check.NORM: 1e-9, Check.REUSE: 0.5}, [Level.RED]),
        ({Check.RECORDS: 1e-5, Check.RECORDS_ACCURACY: 1e-5}, [Level.RED]),
        ({Check.RECORDS: 1e-5, Check.RECORDS_ACCURACY: 0.3}, [Level.ORANGE]),
        ({Check.RECORDS_ACCURACY: 1e-5}, []),
        ({Check.LOSSES: 1e-5}, [Level.RED]),
        ({Check.REUSE: 0.0}, [Level.RED]),
        ({Check.REUSE: 1e-5}, [Level.ORANGE]),
        ({Check.MEMORISATION: 1e-5}, [Level.YELLOW]),
        ({Check.NORM: math.nan}, [Level.RED]),
        ({test: 1e-3 for test in OF_RECORDS.planned}, []),
    ],
)
def test_levels(p_values: dict[Check, float], levels: list[Level]) -> None:
    state, alarms = look_at(OF_RECORDS, Look(p_values))
    assert [alarm.level for alarm in alarms] == levels
    assert state.looks == dict.fromkeys(p_values, 1)
    assert OF_RECORDS.looks == {}


def levels_of_norm(*p_values: float) -> list[Level]:
    """The alarms of one check over several looks."""
    state, raised = PLAN, []
    for p in p_values:
        state, alarms = look_at(state, Look({Check.NORM: p, Check.REUSE: 0.5}))
        raised += [alarm.level for alarm in alarms]
    return raised


def test_a_free_check_is_red_once_one_of_the_next_looks_confirms_it() -> None:
    assert levels_of_norm(1e-5, 0.9, 9e-4) == [Level.ORANGE, Level.RED]
    assert levels_of_norm(1e-5, *[0.9] * 9, 9e-4) == [Level.ORANGE, Level.RED]
    assert levels_of_norm(1e-5, *[0.9] * 10, 9e-4) == [Level.ORANGE]
    assert levels_of_norm(1e-5, *[0.9] * 10, 1e-5) == [Level.ORANGE, Level.RED]
    assert levels_of_norm(9e-4, 9e-4) == []


def test_another_check_confirms_nothing() -> None:
    state, first = look_at(PLAN, Look({Check.NORM: 1e-5, Check.REUSE: 0.5}))
    _, other = look_at(state, Look({Check.NORM: 0.5, Check.REUSE: 1e-5}))
    assert [each.level for each in (*first, *other)] == [Level.ORANGE, Level.ORANGE]


def test_an_audit_that_cannot_see_its_claim_says_so() -> None:
    _, alarms = look_at(PLAN, Look({Check.CANARIES: 0.5}, claim=28.4, ceiling=11.0))
    assert [alarm.level for alarm in alarms] == [Level.BLIND]
    assert look_at(PLAN, Look({Check.CANARIES: 0.5}, claim=4.0, ceiling=11.0))[1] == ()


def test_looks_that_were_not_planned_are_refused() -> None:
    state = PLAN
    for _ in range(10):
        state, _ = look_at(state, Look({Check.CANARIES: 0.5}))
    with pytest.raises(Refusal, match="10 were planned for canaries"):
        look_at(state, Look({Check.CANARIES: 0.5}))
    with pytest.raises(Refusal, match="0 were planned for norm"):
        look_at(AlarmState({Check.REUSE: 5}), Look({Check.NORM: 0.5}))


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.campaign)])
def test_whole_correct_runs_raise_an_alarm_once_in_a_hundred(count: int) -> None:
    """Ten looks at scores that grow on each other, fifty rounds of both noise checks, exposure of ten secrets.

    The noise checks stop a hundredth of them.
    """
    rng = np.random.default_rng(7)
    alarmed = stopped = 0
    for _ in range(count):
        coins = rng.random(400) < 0.5
        sums, state, raised = np.zeros(400), PLAN, False
        for look in range(1, 11):
            sums += rng.standard_normal(400) + coins
            p_values = _p_values(sums[coins], sums[~coins], math.sqrt(look))
            state, alarms = look_at(
                state, Look(p_values | {Check.MEMORISATION: fisher(list(1 - rng.random(10)))})
            )
            raised |= bool(alarms)
        for norm, reuse in rng.random((50, 2)):
            state, alarms = look_at(state, Look({Check.NORM: norm, Check.REUSE: reuse}))
            raised |= bool(alarms)
            stopped += Level.RED in {each.level for each in alarms}
        alarmed += raised
    assert alarmed <= 0.01 * count + 3 * math.sqrt(0.01 * count)
    assert stopped <= 1


def _p_values(members: np.ndarray, others: np.ndarray, mu: float) -> dict[Check, float]:
    right = accuracy_p(right_of_median(members, others), len(members) + len(others), mu)
    return {Check.CANARIES: separation(members, others).p_value(mu), Check.ACCURACY: right}


def test_noise_halved_is_red_at_the_first_look() -> None:
    rng, mu = np.random.default_rng(8), gaussian_mu(4.0, 1e-5)
    coins = rng.random(1000) < 0.5
    scores = rng.standard_normal(1000) + 2 * mu * coins
    _, alarms = look_at(PLAN, Look(_p_values(scores[coins], scores[~coins], mu)))
    assert [alarm.level for alarm in alarms] == [Level.RED]


def test_every_action_names_its_limits() -> None:
    assert set(CANNOT_UNDO) == {"stop", "pause", "raise_noise", "drop_client", "rollback"}
    assert all(CANNOT_UNDO.values())
