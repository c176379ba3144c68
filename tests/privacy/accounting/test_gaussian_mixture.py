"""Promises per person: what a person's records together do to a noised sum, and that they are no more than was planned."""

import math

import numpy as np
import pytest
from dp_accounting.dp_event import (
    GaussianDpEvent,
    MixtureOfGaussiansDpEvent,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
)
from dp_accounting.pld import PLDAccountant
from dp_accounting.privacy_accountant import NeighboringRelation
from scipy.integrate import quad
from scipy.stats import norm

from fedveil.base.refusal import Refusal
from fedveil.privacy.accounting import gaussian_mixture
from fedveil.privacy.accounting.curve import privacy_curve
from fedveil.privacy.accounting.epsilon import GATE_INTERVAL, epsilon, within
from fedveil.privacy.accounting.events import event_from_json, event_to_json
from fedveil.privacy.accounting.gate import Gate
from fedveil.privacy.accounting.gaussian_mixture import group_event
from fedveil.privacy.accounting.loss_distributions import ROUNDED
from fedveil.privacy.budget import Adjacency, Budget, Unit
from fedveil.strategies.record_plan import PoissonBatches

DELTA = 1e-5


@pytest.mark.parametrize("rate", [0.01, 0.3, 1.0])
def test_one_record_a_person_is_todays_event_to_the_bit(rate):
    noise = GaussianDpEvent(1.3)
    today = noise if rate == 1 else PoissonSampledDpEvent(rate, noise)
    assert PoissonBatches(rate, 7).event(noise) == SelfComposedDpEvent(today, 7)
    assert PoissonBatches(rate, 7, of_unit=1).event(noise) == SelfComposedDpEvent(today, 7)


def test_without_coins_the_records_move_the_sum_by_all_their_clips():
    assert PoissonBatches(1.0, 1, of_unit=5).event(GaussianDpEvent(3.0)) == GaussianDpEvent(3.0 / 5)


@pytest.mark.parametrize(
    ("records", "rate", "noise", "rounds"),
    [(2, 0.01, 1.0, 300), (2, 0.3, 3.0, 20), (5, 0.01, 2.0, 300), (5, 0.1, 4.0, 50), (5, 0.3, 10.0, 100)],
)
def test_epsilon_is_that_of_dp_accounting(records, rate, noise, rounds):
    event = group_event(noise, rate, records)
    accountant = PLDAccountant(NeighboringRelation.REPLACE_SPECIAL, GATE_INTERVAL)
    expected = accountant.compose(event, rounds).get_epsilon(DELTA)
    most = accountant.get_epsilon(DELTA - 2 * ROUNDED * rounds)
    found = epsilon({event: rounds}, DELTA, interval=GATE_INTERVAL)
    # Ours may take a finer grid, never a coarser one, and counts what rounding may take of delta.
    assert found == pytest.approx(expected, rel=3e-3) and found <= most * (1 + 1e-9)


def test_every_loss_is_that_of_dp_accounting():
    event = group_event(2.0, 0.2, 3)
    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, GATE_INTERVAL).compose(event)
    ours = gaussian_mixture.distribution(2.0, event.sensitivities, event.sampling_probs, GATE_INTERVAL)
    for size in np.linspace(0.0, 8.0, 33):
        assert ours.get_delta_for_epsilon(size) == pytest.approx(
            accountant.get_delta(size), rel=1e-4, abs=1e-12
        )


def test_rdp_is_the_integral_that_defines_it():
    event = group_event(1.5, 0.2, 3)

    def ratio(x):
        return sum(
            p * math.exp((c * x - c * c / 2) / 1.5**2)
            for c, p in zip(event.sensitivities, event.sampling_probs, strict=True)
        )

    orders = np.array([1.5, 4.0, 16.0])
    found = gaussian_mixture.renyi(1.5, event.sensitivities, event.sampling_probs, orders)
    for order, size in zip(orders, found, strict=True):

        def moment(x, order=order):
            return math.exp(norm.logpdf(x, scale=1.5) + order * math.log(ratio(x)))

        whole, _ = quad(moment, -20, 3 * order + 15, limit=500)
        assert size == pytest.approx(math.log(whole) / (order - 1), rel=1e-6)


def test_more_records_cost_more_and_less_than_group_privacy():
    costs = [epsilon({group_event(4.0, 0.1, records): 100}, DELTA) for records in (1, 2, 5)]
    assert costs[0] < costs[1] < costs[2]
    # By the general rule k records at delta (e^(k eps) - 1) / (e^eps - 1) delta' cost k times epsilon at delta'.
    for records, cost in ((2, costs[1]), (5, costs[2])):
        share = DELTA
        for _ in range(50):
            size = epsilon({group_event(4.0, 0.1, 1): 100}, share)
            share = DELTA * math.expm1(size) / math.expm1(records * size)
        assert cost < records * size


def test_event_survives_the_ledger():
    event = group_event(2.0, 0.2, 3)
    text = event_to_json(event)
    assert text["kind"] == "MixtureOfGaussians" and event_to_json(event_from_json(text)) == text
    for wrong in (
        {**text, "sampling_probs": [0.5, 0.5]},
        {**text, "sampling_probs": [0.5, 0.2, 0.1, 0.1]},
        {**text, "sensitivities": [0.0, -1.0, 2.0, 3.0]},
        {**text, "sensitivities": "0123"},
    ):
        with pytest.raises(Refusal):
            event_from_json(wrong)


def test_gate_admits_affordable_rounds_and_no_more():
    event, budget = group_event(6.0, 0.1, 4), Budget(Unit.RECORD, 2.0, DELTA)
    gate, spent = Gate(), 0
    while gate.fits({event: spent}, event, budget):
        spent += 1
    assert within({event: spent}, budget) and not within({event: spent + 1}, budget)
    assert spent > 5


def test_no_accountant_covers_drawn_records_that_are_replaced():
    with pytest.raises(Refusal, match="no accountant covers it under replace-one"):
        epsilon([group_event(2.0, 0.2, 3)], DELTA, Adjacency.REPLACE_ONE)


def test_immovable_sum_costs_nothing_and_a_noiseless_one_everything():
    assert epsilon([MixtureOfGaussiansDpEvent(1.0, [0.0, 1.0], [1.0, 0.0])], DELTA) == 0
    assert epsilon([MixtureOfGaussiansDpEvent(0.0, [0.0, 1.0], [0.5, 0.5])], DELTA) == math.inf


def test_the_curve_is_drawn_for_persons():
    curve = privacy_curve({group_event(4.0, 0.1, 3): 50}, Adjacency.ZERO_OUT, GATE_INTERVAL)
    sizes = [size for _, size in curve.epsilon]
    assert curve.mu is None and sizes == sorted(sizes)
