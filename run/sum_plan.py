"""Plan of the client level: its noise, its adaptation, and the metrics' share of the norm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dp_accounting.dp_event import DpEvent

from ..base.refusal import Refusal
from ..configs.schema import ClientCentral, RecordAndClient, SimulationSettings, sum_level
from ..messages.client_settings import TRAIN_LOSS
from ..modes.federation import Federation
from ..privacy.accounting.renyi_filter import admits
from ..privacy.adaptation import Adaptation, AdaptiveNoise
from ..privacy.budget import Budget
from ..privacy.mechanisms.adaptive_clipping import AdaptiveClipping
from ..privacy.mechanisms.correlated_noise import Correlation
from ..privacy.mechanisms.sum_spec import least_share
from ..privacy.plan import Plan, Unaffordable
from ..strategies.cohorts import CyclicPoisson
from ..strategies.record_plan import PoissonBatches
from .evaluation_plan import evaluation_events
from .scaling_plan import scaling_events

RAISED = (
    1.0,
    1.1,
    1.5,
    2.0,
)  # noise of a resumed run near its end over what it began with: with more, better end it


def sum_plan(
    federation: Federation,
    prior: tuple[DpEvent, ...] = (),
    num_rounds: int | None = None,
    filter_order: float | None = None,
) -> Plan | None:
    """Return the calibrated plan of the client level; None where clients are not protected.

    Args:
      federation: its parts.
      prior: events that the ledger already holds.
      num_rounds: remaining; None stands for all rounds of the settings.
      filter_order: of a ledger that already uses an RDP filter.

    Raises:
      Refusal: with no noise do these rounds fit the remaining budget.
    """
    if federation.summed is None:
        return None
    together = federation.together
    plan = Plan(
        unit=federation.summed.unit,
        adjacency=federation.summed.adjacency,
        sampling=federation.cohort
        if together is None
        else PoissonBatches(together.sample_rate, 1, of_unit=federation.records_of_unit),
        clipping_norm=federation.unit_norm,
        num_rounds=num_rounds or federation.settings.num_rounds,
        noise_multiplier=federation.summed.noise_multiplier,
        adversaries=federation.adversaries,
        filter_order=filter_order,
        mechanism=federation.mechanism,
    )
    if plan.noise_multiplier is not None:
        return plan
    budget = federation.sum_budget
    assert budget is not None
    adaptive = federation.summed.noise_schedule == "adaptive"
    if adaptive:
        return plan.calibrate_for_filter(budget, prior)
    asked = federation.settings
    beside = [*scaling_events(federation), *evaluation_events(federation, num_rounds)]
    return plan.calibrate_as_one_of(asked.budget.runs, budget, prior, asked.num_rounds, beside)


def best_groups(settings: SimulationSettings, rate: float) -> int:
    """Return the number of client groups, and so of rounds between a client's turns, with the least model error.

    With more groups later rounds subtract more of the noise, but each turn of a client is protected less.

    Args:
      settings: with client-level privacy planned from a budget.
      rate: expected share of all clients in a round, in (0, 1].

    Raises:
      Refusal: noise is given instead of a budget, or no number is possible.
    """
    client, num_rounds = sum_level(settings.privacy), settings.num_rounds
    if client is None or client.target_epsilon is None:
        remedy = "is planned from a target_epsilon; set it, or give a budget"
        raise Refusal("cohort.groups", None, remedy)
    budget = Budget(client.unit, client.target_epsilon, client.target_delta, client.adjacency)

    def error(groups: int) -> float:
        cohort = CyclicPoisson(rate, groups)
        law = Correlation(num_rounds, groups, 1, client.bands or 1, cycle=groups)
        law = law if client.bands else law.with_best_bands()
        plan = Plan(client.unit, client.adjacency, cohort, 1.0, num_rounds, mechanism=law).calibrate(budget)
        return plan.noise_over_clip * law.error

    most = min(num_rounds, int(1 / rate))
    choices = sorted(
        {most, *(1 << power for power in range(most.bit_length()))} - set(range(client.bands or 1))
    )
    if not choices:
        raise Refusal("privacy.bands", client.bands, f"a client's turns are at most {most} rounds apart")
    return min(choices, key=error)


def sum_plan_with(
    federation: Federation, noise_multiplier: float, filter_order: float | None = None
) -> Plan | None:
    """Return the client level's plan with the noise chosen by an earlier process of this run.

    Args:
      federation: its parts.
      noise_multiplier: noise standard deviation over the sensitivity.
      filter_order: of the run's RDP filter; None without one.
    """
    if federation.summed is None:
        return None
    client = federation.summed.model_copy(update={"noise_multiplier": noise_multiplier})
    privacy = federation.settings.privacy
    both = isinstance(privacy, RecordAndClient)
    changed = privacy.model_copy(update={"client": client}) if both else client
    noised = replace(federation, settings=federation.settings.model_copy(update={"privacy": changed}))
    return sum_plan(noised, filter_order=filter_order)


def plan_of_rest(federation: Federation, saved: Plan, prior: tuple[DpEvent, ...], left: int) -> Plan | None:
    """Return the plan of a resumed run's remaining rounds near the end of its budget; None where they do not fit.

    Args:
      federation: its parts.
      saved: the plan that the run began with.
      prior: events that the ledger already holds.
      left: rounds, at least 1.
    """
    budget, events = federation.sum_budget, [*prior, *evaluation_events(federation, left)]
    assert budget is not None and saved.noise_multiplier is not None
    for factor in RAISED:
        plan = replace(saved, num_rounds=left, noise_multiplier=factor * saved.noise_multiplier)
        if admits([*events, *[plan.event()] * left], budget, plan.filter_order):
            return plan
    return None


def adaptation_of(
    federation: Federation, plan: Plan, prior: tuple[DpEvent, ...] = (), begun: int = 0
) -> Adaptation:
    """Return the client level's adaptation during the run.

    Args:
      federation: with a client level.
      plan: of the remaining rounds.
      prior: events that the ledger already holds.
      begun: the round after which `plan` applies.
    """
    client, budget = federation.summed, federation.sum_budget
    assert client is not None and budget is not None
    clipping: AdaptiveClipping | None = None
    if isinstance(client, ClientCentral) and client.clipping == "adaptive":
        clipping = AdaptiveClipping(client.clipping_quantile, client.clipping_learning_rate)
    noise = AdaptiveNoise(plan, budget, TRAIN_LOSS, prior, begun)
    return Adaptation(clipping, noise if client.noise_schedule == "adaptive" else None)


def metrics_share_of(federation: Federation, plan: Plan) -> float:
    """Return the metrics' share of the client level's squared norm, in [0, 1)."""
    given = federation.summed.metrics_share if federation.summed else 0.0
    if given is not None:
        return given
    expected = federation.cohort.expected_size(federation.declared_clients)
    return least_share(plan.noise_std / plan.clipping_norm, expected, len(federation.metrics))


def require_one_round(plan: Plan, budget: Budget, prior: Sequence[DpEvent] = ()) -> None:
    """Refuse noise so small that the budget does not cover a single round.

    Args:
      plan: of one round at a time.
      budget: of the ledger.
      prior: events that the ledger already holds.

    Raises:
      Refusal: it does not; the sentence names the noise multiplier.
    """
    if not admits([*prior, plan.event()], budget, plan.filter_order):
        remedy = f"not even one round fits the rest of epsilon {budget.target_epsilon:g}; raise one of them"
        raise Unaffordable("noise_multiplier", plan.noise_multiplier, remedy)
