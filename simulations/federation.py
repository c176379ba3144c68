"""From settings to the parts of a federation: task, cohort, plans, both apps' settings. Nothing runs yet."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from dp_accounting.dp_event import DpEvent

from ..client.app import calibrated_noise, fingerprint, record_plan
from ..client.identity import simulated_roster
from ..client.settings import TRAIN_LOSS, ClientSettings, Encryption, RecordPrivacy
from ..client.tasks import PLANTED
from ..client.tasks.protocol import Task
from ..configs.checks import check_record_delta
from ..configs.schema import (
    ClientCentral,
    ClientDistributed,
    LinkSettings,
    Record,
    RecordAndClient,
    SimulationSettings,
)
from ..privacy.adaptation import Adaptation, AdaptiveNoise
from ..privacy.budget import Adversary, Budget, Unit
from ..privacy.caps import capped, default_folder
from ..privacy.filter import admits
from ..privacy.mechanisms.adaptive_clipping import AdaptiveClipping
from ..privacy.mechanisms.correlated_noise import Correlation
from ..privacy.mechanisms.metrics_share import least_share
from ..privacy.mechanisms.private_sum import Scalar
from ..privacy.mechanisms.randomness import Randomness
from ..privacy.planning import LEAST_NOISE, Plan
from ..privacy.refusal import Refusal
from ..privacy.secagg.roster import Roster
from ..privacy.secagg.transcript import Profile
from ..server.masking import Masking
from ..strategies.cohorts import Cohort, MinSeparation, invited_size, likely_participations
from ..strategies.wire import WEIGHT
from .display import warn
from .dummies import count_canaries
from .faults import Faults
from .record_audit import canaries_of_each, plants_examples

T = TypeVar("T")

LOSS_BOUND = (
    5.0  # a mean cross-entropy above this is reported as this; uniform guessing among 100 classes has 4.6
)
COUNT_BOUND_BATCHES = (
    10  # a client that has more examples than this many batches is counted as having so many
)
UNLIMITED_EPSILON = 1e9  # a run that was given noise and no target only counts
MAX_NOISE_LEVELS = 8  # clients of more different sizes share the noise of the smaller ones, which is safe
CLIENT_ADVERSARIES = (Adversary.CLIENTS, Adversary.MODEL)  # the server is trusted: it sees single updates
EVERYBODY = (Adversary.SERVER, Adversary.CLIENTS, Adversary.MODEL)


@dataclass(frozen=True)
class Deployed:
    """What a server has in the place of its clients' data: who they are, and how rounds go on their network.

    Attributes:
      run: what people call the run; owners may allow it by this name.
      owner: names the federation on its ledger, in hexadecimal.
      roster, signed_roster: of the clients, read and as the authority signed it.
      ledgers: folder of the population's ledger.
      link: how rounds go.
    """

    run: str
    owner: str
    roster: Roster
    signed_roster: bytes
    ledgers: Path
    link: LinkSettings


@dataclass(frozen=True)
class Federation:
    """The parts of a federation.

    Attributes:
      settings: what the user asked for.
      task: loaded.
      cohort: draws the clients.
      seed: of a declared simulation; None on real data.
      deployed: what stands for the clients' data where the clients are real; None where this machine has them all.
    """

    settings: SimulationSettings
    task: Task
    cohort: Cohort
    seed: int | None
    deployed: Deployed | None = None

    @property
    def simulated(self) -> bool:
        """Whether nobody's data are at stake."""
        return self.deployed is None and self.task.simulated

    @property
    def num_clients(self) -> int:
        """The population."""
        return self.task.num_clients if self.deployed is None else len(self.deployed.roster.members)

    @cached_property
    def num_canaries(self) -> int:
        """How many canary clients stand behind the real ones; whose machines are others' have none."""
        return 0 if self.deployed is not None else count_canaries(self.settings, self.task)

    @property
    def num_nodes(self) -> int:
        """All who answer: the real clients and the canaries."""
        return self.num_clients + self.num_canaries

    @cached_property
    def randomness(self) -> Randomness:
        """Where draws and noise come from."""
        return Randomness(self.seed)

    @property
    def client(self) -> ClientCentral | None:
        """The client-level part of the privacy settings."""
        privacy = self.settings.privacy
        return privacy.client if isinstance(privacy, RecordAndClient) else _as(ClientCentral, privacy)

    @property
    def distributed(self) -> bool:
        """Whether clients add the noise, each a share, so that the server need not be trusted."""
        return isinstance(self.client, ClientDistributed)

    @property
    def adversaries(self) -> tuple[Adversary, ...]:
        """Against whom the client level holds."""
        return EVERYBODY if self.distributed else CLIENT_ADVERSARIES

    @cached_property
    def identities(self) -> str:
        """What simulated identities are made from, 32 bytes in hexadecimal; of the system's generator on real data."""
        seeded = self.seed is not None
        return (self.randomness.stream("identities").bytes(32) if seeded else os.urandom(32)).hex()

    @cached_property
    def masking(self) -> Masking | None:
        """How sums are encrypted, if they are.

        Raises:
          Refusal: a cohort of the expected size cannot stand the stated dropout beside the stated collusion.
        """
        asked = self.settings.secagg
        if asked is None:
            return None
        masking = Masking(
            self._roster,
            asked.dropout,
            asked.collusion,
            Profile(asked.profile),
            asked.bits,
            asked.clipping_norm,
            self._most_examples,
            asked.suite,
            signed_roster=b"" if self.deployed is None else self.deployed.signed_roster,
        )
        real = invited_size(self.cohort, self.num_clients)
        masking.shape(round(real * self.num_nodes / self.num_clients))
        return masking

    @property
    def _roster(self) -> Roster:
        if self.deployed is not None:
            return self.deployed.roster
        return simulated_roster(self.identities, self.num_nodes)[0]

    @property
    def _most_examples(self) -> float:
        """Of one client, where examples weigh in an encrypted sum; of a real client nobody else knows it."""
        if self.deployed is not None:
            return float(COUNT_BOUND_BATCHES * self.settings.batch_size)
        return float(self.sizes[-1])

    @property
    def record(self) -> Record | None:
        """The record-level part of the privacy settings."""
        privacy = self.settings.privacy
        return privacy.record if isinstance(privacy, RecordAndClient) else _as(Record, privacy)

    @property
    def client_budget(self) -> Budget | None:
        """The budget of the population's ledger, if there is one, within the caps of whoever owns the data."""
        budget = _budget(Unit.CLIENT, self.client)
        if budget is None or self.simulated:
            return budget
        return capped(self.ledger_path(Path()), budget)

    @property
    def record_budget(self) -> Budget | None:
        """The budget of each client's own ledger, if there is one."""
        return _budget(Unit.RECORD, self.record)

    @property
    def scalars(self) -> tuple[Scalar, ...]:
        """Which metrics may leave a client.

        With record-level privacy the loss stays at home, since nobody accounted for it; the number of examples is
        public under zero-out adjacency.
        """
        if self.record is not None and self.client is None:
            return ()
        loss = () if self.record is not None else (Scalar(TRAIN_LOSS, LOSS_BOUND),)
        if self.client is None:
            return loss
        return (*loss, Scalar(WEIGHT, float(COUNT_BOUND_BATCHES * self.settings.batch_size)))

    @property
    def faults(self) -> Faults:
        """The faults to inject."""
        f = self.settings.faults
        return Faults(f.dropout, f.failure, f.straggler, f.corrupt)

    def metrics_share(self, plan: Plan) -> float:
        """Return what clients pay for their metrics out of the client level's squared norm."""
        given = self.client.metrics_share if self.client else 0.0
        if given is not None:
            return given
        expected = self.cohort.expected_size(self.task.num_clients)
        return least_share(plan.noise_std / plan.clipping_norm, expected, len(self.scalars))

    def client_plan(
        self,
        prior: tuple[DpEvent, ...] = (),
        num_rounds: int | None = None,
        filter_order: float | None = None,
    ) -> Plan | None:
        """Return the calibrated plan of the client level for these rounds, given what the ledger already holds.

        `filter_order` is that of a ledger which goes by an RDP filter already.
        """
        if self.client is None:
            return None
        plan = Plan(
            unit=Unit.CLIENT,
            adjacency=self.client.adjacency,
            sampling=self.cohort,
            clipping_norm=self.client.clipping_norm,
            num_rounds=num_rounds or self.settings.num_rounds,
            noise_multiplier=self.client.noise_multiplier,
            adversaries=self.adversaries,
            filter_order=filter_order,
            correlation=self.correlation,
        )
        if plan.noise_multiplier is not None:
            return plan
        budget = self.client_budget
        assert budget is not None
        adaptive = self.client.noise_schedule == "adaptive"
        return plan.calibrate_for_filter(budget, prior) if adaptive else plan.calibrate(budget, prior)

    @cached_property
    def correlation(self) -> Correlation | None:
        """How the rounds' noise hangs together; where clients take part by turns, the run is one release anyhow."""
        cohort, client = self.cohort, self.client
        if client is None or not isinstance(cohort, MinSeparation):
            return None
        rounds = self.settings.num_rounds
        independent = Correlation(rounds, cohort.separation, cohort.max_participations)
        if client.noise != "correlated":
            return independent
        return replace(independent, bands=client.bands) if client.bands else independent.with_best_bands()

    def adaptation(self, plan: Plan, prior: tuple[DpEvent, ...] = (), begun: int = 0) -> Adaptation:
        """Return what the client level chooses as the run goes, with this plan for the rounds after round `begun`."""
        client, budget = self.client, self.client_budget
        assert client is not None and budget is not None
        clipping = AdaptiveClipping(client.clipping_quantile, client.clipping_learning_rate)
        noise = AdaptiveNoise(plan, budget, TRAIN_LOSS, prior, begun)
        return Adaptation(
            clipping if client.clipping == "adaptive" else None,
            noise if client.noise_schedule == "adaptive" else None,
        )

    def client_plan_with(self, noise_multiplier: float, filter_order: float | None = None) -> Plan | None:
        """Return the plan with the noise that an earlier process of this run settled on."""
        if self.client is None:
            return None
        client = replace(self.client, noise_multiplier=noise_multiplier)
        privacy = self.settings.privacy
        changed = replace(privacy, client=client) if isinstance(privacy, RecordAndClient) else client
        return replace(self, settings=replace(self.settings, privacy=changed)).client_plan(
            filter_order=filter_order
        )

    def client_settings(self, folder: Path) -> ClientSettings:
        """Return what clients are told; record-level noise is planned here, once for each size of data set.

        Real clients plan it themselves, and are told by `deployment.order` what else there is to know.
        """
        s = self.settings
        settings = ClientSettings(
            task=s.task.target or s.task.name,
            task_options={} if self.deployed is not None else task_options(s, self.seed),
            learning_rate=s.learning_rate,
            local_epochs=s.local_epochs,
            batch_size=s.batch_size,
            seed=self.seed,
            allow_modules=s.allow_modules,
            encryption=self._encryption,
        )
        if self.record is None or self.deployed is not None:
            return settings
        where = str(folder / "client_ledgers") if self.task.simulated else str(_ledger_home(s.ledger_dir))
        budget = self.record_budget
        assert budget is not None
        record = RecordPrivacy(
            budget.target_epsilon,
            self.record.target_delta,
            self.record.max_grad_norm,
            str(self.record.adjacency),
            (),
            where,
            self.record.allow_large_delta,
            self.record.gradients,
            canaries_of_each(s, self.task, self.sizes[0]),
        )
        path = "privacy" if self.client is None else "privacy.record"
        warning = check_record_delta(self.record, self.sizes[-1], path)
        if warning:
            warn(warning)
        noise = self.record_noise(record, settings)
        return replace(settings, record=replace(record, noise_by_records=noise))

    @property
    def _encryption(self) -> Encryption | None:
        """What a simulated owner asks of every attempt: what the settings promise."""
        asked = self.settings.secagg
        if asked is None or self.deployed is not None:
            return None
        return Encryption(
            identities=self.identities,
            clients=self.num_nodes,
            minimum_cohort=2,
            collusion=asked.collusion,
            dropout=asked.dropout,
            maximum_clipping_norm=self.client.clipping_norm if self.client else asked.clipping_norm,
            minimum_noise_multiplier=LEAST_NOISE if self.distributed else 0.0,
            profile=asked.profile,
        )

    def record_noise(self, record: RecordPrivacy, settings: ClientSettings) -> tuple[tuple[int, float], ...]:
        """Return (records, noise multiplier) for the sizes of data sets that the clients have."""
        assert self.record is not None
        sizes = self.sizes
        chosen = sizes[:: -(-len(sizes) // MAX_NOISE_LEVELS)]
        if self.record.noise_multiplier is not None:
            noise = ((0, self.record.noise_multiplier),)
            require_one_round(
                record_plan(replace(record, noise_by_records=noise), sizes[-1], settings), record.budget()
            )
            return noise
        rounds = likely_participations(self.cohort, self.num_clients, self.settings.num_rounds)
        return tuple((n, calibrated_noise(record, n, settings, rounds)) for n in chosen)

    @cached_property
    def sizes(self) -> list[int]:
        """The different numbers of examples that clients have, ascending; who has none sits out."""
        sizes = {len(self.task.client_data(client)) for client in range(self.task.num_clients)} - {0}
        if not sizes:
            raise Refusal("task", self.settings.task.name, "no client has an example; give it data")
        return sorted(sizes)

    def ledger_path(self, folder: Path) -> Path:
        """Return where the population's ledger lives: with the run if its data are simulated, else with the data."""
        if self.simulated:
            return folder / "ledger"
        home = _ledger_home(self.settings.ledger_dir) if self.deployed is None else self.deployed.ledgers
        return home / f"population-{self.owner[:32]}.ledger"

    @cached_property
    def owner(self) -> str:
        """The fingerprint of the population: of all clients' data together, or of the federation that they are in."""
        if self.deployed is not None:
            return self.deployed.owner
        if self.task.simulated:
            return f"simulated {self.settings.task.name}"
        return hashlib.sha256("".join(self.fingerprints).encode()).hexdigest()

    @cached_property
    def fingerprints(self) -> list[str]:
        """The fingerprint of each client's data."""
        return [fingerprint(self.task.client_data(client)) for client in range(self.task.num_clients)]


def require_one_round(plan: Plan, budget: Budget, prior: Sequence[DpEvent] = ()) -> None:
    """Refuse noise so small that the budget does not afford a single round."""
    if not admits([*prior, plan.event()], budget, plan.filter_order):
        remedy = (
            f"not even one round fits what is left of epsilon {budget.target_epsilon:g}; raise one of them"
        )
        raise Refusal("noise_multiplier", plan.noise_multiplier, remedy)


def _as(kind: type[T], value: object) -> T | None:
    return value if isinstance(value, kind) else None


def _budget(unit: Unit, level: ClientCentral | Record | None) -> Budget | None:
    if level is None:
        return None
    return Budget(unit, level.target_epsilon or UNLIMITED_EPSILON, level.target_delta, level.adjacency)


def task_options(settings: SimulationSettings, seed: int | None) -> dict[str, int | float | str]:
    if settings.task.target is not None:
        return {}
    options: dict[str, int | float | str | None] = {
        "num_clients": settings.task.num_clients,
        "partition": settings.partition.name,
        "alpha": settings.partition.alpha,
        "seed": seed or 0,
        **settings.task.options,
        PLANTED: plants_examples(settings) or None,
    }
    return {key: value for key, value in options.items() if value is not None}


def _ledger_home(configured: str | None) -> Path:
    return Path(configured) if configured else default_folder()
