"""Models of the configuration: type, range, default and meaning of every key, and the rules between keys.

Hydra composes a configuration, and these models validate it strictly: "8" and ``true`` are not numbers, and infinite
numbers and unknown keys are refused. Models are frozen; in Python they are created with keyword arguments, as in
``ClientCentral(target_epsilon=1.0)``. No other file defines values and meanings of keys.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from ..messages.local_training import ORDER_KEYS, LocalTraining, Optimizer, Schedule
from .engine_settings import Engine, InProcess
from .group import Group, OfExtension, OfExtensions, OfKeys, remedy
from .privacy_settings import (
    ClientCentral,
    ClientDistributed,
    NoSecagg,
    PrivacySettings,
    RecordLevel,
    SecaggSettings,
    levels_of,
    sum_level,
)
from .task_settings import (
    CORE_TASKS,
    AllCohort,
    CohortSettings,
    CsvTask,
    CustomTask,
    CyclicCohort,
    FlwrPartition,
    FolderTask,
    PartitionSettings,
    PoissonCohort,
    TaskGroup,
)
from .training_settings import (
    AutoOptimizer,
    CompressionSettings,
    ConstantSchedule,
    NoCompression,
    OptimizerSettings,
    ScheduleSettings,
    StrategySettings,
)
from .tuning_settings import NoTuning, TuningSettings
from .values import (
    MAX_ROUNDS,
    TRACKERS,
    By,
    CallbackName,
    Clients,
    Module,
    Positive,
    Probability,
    Rounds,
    Text,
    Times,
)


class FaultSettings(Group):
    """Faults that a simulation injects, each with a probability per client and round; their sum is at most 1."""

    dropout: Probability = 0.0
    """No reply: the client vanishes before it trains."""
    failure: Probability = 0.0
    """An error instead of a reply, after the client trained."""
    straggler: Probability = 0.0
    """A reply after the deadline."""
    corrupt: Probability = 0.0
    """An invalid reply: NaN, a wrong shape, a wrong type or a far too long update, in turn."""

    @property
    def any(self) -> bool:
        """Whether any fault has a probability above 0."""
        return max(self.dropout, self.failure, self.straggler, self.corrupt) > 0


class SpeedSettings(Group):
    """Virtual time that each simulated client takes for a round; the time of a usual one is 1."""

    sigma: Annotated[float, Field(ge=0, le=5)] = 0.0
    """Spread of the clients' times: they are log-normal, with this deviation of the logarithm; 0: all take the same."""
    slow: Probability = 0.0
    """Share of the clients that are slow besides."""
    slow_factor: Times = 10.0
    """Their time over that of others."""
    deadline: Positive | None = None
    """Virtual time after which a round ends, and a client is late; null: it waits for all."""

    @property
    def any(self) -> bool:
        """Whether clients differ in speed, or may be late."""
        return max(self.sigma, self.slow) > 0 or self.deadline is not None


class LedgerSettings(Group):
    """Location of the population's ledger."""

    dir: Text | None = None
    """Folder; null: the run folder for simulated data, FOLDER/ledgers of a server, else ~/.local/share/fedveil/ledgers."""


class BudgetSettings(Group):
    """Division of a budget among runs."""

    runs: Annotated[int, Field(ge=1, le=1000)] = 1
    """Number of identical runs on the same data that share the budget; each is planned with its share."""

    def conflicts(self, whole: "FederationSettings") -> Iterator[tuple[str, str]]:
        """Yield (key, message) for settings with which a budget cannot be shared."""
        if self.runs == 1:
            return
        client, levels = sum_level(whole.privacy), levels_of(whole.privacy)
        if not levels or any(level.noise_multiplier for level in levels):
            yield "budget.runs", "plans the noise from a budget; give none by noise_multiplier, or leave it 1"
        if client and client.noise_schedule == "adaptive":
            yield "budget.runs", "needs noise that is fixed in advance; use privacy.noise_schedule=fixed"
        if whole.cohort.by_turns:
            yield "budget.runs", "needs rounds that are a release each; choose another cohort, or leave it 1"
        if self.runs * whole.num_rounds > MAX_ROUNDS:
            yield "budget.runs", f"together the runs may have at most {MAX_ROUNDS} rounds"


def _only_without(room: str) -> Any:
    """Return the field of a key whose other values need an extension that is not installed."""
    return remedy(f"needs fedveil.{room}, which is missing here: install all of fedveil")


class _Ignored(Group):
    """Group of an extension that is not installed: its keys have no effect."""

    model_config = ConfigDict(extra="ignore")


class Off(_Ignored):
    """Group audit without an observer."""

    name: Annotated[Literal["off"], _only_without("audit")] = "off"


class _NoEvaluation(_Ignored):
    """Group evaluate without questions to clients."""

    clients: Annotated[Literal["none"], _only_without("questions")] = "none"


class _NotPersonal(_Ignored):
    """Group personal without models of clients' own."""

    name: Annotated[Literal["none"], _only_without("personal")] = "none"


