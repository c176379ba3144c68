"""Queries of a run: rounds that ask its clients instead of training. A kind of query is an extension, found by its name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..base.extensions import extension
from ..configs.schema import SimulationSettings
from ..modes.federation import Federation
from ..privacy.budget import Budget
from ..privacy.mechanisms.randomness import Randomness
from ..privacy.plan import Plan
from ..server.round_terms import ALL_ANSWERS, Answers
from ..strategies.cohorts import All
from ..tasks.data import Data

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent
    from flwr.serverapp import Grid

    from ..server.checkpoint import Arrays, State
    from ..server.participants import Participants
    from .prepared_run import Run

SYSTEM = Randomness()


@dataclass(frozen=True)
class Reach:
    """How a federation's clients answer a query.

    Attributes:
      answers: number of answers that a query needs.
      timeout: seconds for the replies of one exchange; None waits for all.
      randomness: source of draws and noise; seeded only for a declared simulation.
      released: file of the model that a question is about, sent with it; None without a model.
    """

    answers: Answers = ALL_ANSWERS
    timeout: float | None = None
    randomness: Randomness = SYSTEM
    released: bytes | None = None


@dataclass(frozen=True)
class EvaluationPlan:
    """Plan of a run's evaluations at its clients.

    Attributes:
      rounds: numbers of the rounds after which the model is evaluated.
      noise_multiplier: noise of each evaluation over the sensitivity.
      epsilon: cost of one evaluation alone.
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


@dataclass(frozen=True)
class ScalingPlan:
    """Plan of a run's question about the scaling of its inputs.

    Attributes:
      columns: names of the columns that the question is about.
      noise_multiplier: noise of the answer over the sensitivity.
      epsilon: cost of the question alone.
    """

    columns: tuple[str, ...]
    noise_multiplier: float
    epsilon: float


@dataclass(frozen=True)
class Query:
    """A kind of round that asks, as functions of the run; what is not given asks nothing.

    Attributes:
      first: whether it is asked before the first round, so that its answer changes the run.
      held_out: returns the share of its records that each client holds out for it; None if it needs none.
      metric: returns the metric by which the clients compare arms; None if it compares none.
      events: returns what it costs a unit in so many remaining rounds, None for all.
      plans: returns the plan of one request, of a run that has this name on ledgers.
      fields: returns fields of the `UnitPlan` of a promise with this plan.
      lines: yields lines for a person about cost and precision, for the plan of a promise and its budget.
      check: refuses a query that cannot be answered, or that owners do not allow, before anything is spent.
      check_records: refuses a model that does not answer for each of a client's records alone, where those are hidden.
      answered: returns the federation of a run that is resumed, as the answer in its folder changed it.
      before: asks before the first round on the grid that is given, and returns the run as the answer changes it.
      after: asks after a round, or where the run ends before its last one, and returns the record of the answer; None if
        the round has no query.
      scores: compares the models of arms, each at its clients, and returns one record for each arm; the number is that of
        the round before.
      released: acts once the released model is fixed, and returns fields of the result; `metrics` among them join the
        run's.
    """

    first: bool = False
    held_out: Callable[[SimulationSettings], float | None] = lambda settings: None
    metric: Callable[[SimulationSettings], str | None] = lambda settings: None
    events: Callable[[Federation, int | None], Sequence[DpEvent]] = lambda federation, num_rounds: ()
    plans: Callable[[Federation, str], Sequence[Plan]] = lambda federation, run: ()
    fields: Callable[[Federation, Plan], Mapping[str, Any]] = lambda federation, plan: {}
    lines: Callable[[Federation, Plan, Budget], Iterable[str]] = lambda federation, plan, budget: ()
    check: Callable[[Federation], None] = lambda federation: None
    check_records: Callable[[Federation, Data], None] = lambda federation, data: None
    answered: Callable[[Federation, Path], Federation] = lambda federation, folder: federation
    before: Callable[[Run, Callable[[Run], AbstractContextManager[Grid]], Reach], Run] = (
        lambda run, grid, reach: run
    )
    after: Callable[[Run, Participants, Reach, State, bool], dict[str, Any] | None] = (
        lambda run, participants, reach, state, last: None
    )
    scores: Callable[[Run, Participants, Reach, Sequence[Arrays], int], list[dict[str, Any]]] = (
        lambda run, participants, reach, models, number: []
    )
    released: Callable[[Run, Arrays], Mapping[str, Any]] = lambda run, model: {}


def queries_of(settings: SimulationSettings) -> tuple[Query, ...]:
    """Return the kinds of query that a run with these settings asks, the first one first.

    Raises:
      Refusal: this installation lacks one.
    """
    return tuple(
        cast(Query, extension("query", name, field, value))
        for name, (field, value) in settings.query_fields.items()
    )


def query_events(federation: Federation, num_rounds: int | None = None) -> list[DpEvent]:
    """Return what the queries of `num_rounds` remaining rounds cost a unit, None for all; a simulation's scaling counts."""
    queries = queries_of(federation.settings)
    return [
        *federation.simulated_cost,
        *(event for query in queries for event in query.events(federation, num_rounds)),
    ]


def later_events(federation: Federation, num_rounds: int | None = None) -> list[DpEvent]:
    """Return what queries cost a unit in `num_rounds` remaining rounds, None for all, without those before the first."""
    later = [query for query in queries_of(federation.settings) if not query.first]
    return [event for query in later for event in query.events(federation, num_rounds)]


def charges_queries(federation: Federation, plan: Plan) -> bool:
    """Return whether a run's queries are charged to the plan's unit: the unit of the sum, or the only one."""
    return plan.unit is federation.mode.promises[0].unit


def query_events_of_unit(federation: Federation, plan: Plan) -> list[DpEvent]:
    """Return what the run's queries cost one unit of a plan; empty for a unit that is not charged for them."""
    return query_events(federation) if charges_queries(federation, plan) else []


def with_everybody(federation: Federation) -> Federation:
    """Return the federation with a cohort of all clients, whom a query asks whatever cohort a round draws."""
    return replace(federation, cohort=All())
