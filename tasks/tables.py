"""Tables as a task: CSV or Parquet files of several owners under one schema, classified or regressed without code."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial, wraps
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..base.extensions import extension
from ..base.refusal import Refusal
from ..configs.bundle_files import SCHEMA
from ..configs.task_settings import AUTO
from ..privacy.statistics.holdout import holdout_mask
from .classification import softmax_regression
from .columns import LazyColumns
from .data import Examples, joined, only
from .exported import schema_inputs, schema_predictions
from .flwr_partition import FLWR, flwr_shares
from .partition import Partition
from .scaling import ASKED, FIELD, Moments, standardised, with_moments
from .table_basis import SMOOTHING, effective, read_pairs
from .table_files import (
    Files,
    RowSource,
    clients_of,
    query_results,
    read_columns,
    read_groups,
    read_persons,
    read_rows,
    row_bound,
)
from .table_schema import Schema, model_of_stored, plain, read_schema, weighted_schema

MODELS = ("linear", "mlp", "gam")
SHARED = ("schema", SCHEMA)  # key of what all devices' tasks share, and its default in a bundle
DRAFT_COMMAND = "fedveil new draft --from csv {} writes a first draft"
SPLIT_KEY = 920  # of the hash that holds rows out; public, and the same everywhere


@dataclass(frozen=True)
class Tables:
    """`Task` over tables, with the loss and the metrics of its label's kind.

    Attributes:
      schema: schema of every table.
      clients: each client's examples; empty on a server, which has none. With weights by group a target encodes group and
        class (`weighted_task`).
      test: held-out examples; empty if the clients are real, since metrics on their rows would be a release.
      hidden: sizes of the hidden layers; empty for a linear model.
      simulated: whether the tables are public or synthetic.
      grouped: names of the columns whose categories are groups.
      sources: each client's own tables; empty if a partition dealt the rows, or on a server.
    """

    schema: Schema
    clients: tuple[Examples, ...]
    test: Examples
    hidden: tuple[int, ...] = ()
    simulated: bool = False
    grouped: tuple[str, ...] = ()
    sources: tuple[RowSource, ...] = ()

    # Only simulated clients' rows are held out, and `held_out_file` is declared public.
    held_out_public = True
    released_figures = (
        "intervals",
        "held_out",
    )  # extensions that add fields to the result of a run, see run/run.py

    @property
    def num_clients(self) -> int:
        return len(self.clients)

    @property
    def classes(self) -> int:
        """Number of classes; 0 if the label is of another kind."""
        return len(self.schema.outcome.words)

    @cached_property
    def weights(self) -> tuple[float, ...]:
        """Weight of an example in the loss by its target; empty if all are 1.

        With weights by group, targets are those of `weighted_task`: the classes alone, of held-out examples, which weigh
        1; then the classes in an unknown group, and in each group.
        """
        groups = self.schema.group_weights
        if self.schema.weight is not None:
            return row_weights().weights_of(self.schema)
        if groups is None:
            return self.schema.outcome.weights
        return tuple(chain((1.0,) * self.classes, groups.unknown, *groups.weights))

    @property
    def squared_length(self) -> int:
        """Bound on the squared length of an input with the 1 of the bias: each column adds at most 1.

        A number that is scaled by its deviation adds 1 on average. The learning rate follows from it and `curvature`.
        """
        return 1 + len(self.schema.inputs) + len(self.schema.pairs)

    @cached_property
    def directions(self) -> float:
        """Number of directions in which noise on a model matters: of smooth bins fewer than of their inputs."""
        schema, numbers = self.schema, float(sum(each.numel() for each in self.model().parameters()))
        if self.hidden:
            return numbers
        rows = [*map(schema.rows, schema.inputs), *(pair.rows for pair in schema.pairs)]
        return numbers * (1 + sum(map(effective, rows))) / (1 + schema.width)

    @property
    def curvature(self) -> float:
        """Bound on the second derivative of an example's loss by the model's outputs."""
        return self.schema.outcome.curvature

    def model(self) -> nn.Module:
        head = self.schema.outcome.head
        return perceptron((self.schema.width, *self.hidden), head) if self.hidden else head(self.schema.width)

    @property
    def final_model(self) -> Callable[[dict[str, NDArray[Any]]], dict[str, NDArray[Any]]] | None:
        """Function that gives a whole model's shapes the schema's directions and bounds; None if it declares none."""
        return partial(constraints().constrained, self.schema) if self.schema.constrained else None

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.schema.outcome.loss(outputs, targets, self.weights)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.schema.outcome.losses(outputs, targets, self.weights)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        return self.schema.outcome.metrics(
            outputs.cpu(), targets.cpu()
        )  # not every device has double precision

    def labels(self, targets: Tensor) -> Tensor:
        """Return targets that may encode a group or a weight as well as those of the label alone, shape (n, ...)."""
        if self.schema.weight is not None:
            return row_weights().labels(self, targets)
        return targets % self.classes if self.classes else targets

    def client_data(self, client: int) -> Examples:
        if not 0 <= client < self.num_clients:
            raise Refusal("client", client, f"clients run from 0 to {self.num_clients - 1}")
        return self.clients[client]

    def client_size(self, client: int) -> int:
        return len(self.clients[client])

    def held_out(self) -> Examples:
        return self.test

    def groups(self, client: int) -> Mapping[str, Tensor]:
        """Return by attribute the number of each example's group, as `GroupedTask` does."""
        return self.client_data(client).groups or {}

    @cached_property
    def group_words(self) -> Mapping[str, tuple[str, ...]]:
        """The groups of each attribute by their words, as the schema declares them."""
        return {name: self.schema.group(name).words for name in self.grouped}

    def columns(self, client: int) -> Mapping[str, NDArray[Any]]:
        """Return a client's columns for questions: those of its table, with missing values.

        Of rows that a partition dealt there are only inputs, where a missing number is replaced: their columns are the
        label, the groups and the categories.
        """
        if self.sources:
            return read_columns(self.sources[client], self.schema)
        data, start = self.client_data(client), 0
        inputs = data.inputs.numpy()
        columns = dict[str, Callable[[], NDArray[Any]]]()
        for column in self.schema.label_columns:
            columns[column.name] = partial(self._label_values, data, column.name)
        for name, codes in (data.groups or {}).items():
            columns[name] = partial(_words_of, self.group_words[name], codes.numpy())
        for column in self.schema.inputs:
            if column.categories:
                one_hot = inputs[:, start : start + column.width]
                columns[column.name] = partial(_words_of_one_hot, column.words, one_hot)
            start += column.width
        return LazyColumns(columns)

    def _label_values(self, data: Examples, name: str) -> NDArray[Any]:
        """Return the words or the numbers of a label's column that targets stand for, shape (n,)."""
        return self.schema.outcome.values(data.targets.numpy())[name]

    def beside_the_model(self) -> Mapping[str, bytes]:
        """Return the schema, which is the preprocessing, as the file that a run saves with its model."""
        return {SCHEMA: self.schema.text().encode()}

    def encode(self, data: object) -> Tensor:
        """Return the model's inputs for a table, a folder of tables or a data frame; a label in it is ignored."""
        return torch.from_numpy(schema_inputs(self.schema, data))

    def decode(self, outputs: Tensor) -> dict[str, NDArray[Any]]:
        """Return predictions by column name, as the label's kind makes them: such as a category and its probability."""
        return schema_predictions(self.schema, outputs.detach().numpy())


