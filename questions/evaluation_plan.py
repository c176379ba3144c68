"""Plan of a run's evaluations at its clients: their rounds, noise, cost and precision.

All clients evaluate, not only the training cohort. A run's plan includes the cost of its evaluations, so the budget
covers both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from dp_accounting.dp_event import DpEvent

from ..base.refusal import Refusal
from ..configs.schema import SimulationSettings
from ..modes.federation import Federation
from ..privacy.budget import Budget, Unit
from ..privacy.ledger.question_caps import require_purposes
from ..privacy.plan import Plan
from ..privacy.statistics.evaluation import EVALUATION, GAINS, HISTOGRAM, MAX_NAME, METRIC, Evaluation
from ..privacy.statistics.gains import gain_half_width
from ..run.queries import EvaluationPlan, charges_queries, query_events_of_unit
from ..tasks.data import held_out_of, run_on
from ..tasks.independence import check_measured_apart
from .evaluations import epsilon_of, events_of, multiples_and_last, noise_of, planned_half_width
from .settings import evaluate_of, measures_own_models, scored_metric

SAMPLE_SIZE = 256  # held-out examples on which the metrics are tried before the run
DIFFERENCE = math.sqrt(2)  # interval of the difference of two independent scores, over that of one


def evaluated_rounds(settings: SimulationSettings) -> tuple[int, ...]:
    """Return the rounds after which clients evaluate the model, including the last one; empty without evaluations."""
    word, last = evaluate_of(settings).clients, settings.steps
    if word == "none":
        return ()
    interval = word.partition(":")[2]  # of every:N; empty for final
    return multiples_and_last(int(interval or last), last)


def one_evaluation(federation: Federation) -> Plan:
    """Return the plan of one evaluation of a run that has some; refuse a mode whose sums hide no single unit."""
    settings = federation.settings
    num_evaluations = len(evaluated_rounds(settings)) + settings.scored_at_clients
    return federation.mode.evaluation(noise_of(evaluate_of(settings).noise_multiplier, num_evaluations))


def evaluation_events(federation: Federation, num_rounds: int | None = None) -> list[DpEvent]:
    """Return the events of the evaluations in the last `num_rounds` rounds, None for all, for `Query.events`."""
    plan, settings = one_evaluation(federation), federation.settings
    finished_rounds = 0 if num_rounds is None else settings.steps - num_rounds
    num_evaluations = sum(each > finished_rounds for each in evaluated_rounds(settings))
    # Arms are compared in their last round, each by its own clients: one evaluation of each client.
    rounds_after_tuning = settings.num_rounds - settings.tuning_rounds
    num_evaluations += settings.scored_at_clients and (num_rounds is None or num_rounds > rounds_after_tuning)
    return events_of(plan, num_evaluations)


def evaluation_plan(federation: Federation) -> EvaluationPlan | None:
    """Return the plan of the run's evaluations; None if only arms are compared. Refuse one that misses its resolution."""
    plan, rounds = one_evaluation(federation), evaluated_rounds(federation.settings)
    if not rounds:
        return None
    delta, evaluate = federation.mode.promises[0].target_delta, evaluate_of(federation.settings)
    evaluation = evaluation_of(federation, "plan")
    clients = rows = federation.declared_clients
    if evaluation.unit is Unit.RECORD:
        rows = max(1, round(evaluate.share * federation.mode.records))
    half_width = planned_half_width(evaluation, plan, rows, evaluate.resolution, delta)
    return EvaluationPlan(rounds, plan.noise, epsilon_of(plan, delta), clients, rows, half_width)


def scoring_plan(federation: Federation) -> EvaluationPlan | None:
    """Return the plan of one arm's evaluation; None if clients compare no arms. Refuse scores too noisy for `tune.resolution`."""
    settings, plan = federation.settings, one_evaluation(federation)
    if not settings.scored_at_clients:
        return None
    delta = federation.mode.promises[0].target_delta
    clients = round(federation.declared_clients / len(settings.tried))
    half_width = scoring_of(federation, "plan").half_width(plan.noise_over_clip, max(clients, 1))
    assert half_width is not None  # a score is a mean
    resolution, resolvable = settings.tune.resolution, half_width * DIFFERENCE
    if resolvable > resolution:
        enough = plan.noise * resolution / resolvable
        epsilon = epsilon_of(replace(plan, noise_multiplier=enough), delta)
        remedy = (
            f"is below the difference that arms of {clients} clients can resolve, {resolvable:.3g}; "
            f"{math.ceil(clients * resolvable / resolution)} clients in each would suffice, or "
            f"evaluate.noise_multiplier={enough:.3g}, with which an evaluation costs epsilon {epsilon:.3g} by itself"
        )
        raise Refusal("tune.resolution", resolution, remedy)
    rounds = (len(settings.tried) * settings.tuning_rounds,)
    return EvaluationPlan(rounds, plan.noise, epsilon_of(plan, delta), clients, clients, half_width)


