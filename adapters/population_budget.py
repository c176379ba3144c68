"""Budget of whole clients behind another framework: its terms, its ledger, and the plan that fits what is left."""

from __future__ import annotations

import math
import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.refusal import Refusal, refusing
from ..privacy.accounting.epsilon import GATE_INTERVAL
from ..privacy.accounting.renyi_filter import spent_epsilon
from ..privacy.budget import Adversary, Budget, Unit, check_delta
from ..privacy.ledger.acts import acting_user
from ..privacy.ledger.caps import DATA_ID, NAME_LENGTH, NO_DATA_ID, POPULATION, ledger_folder
from ..privacy.ledger.data_sets import (
    budgets_of_records,
    exclusive_access,
    keep_head,
    pending_for_population,
    population_ledger,
    settle,
)
from ..privacy.ledger.ledger import Ledger
from ..privacy.plan import Plan
from ..privacy.preconditions import check_adjacency, check_cohort_size, emptiness, vacuity
from ..server.records_plan import within_records
from ..strategies.cohorts import Cohort

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

ADVERSARIES = (Adversary.CLIENTS, Adversary.MODEL)  # not the server, which is trusted and sees single updates


class NobodyAnswered(Exception):
    """Run without any answer of a client: there is no model, and the reservations stay spent."""


def check_terms(
    budget: Budget, cohort: Cohort, population: int, allow_large_delta: bool, parameters: int | None
) -> str | None:
    """Refuse terms that the command line refuses too; return a warning about an allowed large delta, or None.

    Args:
      budget: of whole clients.
      cohort: draws the clients of each round.
      population: number of clients, a public number.
      allow_large_delta: whether delta may be above one over the population.
      parameters: number of the model's; None if it is not known.
    """
    if parameters is not None and parameters < 1:
        raise Refusal("parameters", parameters, "give the number of the model's parameters, at least 1")
    if budget.unit is not Unit.CLIENT:
        raise Refusal("budget.unit", str(budget.unit), "a private sum hides whole clients; use client")
    if population < 1:
        raise Refusal("population", population, "give the number of clients, at least 1")
    if cohort.turns is not None:
        remedy = "here each round is its own release, which is costly with turns; use Poisson, Fixed or All"
        raise Refusal("cohort", cohort.name, remedy)
    public_count = "the population makes the number of clients public; use zero-out"
    check_adjacency("budget.adjacency", budget.adjacency, public_count)
    check_cohort_size(math.ceil(cohort.expected_size(population)), population)
    return check_delta("", budget.target_delta, population, "clients", allow_large_delta)


def require_use(
    plan: Plan, expected: float, coin: float | None, population: int, parameters: int | None
) -> None:
    """Refuse a calibrated plan whose guarantee is vacuous, or whose rounds are often empty.

    Args:
      plan: of the run.
      expected: number of clients of a round.
      coin: probability with which each client takes part; None without independent coins.
      population: number of clients.
      parameters: number of the model's; None if it is not known.
    """
    fault = vacuity(plan, expected, population, parameters) or emptiness(coin, population)
    if fault is not None:
        small = ", give parameters= of a small model" if parameters is None else ""
        remedy = f"this guarantee {fault}; use more clients{small}, or accept it with accept_vacuous=True"
        raise Refusal("population", population, remedy)


def ledger_path(data_id: str, ledger_dir: Path | str | None) -> Path:
    """Return the path of a data set's ledger, the same in every working folder; refuse an invalid name."""
    if not re.fullmatch(DATA_ID, data_id):
        raise Refusal("data_id", data_id, NO_DATA_ID)
    name = f"{POPULATION}{population_ledger(data_id)[:NAME_LENGTH]}.ledger"
    return ledger_folder("ledger_dir", ledger_dir) / name


@contextmanager
def open_ledger(path: Path, data_id: str, budget: Budget) -> Generator[Ledger]:
    """Charge what is pending, open the ledger and at the end store its head: later runs refuse an older copy.

    Args:
      path: from `ledger_path`; its folder is made.
      data_id: names the clients' data.
      budget: of the ledger, within the caps of the data's owner.
    """
    with refusing("ledger_dir", path.parent, "cannot be made"):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with exclusive_access(path.parent, data_id):
        settle(path.parent, data_id, pending_for_population(path.parent, data_id), budget, POPULATION)
        with Ledger.open(path, budget, owner=population_ledger(data_id), simulated=False) as ledger:
            ledger.shared = budgets_of_records(path.parent, data_id, ledger.book)
            ledger.origin = {"who": acting_user(), "data": data_id}
            try:
                yield ledger
            finally:
                with suppress(Refusal):  # of a full disk: the earlier head remains
                    keep_head(ledger, data_id)


def fitted(plan: Plan, budget: Budget, ledger: Ledger, other_events: Sequence[DpEvent]) -> Plan:
    """Return a plan with the smallest noise with which the run fits what earlier releases leave of the budget.

    Args:
      plan: calibrated as if nothing was spent.
      budget: of the ledger.
      ledger: open.
      other_events: of the run, besides its rounds.

    Raises:
      Refusal: too little is left of the clients' budget, or of that of their records.
    """
    if prior := tuple(ledger.events(Adversary.MODEL)):  # of earlier runs on this ledger
        plan = replace(plan, filter_order=ledger.filter_order).calibrate(budget, [*prior, *other_events])
    for shared in ledger.shared:  # budgets of single records, which sums of whole clients spend too
        plan = within_records(plan, shared, budget, "budget", other_events)
    return plan


def round_line(number: int, planned: float, budget: Budget, ledger: Ledger) -> str:
    """Return the line of a log about a round: what is public, with the planned cohort in the place of exact counts.

    Args:
      number: of the round.
      planned: number of clients.
      budget: of the ledger.
      ledger: with the round's release.
    """
    events, delta = ledger.events(Adversary.MODEL), budget.target_delta
    spent = spent_epsilon(events, delta, budget.adjacency, ledger.filter_order, GATE_INTERVAL)
    promised = f"{budget.target_epsilon:g} at delta {delta:g}"
    return f"round {number}: {planned:g} clients planned; epsilon {spent:.4g} of {promised}"