def constraints() -> Any:
    """Return the module of directions and bounds of shapes."""
    return extension("tables", "constraints", "task.schema", "monotone and bound")


def row_weights() -> Any:
    """Return the module of weights of rows."""
    return extension("tables", "row_weights", "task.schema", "weight")


def tables_of(task: object) -> Tables:
    """Return a task of tables, or the one inside a wrapper such as `Mislabelled`."""
    while not isinstance(task, Tables):
        task = task.task  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType, reportUnknownMemberType]
    return task


def weighted_task(task: Tables) -> Tables:
    """Return a task whose clients' targets encode the group as well, if its schema has weights by group.

    Such a target is class + classes * (2 + group), with group -1 if unknown, and selects the weight in `Tables.weights`.
    Every training loop passes targets to the loss and to nothing else, so that weights need no channel of their own.
    """
    if task.schema.weight is not None:
        return row_weights().weighted(task)
    if (weights := task.schema.group_weights) is None:
        return task

    def coded(data: Examples) -> Examples:
        assert data.groups is not None
        return replace(data, targets=data.targets + task.classes * (2 + data.groups[weights.of]))

    return replace(task, clients=tuple(map(coded, task.clients)))


def _words_of(words: tuple[str, ...], codes: NDArray[Any]) -> NDArray[Any]:
    """Return the word of each code, empty for -1."""
    return _array_of(words)[codes]


