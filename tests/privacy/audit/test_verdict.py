"""Estimates and verdicts of the audit: calibration, power, and what must be refused."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import nct

from fedveil.privacy.accounting.gaussian import gaussian_delta, gaussian_epsilon, gaussian_mu, last_true
from fedveil.privacy.audit.normality import (
    Separation,
    accuracy_p,
    estimate,
    right_of_median,
    separation,
    separation_refutes,
)
from fedveil.privacy.audit.one_run import Guesses, gdp_refutes, steinke_p
from fedveil.privacy.audit.verdict import Verdict, by_guesses, by_many_runs, by_one_run, judge

DELTA = 1e-5


@pytest.mark.parametrize(("canaries", "cap"), [(200, 4.19), (500, 5.10), (1000, 5.78), (5000, 7.28)])
def test_ceiling_is_the_measure_of_perfect_guesses(canaries: int, cap: float) -> None:
    (finding,) = judge(by_guesses(Guesses(canaries, canaries, canaries // 2), DELTA), 1.0, 0.05).findings
    assert finding.ceiling == pytest.approx(cap, abs=0.005)


@given(st.floats(0.05, 40), st.sampled_from([1e-8, 1e-5, 1e-2]))
@settings(max_examples=25)
def test_epsilon_and_mu_are_each_others_inverse(mu: float, delta: float) -> None:
    epsilon = gaussian_epsilon(mu, delta)
    assert gaussian_delta(mu, epsilon) <= delta * 1.001 + 1e-12
    if epsilon > 1e-3:
        assert gaussian_mu(epsilon, delta) == pytest.approx(mu, rel=1e-4)


def test_gaussian_epsilon_agrees_with_the_accountant() -> None:
    from dp_accounting import GaussianDpEvent

    from fedveil.privacy import epsilon

    assert gaussian_epsilon(1.0, DELTA) == pytest.approx(epsilon([GaussianDpEvent(1.0)], DELTA), rel=2e-3)


def gaussian_scores(mu: float, seed: int, canaries: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """What a mu-GDP mechanism gives for independent canaries."""
    rng = np.random.default_rng(seed)
    inside = rng.random(canaries) < 0.5
    scores = rng.standard_normal(canaries) + mu * inside
    return scores[inside], scores[~inside]


@pytest.mark.parametrize("epsilon", [1.0, 8.0])
def test_correct_runs_are_not_called_violated(epsilon: float) -> None:
    """200 correct runs: each test refutes at most 2 of them at alpha 0.001, and at 0.05 at most 20."""
    mu = gaussian_mu(epsilon, DELTA)
    p_values = np.empty((200, 2))
    for seed in range(200):
        members, others = gaussian_scores(mu, seed)
        p_values[seed] = (
            separation(members, others).p_value(mu),
            accuracy_p(right_of_median(members, others), 1000, mu),
        )
    assert ((p_values < 0.001).sum(0) <= 2).all()
    refuted = (p_values < 0.05).sum(0)
    assert (refuted >= 2).all() and (refuted <= 20).all(), refuted


def test_most_correct_runs_have_an_estimate_above_the_claim_or_near() -> None:
    """Why estimates raise no alarm."""
    mu = gaussian_mu(4.0, DELTA)
    above = [separation(*gaussian_scores(mu, seed)).mu > mu for seed in range(200)]
    assert 70 <= sum(above) <= 130


@pytest.mark.parametrize("gaussian", [False, True], ids=["any", "gaussian"])
@pytest.mark.parametrize("kind", ["one run", "many runs"])
def test_every_method_keeps_its_level(kind: str, gaussian: bool) -> None:
    """At most alpha plus three standard errors of correct runs are refuted: 150 runs at alpha 0.1."""
    mu, epsilon, alpha, count = gaussian_mu(1.0, DELTA), 1.0, 0.1, 150
    by = by_one_run if kind == "one run" else by_many_runs
    wrong: dict[str, int] = {}
    for seed in range(count):
        for method in by(*gaussian_scores(mu, seed, 400), DELTA, gaussian):
            wrong[method.name] = wrong.get(method.name, 0) + method.refutes(epsilon, alpha)
    assert len(wrong) == (1 if not gaussian else 3 if kind == "one run" else 2)
    allowed = count * alpha + 3 * math.sqrt(count * alpha * (1 - alpha))
    assert all(number <= allowed for number in wrong.values()), wrong


def test_a_test_that_alarms_on_its_estimate_would_not_keep_the_level() -> None:
    """So that the test above cannot pass whatever it is given."""
    mu = gaussian_mu(1.0, DELTA)
    wrong = sum(separation(*gaussian_scores(mu, seed, 400)).mu > mu for seed in range(150))
    assert wrong > 150 * 0.1 + 3 * math.sqrt(150 * 0.09)


def power_if_halved(members: int, others: int, epsilon: float, alpha: float) -> float:
    """The probability that the t test refutes epsilon where the noise is half of what it needs."""

    def stands(mu: float) -> bool:
        return not separation_refutes(Separation(mu, members, others), DELTA, epsilon, alpha)

    scale = math.sqrt(members * others / (members + others))
    limit, true = last_true(stands) * scale, 2 * gaussian_mu(epsilon, DELTA) * scale
    return float(nct.sf(limit, members + others - 2, true))


@pytest.mark.parametrize("epsilon", [2.0, 4.0, 8.0])
def test_halved_noise_is_violated_and_the_power_was_foretold(epsilon: float) -> None:
    mu = gaussian_mu(epsilon, DELTA)
    verdicts = [
        judge(by_one_run(*gaussian_scores(2 * mu, seed), DELTA, gaussian=True), epsilon, 0.001)
        for seed in range(5)
    ]
    assert all(verdict.verdict is Verdict.VIOLATED for verdict in verdicts)
    assert power_if_halved(500, 500, epsilon, 0.001) > 0.99
    assert power_if_halved(50, 50, 1.0, 0.001) < 0.2


@pytest.mark.parametrize(("true", "low", "high"), [(1.0, 0.7, 1.3), (3.0, 2.6, 3.3), (10.0, 9.0, 10.5)])
def test_the_estimate_is_near_the_truth_and_its_interval_covers_it(
    true: float, low: float, high: float
) -> None:
    mu = gaussian_mu(true, DELTA)
    found = [estimate(separation(*gaussian_scores(mu, seed, 2000)), DELTA) for seed in range(10)]
    assert low < np.mean([each.epsilon for each in found]) < high
    assert sum(each.low < true < each.high for each in found) >= 8


def test_the_estimate_of_a_run_without_noise_is_infinite() -> None:
    apart = separation(np.ones(10), np.zeros(10))
    assert estimate(apart, DELTA).epsilon == math.inf
    assert apart.p_value(5.0) == 0
    assert separation(np.zeros(10), np.zeros(10)).p_value(0.0) == 1


def test_claim_above_the_ceiling_is_undecidable() -> None:
    guesses = Guesses(100, 100, 100)
    assert judge(by_guesses(guesses, DELTA), 2.0, 0.05).verdict is Verdict.VIOLATED
    assert judge(by_guesses(guesses, DELTA), 8.0, 0.05).verdict is Verdict.TOO_WEAK
    assert judge(by_guesses(Guesses(100, 100, 50), DELTA), 2.0, 0.05).verdict is Verdict.CONSISTENT


def test_masking_of_canaries_lowers_the_ceiling() -> None:
    methods = by_one_run(*gaussian_scores(1.0, 0), DELTA, gaussian=True)
    assert judge(methods, 8.0, 0.05).verdict is Verdict.CONSISTENT
    assert judge(methods, 8.0, 0.05, masked=7.0).verdict is Verdict.TOO_WEAK


@pytest.mark.parametrize("gaussian", [False, True])
def test_many_runs_apart_refute_and_runs_alike_do_not(gaussian: bool) -> None:
    rng = np.random.default_rng(3)
    members, others = rng.standard_normal(500), rng.standard_normal(500)
    assert judge(by_many_runs(members + 4, others, DELTA, gaussian), 1.0, 0.05).verdict is Verdict.VIOLATED
    assert judge(by_many_runs(members, others, DELTA, gaussian), 1.0, 0.05).verdict is Verdict.CONSISTENT


@given(st.integers(2, 40), st.integers(0, 40), st.integers(0, 40), st.floats(0.1, 3))
@settings(max_examples=40)
def test_a_larger_epsilon_is_never_refuted_more_easily(
    made: int, right: int, more: int, epsilon: float
) -> None:
    guesses = Guesses(made + more, made, min(right, made))
    assert steinke_p(guesses, epsilon, DELTA) <= steinke_p(guesses, epsilon + 0.5, DELTA) + 1e-12
    if gdp_refutes(guesses, DELTA, epsilon + 0.5, 0.05):
        assert gdp_refutes(guesses, DELTA, epsilon, 0.05)
