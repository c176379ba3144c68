"""Plan of a run's evaluations at its clients: their rounds, noise, cost and precision.

All clients evaluate, not only the training cohort. A run's plan includes the cost of its evaluations, so the budget
covers both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.refusal import Refusal
from ..configs.schema import SimulationSettings
from ..modes.federation import Federation
from ..privacy.budget import Budget, Unit
from ..privacy.ledger.question_caps import require_purposes
from ..privacy.plan import Plan
from ..privacy.statistics.evaluation import EVALUATION, HISTOGRAM, METRIC, MOST_NAME, Evaluation
from ..run.prepare import some_examples
from ..run.queries import EvaluationPlan
from ..run.unit_plan import is_asked, questions_of
from ..tasks.data import held_out_of, run_on
from ..tasks.independence import check_measured_apart
from .evaluations import epsilon_of, events_of, noise_of, planned_half_width, rounds_every
from .settings import evaluate_of, scored_metric

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

SEVERAL = 256  # held-out examples
DIFFERENCE = math.sqrt(2)  # interval of the difference of two independent scores, over that of one


def evaluated_rounds(settings: SimulationSettings) -> tuple[int, ...]:
    """Return the rounds after which clients evaluate the model, including the last one; empty without evaluations."""
    word, last = evaluate_of(settings).clients, settings.steps
    if word == "none":
        return ()
    return rounds_every(int(word.partition(":")[2] or last), last)


def one_evaluation(federation: Federation) -> Plan:
    """Return the plan of one evaluation of a run that has some.

    Raises:
      Refusal: the privacy is neither at the client level alone, nor at the record level in joint steps of all clients.
    """
    settings = federation.settings
    many = len(evaluated_rounds(settings)) + settings.scored_at_clients
    return federation.mode.evaluation(noise_of(evaluate_of(settings).noise_multiplier, many))


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
    return events_of(plan, many)


def evaluation_plan(federation: Federation) -> EvaluationPlan | None:
    """Return the plan of the run's evaluations; None where only arms are compared.

    Raises:
      Refusal: the interval of the mean is wider than the requested resolution.
    """
    plan, rounds = one_evaluation(federation), evaluated_rounds(federation.settings)
    if not rounds:
        return None
    delta, clients = federation.mode.promises[0].target_delta, federation.declared_clients
    evaluate = evaluate_of(federation.settings)
    asked, wanted, rows = evaluation_of(federation, "plan"), evaluate.resolution, clients
    if asked.unit is Unit.RECORD:
        rows = max(1, round(evaluate.share * federation.mode.records))
    half = planned_half_width(asked, plan, rows, wanted, delta)
    return EvaluationPlan(rounds, plan.noise, epsilon_of(plan, delta), clients, rows, half)


def scoring_plan(federation: Federation) -> EvaluationPlan | None:
    """Return the plan of one arm's evaluation for the comparison of arms; None if clients do not compare them.

    Raises:
      Refusal: the noise cannot separate scores that differ by `tune.resolution`.
    """
    settings = federation.settings
    plan, tuned = one_evaluation(federation), settings.tune
    if not settings.scored_at_clients:
        return None
    delta, clients = (
        federation.mode.promises[0].target_delta,
        round(federation.declared_clients / len(settings.tried)),
    )
    half = scoring_of(federation, "plan").half_width(plan.noise_over_clip, max(clients, 1))
    assert half is not None
    if half * DIFFERENCE > tuned.resolution:
        enough = plan.noise * tuned.resolution / (half * DIFFERENCE)
        epsilon = epsilon_of(replace(plan, noise_multiplier=enough), delta)
        remedy = (
            f"is below the difference that arms of {clients} clients can resolve, {half * DIFFERENCE:.3g}; "
            f"{math.ceil(clients * half * DIFFERENCE / tuned.resolution)} clients in each would suffice, or "
            f"evaluate.noise_multiplier={enough:.3g}, with which an evaluation costs epsilon {epsilon:.3g} by itself"
        )
        raise Refusal("tune.resolution", tuned.resolution, remedy)
    rounds = (len(settings.tried) * settings.tuning_rounds,)
    return EvaluationPlan(rounds, plan.noise, epsilon_of(plan, delta), clients, clients, half)


def scoring_of(federation: Federation, name: str) -> Evaluation:
    """Return the inquiry to the clients of an arm about its model: only the metric that compares arms.

    Args:
      federation: its parts.
      name: of the release.
    """
    return replace(
        evaluation_of(federation, name), metric=scored_metric(federation.settings), figures=(METRIC,)
    )


def evaluation_of(federation: Federation, name: str) -> Evaluation:
    """Return the inquiry to the clients."""
    asked = evaluate_of(federation.settings)
    why = (federation.settings.purpose or "")[:MOST_NAME]
    inquiry = Evaluation(name, asked.share, asked.metric, asked.metric_bound, asked.figures, why)
    if rows := federation.mode.rows_of_client:
        figures = tuple(each for each in asked.figures if each != HISTOGRAM)
        return replace(inquiry, figures=figures, records=rows)
    return inquiry


def check_evaluation(federation: Federation) -> None:
    """Refuse an evaluation that is too coarse, of an unknown metric, or of too many figures for an encrypted sum."""
    evaluated, scored = evaluation_plan(federation), scoring_plan(federation)
    import torch  # takes a second, and a plan does not need it

    for cap in federation.population.caps(federation.mode.ledger_path(Path())):
        require_purposes([EVALUATION], cap)
    if evaluated:
        federation.check_sum(federation.num_clients)
    task, held_out, settings = federation.task, held_out_of(federation.task), federation.settings
    # At the record level each record is measured separately; a joint metric, such as an area, needs more than two.
    alone = federation.mode.rows_of_client is not None
    some = 1 if alone else SEVERAL
    looked_at = held_out if len(held_out) else some_examples(federation)
    inputs, targets = looked_at.batch(torch.arange(min(len(looked_at), some)))
    model = task.model().eval()
    with torch.no_grad():
        outputs = run_on(model, inputs)
        known = task.metrics(outputs, targets)
    check_measured_apart(task, outputs, targets, size=max(1, len(targets) // 4))
    fields = {"evaluate.metric": evaluate_of(settings).metric} if evaluated else {}
    fields |= {"tune.metric": scored_metric(settings)} if scored else {}
    for field, wanted in fields.items():
        if wanted not in known:
            of = " of one record" if alone else ""
            raise Refusal(field, wanted, f"the task has {', '.join(sorted(known)) or 'none'}{of}")


def lines_of(federation: Federation, plan: Plan, budget: Budget) -> Iterator[str]:
    """Yield lines about the evaluations of arms and of the run's model, beside the plan of a promise."""
    if plan.unit is Unit.CLIENT and (scores := scoring_plan(federation)):
        yield _scoring(federation, plan, budget, scores)
    if is_asked(federation, plan) and (evaluations := evaluation_plan(federation)):
        yield _evaluation(federation, plan, budget, evaluations)