def codes_of(words: Sequence[str], cells: Iterable[object]) -> Tensor:
    """Return the number of each cell's word, shape (n,), int64, -1 for other words; outer spaces do not count."""
    codes = {word: code for code, word in enumerate(words)}
    return torch.tensor([codes.get(str(cell).strip(), -1) for cell in cells], dtype=torch.int64)


@lru_cache(maxsize=256)  # for the columns of a schema, at each client
def _array_of(words: tuple[str, ...]) -> NDArray[Any]:
    return np.array([*words, ""], dtype=np.str_)


def _words_of_one_hot(words: tuple[str, ...], inputs: NDArray[Any]) -> NDArray[Any]:
    """Return the word of each row of a column's inputs, shape (n, words); empty if all are zero."""
    return _words_of(words, np.where(inputs.any(1), inputs.argmax(1), -1))


def additive(task: object) -> Schema | None:
    """Return the schema of a task whose model is a sum of one shape per column; None for any other task."""
    if not isinstance(task, Tables) or task.hidden or task.schema.numbers:
        return None
    return task.schema


def perceptron(sizes: Sequence[int], head: Callable[[int], nn.Module]) -> nn.Module:
    """Return fully connected layers with tanh after each (arXiv:2007.14191) and a head, the same values on every call.

    Args:
      sizes: number of inputs, and the size of each hidden layer.
      head: returns the last layers for a number of inputs.
    """
    generator = torch.Generator().manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [softmax_regression(inputs, outputs), nn.Tanh()]
    model = nn.Sequential(*layers, head(sizes[-1]))
    for parameter in model.parameters():
        if parameter.dim() == 2 and parameter.requires_grad:
            bound = (6 / sum(parameter.shape)) ** 0.5  # Glorot and Bengio 2010
            with torch.no_grad():
                parameter.uniform_(-bound, bound, generator=generator)
    return model


def layers_of(model: str, hidden: Sequence[int] | int) -> tuple[int, ...]:
    """Return the sizes of a model's hidden layers: `hidden` for an mlp, or else none; refuse an unknown model."""
    if model not in MODELS:
        raise Refusal("task.model", model, f"choose one of {', '.join(MODELS)}")
    sizes = (hidden,) if isinstance(hidden, int) else tuple(hidden)
    return sizes if model == "mlp" else ()


class PublicSize(NamedTuple):
    """Public numbers of all clients' tables: rows, columns of inputs, clients, and pairs of the schema."""

    rows: int
    columns: int
    clients: int
    pairs: int


