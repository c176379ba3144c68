"""Question about the scaling of a run's inputs: all clients answer it before round 1; it is charged and stored."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from dp_accounting.dp_event import DpEvent
from flwr.serverapp import Grid

from ..base.durable_files import replace_file
from ..base.notice import warn
from ..base.refusal import Refusal, refusing
from ..configs.bundle_files import SCHEMA
from ..configs.task_settings import CsvTask
from ..modes.federation import Federation
from ..privacy.ledger.ledger import BudgetExhausted
from ..privacy.plan import Plan
from ..privacy.statistics.inquiry import read_inquiry
from ..run.client_instructions import task_options, with_task_of
from ..run.files import SCALING
from ..run.opening import claim_records
from ..run.prepared_run import Run
from ..run.queries import Query, Reach, with_everybody
from ..server.participants import Participants
from ..server.query_rows import FIRST_ROW
from ..tasks import load_task
from ..tasks.scaling import ASKED, FIELD, Moments, moments_of
from ..tasks.table_schema import read_schema
from ..tasks.tables import tables_of
from .ask import answer_record, ledger_epsilon
from .question_plan import Spend, question_plan
from .question_rounds import QuestionRounds
from .scaling_plan import check_scaling, one_scaling, scaling_inquiry, scaling_lines, scaling_plan


def ask_scaling(run: Run, open_grid: Callable[[Run], AbstractContextManager[Grid]], reach: Reach) -> Run:
    """Ask a run's clients for the scaling of its inputs, store the answer, and return the run with scaled inputs.

    A column whose answer is too noisy stays scaled by its bounds. `open_grid` opens the grid to the run's clients.

    Raises:
      Refusal: no client is connected, or the ledger does not afford the question.
    """
    federation, ledger = run.federation, run.ledger
    inquiry, plan = one_scaling(federation, run.name)
    epsilon_before = ledger_epsilon(ledger)
    canaries = federation.extra_clients if federation.population.reads_data else 0
    everybody = with_everybody(federation)
    run.client_ledgers.settle()
    claim_records(federation)
    with open_grid(run) as grid:
        participants = Participants(
            grid,
            everybody.cohort,
            everybody.num_clients,
            reach.answers,
            canaries,
            population=everybody.declared_clients,
        )
        if ledger is not None:
            ledger.purpose = inquiry.why
        rounds = QuestionRounds(everybody, plan, ledger, participants, reach)
        alias = inquiry
        if ledger is not None and federation.population.reads_data:
            # A run's new name must not change a simulation: encrypted sums rotate by a hash of the instruction.
            alias = scaling_inquiry(federation, "simulation")
        try:
            # The row is beyond those of the run's rounds, which have other streams.
            outcome = rounds.ask_once(inquiry, FIRST_ROW, alias)
        except BudgetExhausted as spent:
            raise Refusal(FIELD, ASKED, str(spent)) from spent
        finally:
            if ledger is not None:
                ledger.purpose = federation.settings.purpose
    record = answer_record(rounds, inquiry, epsilon_before, outcome)
    moments = moments_of({each.name: each.figures for each in outcome.answers})
    path = run.folder / SCALING
    with refusing("hydra.run.dir", path, "the answer, which is charged, cannot be stored"):
        replace_file(path, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode(), mode=None)
    if outcome.answers:
        outcome.charge.settle()
    reason = outcome.cause or "its deviation is below the noise"
    for each in inquiry.questions:
        if each.name not in moments:
            warn(f"{FIELD}: {each.name} stays scaled by its bounds: {reason}")
    scaled = _with_scaling(federation, moments, plan)
    return replace(run, federation=scaled, client=with_task_of(scaled, run.client))


def apply_answer(federation: Federation, folder: Path) -> Federation:
    """Return a resumed run's federation, scaled by its clients' answer in the run folder; unchanged before the answer."""
    if "scaling" not in federation.settings.query_fields or not (folder / SCHEMA).is_file():
        return federation
    configured = {each.name: each.standard for each in tables_of(federation.task).schema.columns}
    # The schema in the folder has the moments of the answer beside those that the user configured.
    stored = {each.name: each.standard for each in read_schema(folder / SCHEMA).columns}
    moments = {name: each for name, each in stored.items() if each and not configured.get(name)}
    if not federation.simulated:
        return _with_scaling(federation, moments)
    record = json.loads((folder / SCALING).read_text(encoding="utf-8"))
    inquiry, spend = read_inquiry(record["question"]), Spend(noise_multiplier=record["noise_multiplier"])
    return _with_scaling(federation, moments, question_plan(with_everybody(federation), inquiry, spend))


def _with_scaling(federation: Federation, moments: Moments, plan: Plan | None = None) -> Federation:
    """Return a federation with scaled inputs, which asks no more; a simulation keeps the cost of `plan` for its account."""
    task = federation.settings.task
    assert isinstance(task, CsvTask)
    settings = federation.settings.model_copy(update={"task": task.model_copy(update={"scaling": None})})
    population = federation.population
    options = task_options(settings, federation.seed) if population.reads_data else settings.task.options
    added = {**settings.options_of_groups, "moments": dict(moments)}
    loaded = load_task(task.name, {**options, **added}, settings.allow_modules)
    clients = population.scaled(settings, loaded, keep_names=federation.mode.client_budget is not None)
    scaled = replace(federation, settings=settings, task=loaded, moments=dict(moments), population=clients)
    if federation.simulated and plan:
        return replace(scaled, simulated_cost=(plan.event(),))
    return scaled


def _events(federation: Federation, num_rounds: int | None) -> Sequence[DpEvent]:
    """Return the event of the question, for `Query.events`: it comes before all rounds, whatever number remains."""
    return [each.event() for each in _plans(federation, "plan")]


def _plans(federation: Federation, run: str) -> Sequence[Plan]:
    """Return the plan of the question, for `Query.plans`."""
    _, plan = one_scaling(federation, run)
    return (plan,)


def _fields(federation: Federation, plan: Plan) -> Mapping[str, Any]:
    """Return the plan of the question for each `UnitPlan`, for `Query.fields`."""
    return {"scaling": scaling_plan(federation)}


SCALING_QUERY = Query(
    first=True,
    events=_events,
    plans=_plans,
    fields=_fields,
    lines=scaling_lines,
    check=check_scaling,
    answered=apply_answer,
    before=ask_scaling,
)
