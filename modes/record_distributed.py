"""Mode `record_distributed`: one step of DP-SGD on the records of all clients, whose shares of noise hide each record."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from dp_accounting.dp_event import DpEvent

from ..configs.privacy_settings import RecordDistributed
from ..messages.client_settings import ClientSettings
from ..messages.record_settings import NO_CANARY_RECORDS, CanaryRecords, StepTerms
from ..messages.training_order import ModeName, RecordTerms
from ..privacy.budget import Adjacency, Unit
from ..privacy.ledger.caps import POPULATION, RECORDS
from ..privacy.mechanisms.sum_spec import Segment, SumSpec
from ..privacy.plan import Plan, Sampling
from ..server.round_terms import UnitsPerClient
from ..strategies.record_plan import PoissonBatches
from .mode import Events, Mode
from .sums import SumMode

if TYPE_CHECKING:
    from ..server.masking import Masking

MAX_DEVIATIONS = 6.0  # standard deviations above a client's mean draw; larger ones, once in 10^9, are clipped
ALL_RECORDS = PoissonBatches(1.0, 1)  # of questions and evaluations, which every record answers


class RecordDistributedMode(SumMode):
    """Hides single records from everybody, by noise that all clients share."""

    distributed = True
    charges_records = str(ModeName.RECORD_DISTRIBUTED)
    sums_records = True
    ledger_prefix = POPULATION + RECORDS
    question_rate = 1.0
    clear_sums = "Here the sum is formed in one pass; real clients mask their vectors, so the server sees only the sum."

    @property
    def step(self) -> RecordDistributed:
        """The settings of the joint step."""
        assert isinstance(self.level, RecordDistributed)
        return self.level

    @property
    def metrics(self) -> tuple[Segment, ...]:
        """Which metrics may leave a client: none, since no record is charged for a loss."""
        return ()

    @property
    def sampling_words(self) -> str:
        """How records are sampled, in a result."""
        return "poisson, by a coin for each record of all clients"

    @property
    def round_sampling(self) -> Sampling:
        """How a round samples the records."""
        return PoissonBatches(self.step.sample_rate, 1, of_unit=self.records_of_unit)

    @property
    def unit_norm(self) -> float:
        """Length of a step on one record."""
        return self.step.clip * self.parts.settings.training.learning_rate

    @property
    def tuned_norm(self) -> float | None:
        """The learning rate, if it is tuned: it makes a step on one record longer."""
        tuned = self.parts.settings.tune.name == "learning_rate"
        return self.parts.settings.training.learning_rate if tuned else None

    # --- persons and records ---------------------------------------------------------------------------------------

    @property
    def per_person(self) -> int | None:
        """Largest number of one person's examples that a client trains on; None without a bound."""
        return self.step.per_person

    @property
    def clients_per_person(self) -> int | None:
        """Largest number of clients that train on one person; None without a bound."""
        return self.parts.population.max_clients(self.step.clients_per_person)

    @property
    def records_of_unit(self) -> int:
        """Largest number of records of one unit, each drawn by its own coin."""
        return (self.per_person or 1) * (self.clients_per_person or 1)

    @property
    def gradients(self) -> str:
        """The requested engine of DP-SGD."""
        return self.step.gradients

    @cached_property
    def records(self) -> int:
        """Number of all clients' records, declared or, in a simulation, counted."""
        return self.step.records or super().records

    @property
    def max_records(self) -> int:
        """Bound on the records of one client, declared or, in a simulation, counted."""
        return self.step.most_records or self.sizes[-1]

    @property
    def num_units(self) -> int:
        """Number of records."""
        return self.records

    @cached_property
    def units(self) -> UnitsPerClient:
        """Largest and expected number of records in a client's vector of one step, both from public numbers."""
        rate, max_records = self.step.sample_rate, self.max_records + self.extra_records
        max_drawn = rate * max_records + MAX_DEVIATIONS * math.sqrt(rate * (1 - rate) * max_records + 1)
        expected = rate * self.records / self.parts.num_clients
        return UnitsPerClient(max(1.0, min(float(max_records), max_drawn)), expected)

    @property
    def expected_units(self) -> float:
        """Expected number of records in a step."""
        return self.step.sample_rate * self.records

    def sum_spec(self, plan: Plan) -> SumSpec:
        """Return the grid on which steps are added: a vector has room for `units.maximum` records of the unit's norm."""
        return SumSpec(plan.clipping_norm * self.units.maximum, unit_norm=plan.clipping_norm)

    def sums_before(self) -> Sequence[DpEvent]:
        """Return a record's events by earlier sums of clients that the ledger of all records does not hold."""
        return self.parts.population.sums_of_clients(self.step.adjacency)

    # --- questions -------------------------------------------------------------------------------------------------

    @property
    def max_rows(self) -> float | None:
        """Bound on the rows of a client that answer an evaluation."""
        return float(self.max_records)

    @property
    def question_sampling(self) -> Sampling:
        """How a question samples the records: all of them."""
        return ALL_RECORDS

    @property
    def evaluation_sampling(self) -> Sampling:
        """How an evaluation samples the records: all of them."""
        return ALL_RECORDS

    @property
    def holds_out_apart(self) -> bool:
        """Whether held-out records count as records of a client, so that public sizes do not reveal how many of them train."""
        return not self.parts.settings.query_fields.keys().isdisjoint(("evaluation", "personal"))

    def evaluation(self, noise_multiplier: float) -> Plan:
        """Return the plan of one evaluation at all clients; refuse it where the unit is a person with several records."""
        if self.step.unit is not Unit.RECORD:
            return Mode.evaluation(self, noise_multiplier)
        return super().evaluation(noise_multiplier)

    # --- clients ---------------------------------------------------------------------------------------------------

    def instruct(
        self, client: ClientSettings, folder: Path, rounds: int, resumed: bool, events: Events
    ) -> ClientSettings:
        """Return the settings of clients of this machine, with the terms of a step, and the canaries of the run's observer."""
        return replace(client, step=StepTerms(self.record_order(), canaries=self._canaries()))

    def _canaries(self) -> CanaryRecords:
        """Return the observer's canary records; their secret seed decides which of them take part."""
        parts = self.parts
        if not self.extra_records:
            return NO_CANARY_RECORDS
        seed = parts.randomness.stream("canary records").bytes(32).hex()
        replaced = self.step.adjacency is Adjacency.REPLACE_ONE
        return CanaryRecords(self.extra_records, parts.num_clients, seed, replaced)

    def record_order(self) -> RecordTerms:
        """Return the terms of the joint step in an order."""
        step, budget = self.step, self.budget
        return RecordTerms(
            target_epsilon=budget.target_epsilon,
            target_delta=budget.target_delta,
            max_grad_norm=step.clip,
            adjacency=step.adjacency,
            gradients=step.gradients,
            per_person=step.per_person,
            clients_per_person=step.clients_per_person,
            sample_rate=step.sample_rate,
        )

    def limits(self, plan: Plan, masking: Masking | None) -> list[str]:
        """Return sentences on what the plan does not protect from: the server, or colluding clients, and then persons."""
        return [*super().limits(plan, masking), self.unit_limit]

    def persons(self, clients: int) -> str:
        """Return a sentence on a person whose examples at most so many clients train on."""
        return f"At most {clients} clients train on one person, and all of that is one unit."


MODE = RecordDistributedMode
