"""Federation and its run: task, cohort, levels of privacy, masking, ledger, and the values fixed before round 1."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..base.refusal import Refusal
from ..configs.schema import (
    ClientDistributed,
    ClientLevel,
    CustomTask,
    NoCompression,
    Record,
    RecordAndClient,
    RecordDistributed,
    SimulationSettings,
    SumLevel,
    sum_level,
)
from ..messages.client_settings import TRAIN_LOSS
from ..messages.training_order import Mode
from ..populations.canary_clients import count_canaries
from ..populations.canary_records import canary_records_of_each, records_are_audited
from ..populations.population import Population
from ..privacy.budget import UNLIMITED_EPSILON, Adversary, Budget, Unit
from ..privacy.ledger.caps import POPULATION, RECORDS
from ..privacy.mechanisms.compression import CompressionPlan
from ..privacy.mechanisms.mechanism import CENTRAL, Mechanism, mechanism_of
from ..privacy.mechanisms.randomness import Randomness
from ..privacy.mechanisms.sizing import WEIGHT
from ..privacy.mechanisms.sum_spec import Segment
from ..privacy.secagg.suite import SUITES
from ..privacy.secagg.transcript import Profile
from ..server.masking import Masking
from ..server.round_terms import UnitsOfClient
from ..strategies.cohorts import Cohort, invited_size
from ..tasks.data import Data, data_of, size_of
from ..tasks.persons import Owners, kept
from ..tasks.protocol import Task

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent
    from flwr.serverapp.strategy import Strategy


T = TypeVar("T")

# a mean cross-entropy above this is reported as this; uniform guessing among 100 classes has 4.6
LOSS_BOUND = 5.0
# a client's count of examples is clipped to this number of batches
COUNT_BOUND_BATCHES = 10
OFTEN = 6.0  # standard deviations: a draw is larger once in 10^9, and then loses length
CLIENT_ADVERSARIES = (Adversary.CLIENTS, Adversary.MODEL)  # the trusted server sees single updates

EVERYBODY = (Adversary.SERVER, Adversary.CLIENTS, Adversary.MODEL)


@dataclass(frozen=True)
class Federation:
    """The parts of a federation.

    Attributes:
      settings: of the user.
      task: loaded.
      cohort: draws the clients.
      seed: of a declared simulation; None on real data.
      population: its clients.
      strategy: given as an object; None makes one from the settings.
      reported: whether a run draws its rounds, and states the spending in its result.
      moments: mean and deviation of the columns that scale the run's inputs, from its clients' answer; None without the
        question.
      simulated_cost: cost of that question in a simulation; empty if the plan's ledgers hold it.
    """

    settings: SimulationSettings
    task: Task
    cohort: Cohort
    seed: int | None
    population: Population
    strategy: Strategy | None = None
    reported: bool = True
    moments: Mapping[str, tuple[float, float]] | None = None
    simulated_cost: tuple[DpEvent, ...] = ()

    @property
    def simulated(self) -> bool:
        """Whether the data are public or synthetic."""
        return self.population.simulated

    @property
    def held_out_public(self) -> bool:
        """Whether what is measured on the held-out data may be shown: the settings say it, else the task, else its data."""
        asked, task = self.settings.task.held_out, self.task
        return getattr(task, "held_out_public", task.simulated) if asked is None else asked == "public"

    @property
    def num_clients(self) -> int:
        """Number of clients."""
        return self.population.num_clients

    @property
    def task_name(self) -> str:
        """Display name of the task: a shipped one's name, the user's label, its attribute `name`, or its class."""
        asked = self.settings.task
        if not isinstance(asked, CustomTask):
            return asked.name
        own = getattr(self.task, "name", None)
        return asked.label or (own if isinstance(own, str) and own else asked.target.partition(":")[2])

    @property
    def declared_clients(self) -> int:
        """Declared number of clients: the denominator of the mean, and the only number that is printed."""
        return self.settings.population or self.num_clients

    @cached_property
    def num_canaries(self) -> int:
        """Number of canary clients."""
        return count_canaries(self.settings, self.task)

    @cached_property
    def canary_records(self) -> int:
        """Number of canary records at each client; 0 on real data, which only the client may read."""
        if not self.simulated or not records_are_audited(self.settings):
            return 0
        return canary_records_of_each(self.task.num_clients, self.sizes[0])

    @property
    def num_nodes(self) -> int:
        """Number of nodes of a simulation: real clients and canaries."""
        return self.num_clients + self.num_canaries

    @cached_property
    def randomness(self) -> Randomness:
        """Source of draws and noise."""
        return Randomness(self.seed)

    @property
    def summed(self) -> SumLevel | None:
        """The client-level part of the privacy settings."""
        return sum_level(self.settings.privacy)

    @property
    def mode(self) -> Mode:
        """The group `privacy` of the configuration."""
        return Mode(self.settings.privacy.name)

    @property
    def distributed(self) -> bool:
        """Whether each client adds a share of the noise, so that the server need not be trusted."""
        return isinstance(self.summed, ClientDistributed | RecordDistributed)

    @property
    def together(self) -> RecordDistributed | None:
        """The part of the privacy settings for joint record-level privacy in one sum."""
        return _as(RecordDistributed, self.settings.privacy)

    @property
    def unit_norm(self) -> float:
        """Largest change of a sum by one unit, in the units of the model: a client's update, or a step on one record."""
        if self.together is not None:
            return self.together.max_grad_norm * self.settings.training.learning_rate
        assert isinstance(self.summed, ClientLevel)
        return self.summed.clipping_norm

    @property
    def longest_norm(self) -> float:
        """The unit's norm under the value, of those that are tried, that makes it longest."""
        if self.tuned_norm is None:
            return self.unit_norm
        return self.unit_norm * max(self.settings.tried) / self.tuned_norm

    @property
    def tuned_norm(self) -> float | None:
        """The tuned value that gives the unit its norm; None without tuning, or if the norm does not depend on it."""
        asked = self.settings.tuned
        if asked is not None and asked.name == "clipping_norm":
            return self.unit_norm
        if asked is not None and asked.name == "learning_rate" and self.together is not None:
            # Of a step on one record, which the rate makes longer.
            return self.settings.training.learning_rate
        return None

    @cached_property
    def units(self) -> UnitsOfClient:
        """Number of privacy units in a client's vector."""
        if self.together is None:
            return UnitsOfClient()
        rate, most = self.together.sample_rate, self.most_records + self.canary_records
        drawn = rate * most + OFTEN * math.sqrt(rate * (1 - rate) * most + 1)
        return UnitsOfClient(max(1.0, min(float(most), drawn)), rate * self.records / self.num_clients)

    @property
    def hidden(self) -> int:
        """Number of privacy units in the population."""
        return self.declared_clients if self.together is None else self.records

    @cached_property
    def records(self) -> int:
        """Number of all clients' records, declared or, in a simulation, counted."""
        declared = None if self.together is None else self.together.records
        return declared or sum(size * clients for size, clients in self._clients_of_size.items())

    @cached_property
    def _clients_of_size(self) -> Counter[int]:
        """How many clients have how many records; where they are hidden, with those that they hold out, as nobody may tell."""
        holds_out = self.together is not None and self.settings.evaluate.clients != "none"
        clients = range(self.task.num_clients)
        if holds_out or self.per_person is None:
            return Counter(size_of(self.task, client, holds_out) for client in clients)
        return Counter(len(self.data_of(client)) for client in clients)

    @property
    def most_records(self) -> int:
        """Bound on the records of one client, declared or, in a simulation, counted."""
        declared = None if self.together is None else self.together.most_records
        return declared or self.sizes[-1]

    @property
    def keeps_counts(self) -> bool:
        """Whether only the operator of a trusted server may see cohorts and dropouts.

        The client level hides both from `clients` and `model`. An untrusted server sees them anyway, and has the same
        guarantee.
        """
        return self.summed is not None and not self.distributed

    @property
    def adversaries(self) -> tuple[Adversary, ...]:
        """Adversaries of the client level."""
        return EVERYBODY if self.distributed else CLIENT_ADVERSARIES

    @cached_property
    def identities(self) -> str:
        """What simulated identities are made from, 32 bytes in hexadecimal; of the system's generator on real data."""
        return self.randomness.stream("identities").bytes(32).hex()

    @cached_property
    def masking(self) -> Masking | None:
        """Encryption of the sums, if any.

        Raises:
          Refusal: a cohort of the expected size cannot stand the stated dropout beside the stated collusion.
        """
        asked = self.settings.secagg
        if asked is None:
            return None
        roster, signed = self.population.sign(self.identities, self.num_nodes, self.doubly_signed)
        masking = Masking(
            roster,
            asked.dropout,
            asked.collusion,
            Profile(asked.profile),
            asked.bits,
            asked.clipping_norm,
            self.population.most_examples(
                COUNT_BOUND_BATCHES * self.settings.training.batch_size, lambda: self.sizes[-1]
            ),
            asked.suite,
            signed_roster=signed,
        )
        real = invited_size(self.cohort, self.num_clients)
        masking.shape(round(real * self.num_nodes / self.num_clients))
        return masking

    @property
    def doubly_signed(self) -> bool:
        """Whether the suite of the encrypted sums has ML-DSA beside Ed25519."""
        asked = self.settings.secagg
        return asked is not None and SUITES[asked.suite].doubly_signed

    @property
    def compression(self) -> CompressionPlan | None:
        """Compression of updates before clipping, if any."""
        asked = self.settings.compress
        if isinstance(asked, NoCompression):
            return None
        return CompressionPlan(asked.name, asked.ratio, asked.cells)

    @property
    def sends_differences(self) -> bool:
        """Whether a client that holds an earlier model gets only the difference."""
        return self.settings.compress.down is not None

    @property
    def record(self) -> Record | None:
        """The record-level part of the privacy settings."""
        privacy = self.settings.privacy
        return privacy.record if isinstance(privacy, RecordAndClient) else _as(Record, privacy)

    @property
    def per_person(self) -> int | None:
        """Largest number of one person's examples that a client trains on; None without a bound."""
        level = self.record or self.together
        return None if level is None else level.per_person

    @property
    def records_of_unit(self) -> int:
        """Largest number of records of one unit, each drawn by its own coin."""
        return (self.per_person or 1) * (1 if self.together is None else self.clients_per_person or 1)

    @property
    def clients_per_person(self) -> int | None:
        """Largest number of clients that train on one person; None without a bound."""
        level = self.record or self.together
        most = None if level is None else level.clients_per_person
        return None if most is None else self.population.most_clients(most)

    def data_of(self, client: int) -> Data:
        """Return a client's training data, without a person's examples beyond the limit."""
        most = self.clients_per_person
        owners = None if most is None else Owners(client, range(self.num_clients), most)
        return kept(data_of(self.task, client), self.per_person, owners)

    @property
    def gradients(self) -> str:
        """The requested engine of DP-SGD; `auto` if clients choose it, or train without."""
        level = self.record or self.together
        return "auto" if level is None else level.gradients

    @property
    def sum_budget(self) -> Budget | None:
        """The budget of the population's ledger, if any, within the data owner's caps."""
        budget = None if self.summed is None else _budget(self.summed.unit, self.summed)
        return None if budget is None else self.population.within_caps(self.ledger_path(Path()), budget)

    @property
    def record_budget(self) -> Budget | None:
        """The budget of each client's own ledger, if there is one."""
        return None if self.record is None else _budget(self.record.unit, self.record)

    @property
    def metrics(self) -> tuple[Segment, ...]:
        """Which metrics may leave a client.

        With record-level privacy the loss stays at home, since nobody accounted for it; the number of examples is
        public under zero-out adjacency.
        """
        if self.together is not None or (self.record is not None and self.summed is None):
            return ()
        loss = () if self.record is not None else (Segment(TRAIN_LOSS, LOSS_BOUND),)
        if self.summed is None:
            return loss
        return (*loss, Segment(WEIGHT, float(COUNT_BOUND_BATCHES * self.settings.training.batch_size)))

    @cached_property
    def mechanism(self) -> Mechanism:
        """The law of the noise on the sums; where clients take part by turns, the run is one release anyhow."""
        if self.summed is None:
            return CENTRAL
        return mechanism_of(self.summed.noise, self.cohort.turns, self.settings.num_rounds, self.summed.bands)

    @cached_property
    def sizes(self) -> list[int]:
        """The distinct sizes of clients' data, ascending; a client without examples sits out."""
        sizes = self._clients_of_size.keys() - {0}
        if not sizes:
            raise Refusal("task", self.task_name, "no client has an example; give it data")
        return sorted(sizes)

    def ledger_path(self, folder: Path) -> Path:
        """Return where the population's ledger lives: with the run if its data are simulated, else with the data."""
        prefix = POPULATION if self.together is None else POPULATION + RECORDS
        return self.population.ledger_path(prefix, folder)


def _as(kind: type[T], value: object) -> T | None:
    return value if isinstance(value, kind) else None


def _budget(unit: Unit, level: SumLevel | Record | None) -> Budget | None:
    if level is None:
        return None
    return Budget(unit, level.target_epsilon or UNLIMITED_EPSILON, level.target_delta, level.adjacency)
