"""Plan of a run's evaluations at its clients: after which rounds, at what noise, what they cost, how much they tell.

Every client is asked, whoever trains. What evaluations cost is part of what a run plans for, so that the budget holds with
them in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...configs.schema import ClientLevel, SimulationSettings
from ...privacy.plan import Plan
from ...privacy.refusal import Refusal
from ...privacy.statistics.evaluation import MOST_NAME, Evaluation
from ...strategies.cohorts import All
from ..evaluations import epsilon_of, events_of, noise_of, planned_half_width, rounds_every
from .federation import Federation

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent


@dataclass(frozen=True)
class EvaluationPlan:
    """Plan of a run's evaluations at its clients.

    Attributes:
      rounds: after which the model is evaluated.
      noise_multiplier: of each evaluation, over the sensitivity.
      epsilon: that one costs by itself.
      clients: that are asked.
      half_width: half the width of the interval of the mean metric, at the widest; None where it is not asked for.
    """

    rounds: tuple[int, ...]
    noise_multiplier: float
    epsilon: float
    clients: int
    half_width: float | None


def evaluated_rounds(settings: SimulationSettings) -> tuple[int, ...]:
    """Return the rounds after which clients evaluate the model, the last one among them; none where they never do."""
    word, last = settings.evaluate.clients, settings.steps
    if word == "none":
        return ()
    return rounds_every(int(word.partition(":")[2] or last), last)


def one_evaluation(federation: Federation) -> Plan | None:
    """Return the plan of one evaluation; None where there is none.

    Raises:
      Refusal: the federation does not hide whole clients.
    """
    rounds, summed = evaluated_rounds(federation.settings), federation.summed
    if not rounds:
        return None
    if not isinstance(summed, ClientLevel) or federation.record is not None:
        remedy = "clients are hidden as a whole when they evaluate: use client_central or client_distributed"
        raise Refusal("evaluate.clients", federation.settings.evaluate.clients, remedy)
    noise = noise_of(federation.settings.evaluate.noise_multiplier, len(rounds))
    norm = federation.unit_norm
    return Plan(summed.unit, summed.adjacency, All(), norm, 1, noise, federation.adversaries)


def evaluation_events(federation: Federation, num_rounds: int | None = None) -> list[DpEvent]:
    """Return what the evaluations of the rounds to come cost.

    Args:
      federation: its parts.
      num_rounds: still to come; None stands for all.
    """
    plan, settings = one_evaluation(federation), federation.settings
    done = 0 if num_rounds is None else settings.steps - num_rounds
    many = sum(each > done for each in evaluated_rounds(settings))
    return [] if plan is None else events_of(plan, many)


def evaluation_plan(federation: Federation) -> EvaluationPlan | None:
    """Return the plan of the run's evaluations; None where there are none.

    Raises:
      Refusal: the interval of the mean is wider than the resolution that is asked for.
    """
    plan = one_evaluation(federation)
    if plan is None or plan.noise_multiplier is None or federation.summed is None:
        return None
    delta, clients = federation.summed.target_delta, federation.population
    asked, wanted = evaluation_of(federation, "plan"), federation.settings.evaluate.resolution
    half = planned_half_width(asked, plan, clients, wanted, delta)
    rounds = evaluated_rounds(federation.settings)
    return EvaluationPlan(rounds, plan.noise_multiplier, epsilon_of(plan, delta), clients, half)


def evaluation_of(federation: Federation, name: str) -> Evaluation:
    """Return what clients are asked.

    Args:
      federation: its parts.
      name: of the release.
    """
    asked = federation.settings.evaluate
    why = (federation.settings.purpose or "")[:MOST_NAME]
    return Evaluation(name, asked.share, asked.metric, asked.metric_bound, asked.figures, why)