def scoring_of(federation: Federation, name: str) -> Evaluation:
    """Return the evaluation of an arm's model by its clients: only the metric that compares arms."""
    metric = scored_metric(federation.settings)
    return replace(evaluation_of(federation, name), metric=metric, figures=(METRIC,))


def evaluation_of(federation: Federation, name: str) -> Evaluation:
    """Return the evaluation of the run's model by its clients; its release has this name."""
    group = evaluate_of(federation.settings)
    purpose = (federation.settings.purpose or "")[:MAX_NAME]
    evaluation = Evaluation(name, group.share, group.metric, group.metric_bound, group.figures, purpose)
    if max_rows := federation.mode.max_rows:  # records are hidden
        figures = tuple(each for each in group.figures if each != HISTOGRAM)
        return replace(evaluation, figures=figures, records=max_rows)
    if measures_own_models(federation.settings):
        return replace(evaluation, figures=(*group.figures, *GAINS))
    return evaluation


def check_evaluation(federation: Federation) -> None:
    """Refuse an evaluation that owners forbid, is too coarse, of an unknown metric, or too long for an encrypted sum."""
    run_plan, arm_plan = evaluation_plan(federation), scoring_plan(federation)
    import torch  # takes a second, and a plan does not need it

    for cap in federation.population.caps(federation.mode.ledger_path(Path())):
        require_purposes([EVALUATION], cap)
    if run_plan:
        federation.check_sum(federation.num_clients)
    task, held_out, settings = federation.task, held_out_of(federation.task), federation.settings
    # At the record level each record is measured separately; a joint metric, such as an area, needs more than two.
    per_record = federation.mode.max_rows is not None
    num_examples = 1 if per_record else SAMPLE_SIZE
    examples = held_out if len(held_out) else federation.population.sample_examples(federation.task)
    inputs, targets = examples.batch(torch.arange(min(len(examples), num_examples)))
    model = task.model().eval()
    with torch.no_grad():
        outputs = run_on(model, inputs)
        metrics = task.metrics(outputs, targets)
    check_measured_apart(task, outputs, targets, size=max(1, len(targets) // 4))
    for field, metric, is_requested in (
        ("evaluate.metric", evaluate_of(settings).metric, run_plan),
        ("tune.metric", scored_metric(settings), arm_plan),
    ):
        if is_requested and metric not in metrics:
            scope = " of one record" if per_record else ""
            raise Refusal(field, metric, f"the task has {', '.join(sorted(metrics)) or 'none'}{scope}")


def evaluation_lines(federation: Federation, plan: Plan, budget: Budget) -> Iterator[str]:
    """Yield lines about the evaluations of arms and of the run's model, for the promise with this plan and budget."""
    if plan.unit is Unit.CLIENT and (scores := scoring_plan(federation)):
        yield _scoring_line(federation, plan, budget, scores)
    if charges_queries(federation, plan) and (evaluations := evaluation_plan(federation)):
        yield _evaluation_line(federation, plan, budget, evaluations)


def _scoring_line(federation: Federation, plan: Plan, budget: Budget, scores: EvaluationPlan) -> str:
    together = plan.epsilon(budget.target_delta, prior=query_events_of_unit(federation, plan))
    metric, half_width = scored_metric(federation.settings), scores.half_width or 0.0
    return (
        f"The clients of each arm, about {scores.clients}, evaluate its model at noise multiplier {scores.noise_multiplier:.4g}, for "
        f"epsilon {scores.epsilon:.3f} by itself; rounds and evaluations cost {together:.3f} together. A score in {metric} will be known to "
        f"+-{half_width:.4f} (95 %), and two are told apart where they differ by {half_width * DIFFERENCE:.4f}."
    )


def _evaluation_line(federation: Federation, plan: Plan, budget: Budget, evaluations: EvaluationPlan) -> str:
    of_rounds = plan.epsilon(budget.target_delta)
    together = plan.epsilon(budget.target_delta, prior=query_events_of_unit(federation, plan))
    num_evaluations = len(evaluations.rounds)
    schedule = f"after {num_evaluations} of the rounds" if num_evaluations > 1 else "in the end"
    cost = (
        f"{evaluations.clients} clients evaluate the model {schedule}, at noise multiplier {evaluations.noise_multiplier:.4g}: this adds epsilon "
        f"{together - of_rounds:.3f} to the rounds' {of_rounds:.3f}, and makes {together:.3f}."
    )
    if measures_own_models(federation.settings):
        sigma = evaluation_of(federation, "plan").sigma(evaluations.noise_multiplier)
        half_width = gain_half_width(
            sigma, evaluate_of(federation.settings).metric_bound, evaluations.clients
        )
        cost += f" The mean gain of their own models will be known to +-{half_width:.4f} (95 %)."
    if evaluations.half_width is None:
        return cost
    metric = evaluate_of(federation.settings).metric
    if plan.unit != Unit.CLIENT:
        metric = f"{metric} over about {evaluations.rows} held-out records"
    return f"{cost} Their mean {metric} will be known to +-{evaluations.half_width:.4f} (95 %)."
