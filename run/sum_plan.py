"""Plan of a run's sums: the noise for a budget, or for the rest of one, and the number of groups of a cyclic cohort."""

from __future__ import annotations

from dataclasses import replace

from dp_accounting.dp_event import DpEvent

from ..base.refusal import Refusal
from ..configs.privacy_settings import sum_level
from ..configs.schema import SimulationSettings
from ..modes.federation import Federation
from ..privacy.accounting.renyi_filter import admits
from ..privacy.budget import Budget
from ..privacy.plan import Plan
from ..strategies.cohorts import CyclicPoisson
from .queries import later_events, query_events

# Noise of a resumed run near the end of its budget, over the noise that it began with; with more, it had better end.
RAISED = (1.0, 1.1, 1.5, 2.0)


def sum_plan(
    federation: Federation,
    prior: tuple[DpEvent, ...] = (),
    num_rounds: int | None = None,
    filter_order: float | None = None,
) -> Plan | None:
    """Return the calibrated plan of the sums; None where they have no noise.

    Args:
      federation: the federation that runs.
      prior: events that the ledger already holds.
      num_rounds: remaining; None stands for all rounds of the settings.
      filter_order: order of the RDP filter that the ledger already uses; None without one.

    Raises:
      Refusal: the remaining budget does not pay for these rounds with any noise.
    """
    mode, settings = federation.mode, federation.settings
    plan, budget = mode.round_plan(num_rounds or settings.num_rounds, filter_order), mode.budget
    if plan is None or budget is None or plan.noise_multiplier is not None:
        return plan
    if mode.adapts_noise:
        return plan.calibrate_for_filter(budget, prior)
    other_events = query_events(federation, num_rounds)
    return plan.calibrate_as_one_of(settings.budget.runs, budget, prior, settings.num_rounds, other_events)


def best_groups(settings: SimulationSettings, rate: float) -> int:
    """Return the number of client groups, and so of rounds between a client's turns, with the least model error.

    With more groups later rounds subtract more of the noise, but each turn of a client is protected less.

    Args:
      settings: settings whose sums have noise that is planned from a budget.
      rate: expected share of all clients in a round, in (0, 1].

    Raises:
      Refusal: noise is given instead of a budget, or no number is possible.
    """
    from ..privacy.mechanisms.correlated_noise import Correlation  # of cyclic cohorts alone

    level, num_rounds = sum_level(settings.privacy), settings.num_rounds
    if level is None or level.target_epsilon is None:
        remedy = "is planned from a target_epsilon; set it, or give a budget"
        raise Refusal("cohort.groups", None, remedy)
    budget = Budget(level.unit, level.target_epsilon, level.target_delta, level.adjacency)

    def model_error(groups: int) -> float:
        """Return the error of the model by the noise of all rounds, over the clipping norm."""
        cohort = CyclicPoisson(rate, groups)
        law = Correlation(num_rounds, groups, 1, level.bands or 1, cycle=groups)
        law = law if level.bands else law.with_best_bands()
        plan = Plan(level.unit, level.adjacency, cohort, 1.0, num_rounds, mechanism=law).calibrate(budget)
        return plan.noise_over_clip * law.error

    limit = min(num_rounds, int(1 / rate))
    powers_of_two = {1 << k for k in range(limit.bit_length())}
    # The accounting needs turns at least as many rounds apart as the noise has bands.
    choices = sorted({limit, *powers_of_two} - set(range(level.bands or 1)))
    if not choices:
        raise Refusal("privacy.bands", level.bands, f"a client's turns are at most {limit} rounds apart")
    return min(choices, key=model_error)


def sum_plan_with(federation: Federation, noise_multiplier: float, filter_order: float | None) -> Plan:
    """Return the plan of all rounds' sums with the noise, and the filter's order, of an earlier process of this run."""
    privacy = federation.mode.with_noise(noise_multiplier)
    noised = replace(federation, settings=federation.settings.model_copy(update={"privacy": privacy}))
    plan = sum_plan(noised, filter_order=filter_order)
    assert plan is not None  # the earlier process had one
    return plan


def plan_of_rest(federation: Federation, saved: Plan, prior: tuple[DpEvent, ...], rounds: int) -> Plan | None:
    """Return the plan of a resumed run's remaining rounds near the end of its budget; None where they do not fit.

    Args:
      federation: the federation that runs.
      saved: the plan that the run began with.
      prior: events that the ledger already holds.
      rounds: number of rounds that remain, at least 1.
    """
    budget, events = federation.mode.budget, [*prior, *later_events(federation, rounds)]
    assert budget is not None and saved.noise_multiplier is not None
    for factor in RAISED:
        plan = replace(saved, num_rounds=rounds, noise_multiplier=factor * saved.noise_multiplier)
        if admits([*events, *[plan.event()] * rounds], budget, plan.filter_order):
            return plan
    return None
