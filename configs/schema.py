"""Models of the configuration: type, range, default and meaning of every key, and the rules between keys.

Hydra composes, these models validate, strictly: "8" and ``true`` are no numbers, nothing is infinite, no key is
unknown. They are frozen, and are made in Python with keywords: ``ClientCentral(target_epsilon=1.0)``. What a value may
be, or a key means, is said here and nowhere else.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from ..messages.local_training import TOLD, LocalTraining, Optimizer, Schedule
from .group import Group, OfKeys, remedy
from .privacy_settings import (
    ClientDistributed,
    ClientLevel,
    NoSecagg,
    PrivacyLevel,
    PrivacySettings,
    Record,
    RecordAndClient,
    RecordDistributed,
    SecaggSettings,
    sum_level,
)
from .task_settings import (
    AllCohort,
    CohortSettings,
    CsvTask,
    CustomTask,
    CyclicCohort,
    FlwrPartition,
    PartitionSettings,
    PoissonCohort,
    TaskSettings,
)
from .training_settings import (
    AutoOptimizer,
    CompressionSettings,
    ConstantSchedule,
    NoCompression,
    NoTuning,
    OptimizerSettings,
    ScheduleSettings,
    StrategySettings,
    TuningSettings,
)
from .values import (
    HIDDEN_CLIENTS,
    MOST_ROUNDS,
    TRACKERS,
    By,
    CallbackName,
    Clients,
    Module,
    NotNegative,
    Positive,
    Probability,
    Records,
    Rounds,
    Text,
)


class InProcess(Group):
    """Engine on this machine: clients run in this process or, with more workers, in as many processes."""

    name: Literal["inprocess"] = "inprocess"
    workers: Annotated[int, Field(ge=1, le=1024)] | None = 1
    """Processes; null: one for each core or GPU, if each has enough work."""
    device: Annotated[
        str,
        Field(
            pattern=r"^(auto|cpu|mps|cuda(:[0-9]{1,3})?)$",
            json_schema_extra=remedy("must be auto, cpu, mps, cuda, or one GPU as cuda:N"),
        ),
    ] = "cpu"
    """Device on which models train and are evaluated; auto: a CUDA GPU if there is one. Workers share several GPUs."""
    dtype: Annotated[
        Literal["float32", "bfloat16"],
        Field(json_schema_extra=remedy("float16 would need a loss that is scaled")),
    ] = "float32"
    """Precision of models, by autocast; parameters and updates stay in float32."""
    deadline: Positive = 60.0
    """Seconds until one client's reply is late."""


class Ray(Group):
    """Engine of actors on Ray: one machine, or a cluster by its address."""

    name: Literal["ray"] = "ray"
    address: Text | None = None
    """Address of a running cluster, such as auto or ray://head:10001; null: this machine."""
    num_cpus: Positive | None = None
    """CPUs, one for each actor; null: all that Ray has."""
    workers: ClassVar[None] = None
    device: ClassVar[Literal["cpu"]] = "cpu"
    dtype: ClassVar[Literal["float32"]] = "float32"
    deadline: Positive = 60.0
    """Seconds until one client's reply is late."""


class FaultSettings(Group):
    """Faults that a simulation injects, each with a probability per client and round; at most 1 in sum."""

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
        """Whether a fault can happen at all."""
        return max(self.dropout, self.failure, self.straggler, self.corrupt) > 0


class NoAudit(Group):
    """No audit."""

    name: Literal["off"] = "off"


class _Audit(Group):
    on_alarm: Annotated[
        Literal["stop", "pause", "raise_noise", "rollback", "note"],
        Field(json_schema_extra=remedy("no check of a sum names a client to drop")),
    ] = "stop"
    """Effect of an alarm; note: record it and continue."""
    alpha: Annotated[float, Field(gt=0, le=0.2)] = 0.01
    """Probability that a correct run raises any alarm."""

    def conflicts(self, whole: "FederationSettings") -> Iterator[tuple[str, str]]:
        """Refuse answers to an alarm that a sum cannot have."""
        if self.on_alarm == "raise_noise" and sum_level(whole.privacy) is None:
            yield "audit.on_alarm", "no noise is added to this sum; use stop, pause or rollback"
        elif self.on_alarm == "raise_noise" and whole.cohort.by_turns:
            text = "rounds are one release together, whose noise is fixed; use stop, pause or rollback"
            yield "audit.on_alarm", text
        if self.on_alarm == "rollback" and whole.tried:
            text = "each arm has its own model, and none can be rolled back; use stop or pause"
            yield "audit.on_alarm", text


