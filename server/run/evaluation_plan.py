"""Plan of a run's evaluations at its clients: after which rounds, at what noise, what they cost, how much they tell.

Every client is asked, whoever trains. What evaluations cost is part of what a run plans for, so that the budget holds with
them in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...configs.schema import ClientLevel, SimulationSettings
from ...privacy.accounting.epsilon import PUBLISH_INTERVAL
from ...privacy.accounting.renyi_filter import counted
from ...privacy.plan import Plan
from ...privacy.refusal import Refusal
from ...privacy.statistics.evaluation import Evaluation
from ...strategies.cohorts import All
from .federation import Federation

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

USUAL_NOISE = 5.0  # adds epsilon 0.10 to 3 at delta 1e-4, and tells the mean of 400 clients to 1.2 points


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
    word, last = settings.evaluate.clients, settings.num_rounds
    if word == "none":
        return ()
    every = int(word.partition(":")[2] or last)
    return tuple(sorted({*range(every, last + 1, every), last}))


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
    noise = federation.settings.evaluate.noise_multiplier or USUAL_NOISE * math.sqrt(len(rounds))
    norm = federation.unit_norm
    return Plan(summed.unit, summed.adjacency, All(), norm, 1, noise, federation.adversaries)


def evaluation_events(federation: Federation, num_rounds: int | None = None) -> list[DpEvent]:
    """Return what the evaluations of the rounds to come cost.

    Args:
      federation: its parts.
      num_rounds: still to come; None stands for all.
    """
    from dp_accounting.dp_event import SelfComposedDpEvent

    plan, settings = one_evaluation(federation), federation.settings
    done = 0 if num_rounds is None else settings.num_rounds - num_rounds
    many = sum(each > done for each in evaluated_rounds(settings))
    return [] if plan is None or not many else [SelfComposedDpEvent(plan.event(), many)]


def evaluation_plan(federation: Federation) -> EvaluationPlan | None:
    """Return the plan of the run's evaluations; None where there are none.

    Raises:
      Refusal: the interval of the mean is wider than the resolution that is asked for.
    """
    plan = one_evaluation(federation)
    if plan is None or plan.noise_multiplier is None or federation.summed is None:
        return None
    delta, clients = federation.summed.target_delta, federation.population
    half = evaluation_of(federation, "plan").half_width(plan.noise_over_clip, clients)
    _check_resolution(federation, plan, half)
    rounds = evaluated_rounds(federation.settings)
    return EvaluationPlan(rounds, plan.noise_multiplier, epsilon_of(plan, delta), clients, half)


def _check_resolution(federation: Federation, plan: Plan, half: float | None) -> None:
    wanted = federation.settings.evaluate.resolution
    if wanted is None:
        return
    if half is None:
        raise Refusal("evaluate.resolution", wanted, "is of the mean metric; add metric to evaluate.figures")
    if half > wanted:
        assert plan.noise_multiplier is not None and federation.summed is not None
        noise = plan.noise_multiplier * wanted / half
        enough = epsilon_of(replace(plan, noise_multiplier=noise), federation.summed.target_delta)
        clients = math.ceil(federation.population * half / wanted)
        remedy = (
            f"is planned to +-{half:.3g}; {clients} clients would do, or evaluate.noise_multiplier={noise:.3g}, with "
            f"which an evaluation costs epsilon {enough:.3g} by itself"
        )
        raise Refusal("evaluate.resolution", wanted, remedy)


def epsilon_of(plan: Plan, delta: float) -> float:
    """Return what one evaluation costs by itself.

    Args:
      plan: of one.
      delta: in (0, 1).
    """
    return counted([plan.event()], delta, plan.adjacency, None, PUBLISH_INTERVAL)


def evaluation_of(federation: Federation, name: str) -> Evaluation:
    """Return what clients are asked.

    Args:
      federation: its parts.
      name: of the release.
    """
    asked = federation.settings.evaluate
    why = federation.settings.purpose or ""
    return Evaluation(name, asked.share, asked.metric, asked.metric_bound, asked.figures, why)
