"""Mode of privacy: what a run promises to whom, and what that asks of its clients, its sums and its ledgers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ..base.refusal import Refusal
from ..configs.privacy_settings import PrivacySettings
from ..configs.schema import SimulationSettings
from ..configs.task_settings import CustomTask
from ..configs.values import HIDDEN_CLIENTS
from ..messages.client_settings import TRAIN_LOSS, ClientSettings
from ..messages.training_order import ClientClaim, ModeName, RecordTerms
from ..populations.population import Population, extra_of
from ..privacy.adaptation import NOTHING_ADAPTS, Adaptation
from ..privacy.budget import UNLIMITED_EPSILON, Adjacency, Adversary, Budget, Unit
from ..privacy.ledger.caps import POPULATION
from ..privacy.mechanisms.mechanism import CENTRAL, Mechanism
from ..privacy.mechanisms.randomness import Randomness
from ..privacy.mechanisms.sum_spec import Segment
from ..privacy.plan import Plan
from ..privacy.preconditions import check_adjacency
from ..privacy.sampling import NO_BOUNDS, Turns
from ..server.round_terms import UnitsPerClient
from ..strategies.cohorts import Cohort
from ..tasks.data import Data, data_of, size_of
from ..tasks.persons import Owners, limit_per_person
from ..tasks.protocol import Task

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

    from ..privacy.plan import Sampling
    from ..server.masking import Masking

LOSS_BOUND = 5.0  # to which a client clips its mean loss; uniform guessing among 100 classes has 4.6
COUNT_BOUND_BATCHES = 10  # to which a client clips its number of examples
EVERYBODY = (Adversary.SERVER, Adversary.CLIENTS, Adversary.MODEL)
TWO_UNITS = "A person at two clients is two units: the losses at both add up."
Events = Callable[[], "Sequence[DpEvent]"]  # what queries cost a unit; called only to plan clients' noise


@dataclass(frozen=True)
class Parts:
    """Parts of a federation, of which its mode of privacy is a view.

    Attributes:
      settings: settings of the user.
      task: model, loss and data of the clients.
      cohort: draws the clients.
      seed: repeats draws and noise; None on real data, except on this machine in a mode that charges nobody.
      population: the clients, and where their ledgers are.
    """

    settings: SimulationSettings
    task: Task
    cohort: Cohort
    seed: int | None
    population: Population

    @property
    def simulated(self) -> bool:
        """Whether the data are public or synthetic."""
        return self.population.simulated

    @property
    def task_name(self) -> str:
        """Display name of the task: a shipped one's name, the user's label, its attribute `name`, or its class."""
        task = self.settings.task
        if not isinstance(task, CustomTask):
            return task.option
        name = getattr(self.task, "name", None)
        return task.label or (name if isinstance(name, str) and name else task.target.partition(":")[2])

    @property
    def num_clients(self) -> int:
        """Number of clients."""
        return self.population.num_clients

    @property
    def turns(self) -> Turns:
        """Bounds on the participation of a client that the cohort keeps."""
        return self.cohort.turns or NO_BOUNDS

    @property
    def declared_clients(self) -> int:
        """Declared number of clients: the denominator of the mean, and the only number that is printed."""
        return self.settings.population or self.num_clients

    @cached_property
    def randomness(self) -> Randomness:
        """Source of draws and noise."""
        return Randomness(self.seed)


@dataclass(frozen=True)
class Promise:
    """One guarantee of a mode: whose contribution is hidden, from whom, and within which budget.

    Attributes:
      unit: whose contribution is hidden.
      target_epsilon, target_delta: of the budget; an epsilon of None sets no limit.
      adjacency: which two data sets are neighbours.
      noise_multiplier: as the settings give it; None where it is planned from the budget.
      adversaries: from whom it is hidden.
      sampling: how units are sampled, in words of a result.
      per_client: whether each client's own ledger is charged, in place of the one of all clients.
    """

    unit: Unit
    target_epsilon: float | None
    target_delta: float
    adjacency: Adjacency
    noise_multiplier: float | None
    adversaries: tuple[Adversary, ...]
    sampling: str
    per_client: bool = False

    @property
    def budget(self) -> Budget:
        """The configured budget of the ledger that pays for it; the caps of the data's owner may lower it."""
        return Budget(self.unit, self.target_epsilon or UNLIMITED_EPSILON, self.target_delta, self.adjacency)