class LightAudit(_Audit):
    """Free checks in every round: whether the released sum has the claimed noise, and whether the noise is new."""

    name: Literal["light"] = "light"
    full: ClassVar[bool] = False
    """Whether canary clients and probes are used as well."""
    canaries: ClassVar[None] = None
    looks: ClassVar[int] = 0
    support: ClassVar[None] = None
    loss_traces: ClassVar[bool] = False


class FullAudit(_Audit):
    """The light checks, and canary clients in the cohort, which compare the measured leakage with the claim."""

    name: Literal["full"] = "full"
    full: ClassVar[bool] = True
    canaries: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    """Canary clients; null: 1000, or with encrypted sums half as many as secagg.collusion allows."""
    looks: Annotated[int, Field(ge=1, le=1_000)] = 10
    """Rounds, spread over the run, after which canaries and planted secrets are scored."""
    support: Annotated[int, Field(ge=2, le=1_000_000_000)] | None = None
    """Most coordinates of one canary; null: 20 000 or all."""
    loss_traces: bool = False
    """Whether each client keeps the losses of its own records locally; see docs/audits.md."""

    def conflicts(self, whole: "FederationSettings") -> Iterator[tuple[str, str]]:
        """Refuse canaries that this mode, cohort or search cannot score."""
        yield from super().conflicts(whole)
        client = sum_level(whole.privacy)
        if isinstance(whole.cohort, CyclicCohort):
            text = "its canary clients cannot be scored for turns in some rounds only; use light"
            yield "audit.name", text
        if whole.tried:
            text = "its canaries are in no arm, but test the promise to all clients; use light"
            yield "audit.name", text
        if self.canaries and not isinstance(client, ClientLevel):
            text = "test the claim of client-level privacy, and there is none; leave it null"
            yield "audit.canaries", text
        if self.canaries != 0 and client and client.clipping == "adaptive":
            text = (
                "canaries exceed every norm and would raise an adaptive one; use privacy.clipping=fixed, or 0"
            )
            yield "audit.canaries", text


class LedgerSettings(Group):
    """Location of the population's ledger."""

    dir: Text | None = None
    """Folder; null: the run folder for simulated data, FOLDER/ledgers of a server, else ~/.local/share/fedveil/ledgers."""


class BudgetSettings(Group):
    """Use of a budget."""

    runs: Annotated[int, Field(ge=1, le=1000)] = 1
    """Number of runs like this one on the same data that share the budget; each is planned with its share."""

    def conflicts(self, whole: "FederationSettings") -> Iterator[tuple[str, str]]:
        """Refuse noise that is not planned from the budget, and runs that are one release."""
        if self.runs == 1:
            return
        privacy, client = whole.privacy, sum_level(whole.privacy)
        record = privacy.record if isinstance(privacy, RecordAndClient) else privacy
        levels = [each for each in (record, client) if isinstance(each, PrivacyLevel)]
        if not levels or any(each.noise_multiplier is not None for each in levels):
            yield "budget.runs", "plans the noise from a budget; give none by noise_multiplier, or leave it 1"
        if client and client.noise_schedule == "adaptive":
            yield "budget.runs", "needs noise that is fixed in advance; use privacy.noise_schedule=fixed"
        if whole.cohort.by_turns:
            yield "budget.runs", "needs rounds that are a release each; choose another cohort, or leave it 1"
        if self.runs * whole.num_rounds > MOST_ROUNDS:
            yield "budget.runs", f"together the runs may have at most {MOST_ROUNDS} rounds"


