"""Plan of the question that gives the scaling of a run's inputs: its inquiry, its cost, and its precision.

All clients are asked, not only the training cohort. The run's plan includes the question's cost, so the budget covers
both.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from ..base.refusal import Refusal
from ..configs.schema import SimulationSettings
from ..configs.task_settings import CsvTask
from ..modes.federation import Federation
from ..privacy.budget import Budget, Unit
from ..privacy.ledger.question_caps import require_purposes
from ..privacy.plan import Plan
from ..privacy.statistics.inquiry import MAX_NAME, Inquiry, read_inquiry
from ..run.queries import ScalingPlan, query_events, with_everybody
from ..tasks.scaling import ASKED, FIELD, moments_of, scaling_questions
from .evaluations import USUAL_NOISE, epsilon_of
from .question_plan import Spend, budget_of, noise_of_sum, question_plan, sigma_of, smallest_epsilon

PURPOSE = "scaling"  # which owners allow; suffix of the run's name for the question on ledgers
DESCRIPTION = "Mean and deviation by which the inputs of this run's model are scaled."
MAX_SHARE, MAX_EPSILON = 0.25, 1.0  # largest cost of the question: share of the target epsilon, and epsilon
# What a row of a column that is uniform over [-1, 1] adds to the cells of `Variance` on average: one row, its value, and
# the square of that less a half.
UNIFORM_CELLS = (1.0, 0.0, 1 / 3 - 0.5)


def scaling_inquiry(federation: Federation, run: str) -> Inquiry:
    """Return the inquiry to the clients: mean and deviation of each numeric column, in one answer.

    At the client level one row of each client counts in full, so that all weigh nearly the same and the noise is least.
    If each client adds noise to its own answer, all of its rows count, whatever number is declared.

    Raises:
      Refusal: its name is too long, or the model has no numeric column, or too many.
    """
    from ..tasks.tables import tables_of  # torch, and plans know this question too

    name = f"{run} {PURPOSE}"
    if len(name) > MAX_NAME:
        longest = MAX_NAME - len(PURPOSE) - 1
        remedy = (
            f"the run's name on ledgers may have at most {longest} characters with this question; shorten it"
        )
        raise Refusal("run", run, remedy)
    fields = {
        "name": name,
        "purpose": PURPOSE,
        "why": DESCRIPTION,
        "unit": str(Unit.RECORD if federation.mode.hides_records else Unit.CLIENT),
        "records": federation.mode.max_rows or 1.0,
        "ask": scaling_questions(tables_of(federation.task).schema),
    }
    return read_inquiry(fields)


def one_scaling(federation: Federation, run: str = "plan") -> tuple[Inquiry, Plan]:
    """Return the question of a run that asks for its scaling, and its plan; `run` names it on ledgers.

    Raises:
      Refusal: the privacy is at neither level or at both, or the answer would be too noisy.
    """
    settings, promises = federation.settings, federation.mode.promises
    if len(promises) != 1:
        remedy = (
            f"with privacy={settings.privacy.name} no single private sum can answer: use record, record_distributed, "
            "client_central or client_distributed, or ask first (fedveil ask) and give the JSON of its answer"
        )
        raise Refusal(FIELD, ASKED, remedy)
    if federation.mode.adapts_noise:
        raise Refusal(FIELD, ASKED, "does not go with noise_schedule=adaptive; leave one of them out")
    inquiry = scaling_inquiry(federation, run)
    spend = _spend(settings, promises[0].target_epsilon)
    plan = question_plan(with_everybody(federation), inquiry, spend)
    _require_scalable(federation, inquiry, plan)
    return inquiry, plan


def _spend(settings: SimulationSettings, target_epsilon: float | None) -> Spend:
    """Return the cost of the question: as configured, else a share of the run's target, if it has one."""
    assert isinstance(settings.task, CsvTask)
    if settings.task.scaling_epsilon is not None:
        return Spend(settings.task.scaling_epsilon)
    if target_epsilon is None:
        return Spend(noise_multiplier=USUAL_NOISE)
    return Spend(min(MAX_SHARE * target_epsilon, MAX_EPSILON))


def _require_scalable(federation: Federation, inquiry: Inquiry, plan: Plan) -> None:
    """Refuse noise with which not even a column that is uniform over its bounds could be scaled."""
    # Where each device answers for itself, only its owner knows the number of its records.
    unknown_records = federation.mode.promises[0].per_client and not federation.population.reads_data
    if unknown_records or _can_scale(federation, inquiry, plan):
        return
    delta = budget_of(federation, inquiry).target_delta
    epsilon = smallest_epsilon(plan, delta, partial(_can_scale, federation, inquiry))
    cost = "no epsilon suffices" if epsilon is None else f"task.scaling_epsilon={epsilon:.3g} suffices"
    units = "records" if inquiry.unit is Unit.RECORD else "clients"
    remedy = f"too few {units} to determine the scaling under this noise; {cost}, or leave it out"
    raise Refusal(FIELD, ASKED, remedy)


def _can_scale(federation: Federation, inquiry: Inquiry, plan: Plan) -> bool:
    """Return whether a column that is uniform over its bounds at every client can be scaled under this noise."""
    rows = float(federation.mode.records if inquiry.unit is Unit.RECORD else federation.declared_clients)
    first, noise = inquiry.questions[0], noise_of_sum(federation, plan)
    sigma = sigma_of(with_everybody(federation), inquiry, first, noise)
    figures = first.statistic.answer(np.array(UNIFORM_CELLS) * rows, sigma)
    return first.name in moments_of({first.name: figures})


def scaling_plan(federation: Federation) -> ScalingPlan:
    """Return the plan of the run's question, or refuse as `one_scaling` does."""
    inquiry, plan = one_scaling(federation)
    columns = tuple(each.name for each in inquiry.questions)
    epsilon = epsilon_of(plan, budget_of(federation, inquiry).target_delta)
    return ScalingPlan(columns, plan.noise, epsilon)


def check_scaling(federation: Federation) -> None:
    """Refuse a run's scaling question that is not allowed, or whose columns no client has."""
    one_scaling(federation)  # refuses a question that this run cannot ask
    for path in federation.mode.question_ledgers():
        for cap in federation.population.caps(path):
            require_purposes([PURPOSE], cap)
    federation.check_sum(federation.num_clients)
    from ..tasks.tables import tables_of

    if federation.population.reads_data and not tables_of(federation.task).sources:
        remedy = "deals rows anew, of which numbers are columns no more: use partition=natural"
        raise Refusal("partition", federation.settings.partition.name, f"with {FIELD}={ASKED} it {remedy}")


def scaling_lines(federation: Federation, plan: Plan, budget: Budget) -> Iterator[str]:
    """Yield the line about the question for a person, for the promise with this plan and budget."""
    scaling = scaling_plan(federation)
    columns = scaling.columns[0] if len(scaling.columns) == 1 else f"{len(scaling.columns)} columns"
    of_rounds = plan.epsilon(budget.target_delta)
    together = plan.epsilon(budget.target_delta, prior=query_events(federation))
    yield (
        f"Before round 1 the clients are asked mean and deviation of {columns}, at noise multiplier {scaling.noise_multiplier:.4g}: "
        f"epsilon {scaling.epsilon:.3f} by itself, which adds {together - of_rounds:.3f} to the rounds' {of_rounds:.3f}."
    )