class FederationSettings(Group):
    """Settings common to a simulation and a server."""

    inline_groups: ClassVar[Mapping[str, tuple[str, ...]]] = {"training": ORDER_KEYS}
    simulates_clients: ClassVar[bool] = True  # so that an audit can add canaries to them; a server's are real
    task: Annotated[TaskGroup, OfExtensions("task settings", CORE_TASKS)]
    cohort: Annotated[CohortSettings, By]
    strategy: Annotated[StrategySettings, By]
    privacy: Annotated[PrivacySettings, By]
    optimizer: Annotated[OptimizerSettings, By] = AutoOptimizer()
    schedule: Annotated[ScheduleSettings, By] = ConstantSchedule()
    secagg_group: Annotated[SecaggSettings | NoSecagg, By] = Field(alias="secagg")
    audit_group: Annotated[Group, OfExtension("audit", Off)] = Field(alias="audit")
    compress: Annotated[CompressionSettings | NoCompression, By] = NoCompression()
    tune: Annotated[TuningSettings, By] = NoTuning()
    training: Annotated[LocalTraining, OfKeys()] = LocalTraining()
    num_rounds: Rounds = 100
    """Number of rounds of the run."""
    model: Literal["last", "average"] = "last"
    """Final model: that of the last round, or the mean of the last rounds; their number depends on the noise."""
    checkpoint_every: Rounds = 1
    """Number of rounds from one checkpoint to the next."""
    measure_every: Rounds = 1
    """Number of rounds from one measurement of the model on public held-out data to the next; the last model is measured."""
    ledger: LedgerSettings = LedgerSettings()
    budget: BudgetSettings = BudgetSettings()
    evaluate: Annotated[Group, OfExtension("evaluate", _NoEvaluation)] = Field(
        default_factory=dict, validate_default=True
    )
    personal: Annotated[Group, OfExtension("personal", _NotPersonal)] = Field(
        default_factory=lambda: {"name": "none"}, validate_default=True
    )
    cost: Annotated[Group, OfExtension("cost", _Ignored)] = Field(default_factory=dict, validate_default=True)
    accept_vacuous: bool = False
    """Train on real data even if the plan calls the guarantee vacuous, or most cohorts would be empty."""
    purpose: Text | None = None
    """Purpose of the run in words; stored with each of its releases on the ledger."""
    reason: Text | None = None
    """Reason for accepting a vacuous guarantee, or for continuing after an alarm; stored on the ledger with the user's name."""
    callbacks: Annotated[
        tuple[CallbackName, ...],
        remedy(f"must hold {', '.join(TRACKERS)}, or classes as 'module:Class'", strict=False),
    ] = ()
    """Callbacks: csv, mlflow, tensorboard, wandb, or your own class as module:Class."""
    allow_modules: Annotated[
        tuple[Module, ...], remedy("must hold module names only, for instance [my_task]", strict=False)
    ] = ()
    """Modules that task.target, strategy.target and callbacks may name, such as [my_task]."""
    group_equal_rows: Annotated[bool, Field(exclude=True)] = False
    """Whether equal records are held out together, as in a run that was started with an earlier release."""
    rate_of_task: Annotated[bool, Field(exclude=True, repr=False)] = False
    """Whether learning_rate is null and still has to be set from the task."""
    source: Annotated[str, Field(exclude=True, repr=False)] = ""
    """Composed configuration as YAML; interpolations are unresolved, so that no secret is saved with it."""

    @model_validator(mode="before")
    @classmethod
    def _mark_rate(cls, values: Any) -> Any:
        """Replace a null learning_rate by the mark `rate_of_task`; a left out one has its default."""
        if not isinstance(values, dict) or values.get("learning_rate", 0) is not None:
            return values
        return {k: value for k, value in values.items() if k != "learning_rate"} | {"rate_of_task": True}

    @property
    def local_training(self) -> LocalTraining:
        """Settings of a client's training in one round."""
        optimizer, schedule = self.optimizer, self.schedule.model_dump()
        return replace(
            self.training,
            learning_rate=optimizer.lr or self.training.learning_rate,
            optimizer=Optimizer(optimizer.name, tuple(optimizer.options.items())),
            schedule=Schedule(rounds=self.num_rounds, **schedule),
        )

    @property
    def tried(self) -> tuple[float, ...]:
        """Values that tuning compares, one for each arm; () without tuning."""
        return self.tune.values or self.tune.usual(self)

    @property
    def scored_at_clients(self) -> bool:
        """Whether tuning compares the arms' models by evaluations at their clients."""
        return self.tune.score == "clients"

    @property
    def query_fields(self) -> Mapping[str, tuple[str, object]]:
        """Kinds of query that the run sends to its clients, in order, each with the (key, value) that requests it."""
        return {name: field for group in self.groups for name, field in group.queries(self).items()}

    @property
    def options_of_groups(self) -> Mapping[str, Any]:
        """Options of every task that the groups add, for the clients and for a server."""
        return {name: value for group in self.groups for name, value in group.options_of_task(self).items()}

    @property
    def groups(self) -> Iterator[Group]:
        """All groups of keys."""
        values = (getattr(self, field) for field in type(self).model_fields)
        return (each for each in values if isinstance(each, Group))

    @property
    def tuning_rounds(self) -> int:
        """Number of rounds of each arm, before the run continues with the best value; 0 without tuning."""
        return self.tune.rounds_of_arm(self.num_rounds)

    @property
    def steps(self) -> int:
        """Number of sums in the run: each arm's round is one, although a client takes part in at most num_rounds."""
        more = max(0, len(self.tried) - 1)
        return self.num_rounds + more * self.tuning_rounds

    def measures(self, number: int) -> bool:
        """Return whether the model is measured on public held-out data after this round."""
        return number % self.measure_every == 0 or number == self.steps

    def rounds_begun(self, steps: int) -> int:
        """Return the largest number of rounds in which a client, of one arm at most, may have taken part after `steps` sums."""
        arms = max(1, len(self.tried))
        # The arms' rounds come first, each of which has one sum for each arm.
        if steps < arms * self.tuning_rounds:
            return math.ceil(steps / arms)
        return self.num_rounds - (self.steps - steps)

    def rounds_left(self, steps: int) -> int:
        """Return the largest number of rounds in which a client, of one arm at most, may still take part after `steps` sums."""
        arms = max(1, len(self.tried))
        if steps < arms * self.tuning_rounds:
            return self.num_rounds - steps // arms
        return self.steps - steps

    @property
    def secagg(self) -> SecaggSettings | None:
        """Settings of secure aggregation; None if vectors are sent unencrypted."""
        group = self.secagg_group
        needed = isinstance(self.privacy, ClientDistributed)
        return group if isinstance(group, SecaggSettings) and (needed or group.name == "masked") else None

    @property
    def observer(self) -> str:
        """Name of the audit; empty without one."""
        name = self.audit_group.option
        return "" if name == "off" else name

    def rules(self) -> Iterator[tuple[str, str]]:
        """Yield (key, remedy) for each module that is not allowed, and each conflict between groups."""
        targets = [
            ("task.target", self.task.own),
            ("strategy.target", self.strategy.target),
            ("task.model", getattr(self.task, "model", None)),
            *(("callbacks", each) for each in self.callbacks),
        ]
        for key, target in targets:
            module, colon, _ = str(target).partition(":")  # without a colon it is a word, and no user's class
            if colon and module not in self.allow_modules:
                yield key, f"'{module}' is not among the modules you allow; add allow_modules=[{module}]"
        for group in self.groups:
            yield from group.conflicts(self)