@dataclass(frozen=True, eq=False)
class Mode:
    """What a run promises. What it does by default suits `privacy=none`, which promises nothing.

    A mode adds to the one that it extends, by `super()`, so that two are composed by inheriting from both.

    Attributes:
      parts: parts of the federation whose clients are protected.
      distributed: whether each client adds a share of the noise, so that the server need not be trusted.
      hides_counts: whether only the operator of a trusted server may see cohorts and dropouts, which are hidden from the
        clients and the model. An untrusted server sees them anyway, and has the same guarantee.
      charges_records: name of the mode that charges the ledgers of records; empty where they are not charged.
      sum_source: `Release.source` of the sums on a ledger of real clients: `OF_RECORDS` if clients' own ledgers pay
        for their records, so that the sums do not charge them again; None otherwise.
      spends: whether a run charges anybody.
      usual_over_selection: default ratio of invited to planned clients, above 1 where a larger draw costs no privacy.
      public_draw: why the draw of a cohort is public, as reports state it; empty where the draw may be secret.
      hides_clients: whether the sums hide whole clients.
      sums_cost_records: whether a sum of whole clients costs their records something in addition.
      sums_records: whether a sum is of clipped records, in which every client takes part.
      ledger_prefix: prefix in the file name of the ledger of all clients.
      share_of_models: where no noise is on the sums, the last share of the rounds, whose models a run averages.
      question_rate: rate at which a question's order samples records into one sum; None where each client noises its own
        answer.
    """

    parts: Parts

    distributed = False
    hides_counts = False
    charges_records = ""
    sum_source: ClassVar[str | None] = None
    spends = True
    usual_over_selection = 1.0
    public_draw = ""
    hides_clients = False
    sums_cost_records = False
    sums_records = False
    ledger_prefix = POPULATION
    share_of_models = 0.0
    question_rate: ClassVar[float | None] = None

    @property
    def name(self) -> ModeName:
        """The group `privacy` of the configuration."""
        return ModeName(self.parts.settings.privacy.name)

    @property
    def promises(self) -> tuple[Promise, ...]:
        """Guarantees, () if none: the first is by the noise on the sums, if there is such noise; the last by each client's."""
        return ()

    @property
    def budget(self) -> Budget | None:
        """The budget of the ledger of all clients, within its owner's caps; None if the sums charge no ledger."""
        return None

    @property
    def client_budget(self) -> Budget | None:
        """The budget of each client's own ledger; None if clients have none."""
        return None

    @property
    def metrics(self) -> tuple[Segment, ...]:
        """Metrics that may leave a client, each with the bound to which it is clipped."""
        return (Segment(TRAIN_LOSS, LOSS_BOUND),)

    @cached_property
    def mechanism(self) -> Mechanism:
        """The law of the noise on the sums."""
        return CENTRAL

    # --- persons and records ---------------------------------------------------------------------------------------

    @property
    def per_person(self) -> int | None:
        """Largest number of one person's examples that a client trains on; None without a bound."""
        return None

    @property
    def clients_per_person(self) -> int | None:
        """Largest number of clients that train on one person; None without a bound."""
        return None

    @property
    def records_of_unit(self) -> int:
        """Largest number of records of one unit, each drawn by its own coin."""
        return self.per_person or 1

    @property
    def gradients(self) -> str:
        """The requested engine of DP-SGD; `auto` if clients choose it, or train without."""
        return "auto"

    @cached_property
    def extra_records(self) -> int:
        """Number of canary records that the run's observer adds at each client; 0 on real data, which only the client reads."""
        if not self.parts.simulated:
            return 0
        settings = self.parts.settings
        return extra_of(settings).extra_records(settings, self.parts.task.num_clients, lambda: self.sizes[0])

    @cached_property
    def records(self) -> int:
        """Number of all clients' records, which a simulation counts."""
        return sum(size * clients for size, clients in self._clients_of_size.items())

    @cached_property
    def _clients_of_size(self) -> Counter[int]:
        """Number of clients by their number of records."""
        task, with_held_out = self.parts.task, self.holds_out_apart
        clients = range(task.num_clients)
        if with_held_out or self.per_person is None:
            return Counter(size_of(task, client, with_held_out) for client in clients)
        return Counter(len(self.data_of(client)) for client in clients)

    def data_of(self, client: int) -> Data:
        """Return a client's training data, without the examples of a person beyond `per_person` and `clients_per_person`."""
        max_clients = self.clients_per_person
        owners = None if max_clients is None else Owners(client, range(self.parts.num_clients), max_clients)
        return limit_per_person(data_of(self.parts.task, client), self.per_person, owners)

    @cached_property
    def sizes(self) -> list[int]:
        """The distinct numbers of examples at clients, ascending, without 0; refuse a federation without a single example."""
        self.check_sizes()
        return sorted(self._clients_of_size.keys() - {0})

    def check_sizes(self) -> None:
        """Refuse a federation without a single example."""
        if not self._clients_of_size.keys() - {0}:
            raise Refusal("task", self.parts.task_name, "no client has an example; give it data")

    def ledger_path(self, folder: Path) -> Path:
        """Return the path of the ledger of all clients: in the run's folder if data are simulated, else with the data."""
        return self.parts.population.ledger_path(self.ledger_prefix, folder)

    @property
    def num_units(self) -> int:
        """Number of privacy units in the population: delta should be below 1 / this number."""
        return self.parts.declared_clients

    @cached_property
    def units(self) -> UnitsPerClient:
        """Largest and expected number of privacy units in one client's vector: 1 and 1 where the client is the unit."""
        return UnitsPerClient()

    @property
    def expected_units(self) -> float:
        """Expected number of units in the sum of a round."""
        return self.parts.cohort.expected_size(self.parts.declared_clients)

    # --- sums ------------------------------------------------------------------------------------------------------

    @property
    def unit_norm(self) -> float:
        """L2 norm to which one unit's part of a sum is clipped; the noise is a multiple of it."""
        return 1.0

    @property
    def tuned_norm(self) -> float | None:
        """The configured value of a tuned setting to which `unit_norm` is proportional, so that arms rescale it; else None."""
        return None

    @property
    def longest_norm(self) -> float:
        """Largest norm of a unit under all tried values; simulated clients refuse an encrypted sum with a larger one."""
        secagg = self.parts.settings.secagg
        assert secagg is not None
        return secagg.clipping_norm

    @property
    def adapts_noise(self) -> bool:
        """Whether the noise is chosen as the run goes."""
        return False

    @property
    def adapts_clip(self) -> bool:
        """Whether the clipping norm is chosen as the run goes."""
        return False

    def round_plan(self, num_rounds: int, filter_order: float | None = None) -> Plan | None:
        """Return the plan of the rounds, with the noise of the settings if they give it; None without noise on the sums.

        Args:
          num_rounds: number of rounds that are left.
          filter_order: order of the RDP filter that the ledger already uses; None without one.
        """
        return None

    def with_noise(self, noise_multiplier: float) -> PrivacySettings:
        """Return the privacy settings with this noise on the sums, in place of noise planned from a budget."""
        return self.parts.settings.privacy

    def adaptation(self, plan: Plan, prior: tuple[DpEvent, ...], start_round: int) -> Adaptation:
        """Return the rules by which each round's clip and noise follow from earlier releases.

        Args:
          plan: plan of the remaining rounds.
          prior: events that the ledger already holds.
          start_round: the round after which `plan` applies.
        """
        return NOTHING_ADAPTS

    def metrics_share(self, plan: Plan) -> float:
        """Return the metrics' share of the squared norm of a unit, in [0, 1); the update may use the rest."""
        return 0.0

    def sums_before(self) -> Sequence[DpEvent]:
        """Return what earlier sums cost a unit that are not on its ledger; a plan counts these events as spent."""
        return ()

    # --- questions -------------------------------------------------------------------------------------------------

    @property
    def max_rows(self) -> float | None:
        """Bound on the rows of a client that answer an evaluation; None where a client answers as a whole."""
        return None

    @property
    def question_sampling(self) -> Sampling:
        """How a question samples the units: whether the draw lowers its cost follows from this."""
        return self.parts.cohort

    @property
    def holds_out_apart(self) -> bool:
        """Whether held-out records count as records of a client, so that public sizes do not reveal how many of them train."""
        return False

    def noise_of_answers(self, plan: Plan) -> float:
        """Return the noise's standard deviation on a question's sum, over the norm of one unit, for the answers' intervals."""
        return plan.noise_over_clip

    def question_ledgers(self) -> list[Path]:
        """Return the paths of the ledgers on this machine that a run's question charges; their caps may forbid its purpose."""
        return []

    def evaluation(self, noise_multiplier: float) -> Plan:
        """Return the plan of one evaluation at all clients. By default refuse: no promise covers it."""
        field, value = self.parts.settings.query_fields["evaluation"]
        raise Refusal(field, value, f"{HIDDEN_CLIENTS} or record_distributed")

    # --- clients ---------------------------------------------------------------------------------------------------

    @cached_property
    def hides_records(self) -> bool:
        """Whether records are hidden from everybody."""
        return bool(self.charges_records)

    def instruct(
        self, client: ClientSettings, folder: Path, rounds: int, resumed: bool, events: Events
    ) -> ClientSettings:
        """Return the settings of clients of this machine, with the mode's terms of DP-SGD and its noise.

        Args:
          client: settings without these terms.
          folder: folder of the run, under which a simulation has its ledgers.
          rounds: remaining ones, planned with the remaining budget of ledgers of real data; 0 plans all rounds for empty
            ledgers.
          resumed: whether the run has begun, so that what is left of a budget may be too little for a plan.
          events: returns a unit's events outside the rounds.

        Raises:
          Refusal: the budget affords no round.
        """
        return client

    def instruct_for_question(self, client: ClientSettings, folder: Path) -> ClientSettings:
        """Return the settings with which clients of this machine answer a question; `folder` is that of the answers."""
        return client

    def claim(self, plan: Plan) -> ClientClaim | None:
        """Return the noise that an order claims for sums by a plan; None if the sums do not hide whole clients."""
        return None

    def record_order(self) -> RecordTerms | None:
        """Return the terms of DP-SGD in an order; None if records are not protected."""
        return None

    def count_disclosure(self, promise: Promise) -> str | None:
        """Return which public value reveals the number of a promise's units, with the remedy; None if none does."""
        return "a client's sampling rate reveals its number of records; use zero-out"

    def check_adjacencies(self) -> None:
        """Refuse add-or-remove-one, which promises to hide the number of units, where a public value reveals it."""
        for promise in reversed(self.promises):
            check_adjacency("privacy.adjacency", promise.adjacency, self.count_disclosure(promise))

    def client_plan(self, client: ClientSettings) -> Plan:
        """Return the plan of one client's rounds, which its own ledger pays, by settings that `instruct` returned.

        It is that of the data set whose records lose most.
        """
        raise NotImplementedError

    # --- words -----------------------------------------------------------------------------------------------------

    def vacuity(self, plan: Plan) -> str | None:
        """Return a clause, "is vacuous ...", if the noise on the sums hides whatever could be learned; otherwise None."""
        return None

    def limits(self, plan: Plan, masking: Masking | None) -> list[str]:
        """Return sentences on what the plan of a promise does not protect from, with this encryption of the sums, if any."""
        return []

    @property
    def unit_limit(self) -> str:
        """Sentence on the records of one person that a promise about records, or persons, does not cover."""
        if self.per_person is None:
            return "This guarantee does not cover a person whose records are at two clients."
        of_each = "one example" if self.per_person == 1 else f"{self.per_person} examples"
        clients = self.clients_per_person
        across = TWO_UNITS if clients is None else self.persons(clients)
        return f"A client trains on at most {of_each} of one person. {across}"

    def persons(self, clients: int) -> str:
        """Return a sentence on a person whose examples at most so many clients train on."""
        return f"At most {clients} clients train on one person: the losses at {clients} of them add up."