@dataclass(frozen=True)
class TableKeys:
    """Keys of the task `csv`.

    Attributes:
      folder: folder of the tables, in which each file or folder belongs to one client; None on a server.
      label: column that is predicted; None for that of the schema.
      schema: YAML file; None for schema.yaml in the folder or, if the tables are simulated, a draft from their rows.
      model: linear; mlp, with hidden layers; or gam, which is linear over the bins of each number and the words of each
        category, so that its score is a sum of one shape per column.
      hidden: sizes of the hidden layers of an mlp.
      simulated: whether the tables are public or synthetic.
      held_out_share: share of all clients' rows that are held out if they are simulated, in (0, 1); selected by a keyed
        hash of the row and of the number of equal rows before it, or of its person.
      held_out_file: public table, on which the model is evaluated instead.
      person: column that identifies the person of a row, which the model never sees; None without one.
      groups: columns whose categories are groups, for figures of fairness.
      bins: number of bins of a number without edges, for gam; at least 2.
      smoothing: length over which neighbouring bins of a gam share their inputs, as a share of half the range, where the
        schema has none; 0 if they are separate.
      pairs: names of both columns of pairs that act together, for gam, beside those of the schema.
      group_weights: file of weights in the loss by group and class, or of an answer that they follow from; None for those
        of the schema.
      scaling: file of an answer with the mean and variance of each number, by which numbers are scaled; None for the
        bounds of the schema. `asked` is the same as None, until the run has asked for `moments`.
      num_clients: number of clients; None for the natural partition.
      partition: natural (one client per file or folder); iid, dirichlet, shards and flwr deal the rows of simulated tables.
      alpha: concentration of a dirichlet partition, above 0.
      seed: seed of the partition.
      dealer: target and args of a partitioner of flwr-datasets, for partition=flwr.
      data: on a device, its own table or folder of tables, in place of `folder`.
      moments: mean and deviation of columns by which a run that has asked scales its numbers; None for other runs.
      group_equal_rows: whether equal rows are held out together, as by the rule of earlier releases.
      encoding: of text files, as Python names it; None: UTF-8, or UTF-16 if a file begins with its mark.
      query: SELECT whose result is a client's table, in place of `folder`.
      database: file or URL on which it is executed, or a folder of files, each of which is a client.
    """

    folder: str | None = None
    label: str | None = None
    schema: str | None = None
    model: str = "linear"
    hidden: Sequence[int] | int = (32,)
    simulated: bool = False
    held_out_share: float = 0.2
    held_out_file: str | None = None
    person: str | None = None
    groups: Sequence[str] | str = ()
    bins: int = 16
    smoothing: float = SMOOTHING
    pairs: Sequence[Sequence[str]] = ()
    group_weights: str | None = None
    scaling: str | None = None
    num_clients: int | None = None
    partition: str = "natural"
    alpha: float = 0.5
    seed: int = 0
    dealer: Mapping[str, Any] | None = None
    data: str | None = None
    moments: Moments | None = None
    group_equal_rows: bool = False
    encoding: str | None = None
    query: str | None = None
    database: str | None = None

    def sources(self) -> list[RowSource]:
        """Return the clients' tables."""
        if self.query is not None or self.database is not None:
            return self._results()
        if self.data is not None:
            return [self.files(self.data)]
        public = [Path(self.held_out_file)] if self.held_out_file is not None else []
        paths = clients_of(Path(self.folder), public) if self.folder is not None else []
        return [self.files(path) for path in paths]

    def _results(self) -> list[RowSource]:
        """Return the results of the query; refuse further tables."""
        if (other := self.folder or self.data) is not None:
            raise Refusal("task.query", self.query, f"gives the rows, and so does {other}; leave one out")
        return query_results(self.query, self.database)

    def files(self, path: str | Path) -> RowSource:
        """Return the tables at a path."""
        return Files(Path(path), self.encoding)

    def public_size(self) -> PublicSize:
        """Return what a choice of the model may depend on; of a CSV file's rows no cell is read."""
        sources = self.sources()
        schema = self.agreed(sources)
        rows = sum(row_bound(source) for source in sources)
        return PublicSize(rows, len(schema.inputs), self.num_clients or len(sources), len(schema.pairs))

    def agreed(self, sources: Sequence[RowSource]) -> Schema:
        """Return the schema that all clients share, with the model's bins, scaling and weights, and without persons."""
        schema = _without(self.person, _schema(self, sources), self.simulated)
        if self.pairs:
            pairs = read_pairs("task.pairs", [*map(list, self.pairs)], schema.spelling)
            declared = {*map(frozenset, schema.pair_names)}
            further = (each for each in pairs if frozenset(each) not in declared)
            schema = replace(schema, pair_names=(*schema.pair_names, *further))
        if self.model == "gam":
            if self.scaling is not None:
                raise Refusal(FIELD, self.scaling, "scales numbers, and a gam uses their bins; leave it out")
            schema = schema.binned(self.bins, self.smoothing)
        elif schema.pair_names:
            remedy = "are of an additive model; set task.model=gam, or remove the pairs"
            raise Refusal("task.model", self.model, f"{schema.pairs[0].name} and other pairs {remedy}")
        schema = with_moments(standardised(schema, self.scaling), self.moments or {})
        return weighted_schema(schema, self.group_weights)


