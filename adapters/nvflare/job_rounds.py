"""Rounds of a protected job at its server: each is reserved, summed, noised and committed, in this order."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...base.refusal import Refusal
from ...privacy.budget import Budget, Release
from ...privacy.ledger.ledger import Ledger
from ...privacy.mechanisms.private_sum import CohortSum, add, decode
from ...privacy.mechanisms.randomness import Randomness
from ...privacy.mechanisms.sum_spec import TRAINING, UPDATE, SumSpec
from ...privacy.plan import Plan
from ..population_budget import NobodyAnswered, fitted, open_ledger, round_line
from .exchange import VECTOR, Layout, Model, layout_of, spec_of, terms_of
from .job_terms import JobTerms

MECHANISM = "private_sum"  # on the ledger, as of all sums of updates

logger = logging.getLogger("fedveil.server")


@dataclass
class OpenRound:
    """A round that the ledger has paid for, and whose sum is not released yet.

    Attributes:
      number: from 1.
      model: that was sent to clients; empty before the first task leaves.
      spec: parameters of the sum.
      layout: shapes of the averaged arrays by name.
      total: of the vectors so far.
      answered: names of the clients that have replied.
    """

    number: int
    model: Model
    spec: SumSpec
    layout: Layout
    total: CohortSum
    answered: set[str] = field(default_factory=set[str])


@dataclass
class JobRounds:
    """Rounds of one job, under an open ledger.

    Attributes:
      terms: of the job.
      plan: calibrated to what is left of the budget.
      ledger: of the population.
      budget: of the ledger.
      randomness: source of the noise.
      run: name of the job on the ledger, new for each.
      number: of the last reserved round.
    """

    terms: JobTerms
    plan: Plan
    ledger: Ledger
    budget: Budget
    randomness: Randomness = field(default_factory=Randomness)
    run: str = field(default_factory=lambda: uuid.uuid4().hex)
    number: int = 0
    _reserved: bool = False
    _round: OpenRound | None = None
    _lock: Lock = field(default_factory=Lock)  # replies come in threads

    def __post_init__(self) -> None:
        self._noise = self.plan.mechanism.noise(lambda row: self.randomness.stream("noise", row))

    def reserve(self, connected: int) -> None:
        """Charge the next round durably, before its task leaves.

        Args:
          connected: number of clients.

        Raises:
          BudgetExhausted: the round does not fit; nothing was written.
          Refusal: more clients are connected than the plan and its delta hold for.
        """
        if connected > self.terms.population:
            remedy = f"{connected} clients are connected; set it to that number"
            raise Refusal("population", self.terms.population, remedy)
        self._reserved, self._round = False, None
        self.ledger.reserve_new(self._release(self.number + 1))
        self.number += 1
        self._reserved = True

    def send(self, model: Model) -> None:
        """Take the model of a task that is about to leave.

        Args:
          model: arrays by name, of the reserved round.

        Raises:
          Refusal: no round is reserved, or its tasks have different models.
        """
        with self._lock:
            if not self._reserved:
                raise Refusal("task", "not reserved", "no release covers its results, so it is not sent")
            if not self._round:
                layout = layout_of(model)
                spec = spec_of(self.plan.clipping_norm, layout)
                size = sum(int(np.prod(shape)) for shape in layout.values())
                self._round = OpenRound(self.number, model, spec, layout, CohortSum(np.zeros(size)))
            elif self._round.layout != layout_of(model):
                raise Refusal("task", "another model", "send all clients of a round the same model")

    def take(self, client: str, arrays: Model, terms: Any) -> str | None:
        """Add one client's vector, never trusting that the client clipped it; return why it is not used, or None.

        Args:
          client: its name, from the server's own records.
          arrays: of its reply, as they came.
          terms: what the reply says of the parameters with which the vector was made.
        """
        with self._lock:
            if not self._round:
                return "late"
            open_round, total = self._round, self._round.total
            if client in open_round.answered:
                return "answered before"
            vector = arrays.get(VECTOR)
            if len(arrays) != 1 or not isinstance(vector, np.ndarray) or vector.dtype != np.int32:
                return "no vector: is the filter UpdateFilter on this client's results?"
            if terms != terms_of(open_round.spec):
                return "another clipping norm"
            before = total.replies
            add(total, vector, open_round.spec)
            if total.replies == before:
                return "another shape"
            open_round.answered.add(client)
            return None

    def release(self) -> dict[str, Any]:
        """Return the model after the round: the one that was sent plus the noised mean of the updates.

        Raises:
          Refusal: no round is reserved.
          NobodyAnswered: no client's vector is in the sum; the charge stays.
        """
        with self._lock:
            reserved, open_round = self._reserved, self._round
            self._reserved, self._round = False, None
        if not reserved:
            raise Refusal("round", self.number, "no release of it is reserved, so nothing is released")
        if not open_round or not open_round.total.replies:
            reason = f"no client answered in round {self.number}: read a client's log for an exception; its cost is spent"
            raise NobodyAnswered(reason)
        mean = self._mean(open_round)
        self.ledger.commit(self._release(open_round.number).key)
        logger.info(round_line(open_round.number, self.terms.clients, self.budget, self.ledger))
        return moved(open_round.model, mean)

    def _mean(self, open_round: OpenRound) -> dict[str, NDArray[np.float64]]:
        """Return the noised mean update by name; the divisor is fixed, whoever answered."""
        plan, spec = self.plan, open_round.spec
        total, event = self._noise.add(open_round.total.total, open_round.number, plan.noise_over_clip, spec)
        if event != plan.mechanism.event(plan.noise_over_clip):
            raise AssertionError("the mechanism's event is not the one that was reserved")
        return decode(total, open_round.layout, spec, self.terms.clients)[0]

    def _release(self, number: int) -> Release:
        """Return the release of a round, as the ledger names it."""
        plan = self.plan
        events = dict.fromkeys(plan.adversaries, plan.event_of(number))
        rng, segments = self.randomness.kind, {UPDATE: TRAINING}
        return Release(plan.unit, self.run, number, MECHANISM, events, rng, segments=segments)


def moved(model: Model, mean: dict[str, NDArray[np.float64]]) -> dict[str, Any]:
    """Return a model plus a mean update, computed in float64; what is not averaged stays."""
    new = dict(model)
    for name, step in mean.items():
        value = new[name]
        new[name] = np.add(value, step, out=np.empty_like(value), casting="unsafe")
    return new


@contextmanager
def job_rounds(terms: JobTerms) -> Generator[JobRounds]:
    """Open the ledger of a job, and plan its rounds within what is left; use it in a `with` block.

    Raises:
      Refusal: the terms are invalid, or the budget is spent.
      LedgerUnavailable: another process has the ledger open, or it cannot be written.
    """
    plan, warning = terms.plan()  # as if nothing was spent: bad terms are refused before a ledger is made
    if warning:
        logger.warning(warning)
    budget = terms.budget
    with open_ledger(terms.path, terms.data_id, budget) as ledger:
        plan = fitted(plan, budget, ledger, [])
        terms.require_use(plan)
        yield JobRounds(terms, plan, ledger, budget)
