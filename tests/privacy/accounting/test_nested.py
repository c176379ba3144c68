"""A sample of which a whole composition is asked: values pinned by others' means, its bounds, what it is not."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from dp_accounting import (
    ComposedDpEvent,
    DpEvent,
    GaussianDpEvent,
    LaplaceDpEvent,
    PoissonSampledDpEvent,
    RandomizedResponseDpEvent,
    SelfComposedDpEvent,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import comb, logsumexp

from fedveil.base.refusal import Refusal
from fedveil.privacy.accounting import loss_distributions
from fedveil.privacy.accounting.custom_events import OpenlySampledDpEvent
from fedveil.privacy.accounting.epsilon import (
    GATE_INTERVAL,
    epsilon,
    grouped,
)
from fedveil.privacy.accounting.events import event_from_json, event_to_json
from fedveil.privacy.accounting.renyi import relation_of
from fedveil.privacy.budget import Adjacency, Adversary, Budget, Release, Unit
from fedveil.privacy.ledger.ledger import BudgetExhausted, Ledger, verify

ZERO_OUT, ADD_REMOVE = Adjacency.ZERO_OUT, Adjacency.ADD_OR_REMOVE_ONE
BOTH = [ZERO_OUT, ADD_REMOVE]
# A client of 500 records, batches of 32, noise 1, 16 steps a round; drawn with probability 0.1 in 100 rounds.
STEPS = SelfComposedDpEvent(PoissonSampledDpEvent(0.064, GaussianDpEvent(1.0)), 16)
SECRET = PoissonSampledDpEvent(0.1, STEPS)


def step(rate: float, noise: float) -> DpEvent:
    return PoissonSampledDpEvent(rate, GaussianDpEvent(noise))


def delta_of(event: DpEvent, at: float, adjacency: Adjacency = ZERO_OUT, interval: float = 1e-4) -> float:
    losses = loss_distributions.distribution(grouped([event]), relation_of(adjacency), interval)
    return float(losses.get_delta_for_epsilon(at))


# --- pinned


@pytest.mark.parametrize("adjacency", BOTH)
def test_the_pinned_values(adjacency: Adjacency) -> None:
    assert epsilon({SECRET: 100}, 1e-5, adjacency) == pytest.approx(1.596, abs=1e-3)
    assert epsilon({STEPS: 10}, 1e-5, adjacency) == pytest.approx(5.553, abs=1e-3)
    assert epsilon({STEPS: 100}, 1e-5, adjacency) == pytest.approx(19.470, abs=1e-3)


def test_the_product_of_the_rates_cannot_be_had_for_several_steps() -> None:
    product = epsilon({step(0.1 * 0.064, 1.0): 1600}, 1e-5, interval=GATE_INTERVAL)
    assert product == pytest.approx(1.417, abs=3e-3)
    written = [
        SECRET,
        PoissonSampledDpEvent(0.1, ComposedDpEvent([STEPS])),
        PoissonSampledDpEvent(0.1, ComposedDpEvent([step(0.064, 1.0)] * 16)),
        PoissonSampledDpEvent(0.1, SelfComposedDpEvent(ComposedDpEvent([step(0.064, 1.0)] * 4), 4)),
        PoissonSampledDpEvent(0.2, PoissonSampledDpEvent(0.5, STEPS)),
    ]
    assert {epsilon([event] * 100, 1e-5, interval=GATE_INTERVAL) for event in written} == {
        epsilon({SECRET: 100}, 1e-5, interval=GATE_INTERVAL)
    }


def test_one_step_on_one_draw_is_one_draw_at_the_product() -> None:
    for inner in (step(0.5, 1.3), SelfComposedDpEvent(step(0.5, 1.3), 1), ComposedDpEvent([step(0.5, 1.3)])):
        assert grouped([PoissonSampledDpEvent(0.25, inner)]) == grouped([step(0.125, 1.3)])


@settings(max_examples=8)
@given(p=st.floats(0.02, 0.9), q=st.floats(0.02, 0.95), noise=st.floats(0.5, 4.0), rounds=st.integers(1, 50))
def test_dominating_pair_of_one_step_is_that_of_dp_accounting(
    p: float, q: float, noise: float, rounds: int
) -> None:
    """`grouped` would multiply the rates; here the pair itself is sampled and must come to the same."""
    unmerged = PoissonSampledDpEvent(p, SelfComposedDpEvent(step(q, noise), 1))
    relation = relation_of(ADD_REMOVE)
    inner = loss_distributions.distribution(((step(q, noise), 1),), relation, GATE_INTERVAL)
    drawn = loss_distributions.PrivacyLossDistribution(
        loss_distributions._removed(inner._pmf_remove, p, GATE_INTERVAL),
        loss_distributions._added(inner._pmf_add, p, GATE_INTERVAL),
    )
    ours = drawn.self_compose(rounds).get_epsilon_for_delta(1e-5)
    theirs = loss_distributions.distribution(
        grouped({unmerged: rounds}), relation, GATE_INTERVAL
    ).get_epsilon_for_delta(1e-5)
    assert theirs - 1e-7 <= ours <= theirs * 1.01 + 3e-3


# --- computed by other means


def integrated(p: float, q: float, noise: float, at: float) -> tuple[float, float]:
    """delta at epsilon ``at`` of two steps on one draw, (remove, add), by the densities on a fine square grid."""
    x = np.linspace(-9 * noise, 1 + 9 * noise, 3001)
    without = stats.norm.pdf(x, 0, noise)
    each = q * stats.norm.pdf(x, 1, noise) + (1 - q) * without
    absent, present = np.multiply.outer(without, without), np.multiply.outer(each, each)
    drawn, area = p * present + (1 - p) * absent, (x[1] - x[0]) ** 2
    removed = np.maximum(drawn - math.exp(at) * absent, 0).sum() * area
    added = np.maximum(absent - math.exp(at) * drawn, 0).sum() * area
    return float(removed), float(added)


@pytest.mark.parametrize(
    ("p", "q", "noise", "at"),
    [(0.1, 0.3, 1.0, 0.2), (0.5, 0.5, 0.8, 1.0), (0.3, 1.0, 2.0, 0.1), (0.7, 0.2, 1.0, 0.05)],
)
def test_two_steps_by_integration(p: float, q: float, noise: float, at: float) -> None:
    inner = step(q, noise) if q < 1 else GaussianDpEvent(noise)
    # Two Gaussians of one draw are merged by the reader; two samples are not.
    event = PoissonSampledDpEvent(p, SelfComposedDpEvent(inner, 2))
    exact = max(integrated(p, q, noise, at))
    assert exact - 1e-7 <= delta_of(event, at) <= exact * 1.005 + 1e-7


@pytest.mark.parametrize("direction", ["remove", "add"])
def test_each_direction_by_integration(direction: str) -> None:
    p, q, noise, at = 0.4, 0.3, 0.9, 0.15
    losses = loss_distributions.distribution(
        grouped([PoissonSampledDpEvent(p, SelfComposedDpEvent(step(q, noise), 2))]),
        relation_of(ZERO_OUT),
        1e-4,
    )
    exact = integrated(p, q, noise, at)[direction == "add"]
    ours = getattr(losses, f"_pmf_{direction}").get_delta_for_epsilon(at)
    assert exact - 1e-7 <= ours <= exact * 1.005 + 1e-7


def test_sixteen_steps_over_five_rounds_by_simulation() -> None:
    p, q, noise, k, rounds, at, runs = 0.3, 0.3, 1.0, 16, 5, 2.0, 40_000
    draw = np.random.default_rng(11)
    drawn = draw.random((runs, rounds)) < p
    sampled = (draw.random((runs, rounds, k)) < q) & drawn[..., None]
    seen = draw.normal(sampled, noise)
    inner = np.log1p(q * np.expm1((2 * seen - 1) / (2 * noise**2))).sum(axis=2)
    loss = np.log1p(p * np.expm1(inner)).sum(axis=1)
    terms = np.maximum(-np.expm1(at - loss), 0)
    estimate, error = terms.mean(), terms.std() / math.sqrt(runs)
    event = PoissonSampledDpEvent(p, SelfComposedDpEvent(step(q, noise), k))
    losses = loss_distributions.distribution(grouped({event: rounds}), relation_of(ZERO_OUT), GATE_INTERVAL)
    assert losses._pmf_remove.get_delta_for_epsilon(at) == pytest.approx(estimate, abs=4 * error)
    assert estimate > 20 * error


def test_rdp_of_the_sampled_pair_is_looser() -> None:
    """At integer orders the moments of p P/Q + (1 - p) are a binomial sum of the inner ones (Zhu and Wang 2019)."""
    from dp_accounting.rdp import RdpAccountant

    orders = list(range(2, 64))
    inner = RdpAccountant(orders, relation_of(ADD_REMOVE)).compose(STEPS).rdp
    found = []
    for order in orders:
        moments = np.array([0.0, 0.0, *((j - 1) * inner[j - 2] for j in range(2, order + 1))])
        j = np.arange(order + 1)
        logs = np.log(comb(order, j)) + j * math.log(0.1) + (order - j) * math.log(0.9) + moments
        rdp = 100 * logsumexp(logs) / (order - 1)
        found.append(rdp + math.log1p(-1 / order) - math.log(1e-5 * order) / (order - 1))
    tight = epsilon({SECRET: 100}, 1e-5)
    assert tight < min(found) < 1.6 * tight


# --- bounds and invariants


@settings(max_examples=5)
@given(
    p=st.floats(0.1, 0.8),
    q=st.floats(0.1, 0.9),
    noise=st.floats(1.0, 3.0),
    k=st.integers(2, 6),
    rounds=st.integers(1, 8),
)
def test_it_lies_between_the_product_and_always_taking_part(
    p: float, q: float, noise: float, k: int, rounds: int
) -> None:
    steps = SelfComposedDpEvent(step(q, noise), k)

    def cost(event: DpEvent, times: int = rounds) -> float:
        return epsilon({event: times}, 1e-5, interval=GATE_INTERVAL)

    ours = cost(PoissonSampledDpEvent(p, steps))
    assert cost(step(p * q, noise), rounds * k) * 0.99 - 5e-3 <= ours
    assert ours <= cost(OpenlySampledDpEvent(p, steps)) * 1.01 + 5e-3
    assert cost(OpenlySampledDpEvent(p, steps)) <= cost(steps) + 1e-6
    assert ours <= cost(PoissonSampledDpEvent(min(1.0, p * 1.2), steps)) + 1e-6
    assert ours <= cost(PoissonSampledDpEvent(p, SelfComposedDpEvent(step(q, noise), k + 1))) + 1e-6
    assert ours <= cost(PoissonSampledDpEvent(p, steps), rounds + 1) + 1e-6


def test_mixed_with_others_and_in_any_order() -> None:
    events = [
        *[SECRET] * 3,
        GaussianDpEvent(8.0),
        step(0.02, 1.2),
        PoissonSampledDpEvent(0.1, LaplaceDpEvent(3.0)),
    ]
    whole = epsilon(events, 1e-5, interval=GATE_INTERVAL)
    assert whole == epsilon(events[::-1], 1e-5, interval=GATE_INTERVAL)
    assert whole > epsilon(events[1:], 1e-5, interval=GATE_INTERVAL)
    both = PoissonSampledDpEvent(0.3, ComposedDpEvent([STEPS, GaussianDpEvent(3.0), GaussianDpEvent(4.0)]))
    assert epsilon([PoissonSampledDpEvent(0.3, STEPS)], 1e-5) < epsilon([both], 1e-5)


def test_types_of_numbers_do_not_matter() -> None:
    one = PoissonSampledDpEvent(
        np.float64(0.1),
        SelfComposedDpEvent(PoissonSampledDpEvent(0.064, GaussianDpEvent(np.int64(1))), np.int64(16)),
    )
    assert epsilon({one: 100}, 1e-5, interval=GATE_INTERVAL) == epsilon(
        {SECRET: 100}, 1e-5, interval=GATE_INTERVAL
    )


def test_vacuous_noise_takes_bounded_memory() -> None:
    event = PoissonSampledDpEvent(0.5, SelfComposedDpEvent(step(0.5, 0.05), 20))
    assert epsilon([event], 1e-5) > 1000


def test_below_pld_the_inner_steps_answer_unsampled() -> None:
    assert epsilon([SECRET], 1e-14) == epsilon([STEPS], 1e-14)


# --- what is refused, and what is kept


def test_question_beyond_a_dominating_pair_is_refused() -> None:
    with pytest.raises(Refusal, match="no accountant covers it"):
        epsilon([SECRET], 1e-5, Adjacency.REPLACE_ONE)
    responses = SelfComposedDpEvent(RandomizedResponseDpEvent(0.5, 2), 2)
    assert not loss_distributions.has_distribution(
        grouped([PoissonSampledDpEvent(0.1, responses)])[0][0], relation_of(ZERO_OUT)
    )


@pytest.mark.parametrize("event", [SECRET, OpenlySampledDpEvent(0.1, STEPS)], ids=["secret", "open"])
def test_nested_event_is_stored_verified_and_refused_on_a_ledger(tmp_path: Path, event: DpEvent) -> None:
    assert event_from_json(json.loads(json.dumps(event_to_json(event)))) == event
    budget, path = Budget(Unit.CLIENT, 3.0, 1e-5), tmp_path / "ledger"
    with Ledger.open(path, budget, owner="population", simulated=True, durable=False) as ledger:
        with pytest.raises(BudgetExhausted):
            for number in range(500):
                release = Release(Unit.CLIENT, "run", number, "steps", {Adversary.MODEL: event}, "system")
                ledger.reserve(release)
        assert ledger.epsilon() == epsilon({event: number}, 1e-5) <= 3.0
    found = verify(path)
    assert found.ok, found.problem
    assert found.epsilon == pytest.approx(epsilon({event: number}, 1e-5))


# --- a draw that shows


@pytest.mark.parametrize("adjacency", list(Adjacency))
def test_public_draw_costs_the_average_of_its_cases(adjacency: Adjacency) -> None:
    p, at, rounds = 0.3, 1.0, 4
    ours = loss_distributions.distribution(
        grouped({OpenlySampledDpEvent(p, STEPS): rounds}), relation_of(adjacency), 1e-3
    ).get_delta_for_epsilon(at)
    cases = [0.0] + [
        loss_distributions.distribution(
            grouped({STEPS: n}), relation_of(adjacency), 1e-3
        ).get_delta_for_epsilon(at)
        for n in range(1, rounds + 1)
    ]
    average = float(np.dot(stats.binom.pmf(range(rounds + 1), rounds, p), cases))
    assert ours == pytest.approx(average, rel=1e-3)


def test_a_record_is_not_hidden_by_a_draw_of_its_client() -> None:
    """One client, drawn or not: the model changes or does not, so whoever sees it may say which.

    The likelihood test between the two data sets is then that of the steps alone, in the rounds drawn; what it
    reaches lies above what a secret draw of the record itself would leave.
    """
    p, noise, at, runs = 0.1, 1.0, 1.0, 200_000
    draw = np.random.default_rng(5)
    drawn = draw.random(runs) < p
    with_it, without = draw.normal(drawn * 1.0, noise), draw.normal(0.0, noise, runs)
    threshold = at * noise**2 + 0.5
    told, mistaken = (drawn & (with_it > threshold)).mean(), (drawn & (without > threshold)).mean()
    reached = told - math.exp(at) * mistaken
    secret, shown = (
        kind(p, GaussianDpEvent(noise)) for kind in (PoissonSampledDpEvent, OpenlySampledDpEvent)
    )
    margin = 4 * math.sqrt(told / runs)
    assert delta_of(secret, at) < reached - margin
    assert reached <= delta_of(shown, at) + margin