@wraps(TableKeys, assigned=(), updated=())
def load(*args: Any, **options: Any) -> Tables:
    """Return the task; arguments as of `TableKeys`. Refuse an invalid value, schema or table."""
    keys = TableKeys(*args, **options)
    layers, sources = layers_of(keys.model, keys.hidden), keys.sources()
    schema = keys.agreed(sources)
    if schema.constrained:
        constraints().require_shapes(schema, layers)
    groups = _groups(schema, [keys.groups] if isinstance(keys.groups, str) else keys.groups)
    clients = tuple(_examples(source, schema, keys.person, groups) for source in sources)
    if schema.weight is not None:
        clients = tuple(
            row_weights().with_levels(data, source, schema)
            for data, source in zip(clients, sources, strict=True)
        )
    if keys.partition != "natural":
        clients, sources = _dealt(clients, schema, keys), list[RowSource]()
    elif keys.num_clients not in (None, len(clients)) and keys.folder is not None:
        remedy = f"{keys.folder} gives {len(clients)}, one per file or folder; leave it out"
        raise Refusal("task.num_clients", keys.num_clients, remedy)
    if keys.held_out_file is not None:
        test = _examples(keys.files(keys.held_out_file), schema)
    elif keys.simulated:
        clients, test = _split(clients, keys, _unscaled(keys, sources) or clients)
    else:
        test = Examples(torch.zeros(0, schema.width), torch.from_numpy(schema.outcome.empty(0)))
    return weighted_task(Tables(schema, clients, test, layers, keys.simulated, groups, tuple(sources)))