class SimulationSettings(FederationSettings):
    """Settings of ``fedveil simulate`` and ``fedveil plan``."""

    partition: Annotated[PartitionSettings, By]
    engine: Annotated[Engine, OfExtension("engine", InProcess)]
    faults: FaultSettings = FaultSettings()
    speed: SpeedSettings = SpeedSettings()
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] | None = None  # what both NumPy and torch accept
    """Seed; null: 0 in a declared simulation, the system's generator on real data, where a seed is refused."""
    population: Clients | None = None
    """Public number of clients that divides the mean (cohort=poisson or all); null: the actual number."""
    optimize: Text | None = None
    """Metric that a sweeper such as Optuna's optimises, such as accuracy; it is returned as the run's objective."""
    resume: Text | None = None
    """Folder of a run to continue: fedveil simulate resume=runs/2026-01-31/12-00-00."""

    def rules(self) -> Iterator[tuple[str, str]]:
        """Yield (key, message) for missing settings, limits of the engine, and conflicts with the population."""
        yield from super().rules()
        if isinstance(self.task, FolderTask) and not self.task.locates_rows:
            yield "task.folder", "name the clients' folder, in which each file or folder is a client"
        if isinstance(self.partition, FlwrPartition) and not isinstance(self.task, CsvTask | CustomTask):
            yield (
                "partition",
                "partitions your own task's pool or simulated tables; use iid, dirichlet or shards",
            )
        if any(isinstance(level, RecordLevel) for level in levels_of(self.privacy)):
            if self.engine.dtype != "float32":
                yield "engine.dtype", "the norms of examples need full precision; use float32"
            if self.engine.device == "mps":
                yield "engine.device", "has no double precision, which norms need; use cpu"
        if self.secagg is not None:
            remedy = "clients of encrypted sums answer in several exchanges, which have no virtual time; leave it out"
            if self.speed.any and not self.cohort.by_turns:
                yield "speed", remedy
            if (
                self.speed.deadline is not None and self.cohort.by_turns
            ):  # the order of their answers is by speed
                yield "speed.deadline", remedy
        if self.population is not None:
            yield from self._rules_of_population()

    def _rules_of_population(self) -> Iterator[tuple[str, str]]:
        """Yield (key, remedy) for each setting by which the mean is not divided by `population`."""
        if not isinstance(sum_level(self.privacy), ClientCentral):
            yield "population", "divides the mean of client_central or record_and_client; leave it null"
        if not isinstance(self.cohort, PoissonCohort | CyclicCohort | AllCohort):
            yield "population", f"cohort={self.cohort.name} divides by its size; leave it null"