class CostSettings(Group):
    """Prices and powers for a report's estimates; null is not computed. `assessment.yaml` overrides them."""

    watts_of_core: NotNegative | None = None
    """Watts of one busy core of the server's machine; null: 4, CodeCarbon's value, if no counter can be read."""
    grams_co2_of_kwh: NotNegative | None = None
    """Grams of CO2 for a kilowatt hour of its electricity."""
    price_of_kwh: NotNegative | None = None
    """Price of a kilowatt hour in `currency`."""
    price_of_gigabyte: NotNegative | None = None
    """Price of a gigabyte sent or received, in `currency`."""
    joules_of_gigabyte: NotNegative | None = None
    """Energy of a gigabyte on the network, in joules."""
    currency: (
        Annotated[
            str,
            Field(
                pattern=r"^[A-Z]{3}$", json_schema_extra=remedy("must be a code of three letters such as EUR")
            ),
        ]
        | None
    ) = None
    """Currency code of three letters such as EUR."""
    examples_of_client: Records | None = None
    """Public upper bound on the examples of one client, for the report's bound on its work in a round."""
    flops_of_client: Positive | None = None
    """Floating-point operations per second of CPU on a client's processor."""


class EvaluateSettings(Group):
    """Evaluation of the model at the clients, on records that each holds out of training."""

    clients: Annotated[
        str,
        Field(
            pattern=r"^(none|final|every:[1-9][0-9]{0,5})$",
            json_schema_extra=remedy("must be none, final, or every:N as in every:10"),
        ),
    ] = "none"
    """When all clients evaluate the model: none, final (after the last round), or every:N rounds and after the last."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of its records that each client holds out, by a hash of each: the same ones in every run."""
    metric: Text = "accuracy"
    """Name of one of the task's metrics."""
    metric_bound: Positive = 1.0
    """Upper bound of the metric, which is clipped to [0, metric_bound]."""
    figures: Annotated[
        tuple[Literal["metric", "loss", "clients", "histogram"], ...], Field(strict=False, min_length=1)
    ] = ("metric", "loss", "clients", "histogram")
    """Figures to measure, with equal parts of the norm: mean metric, mean loss, number of clients that evaluated, and their
    histogram. With record-level privacy the number of held-out records, and no histogram."""
    noise_multiplier: Positive | None = None
    """Noise of one evaluation. Null: 5 times the root of the number of evaluations, which together then cost as much as one at 5."""
    resolution: Positive | None = None
    """Largest half-width of the interval of the mean metric; null: no limit."""

    def conflicts(self, whole: "FederationSettings") -> Iterator[tuple[str, str]]:
        """Refuse evaluations whose sums hide no unit, or before there is one model."""
        if self.clients == "none":
            return
        privacy = whole.privacy
        if not isinstance(privacy, ClientLevel | RecordDistributed):
            yield "evaluate.clients", f"{HIDDEN_CLIENTS}, record_distributed, which hides records, or none"
        elif isinstance(privacy, RecordDistributed) and privacy.per_person is not None:
            yield (
                "evaluate.clients",
                "counts records, of which a person may have several; leave privacy.per_person null, or none",
            )
        elif privacy.noise_schedule == "adaptive":
            text = "needs noise that is fixed in advance; use privacy.noise_schedule=fixed, or none"
            yield "evaluate.clients", text
        if whole.tried and self.clients != "final":
            text = "arms have models of their own, and which stays is not known yet; use final"
            yield "evaluate.clients", text


EngineSettings = InProcess | Ray
AuditSettings = LightAudit | FullAudit