def _groups(schema: Schema, names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the columns of groups as the schema spells them, with that of weights by group."""
    if schema.group_weights is not None:
        names = [*names, schema.group_weights.of]
    return tuple(dict.fromkeys(schema.group(name).name for name in names))


def _schema(keys: TableKeys, sources: Sequence[RowSource]) -> Schema:
    """Return the declared schema or, for simulated tables without one, a draft from their rows."""
    declared = Path(keys.schema) if keys.schema else Path(keys.folder or ".") / SCHEMA
    if keys.schema or (keys.folder and declared.is_file()):
        return read_schema(declared, keys.label)
    command = DRAFT_COMMAND.format(keys.folder or "TABLES")
    if keys.folder is None:
        raise Refusal("task.schema", None, f"name the schema that all clients have; {command}")
    if not keys.simulated:
        remedy = (
            f"these tables are real, and a schema inferred from them would reveal their rows; declare one: {command}. "
            "Set task.simulated=true if they are public or synthetic"
        )
        raise Refusal("task.schema", None, remedy)
    if keys.scaling == ASKED:
        remedy = "needs the bounds of a declared schema, since bounds made from the rows would reveal them"
        raise Refusal(FIELD, ASKED, f"{remedy}; write one: {command}")
    if keys.label is None:
        raise Refusal("task.label", None, "name the column to predict")
    draft = extension("tables", "draft", "task.schema", keys.schema)(sources, keys.label)
    label = draft.schema.label
    if (other := draft.other_words.get(label)) is not None and other.doubtful:
        remedy = f"has other words in other tables ({other}); say which are the same: {command}"
        raise Refusal("task.label", label, remedy)
    return draft.schema


def _without(person: str | None, schema: Schema, simulated: bool) -> Schema:
    """Return the schema without the column of persons, which a model must not see; real tables may not declare it."""
    if person is None:
        return schema
    others = tuple(column for column in schema.columns if plain(column.name) != plain(person))
    if len(others) < len(schema.columns) and not (simulated and plain(person) != plain(schema.label)):
        remedy = "is a column of the schema, so the model would see it; remove it there"
        raise Refusal("task.person", person, remedy)
    if any(plain(person) in map(plain, pair) for pair in schema.pair_names):
        raise Refusal("task.person", person, "is in a pair of the schema; remove that pair")
    if len(others) < 2:
        raise Refusal("task.person", person, "leaves no column to predict the label from")
    return replace(schema, columns=others)


def _examples(
    source: RowSource, schema: Schema, person: str | None = None, grouped: Sequence[str] = ()
) -> Examples:
    """Return the rows of a client's tables, with their persons and their groups by the columns `grouped`."""
    rows = read_rows(source, schema)
    assert rows.targets is not None
    persons = None if person is None else read_persons(source, person, schema)
    codes = read_groups(source, [schema.group(name) for name in grouped], schema) if grouped else {}
    groups = {name: torch.from_numpy(numbers) for name, numbers in codes.items()}
    return Examples(torch.from_numpy(rows.inputs), torch.from_numpy(rows.targets), persons, groups or None)


def released(folder: Path, task: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return name and options of the task of a run on tables, which stores the schema of its inputs.

    Args:
      folder: of the run.
      task: keys of its task.
    """
    schema = folder / SCHEMA
    options = {name: task[name] for name in ("model", "hidden", "groups", "bins") if name in task}
    if options.get("model") == AUTO:
        options["model"] = model_of_stored(schema)
    return "csv", {"schema": str(schema), "smoothing": 0.0, **options}  # that of gams of earlier releases


def _dealt(clients: Sequence[Examples], schema: Schema, keys: TableKeys) -> tuple[Examples, ...]:
    """Return the rows of all clients, dealt anew by a partition."""
    name, pool = keys.partition, joined(clients)
    if not keys.simulated:
        remedy = "real rows stay with their owners; use natural, or set task.simulated=true"
        raise Refusal("partition", name, remedy)
    if not schema.outcome.words and name not in ("iid", FLWR):
        raise Refusal("partition", name, "needs classes, and the label has none; use iid or natural")
    labels, num_clients = pool.targets.numpy().reshape(len(pool), -1)[:, 0], keys.num_clients
    if name == FLWR:
        dealer = {"num_clients": num_clients, "seed": keys.seed, **(keys.dealer or {})}
        owners = np.repeat(np.arange(len(clients)), [len(client) for client in clients])
        shares = flwr_shares({**dealer, "name": name, "alpha": keys.alpha}, labels, owners)
    else:
        partition = Partition(name, num_clients or len(clients), keys.alpha, keys.seed)
        shares = partition.shares(labels.astype(np.int64))
    return tuple(only(pool, share) for share in shares)


def _unscaled(keys: TableKeys, sources: Sequence[RowSource]) -> list[Examples]:
    """Return the clients' rows without `moments`; empty if there are none, or a partition dealt the rows."""
    if keys.moments is None:
        return []
    schema = replace(keys, moments=None).agreed(sources)
    return [_examples(source, schema, keys.person) for source in sources]


def _split(
    clients: Sequence[Examples], keys: TableKeys, hashed: Sequence[Examples]
) -> tuple[tuple[Examples, ...], Examples]:
    """Return the clients' training examples, and the held-out ones of all: single rows, or whole persons.

    Equal rows are numbered over all clients: otherwise many small clients with few distinct rows would hold out the same.

    Args:
      clients: all examples of each client.
      keys: share and rule.
      hashed: the same rows; their hashes select. Of natural clients they lack a scaling that the run asked for.
    """
    field, share = "task.held_out_share", keys.held_out_share
    if not 0 < share < 1:
        raise Refusal(field, share, "give a number above 0 and below 1")
    hashes = [row_hashes(data) if data.persons is None else person_hashes(data.persons) for data in hashed]
    mask = holdout_mask(
        np.concatenate(hashes),
        share,
        independent=True,
        group_equal_rows=keys.group_equal_rows or keys.person is not None,
    )
    masks = np.split(mask, np.cumsum([len(client) for client in clients])[:-1])
    test = joined([only(data, np.flatnonzero(part)) for data, part in zip(clients, masks, strict=True)])
    if not len(test):
        raise Refusal(field, share, "holds out no row; increase it, or set task.held_out_file")
    return tuple(only(data, np.flatnonzero(~part)) for data, part in zip(clients, masks, strict=True)), test


def person_hashes(persons: Sequence[object]) -> NDArray[np.uint64]:
    """Return a keyed hash of each row's person, which is the same everywhere."""
    key = SPLIT_KEY.to_bytes(2, "big")
    digests = (hashlib.blake2b(str(person).encode(), key=key, digest_size=8).digest() for person in persons)
    return np.fromiter((int.from_bytes(digest, "big") for digest in digests), np.uint64)


def row_hashes(examples: Examples) -> NDArray[np.uint64]:
    """Return a keyed hash of each row's inputs and target, whatever the row's position."""
    inputs, targets = examples.inputs.numpy(), examples.targets.numpy().astype(np.float32)
    targets = targets.reshape(len(targets), -1)
    generator, size = np.random.default_rng(SPLIT_KEY), inputs.shape[1] + targets.shape[1] + 1
    factors = generator.integers(0, 2**64, size, dtype=np.uint64) | np.uint64(1)  # odd, and so invertible
    total = np.full(len(targets), factors[-1], dtype=np.uint64)
    for column, factor in zip((*inputs.T, *targets.T), factors, strict=False):
        bits = (column + np.float32(0)).view(np.uint32).astype(np.uint64)  # 0 for -0
        total = (total ^ bits) * factor
        total ^= total >> np.uint64(29)
    return total
