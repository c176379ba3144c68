"""Evaluation of a run's model at its clients: one charged question with the model, and the record of its answer.

When arms try values, each arm's clients may evaluate its model. This costs one charge, since a client is in one arm.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from ..base.bounded_decoding import plain_of
from ..base.durable_files import append_line
from ..base.extensions import extension
from ..messages.wire import memory_arrays
from ..modes.federation import Federation
from ..privacy.arms import Arm
from ..privacy.budget import Unit
from ..privacy.ledger.ledger import BudgetExhausted
from ..privacy.plan import Plan
from ..privacy.statistics.evaluation import GAINS, Evaluation
from ..run.files import BLAME
from ..run.prepared_run import Run
from ..run.queries import Query, Reach, charges_queries
from ..server.checkpoint import State
from ..server.participants import Participants
from ..server.query_rows import FIRST_ROW, name_of, row_after
from ..server.round_terms import Mean, Round, describe_failure
from ..strategies.cohorts import All
from ..tasks.arrays import final_arrays
from ..tasks.data import Data
from ..tasks.independence import check_evaluated_apart
from .evaluation_plan import (
    check_evaluation,
    evaluated_rounds,
    evaluation_events,
    evaluation_lines,
    evaluation_of,
    evaluation_plan,
    one_evaluation,
    scoring_of,
    scoring_plan,
)
from .evaluations import epsilon_of
from .question_rounds import question_order
from .settings import evaluate_of, scored_metric
from .sums import Charge, ask_cohort, sums_of
from .wire import evaluation_content

Arrays = dict[str, NDArray[np.generic]]


def evaluate_at_clients(
    run: Run, participants: Participants, reach: Reach, state: State, is_last: bool = False
) -> dict[str, Any] | None:
    """Evaluate a round's model at all clients, and return the record; None if the round has no evaluation.

    Arguments as of `Query.after`: `is_last` says that the run ends here, before its last round.
    """
    federation = run.federation
    planned = evaluated_rounds(federation.settings)
    if state.round not in planned and not (is_last and planned):
        return None
    evaluation = evaluation_of(federation, name_of(run.name))
    return _evaluate(run, participants, reach, evaluation, state.model, row_after(state.round))


def score_at_clients(
    run: Run, participants: Participants, reach: Reach, models: Sequence[Arrays], number: int
) -> list[dict[str, Any]]:
    """Evaluate each arm's model, in the arms' order, at its clients after round `number`; return a record for each arm."""
    evaluation = scoring_of(run.federation, name_of(run.name))
    records: list[dict[str, Any]] = []
    for arm_number, model in enumerate(models, 1):
        arm, row = run.tuning.deal.arm(arm_number), row_after(number, arm_number)
        record = _evaluate(run, participants, reach, evaluation, model, row, arm)
        records.append({"arm": arm_number, **record})
    return records


def _evaluate(
    run: Run,
    participants: Participants,
    reach: Reach,
    evaluation: Evaluation,
    model: Arrays,
    row: int,
    arm: Arm | None = None,
) -> dict[str, Any]:
    """Reserve an evaluation in a row of its own, ask all clients or those of an arm, and return the record.

    Where the budget is spent, nobody is asked, and the record says so. Evidence against members is added to BLAME.
    """
    federation, plan = run.federation, one_evaluation(run.federation)
    # No canary evaluates; those that are nodes of the grid must be known, so that they are left out.
    canaries = 0 if participants.add_canaries else participants.canaries
    everybody = replace(
        participants, cohort=All(), answers=reach.answers, canaries=canaries, add_canaries=None, arm=arm
    )
    assert run.ledger is not None  # modes with ledgers at the clients refuse evaluations
    record = {
        "round": row % FIRST_ROW,
        "epsilon": epsilon_of(plan, run.ledger.budget.target_delta),
        "noise_multiplier": plan.noise_multiplier,
        "share": evaluation.share,
        "confidence": 0.95,
    }
    charge = Charge(plan, run.ledger, evaluation, federation.randomness, row, arm)
    try:
        charge.reserve()
    except BudgetExhausted as spent:
        return {**record, "epsilon": None, "reason": str(spent), "clients": None, "answers": []}
    model = final_arrays(federation.task, model)  # what the run would release
    model_content = memory_arrays(model) if evaluation.unit is Unit.CLIENT else save(model)
    # A run's new name must not change a simulation's results: encrypted sums rotate by a hash of the instruction.
    sent = _in_simulation(federation, evaluation) if federation.population.reads_data else evaluation
    content = evaluation_content(sent, model_content, question_order(federation, sent, plan, arm))
    result, mean = ask_cohort(everybody, charge, content, federation.masking, reach.timeout)
    participants.search = everybody.search  # for corrupt members, in rounds and evaluations alike
    if mean is not None:
        charge.settle()
    for evidence in result.evidence:
        append_line(run.folder / BLAME, evidence)
    faults = {"blamed": result.blamed, "suspected": result.suspected}
    answer = _answer_fields(federation, charge, result, mean, everybody.expected)
    return {**record, **answer, **{kind: members for kind, members in faults.items() if members}}


def _in_simulation(federation: Federation, evaluation: Evaluation) -> Evaluation:
    """Return the evaluation as clients of a simulation get it: they have no owners, who decide on own training."""
    evaluation = replace(evaluation, name="simulation")
    if not {*GAINS} & {*evaluation.figures}:
        return evaluation
    personal = federation.settings.personal
    own = extension("personal", "training", "personal", personal)(federation.settings, federation.task)
    return replace(evaluation, own=json.dumps(plain_of(own)))


def _answer_fields(
    federation: Federation, charge: Charge, result: Round, mean: Mean | None, expected: float
) -> dict[str, Any]:
    """Return the fields of a record that depend on the answer; `expected` is the public number of clients."""
    if mean is None:
        reason = describe_failure(result, not federation.mode.hides_counts)
        return {"reason": reason, "clients": None, "answers": []}
    is_masked = federation.masking is not None
    # With encrypted sums the server and every participant see the cohort; otherwise only the server does.
    clients = mean.clients if is_masked else round(expected)
    evaluation, sums = charge.inquiry, sums_of(charge, result, mean, is_masked)
    assert isinstance(evaluation, Evaluation)
    answers = [
        {"name": name, "figures": [each.plain for each in figures]}
        for name, figures in evaluation.answers(sums.cells, sums.noise, clients)
    ]
    return {"clients": clients, "answers": answers}


def _plans(federation: Federation, run: str) -> Sequence[Plan]:
    """Return the plan of one evaluation, for `Query.plans`; the run's name changes nothing."""
    return (one_evaluation(federation),)


def _fields(federation: Federation, plan: Plan) -> Mapping[str, Any]:
    """Return the plans of evaluations for the `UnitPlan` of the promise with this plan, for `Query.fields`."""
    return {
        "evaluation": evaluation_plan(federation) if charges_queries(federation, plan) else None,
        "scoring": scoring_plan(federation) if plan.unit is Unit.CLIENT else None,
    }


def _check_records(federation: Federation, data: Data) -> None:
    """Refuse a model that does not evaluate each of a client's records alone, for `Query.check_records`."""
    check_evaluated_apart(federation.task.model(), federation.task, data)


EVALUATIONS = Query(
    held_out=lambda settings: evaluate_of(settings).share,
    metric=lambda settings: scored_metric(settings) if settings.scored_at_clients else None,
    events=evaluation_events,
    plans=_plans,
    fields=_fields,
    lines=evaluation_lines,
    check=check_evaluation,
    check_records=_check_records,
    after=evaluate_at_clients,
    scores=score_at_clients,
)