class FederationSettings(Group):
    """Settings common to a simulation and a server."""

    beside: ClassVar[Mapping[str, tuple[str, ...]]] = {"training": TOLD}
    task: Annotated[TaskSettings, By]
    cohort: Annotated[CohortSettings, By]
    strategy: Annotated[StrategySettings, By]
    privacy: Annotated[PrivacySettings, By]
    optimizer: Annotated[OptimizerSettings, By] = AutoOptimizer()
    schedule: Annotated[ScheduleSettings, By] = ConstantSchedule()
    secagg_group: Annotated[SecaggSettings | NoSecagg, By] = Field(alias="secagg")
    audit_group: Annotated[AuditSettings | NoAudit, By] = Field(alias="audit")
    compress: Annotated[CompressionSettings | NoCompression, By] = NoCompression()
    tune: Annotated[TuningSettings, By] = NoTuning()
    training: Annotated[LocalTraining, OfKeys()] = LocalTraining()
    num_rounds: Rounds = 100
    """Number of rounds of the run."""
    model: Literal["last", "average"] = "last"
    """Final model: that of the last round, or the mean of the last rounds, as many as its noise justifies."""
    checkpoint_every: Rounds = 1
    """Rounds from one checkpoint to the next."""
    ledger: LedgerSettings = LedgerSettings()
    budget: BudgetSettings = BudgetSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    cost: CostSettings = CostSettings()
    accept_vacuous: bool = False
    """Train on real data although the plan calls the promise vacuous, or most cohorts would be empty."""
    purpose: Text | None = None
    """Purpose of the run in words; stored with each of its releases on the ledger."""
    reason: Text | None = None
    """Reason for accepting a vacuous promise, or for continuing after an alarm; stored on the ledger with the user's name."""
    callbacks: Annotated[
        tuple[CallbackName, ...],
        Field(
            strict=False,
            json_schema_extra=remedy(f"must hold {', '.join(TRACKERS)}, or classes as 'module:Class'"),
        ),
    ] = ()
    """Callbacks: csv, mlflow, tensorboard, wandb, or your own class as module:Class."""
    allow_modules: Annotated[
        tuple[Module, ...],
        Field(strict=False, json_schema_extra=remedy("must hold module names only, for instance [my_task]")),
    ] = ()
    """Modules that task.target, strategy.target and callbacks may name, such as [my_task]."""
    group_equal_rows: Annotated[bool, Field(exclude=True)] = False
    """Whether equal records are held out together: of a run that an earlier release began, which goes on by its rule."""
    rate_of_task: Annotated[bool, Field(exclude=True, repr=False)] = False
    """Whether learning_rate is null, so that it follows from the task; false once it does."""
    source: Annotated[str, Field(exclude=True, repr=False)] = ""
    """The composed configuration as YAML, interpolations unresolved, so that saving it saves no secret."""

    @model_validator(mode="before")
    @classmethod
    def _mark_rate(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("learning_rate", 0) is not None:
            return values
        return {key: value for key, value in values.items() if key != "learning_rate"} | {
            "rate_of_task": True
        }

    @property
    def local_training(self) -> LocalTraining:
        """Training of a client in one round."""
        optimizer, schedule = self.optimizer, self.schedule.model_dump()
        return replace(
            self.training,
            learning_rate=optimizer.lr or self.training.learning_rate,
            optimizer=Optimizer(optimizer.name, tuple(optimizer.options.items())),
            schedule=Schedule(rounds=self.num_rounds, **schedule),
        )

    @property
    def tried(self) -> tuple[float, ...]:
        """Values of the arms; empty without tuning."""
        return self.tune.tried(self)

    @property
    def scored_at_clients(self) -> bool:
        """Whether the models of arms are compared by evaluations at their clients."""
        return self.tune.score == "clients"

    @property
    def scored_metric(self) -> str:
        """The metric by which clients compare arms."""
        return self.tune.metric or self.evaluate.metric

    @property
    def queries(self) -> Mapping[str, tuple[str, object]]:
        """Kinds of query that the run asks of its clients, the first one first, each with the field that asks for it."""
        found: dict[str, tuple[str, object]] = {}
        if isinstance(self.task, CsvTask) and self.task.scaling == "asked":
            found["scaling"] = "task.scaling", self.task.scaling
        if self.evaluate.clients != "none" or self.scored_at_clients:
            found["evaluation"] = "evaluate.clients", self.evaluate.clients
        return found

    @property
    def tuning_rounds(self) -> int:
        """Rounds of each arm, before the best value continues; 0 without tuning."""
        return self.tune.rounds_of_arm(self.num_rounds)

    @property
    def steps(self) -> int:
        """Sums that the run forms: a round of each arm is one, though no client takes part in more than num_rounds."""
        more = max(0, len(self.tried) - 1)
        return self.num_rounds + more * self.tuning_rounds

    def rounds_begun(self, steps: int) -> int:
        """Return how many rounds some client may have taken part in after `steps` sums."""
        arms = max(1, len(self.tried))
        of_arms = arms * self.tuning_rounds
        return -(-steps // arms) if steps < of_arms else self.num_rounds - (self.steps - steps)

    def rounds_left(self, steps: int) -> int:
        """Return how many rounds some client may still take part in after `steps` sums."""
        arms = max(1, len(self.tried))
        of_arms = arms * self.tuning_rounds
        return self.num_rounds - steps // arms if steps < of_arms else self.steps - steps

    @property
    def ledger_dir(self) -> str | None:
        """Folder of the population's ledger, if it is given."""
        return self.ledger.dir

    @property
    def secagg(self) -> SecaggSettings | None:
        """Settings of masks; None: vectors are sent in the clear."""
        asked = self.secagg_group
        if isinstance(asked, NoSecagg):
            return None
        return asked if asked.name == "masked" or isinstance(self.privacy, ClientDistributed) else None

    @property
    def audit(self) -> AuditSettings | None:
        """Settings of the audit; None: no audit."""
        return None if isinstance(self.audit_group, NoAudit) else self.audit_group

    def rules(self) -> Iterator[tuple[str, str]]:
        """Yield conflicts between groups."""
        own = [("callbacks", each) for each in self.callbacks if each not in TRACKERS]
        model: object = getattr(self.task, "model", None)  # of tables a word
        named = model if isinstance(model, str) and ":" in model else None
        targets = [
            ("task.target", self.task.target),
            ("strategy.target", self.strategy.target),
            ("task.model", named),
            *own,
        ]
        for key, target in targets:
            module = (target or "").partition(":")[0]
            if target and module not in self.allow_modules:
                yield key, f"'{module}' is not among the modules you allow; add allow_modules=[{module}]"
        for field in type(self).model_fields:
            if isinstance(group := getattr(self, field), Group):
                yield from group.conflicts(self)


class SimulationSettings(FederationSettings):
    """Settings of ``fedveil simulate`` and ``fedveil plan``."""

    partition: Annotated[PartitionSettings, By]
    engine: Annotated[EngineSettings, By]
    faults: FaultSettings = FaultSettings()
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] | None = None  # what both NumPy and torch accept
    """Seed; null: 0 in a declared simulation, the system's generator on real data, where a seed is refused."""
    population: Clients | None = None
    """Public number of clients that divides the mean (cohort=poisson or all); null: the actual number."""
    optimize: Text | None = None
    """Metric that a sweeper such as Optuna's optimises, such as accuracy; it is returned as the run's objective."""
    resume: Text | None = None
    """Folder of a run to continue: fedveil simulate resume=runs/2026-01-31/12-00-00."""

    def rules(self) -> Iterator[tuple[str, str]]:
        """Yield missing settings, limits of the engine, and conflicts with the population."""
        yield from super().rules()
        if isinstance(self.task, CsvTask) and self.task.folder is None:
            yield "task.folder", "name the folder of the tables, in which each file or folder is a client"
        if isinstance(self.partition, FlwrPartition) and not isinstance(self.task, CsvTask | CustomTask):
            yield (
                "partition",
                "partitions your own task's pool or simulated tables; use iid, dirichlet or shards",
            )
        if isinstance(self.privacy, Record | RecordAndClient | RecordDistributed):
            if self.engine.dtype != "float32":
                text = "the norms of examples need full precision; use float32"
                yield "engine.dtype", text
            if self.engine.device == "mps":
                yield "engine.device", "has no double precision, which norms need; use cpu"
        if self.population is not None:
            yield from self._rules_of_population()

    def _rules_of_population(self) -> Iterator[tuple[str, str]]:
        if sum_level(self.privacy) is None or isinstance(self.privacy, ClientDistributed | RecordDistributed):
            yield "population", "divides the mean of client_central or record_and_client; leave it null"
        if not isinstance(self.cohort, PoissonCohort | CyclicCohort | AllCohort):
            yield "population", f"cohort={self.cohort.name} divides by its size; leave it null"
