"""Plan of the question by which a run scales its inputs: what is asked, what it costs, and whether it can be answered.

Every client is asked, whoever trains. What the question costs is part of what the run plans for, so that the budget holds
with it in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ...configs.schema import CsvTask, SimulationSettings
from ...privacy.budget import Unit
from ...privacy.plan import Plan
from ...privacy.refusal import Refusal
from ...privacy.statistics.inquiry import MOST_NAME, Inquiry, read_inquiry
from ...strategies.cohorts import All
from ...tasks.scaling import ASKED, FIELD, moments_of, scaling_questions
from ..evaluations import USUAL_NOISE, epsilon_of
from .federation import Federation
from .question_plan import Spend, budget_of, least_epsilon, noise_of_sum, question_plan, sigma_of

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

PURPOSE = "scaling"  # which owners allow; behind the run's name it names the question on ledgers
WHY = "Mean and deviation by which the inputs of this run's model are scaled."
PART, MOST = 0.25, 1.0  # of the target epsilon, and of epsilon: what the question costs by itself
EVENLY = (
    1.0,
    0.0,
    1 / 3 - 0.5,
)  # what a row of a column that is spread evenly over its bounds adds on average


@dataclass(frozen=True)
class ScalingPlan:
    """Plan of a run's question about the scaling of its inputs.

    Attributes:
      columns: that are asked about.
      noise_multiplier: of the answer, over the sensitivity.
      epsilon: that it costs by itself.
    """

    columns: tuple[str, ...]
    noise_multiplier: float
    epsilon: float


def asks_scaling(settings: SimulationSettings) -> bool:
    """Return whether a run of these settings has yet to ask by what its inputs are scaled."""
    return isinstance(settings.task, CsvTask) and settings.task.scaling == ASKED


def everybody(federation: Federation) -> Federation:
    """Return the federation with all of its clients in every round."""
    return replace(federation, cohort=All())


def scaling_inquiry(federation: Federation, run: str) -> Inquiry:
    """Return what the clients are asked: mean and deviation of each number, in one answer.

    Where clients are hidden, one row of each counts in full, so that all weigh nearly the same, and the noise is least. Where
    each client adds the noise to its own answer, all of its rows do, however many are declared.

    Raises:
      Refusal: its name is too long, or the model sees no number, or too many.
    """
    from ...tasks.tables import tables_of  # torch, and plans know this question too

    name = f"{run} {PURPOSE}"
    if len(name) > MOST_NAME:
        remedy = (
            f"a run that asks has a name of at most {MOST_NAME - len(name) + len(run)} characters on ledgers"
        )
        raise Refusal("run", run, f"{remedy}; shorten it")
    of_records = federation.together is not None or federation.record is not None
    asked = {
        "name": name,
        "purpose": PURPOSE,
        "why": WHY,
        "unit": str(Unit.RECORD if of_records else Unit.CLIENT),
        "records": 1.0 if federation.together is None else float(federation.most_records),
        "ask": scaling_questions(tables_of(federation.task).schema),
    }
    return read_inquiry(asked)


def one_scaling(federation: Federation, run: str = "plan") -> tuple[Inquiry, Plan] | None:
    """Return the run's question and its plan; None where it asks none, or has been answered.

    Raises:
      Refusal: neither clients nor records are hidden, or both are, or the answer would say nothing.
    """
    settings, summed, record = federation.settings, federation.summed, federation.record
    if not asks_scaling(settings):
        return None
    level = summed or record
    if level is None or None not in (summed, record):
        remedy = (
            f"with privacy={settings.privacy.name} no sum answers for the clients or records that are hidden: use record, "
            "record_distributed, client_central or client_distributed, or ask first (fedveil ask) and give the JSON that it leaves"
        )
        raise Refusal(FIELD, ASKED, remedy)
    if summed is not None and summed.noise_schedule == "adaptive":
        raise Refusal(FIELD, ASKED, "does not go with noise_schedule=adaptive; leave one of them out")
    inquiry = scaling_inquiry(federation, run)
    plan = question_plan(everybody(federation), inquiry, _price(settings, level.target_epsilon))
    _require_answer(federation, inquiry, plan)
    return inquiry, plan


def _price(settings: SimulationSettings, target: float | None) -> Spend:
    assert isinstance(settings.task, CsvTask)
    if settings.task.scaling_epsilon is not None:
        return Spend(settings.task.scaling_epsilon)
    return Spend(noise_multiplier=USUAL_NOISE) if target is None else Spend(min(PART * target, MOST))


def _require_answer(federation: Federation, inquiry: Inquiry, plan: Plan) -> None:
    """Refuse noise under which not even a number that is spread evenly over its bounds could be scaled.

    Raises:
      Refusal: naming the epsilon that would do.
    """
    if (federation.deployed and federation.record) or _tells(federation, inquiry, plan):
        return  # nobody but its owner knows how many records a device has
    delta = budget_of(federation, inquiry).target_delta
    enough = least_epsilon(plan, delta, partial(_tells, federation, inquiry))
    would = "no epsilon would do" if enough is None else f"task.scaling_epsilon={enough:.3g} would do"
    whom = "records" if inquiry.unit is Unit.RECORD else "clients"
    remedy = f"too few {whom} to determine the scaling under this noise; {would}, or leave it out"
    raise Refusal(FIELD, ASKED, remedy)


def _tells(federation: Federation, inquiry: Inquiry, plan: Plan) -> bool:
    """Return whether the noise lets a number be scaled that is spread evenly over its bounds at every client."""
    rows = float(federation.records if inquiry.unit is Unit.RECORD else federation.population)
    first, noise = inquiry.questions[0], noise_of_sum(federation, plan)
    sigma = sigma_of(everybody(federation), inquiry, first, noise)
    figures = first.statistic.answer(np.array(EVENLY) * rows, sigma)
    return first.name in moments_of({first.name: figures})


def scaling_events(federation: Federation) -> list[DpEvent]:
    """Return what the run's question costs; nothing where it asks none, or it is on a ledger that plans go on from."""
    if federation.asked:
        return list(federation.asked)
    found = one_scaling(federation)
    return [] if found is None else [found[1].event()]


def scaling_plan(federation: Federation) -> ScalingPlan | None:
    """Return the plan of the run's question; None where it asks none.

    Raises:
      Refusal: as `one_scaling`.
    """
    found = one_scaling(federation)
    if found is None:
        return None
    inquiry, plan = found
    assert plan.noise_multiplier is not None
    columns = tuple(each.name for each in inquiry.questions)
    price = epsilon_of(plan, budget_of(federation, inquiry).target_delta)
    return ScalingPlan(columns, plan.noise_multiplier, price)
