"""Models of the groups task, partition and cohort: what is learned, from whom."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from ..privacy.ledger.caps import DATA_ID, NO_DATA_ID
from .group import Group, remedy
from .values import (
    OF_ARGUMENTS,
    Argument,
    Clients,
    Epochs,
    OtherModel,
    Positive,
    Rounds,
    Target,
    Text,
    Times,
)


class TaskGroup(Group):
    """Keys of every task."""

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
    data_id: Annotated[str, remedy(NO_DATA_ID, pattern=f"^{DATA_ID}$")] | None = None
    """Name of the real data, by which ledgers identify them in any order, split or preprocessing. Null: the task's."""
    held_out: Literal["public", "private"] | None = None
    """Whether the held-out data are public; private ones are not evaluated. Null: the task's, private if its data are real."""

    @property
    def own(self) -> str:
        """The user's own class, module:Class; empty of a task that ships."""
        return str(getattr(self, "target", ""))

    @property
    def options(self) -> dict[str, Any]:
        """Keys of this task alone that are not null, as its loader takes them."""
        return self.model_dump(
            exclude=set(TaskGroup.model_fields) | {"name", "target"}, exclude_none=True, by_alias=True
        )


class ModelTask(TaskGroup):
    """A task on real data whose model may be another. Its values are the defaults of the keys of the same name."""

    model: OtherModel = None
    """Null: the task's model. student: a model with an eighth of the parameters (mnist5k, fashion_mnist). Or your class."""

    def rules(self) -> Iterator[tuple[str, str]]:
        """Refuse a small model of a task that has none."""
        if self.model == "student" and self.option in ("digits", "heart"):
            yield "model", f"the model of {self.option} is small already; leave it null"


class DigitsTask(ModelTask):
    """Handwritten digits of 8 by 8 pixels."""

    name: Literal["digits"] = "digits"


AUTO = "auto"  # model of tables that follows from public numbers


class TableTask(TaskGroup):
    """A task on tables with a schema."""

    model: Literal["linear", "mlp", "gam"] = "linear"
    """linear; mlp: fully connected layers with tanh between them; gam: a sum of one function per column, over declared bins."""
    hidden: Annotated[tuple[Annotated[int, Field(ge=1, le=4096)], ...], Field(strict=False)] = (32,)
    """Sizes of the hidden layers of an mlp."""
    group_weights: Text | None = None
    """File with loss weights by group and class, or the JSON of a crosstable question. Null: the schema's."""


class FolderTask(TaskGroup):
    """A task on files of the owners' own; each file or folder is a client."""

    folder: Text | None = None
    """Folder of the clients' files. A server has none."""
    simulated: bool = False
    """Whether the files are public or synthetic. Real ones need a ledger of their own, and tables a schema."""
    held_out_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of all rows or texts that is held out if they are simulated, each by a keyed hash, in any order."""
    held_out_file: Text | None = None
    """Public file on which the model is evaluated instead of clients' rows or texts."""
    person: Text | None = None
    """Column or field that identifies the person of a row or text, for privacy.per_person; no input of the model."""

    @property
    def locates_rows(self) -> bool:
        """Whether a key says where the clients' rows are."""
        return self.folder is not None


