"""Terms of a protected job, as they stand in its configuration."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ...base.refusal import Refusal
from ...privacy.budget import Adjacency, Budget, Unit
from ...privacy.ledger.caps import capped
from ...privacy.plan import Plan
from ...strategies.cohorts import All
from ..population_budget import ADVERSARIES, check_terms, ledger_path, require_use


@dataclass(frozen=True)
class JobTerms:
    """Terms of a protected job; all of them are public.

    Attributes:
      data_id: names the clients' data, and so their ledger.
      population: number of clients that may ever connect, at least `clients`.
      clients: of a round, at least 1; the fixed denominator of the mean.
      num_rounds: rounds to plan for, at least 1.
      clipping_norm: L2 norm of the largest update, all parameters together.
      target_epsilon, target_delta, adjacency, unit: of the budget of one client, for all jobs with this `data_id`.
      ledger_dir: an absolute folder at the server; None is the default of the server's user.
      allow_large_delta: accept a delta above one over the population.
      accept_vacuous: accept a vacuous guarantee.
      parameters: number of the model's, at least 1; None if it is not known.
    """

    data_id: str
    population: int
    clients: int
    num_rounds: int
    clipping_norm: float
    target_epsilon: float
    target_delta: float
    adjacency: str = "zero-out"
    unit: str = "client"
    ledger_dir: str | None = None
    allow_large_delta: bool = False
    accept_vacuous: bool = False
    parameters: int | None = None

    @property
    def path(self) -> Path:
        """Path of the ledger on this machine; an invalid name or folder is refused."""
        return ledger_path(self.data_id, self.ledger_dir)

    @property
    def budget(self) -> Budget:
        """Budget of one client, within the caps that the data's owner set on this machine."""
        unit, adjacency = Unit(self.unit), Adjacency(self.adjacency)
        return capped(self.path, Budget(unit, self.target_epsilon, self.target_delta, adjacency))

    def plan(self) -> tuple[Plan, str | None]:
        """Return the plan of a job before which nothing is spent, and a warning or None; refuse invalid terms.

        NVFLARE's own draw of a round's clients is no secret, so nothing amplifies: each client counts as in every round.
        """
        budget, everybody = self.budget, All()
        if not 1 <= self.clients <= self.population:
            remedy = f"a round has {self.clients} clients; give at least that many"
            raise Refusal("population", self.population, remedy)
        warning = check_terms(budget, everybody, self.population, self.allow_large_delta, self.parameters)
        plan = Plan(budget.unit, budget.adjacency, everybody, self.clipping_norm, self.num_rounds)
        plan = replace(plan, adversaries=ADVERSARIES).calibrate(budget)
        self.require_use(plan)
        return plan, warning

    def require_use(self, plan: Plan) -> None:
        """Refuse a calibrated plan whose guarantee is vacuous, unless the terms accept it."""
        if not self.accept_vacuous:
            require_use(plan, self.clients, None, self.population, self.parameters)
