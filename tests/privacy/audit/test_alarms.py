"""Exposure, membership inference and alarms: definitions by brute force, intervals that cover, a budget that holds."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedveil.base.refusal import Refusal
from fedveil.privacy.accounting.gaussian import gaussian_mu
from fedveil.privacy.audit.alarms import CANNOT_UNDO, CONFIRMED_BY, AlarmState, Check, Level, Look, look_at
from fedveil.privacy.audit.membership import Likelihoods, auc, late_fall, lira, logit, rmia, tpr_at
from fedveil.privacy.audit.memorisation import Exposure, exposure, fisher
from fedveil.privacy.audit.normality import accuracy_p, right_of_median, separation

# --- exposure ---------------------------------------------------------------------------------------------------


def test_exposure_is_the_rank_in_bits() -> None:
    found = exposure(0.5, np.arange(1.0, 1024.0))
    assert found == Exposure(1, 1024)
    assert (found.bits, found.p_value) == (10.0, 1 / 1024)
    assert exposure(3.0, np.arange(1.0, 1024.0)) == Exposure(4, 1024)


def test_ties_and_losses_that_are_no_numbers_count_against_a_secret() -> None:
    assert exposure(1.0, np.ones(99)).p_value == 1
    assert exposure(math.nan, np.zeros(99)).p_value == 1
    assert exposure(1.0, np.full(99, math.nan)).p_value == 1


def test_a_secret_that_was_not_learnt_is_rarely_exposed() -> None:
    rng = np.random.default_rng(0)
    p_values = [exposure(losses[0], losses[1:]).p_value for losses in rng.standard_normal((2000, 200))]
    assert abs(np.mean(np.array(p_values) <= 0.05) - 0.05) < 3 * math.sqrt(0.05 * 0.95 / 2000)
    pooled = [fisher(p_values[i : i + 10]) for i in range(0, 2000, 10)]
    assert sum(p < 0.05 for p in pooled) <= 10 + 3 * math.sqrt(10)
    assert stats.kstest(pooled, "uniform").pvalue > 1e-3


def test_fisher_is_scipys() -> None:
    given_p = [0.02, 0.3, 1.0, 0.0007]
    assert fisher(given_p) == pytest.approx(stats.combine_pvalues(given_p, "fisher").pvalue, rel=1e-12)
    assert fisher([1e-4] * 6) < 1e-12
    assert fisher([0.5, 0.0]) == 0


# --- membership -------------------------------------------------------------------------------------------------


def test_rmia_is_the_share_of_the_population_that_is_beaten() -> None:
    rng = np.random.default_rng(1)
    (target, reference), (z_target, z_reference) = rng.random((2, 20)), rng.random((2, 50))
    for a in (0.3, 1.0):
        ratio = target / ((1 + a) / 2 * reference + (1 - a) / 2)
        z_ratio = z_target / ((1 + a) / 2 * z_reference + (1 - a) / 2)
        expected = np.mean(ratio[:, None] / z_ratio > 1, axis=1)
        assert rmia(Likelihoods(target, reference), Likelihoods(z_target, z_reference), a) == pytest.approx(
            expected
        )


def test_lira_is_the_ratio_of_two_gaussians() -> None:
    rng = np.random.default_rng(2)
    shadows, target = rng.standard_normal((8, 30)), rng.standard_normal(30)
    inside = np.argsort(rng.random((8, 30)), axis=0) < 4
    centres = [np.array([shadows[held[:, i], i].mean() for i in range(30)]) for held in (inside, ~inside)]
    spreads = [
        math.sqrt(
            sum(((shadows[held[:, i], i] - centre[i]) ** 2).sum() for i in range(30)) / (8 * 30 / 2 - 30)
        )
        for held, centre in zip((inside, ~inside), centres, strict=True)
    ]
    logs = [stats.norm.logpdf(target, c, s) for c, s in zip(centres, spreads, strict=True)]
    assert lira(target, shadows, inside) == pytest.approx(logs[0] - logs[1])
    with pytest.raises(Refusal, match="train more"):
        lira(target, shadows, np.ones_like(inside))


def test_attacks_with_references_beat_the_loss_on_uneven_records() -> None:
    """Records differ more from each other than membership changes one: the case that the references are for."""
    rng = np.random.default_rng(3)
    records, gain = 1500, 1.0
    hard = 2 * rng.standard_normal(records)
    member = rng.random(records) < 0.5

    def model(inside: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-(hard + gain * inside + 0.5 * rng.standard_normal(records))))

    inside = np.argsort(rng.random((8, records)), axis=0) < 4
    shadows = np.array([model(held) for held in inside])
    target = model(member)
    none = np.zeros(records, bool)
    z = Likelihoods(model(none), model(none))
    scores = {
        "loss": np.log(target),
        "rmia": rmia(Likelihoods(target, model(none)), z),
        "lira": lira(logit(target), logit(shadows), inside),
    }
    found = {name: auc(each[member], each[~member]).value for name, each in scores.items()}
    assert found["loss"] < 0.65
    assert found["rmia"] > 0.7
    assert found["lira"] > 0.85


def test_auc_is_mann_whitneys_with_delongs_interval() -> None:
    rng = np.random.default_rng(4)
    members, others = np.round(rng.standard_normal(40) + 0.8, 1), np.round(rng.standard_normal(60), 1)
    found = auc(members, others)
    wins = (members[:, None] > others) + 0.5 * (members[:, None] == others)
    spread = math.sqrt(wins.mean(1).var(ddof=1) / 40 + wins.mean(0).var(ddof=1) / 60)
    assert found.value == pytest.approx(wins.mean())
    assert found.low == pytest.approx(wins.mean() - 1.959964 * spread, abs=1e-6)
    assert found.high == pytest.approx(wins.mean() + 1.959964 * spread, abs=1e-6)


def test_perfect_separation_is_not_reported_as_certain() -> None:
    found = auc(np.ones(20), np.zeros(30))
    assert (found.value, found.high) == (1.0, 1.0)
    assert 0.8 < found.low < 0.9


@pytest.mark.parametrize("fpr", [0.01, 0.1])
def test_the_rate_at_few_false_positives_is_covered(fpr: float) -> None:
    rng = np.random.default_rng(5)
    true, count = stats.norm.sf(stats.norm.isf(fpr) - 1.5), 200
    found = [tpr_at(fpr, rng.standard_normal(400) + 1.5, rng.standard_normal(1500)) for _ in range(count)]
    assert sum(each.low <= true <= each.high for each in found) >= 0.95 * count - 3
    assert abs(np.median([each.value for each in found]) - true) < 0.03
    assert all(each.low <= each.value <= each.high for each in found)


def test_too_few_records_leave_a_rate_open() -> None:
    rng = np.random.default_rng(6)
    found = tpr_at(0.001, rng.standard_normal(100) + 9, rng.standard_normal(1000))
    assert (found.low, found.value) == (0.0, 1.0)
    many = tpr_at(0.001, rng.standard_normal(100) + 9, rng.standard_normal(20_000))
    assert many.low > 0.9


def test_false_positive_rate_stays_below_its_level() -> None:
    others = np.arange(1000.0)
    assert tpr_at(0.01, np.full(10, 989.5), others).value == 1.0
    assert tpr_at(0.01, np.full(10, 989.0), others).value == 0.0


def test_late_learnt_record_stands_out_and_an_unlearnt_one_does_not() -> None:
    known_at_once, by_heart, never = [2.0, 0.1, 0.1, 0.1], [2.0, 4.0, 3.0, 0.1], [2.0, 4.0, 5.0, 6.0]
    scores = late_fall(np.array([known_at_once, by_heart, never]).T)
    assert scores == pytest.approx([0.475, 2.175, -1.75])


# --- alarms -----------------------------------------------------------------------------------------------------

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
