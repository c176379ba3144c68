"""Plan of a run's evaluations at its clients: their rounds, noise, cost and precision.

All clients evaluate, not only the training cohort. A run's plan includes the cost of its evaluations, so the budget
covers both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..base.refusal import Refusal
from ..configs.schema import SimulationSettings
from ..modes.federation import Federation
from ..privacy.plan import Plan
from ..privacy.statistics.evaluation import HISTOGRAM, METRIC, MOST_NAME, Evaluation
from ..server.evaluations import epsilon_of, events_of, noise_of, planned_half_width, rounds_every

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

DIFFERENCE = math.sqrt(2)  # interval of the difference of two independent scores, over that of one


@dataclass(frozen=True)
class EvaluationPlan:
    """Plan of a run's evaluations at its clients.

    Attributes:
      rounds: after which the model is evaluated.
      noise_multiplier: of each evaluation, over the sensitivity.
      epsilon: of one evaluation alone.
      clients: number of clients asked.
      rows: denominator of the mean: the number of clients or, at the record level, about the number of held-out
        records.
      half_width: largest half-width of the mean metric's interval; None if the metric is not asked for.
    """

    rounds: tuple[int, ...]
    noise_multiplier: float
    epsilon: float
    clients: int
    rows: int
    half_width: float | None


def evaluated_rounds(settings: SimulationSettings) -> tuple[int, ...]:
    """Return the rounds after which clients evaluate the model, including the last one; empty without evaluations."""
    word, last = settings.evaluate.clients, settings.steps
    if word == "none":
        return ()
    return rounds_every(int(word.partition(":")[2] or last), last)


def one_evaluation(federation: Federation) -> Plan | None:
    """Return the plan of one evaluation; None without evaluations.

    Raises:
      Refusal: the privacy is neither at the client level alone, nor at the record level in joint steps of all clients.
    """
    settings = federation.settings
    many = len(evaluated_rounds(settings)) + settings.scored_at_clients
    if not many:
        return None
    return federation.mode.evaluation(noise_of(settings.evaluate.noise_multiplier, many))


def evaluation_events(federation: Federation, num_rounds: int | None = None) -> list[DpEvent]:
    """Return the events of the evaluations of the remaining rounds.

    Args:
      federation: its parts.
      num_rounds: remaining; None stands for all.
    """
    plan, settings = one_evaluation(federation), federation.settings
    done = 0 if num_rounds is None else settings.steps - num_rounds
    many = sum(each > done for each in evaluated_rounds(settings))
    # Arms are compared in their last round, each by its own clients: one evaluation of each client.
    behind = settings.num_rounds - settings.tuning_rounds
    many += settings.scored_at_clients and (num_rounds is None or num_rounds > behind)
    return [] if plan is None else events_of(plan, many)


def evaluation_plan(federation: Federation) -> EvaluationPlan | None:
    """Return the plan of the run's evaluations; None without evaluations.

    Raises:
      Refusal: the interval of the mean is wider than the requested resolution.
    """
    plan, rounds = one_evaluation(federation), evaluated_rounds(federation.settings)
    if not rounds or plan is None or plan.noise_multiplier is None:
        return None
    delta, clients = federation.mode.promises[0].target_delta, federation.declared_clients
    asked, wanted = evaluation_of(federation, "plan"), federation.settings.evaluate.resolution
    rows = (
        clients
        if asked.records is None
        else max(1, round(federation.settings.evaluate.share * federation.mode.records))
    )
    half = planned_half_width(asked, plan, rows, wanted, delta)
    return EvaluationPlan(rounds, plan.noise_multiplier, epsilon_of(plan, delta), clients, rows, half)


def scoring_plan(federation: Federation) -> EvaluationPlan | None:
    """Return the plan of one arm's evaluation for the comparison of arms; None if clients do not compare them.

    Raises:
      Refusal: the noise cannot separate scores that differ by `tune.resolution`.
    """
    settings = federation.settings
    plan, tuned = one_evaluation(federation), settings.tuned
    if tuned is None or not settings.scored_at_clients or plan is None:
        return None
    assert plan.noise_multiplier is not None
    delta, clients = (
        federation.mode.promises[0].target_delta,
        round(federation.declared_clients / len(settings.tried)),
    )
    half = scoring_of(federation, "plan").half_width(plan.noise_over_clip, max(clients, 1))
    assert half is not None
    if half * DIFFERENCE > tuned.resolution:
        enough = plan.noise_multiplier * tuned.resolution / (half * DIFFERENCE)
        epsilon = epsilon_of(replace(plan, noise_multiplier=enough), delta)
        remedy = (
            f"is below the difference that arms of {clients} clients can resolve, {half * DIFFERENCE:.3g}; "
            f"{math.ceil(clients * half * DIFFERENCE / tuned.resolution)} clients in each would suffice, or "
            f"evaluate.noise_multiplier={enough:.3g}, with which an evaluation costs epsilon {epsilon:.3g} by itself"
        )
        raise Refusal("tune.resolution", tuned.resolution, remedy)
    rounds = (len(settings.tried) * settings.tuning_rounds,)
    return EvaluationPlan(rounds, plan.noise_multiplier, epsilon_of(plan, delta), clients, clients, half)


def scoring_of(federation: Federation, name: str) -> Evaluation:
    """Return the inquiry to the clients of an arm about its model: only the metric that compares arms.

    Args:
      federation: its parts.
      name: of the release.
    """
    return replace(
        evaluation_of(federation, name), metric=scored_metric(federation.settings), figures=(METRIC,)
    )


def scored_metric(settings: SimulationSettings) -> str:
    """Return the metric by which clients compare arms."""
    return (settings.tuned and settings.tuned.metric) or settings.evaluate.metric


def evaluation_of(federation: Federation, name: str) -> Evaluation:
    """Return the inquiry to the clients."""
    asked = federation.settings.evaluate
    why = (federation.settings.purpose or "")[:MOST_NAME]
    inquiry = Evaluation(name, asked.share, asked.metric, asked.metric_bound, asked.figures, why)
    rows = federation.mode.rows_of_client
    if rows is None:
        return inquiry
    figures = tuple(each for each in asked.figures if each != HISTOGRAM)
    return replace(inquiry, figures=figures, records=rows)