class CsvTask(TableTask, FolderTask):
    """Tables with one schema, in CSV, Parquet, .xlsx or packed CSV; each file or folder is a client."""

    name: Literal["csv"] = "csv"
    model: Literal["auto", "linear", "mlp", "gam"] = AUTO  # pyright: ignore[reportIncompatibleVariableOverride]
    """auto: linear or gam, by the public numbers of columns, records and epsilon; fedveil plan says which and why. With real
    clients auto is linear, unless their options say otherwise. linear; mlp: fully connected layers with tanh between them; gam: a
    sum of one function per column, over bins, and per pair of the schema."""
    label: Text | None = None
    """Column to predict; null: the schema's."""
    schema_file: Annotated[Text | None, Field(alias="schema")] = None
    """YAML file that describes the columns; null: schema.yaml in the folder, or inferred from simulated tables."""
    groups: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    """Columns of the schema, or of its groups, whose categories are the groups of fairness metrics."""
    query: Text | None = None
    """One SELECT, whose result is a client's table, in place of folder. Rows of a CSV or Parquet file are the table `data`."""
    database: Text | None = None
    """File or URL on which the query is executed; a folder of files, each of which is a client. A URL has no password."""
    encoding: Text | None = None
    """Encoding of text files, as Python names it, such as cp1252. Null: UTF-8, or UTF-16 if a file begins with its mark."""
    bins: Annotated[int, Field(ge=2, le=256)] = 16
    """Bins of a number without edges in the schema, with model=gam."""
    smoothing: Annotated[float, Field(ge=0, le=4)] = 0.5
    """Length over which neighbouring bins share their inputs, as a share of half the range, with model=gam; 0: separate bins."""
    pairs: Annotated[tuple[Annotated[tuple[Text, Text], Field(strict=False)], ...], Field(strict=False)] = ()
    """Pairs of columns that act together, with model=gam, beside those of the schema: [[age,sex]]."""
    scaling: Text | None = None
    """asked: the run asks for mean and deviation of each number and scales inputs by them; or the JSON of such a question. Null:
    inputs are scaled by the bounds in the schema."""
    scaling_epsilon: Positive | None = None
    """Epsilon of that question alone; null: a quarter of the target, at most 1."""

    @property
    def locates_rows(self) -> bool:
        """Whether a key says where the clients' rows are."""
        return self.query is not None or self.database is not None or super().locates_rows

    def queries(self, whole: Any) -> Mapping[str, tuple[str, object]]:
        """Return the question about the inputs' scale, if the run asks for it."""
        return {"scaling": ("task.scaling", self.scaling)} if self.scaling == "asked" else {}

    @property
    def options(self) -> dict[str, Any]:
        """Keys of this task alone, without the cost of a question, which belongs to the run."""
        return {name: value for name, value in super().options.items() if name != "scaling_epsilon"}


class CustomTask(TaskGroup):
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
        """Keyword arguments of the class."""
        arguments = {"num_clients": self.num_clients, "model": self.model}
        return {name: value for name, value in arguments.items() if value is not None} | self.args


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
    by_arrival: ClassVar[bool] = False
    """Whether those of the invited clients take part that answer first."""
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
    by_arrival: ClassVar[bool] = False
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
    by_arrival: ClassVar[bool] = False
    secret: ClassVar[bool] = False


class FirstCohort(Group):
    """The first `size` clients that answer, each at most once in `separation` rounds; the whole run is one release."""

    name: Literal["first"] = "first"
    size: Clients = 100
    """Clients per round: the first that answer, of all that are invited."""
    separation: Rounds | None = None
    """Rounds from one participation of a client to its next; null: the most for which three quarters of the clients suffice."""
    max_participations: Rounds | None = None
    """Participations of one client in the run; null: as many as the separation allows."""
    over_selection: Times = 1.5
    """Invited clients over `size`."""
    staleness: Annotated[int, Field(ge=0, le=1)] = 1
    """1: a client that is still at work when its round ends goes on, and its answer may count in the next round. 0: it is late."""
    by_turns: ClassVar[bool] = True
    by_arrival: ClassVar[bool] = True
    secret: ClassVar[bool] = False

    def conflicts(self, whole: Any) -> Iterator[tuple[str, str]]:
        """Refuse what an answer to the last round does not fit, and other words on how many answers end a round."""
        if self.staleness and whole.compress.option != "none":
            text = "an answer to the last round is compressed by that round's draw; use compress=none, or 0"
            yield "cohort.staleness", text
        if self.staleness and whole.secagg is not None:
            text = "members of an encrypted sum exchange keys before they train, and a late one cannot join the next; use 0"
            yield "cohort.staleness", text
        link = getattr(whole, "link", None)  # of a server alone
        if link and link.enough is not None:
            yield "link.enough", "cohort.size says how many answers end a round; leave it null"
        if link and link.name == "flower" and self.staleness:
            yield "cohort.staleness", "an answer on Flower's link is lost with its round; use 0"


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
    by_arrival: ClassVar[bool] = False
    secret: ClassVar[bool] = True


class AllCohort(Group):
    """Every client in every round; accounted without amplification."""

    name: Literal["all"] = "all"
    size: ClassVar[None] = None
    over_selection: ClassVar[None] = None
    by_turns: ClassVar[bool] = False
    by_arrival: ClassVar[bool] = False
    secret: ClassVar[bool] = False


CORE_TASKS = DigitsTask | CsvTask | CustomTask
PartitionSettings = PlainPartition | Dirichlet | FlwrPartition
CohortSettings = PoissonCohort | FixedCohort | SeparatedCohort | FirstCohort | CyclicCohort | AllCohort