def _scoring(federation: Federation, plan: Plan, budget: Budget, asked: EvaluationPlan) -> str:
    whole = plan.epsilon(budget.target_delta, prior=questions_of(federation, plan))
    metric, half = scored_metric(federation.settings), asked.half_width or 0.0
    return (
        f"The clients of each arm, about {asked.clients}, evaluate its model at noise multiplier {asked.noise_multiplier:.4g}, for "
        f"epsilon {asked.epsilon:.3f} by itself; rounds and evaluations cost {whole:.3f} together. A score in {metric} will be known to "
        f"+-{half:.4f} (95 %), and two are told apart where they differ by {half * DIFFERENCE:.4f}."
    )


def _evaluation(federation: Federation, plan: Plan, budget: Budget, asked: EvaluationPlan) -> str:
    without = plan.epsilon(budget.target_delta)
    whole = plan.epsilon(budget.target_delta, prior=questions_of(federation, plan))
    many = len(asked.rounds)
    often = f"after {many} of the rounds" if many > 1 else "in the end"
    said = (
        f"{asked.clients} clients evaluate the model {often}, at noise multiplier {asked.noise_multiplier:.4g}: this adds epsilon "
        f"{whole - without:.3f} to the rounds' {without:.3f}, and makes {whole:.3f}."
    )
    if asked.half_width is None:
        return said
    of = "" if plan.unit == "client" else f" over about {asked.rows} held-out records"
    return f"{said} Their mean {evaluate_of(federation.settings).metric}{of} will be known to +-{asked.half_width:.4f} (95 %)."
