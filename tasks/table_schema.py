"""Schema of tables: what each column holds, one for all clients, declared in a YAML file."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from yaml.constructor import BaseConstructor

from ..base.extensions import extension
from ..base.refusal import Refusal, real
from ..configs.strict import nearest
from ..configs.yaml_guard import Limits, composed
from .labels import Classes, Label, Number
from .table_basis import Pair, basis, read_pairs

# Spellings of an unknown value, unless the schema declares others.
MISSING = ("", "?", "na", "n/a", "nan", "null", "none")
KEYS = ("label", "missing", "columns", "smoothing", "pairs", "groups", "group_weights", "weight")
DATES = ("since", "unit", "format")  # keys of a column of dates
COLUMN_KEYS = (
    "low",
    "high",
    "mean",
    "deviation",
    "edges",
    "missing",
    "required",
    "categories",
    "weights",
    "monotone",
    "bound",
    *DATES,
)
DIRECTIONS = ("up", "down")  # values of `monotone`
MISSING_KEYS = ("words", "value")
OWN_INPUT = (
    "category",
    "indicator",
)  # values of `missing` for `Column.missing_input`: of words or bins, of a number
LIMITS = Limits(1 << 26, 1 << 22)  # of a schema's file: of 2^17 columns, each with some 30 values
LONGEST = 4.0  # length of smoothing: beyond it only a line remains
WHOLE = re.compile(r"^(-?\d+)\.0+$")
# A word that a schema's file holds without quotes; `_word` quotes others.
PLAIN = re.compile(r"[^\W\d][\w ./()-]*[\w.)]|[^\W\d]")


@dataclass(frozen=True)
class Column:
    """Column of a table: a number between two bounds, or one of several words.

    Attributes:
      name: as in the header of a table, but for case and spaces.
      low, high: bounds to which a number is clipped, and which are scaled to -1 and 1.
      missing: number that stands for a missing one; None: for a number that is an input, the middle of its range or its
        mean; for bins, none.
      required: whether a missing value is refused.
      categories: for each word its spellings, the word itself first; empty for a number.
      absent: words that stand for a missing value in this column, besides the schema's, in the form of `plain`.
      weights: weight in the loss of an example of each category of a label, the largest 1; empty if all are 1.
      edges: edges between the bins of a number, ascending; each bin is an input. Empty if the number itself is the input.
      standard: mean and standard deviation that scale a clipped number, in place of its bounds.
      since: instant from which the column's dates count, in its unit, a `tables.durations.Since`; None for a column of
        numbers or words.
      missing_input: whether a missing value is an input of its own, the column's last, 1 if it is missing and 0 otherwise.
      monotone: `up` or `down`, the direction in which the released model's score changes with a number; empty for any.
      bound: largest size of what the column adds to the released model's score, above 0, in the score's unit.
    """

    name: str
    low: float = -1.0
    high: float = 1.0
    missing: float | None = None
    required: bool = False
    categories: tuple[tuple[str, ...], ...] = ()
    absent: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    edges: tuple[float, ...] = ()
    standard: tuple[float, float] | None = None
    missing_input: bool = False
    since: Any = None
    monotone: str = ""
    bound: float = math.inf

    @property
    def is_constrained(self) -> bool:
        """Whether the released model's shape has a direction or a bound."""
        return bool(self.constraint)

    @property
    def constraint(self) -> str:
        """Direction and bound in words; empty without any."""
        bound = f"within {self.bound:g}" if self.bound < math.inf else ""
        return ", ".join(filter(None, (self.monotone, bound)))

    @property
    def origin(self) -> tuple[Column, ...]:
        """The column of dates from which this one counts, or none."""
        if self.since is None or not self.since.column:
            return ()
        return (Column(self.since.column, since=self.since),)

    @property
    def scale(self) -> tuple[float, float]:
        """Offset and scale by which a number becomes an input: the middle and half of its range, or mean and deviation."""
        return self.standard or ((self.low + self.high) / 2, (self.high - self.low) / 2)

    @property
    def width(self) -> int:
        """Number of inputs of the model that the column becomes."""
        return self.values + self.missing_input

    @property
    def values(self) -> int:
        """Number of inputs for values: the categories, the bins of a number, or 1 for the number itself."""
        return len(self.categories) or len(self.edges) + 1

    @property
    def words(self) -> tuple[str, ...]:
        """The categories, each by its first spelling."""
        return self._words

    @cached_property
    def _words(self) -> tuple[str, ...]:
        return tuple(spellings[0] for spellings in self.categories)

    @cached_property
    def codes(self) -> Mapping[str, int]:
        """The number of a category by each of its spellings, in the form of `plain`."""
        return {plain(word): code for code, spellings in enumerate(self.categories) for word in spellings}


def categorical(name: str, words: Iterable[str]) -> Column:
    """Return a column of words, each of which has one spelling."""
    return Column(name, categories=tuple((word,) for word in words))


@dataclass(frozen=True)
class GroupWeights:
    """Public weights of examples in the loss, by group and class; the largest is 1.

    Attributes:
      of: name of the column whose words are the groups.
      weights: for each group, in the order of the words, the weight of each class.
    """

    of: str
    weights: tuple[tuple[float, ...], ...]

    @property
    def unknown(self) -> tuple[float, ...]:
        """Weight of each class in an unknown group: the mean over the groups."""
        return tuple(sum(weights) / len(weights) for weights in zip(*self.weights, strict=True))


@dataclass(frozen=True)
class Schema:
    """Schema of tables.

    Attributes:
      columns: inputs of the model in their order, and the label.
      label: name of the column that is predicted.
      missing: words that stand for a missing value, in the form of `plain`.
      groups: columns with categories that may be groups, and are no inputs of the model.
      group_weights: weights of examples in the loss by group and class; None if all are 1.
      weight: column of numbers that weighs each row in the loss, divided by its `high`; None if all weigh 1.
      kind: label that the schema declares by `kind`; None for one column of categories or numbers.
      smoothing: length over which neighbouring bins share their inputs, as a share of half the range; 0 if they are
        separate, None if the schema leaves it to the model.
      pair_names: names of both columns of each of `pairs`.
    """

    columns: tuple[Column, ...]
    label: str
    missing: tuple[str, ...] = field(default=MISSING)
    groups: tuple[Column, ...] = ()
    group_weights: GroupWeights | None = None
    weight: Column | None = None
    kind: Label | None = None
    smoothing: float | None = None
    pair_names: tuple[tuple[str, str], ...] = ()

    @cached_property
    def target(self) -> Column:
        """The column that is predicted, or the first of several."""
        return next(column for column in self.columns if plain(column.name) == plain(self.label))

    @cached_property
    def outcome(self) -> Label:
        """The label: what the model predicts, and how it is trained and measured."""
        label = self.kind or (Classes if self.target.categories else Number)(self.target)
        if self.weight is None:
            return label
        return extension("tables", "row_weights", "weight", self.weight.name).label_of_rows(label)

    @cached_property
    def label_columns(self) -> tuple[Column, ...]:
        """The columns that hold the label."""
        names = {plain(column.name) for column in self.outcome.columns}
        return tuple(column for column in self.columns if plain(column.name) in names)

    @cached_property
    def inputs(self) -> tuple[Column, ...]:
        """The columns that the model sees."""
        return tuple(column for column in self.columns if column not in self.label_columns)

    @property
    def numbers(self) -> tuple[Column, ...]:
        """The columns of numbers that are inputs themselves, and not by their bins."""
        return tuple(column for column in self.inputs if not column.categories and not column.edges)

    @cached_property
    def pairs(self) -> tuple[Pair, ...]:
        """The pairs of columns whose joint bins and words are inputs too, after those of single columns."""
        by_name = {column.name: column for column in self.inputs}
        return tuple(Pair(by_name[first], by_name[second]) for first, second in self.pair_names)

    @property
    def constrained(self) -> tuple[Column, ...]:
        """The columns whose shapes in the released model have a direction or a bound."""
        return tuple(column for column in self.inputs if column.is_constrained)

    @property
    def width(self) -> int:
        """Number of inputs of the model."""
        return sum(each.width for each in (*self.inputs, *self.pairs))

    def rows(self, column: Column) -> NDArray[np.float32]:
        """Return the inputs of each bin or word of a column, and last of no value if that is an input, (width, width).

        Bins of a column with a direction or a bound are separate: the closest shape need not be smooth.
        """
        rows = np.eye(column.width, dtype=np.float32)
        if column.edges and self.smoothing and not column.is_constrained:
            rows[: column.values, : column.values] = basis(column.values, self.smoothing)
        return rows

    def spelling(self, name: str) -> str | None:
        """Return the name of an input as the schema spells it; None for another name."""
        return next((each.name for each in self.inputs if plain(each.name) == plain(name)), None)

    @property
    def unit(self) -> tuple[float, float]:
        """Offset and scale that convert an output of the model to the unit of the label; 0 and 1 for classes."""
        return self.outcome.unit

    def text(self) -> str:
        """Return the schema as the content of a file that `read_schema` reads."""
        lines = [f"label: {_flow(self.outcome.keys or self.label)}"]
        if self.missing != MISSING:
            lines.append(f"missing: {_words(self.missing)}")
        if self.weight is not None:
            lines += ["weight:", column_line(self.weight)]
        lines += ["columns:", *map(column_line, self.columns)]
        if self.smoothing is not None:
            lines.append(f"smoothing: {_digits(self.smoothing)}")
        if self.pair_names:
            lines.append(f"pairs: [{', '.join(map(_words, self.pair_names))}]")
        if self.groups:
            lines += ["groups:", *map(column_line, self.groups)]
        if self.group_weights is not None:
            lines += ["group_weights:", f"  {_word(self.group_weights.of)}:"]
            words = self.group(self.group_weights.of).words
            for word, weights in zip(words, self.group_weights.weights, strict=True):
                lines.append(f"    {_word(word)}: {_weights_text(self.target.words, weights)}")
        return "\n".join([*lines, ""])

    def group(self, name: str) -> Column:
        """Return the column of that name among `groups` and inputs of the model; refuse one without categories."""
        columns = {plain(column.name): column for column in (*self.inputs, *self.groups)}
        if (column := columns.get(plain(name))) is None:
            remedy = f"is not a column; {nearest(name, (column.name for column in columns.values()))}"
            raise Refusal("task.groups", name, remedy)
        if not column.categories:
            remedy = "holds numbers; name a column with categories, whose words are the groups"
            raise Refusal("task.groups", name, remedy)
        return column

    def unbinned(self) -> Schema:
        """Return the schema without bins: numbers are inputs themselves."""
        return replace(
            self, columns=tuple(replace(column, edges=()) for column in self.columns), smoothing=None
        )

    def binned(self, bins: int, smoothing: float = 0.0) -> Schema:
        """Return the schema in which each number of the inputs has bins: of its own edges, or at least 2 of equal width.

        Args:
          bins: number of bins of a number without edges.
          smoothing: length of smoothing where the schema has none.
        """
        columns = tuple(self._binned(column, bins) for column in self.columns)
        return replace(
            self, columns=columns, smoothing=smoothing if self.smoothing is None else self.smoothing
        )

    def _binned(self, column: Column, bins: int) -> Column:
        if column.categories or column.edges or column in self.label_columns:
            return column
        step = (column.high - column.low) / bins
        edges = tuple(column.low + step * number for number in range(1, bins))
        return replace(column, edges=edges, standard=None)


def plain(text: str) -> str:
    """Return a word in the form in which words are compared: lower case, single spaces, and 1.0 as 1."""
    word = " ".join(text.lower().split())
    return WHOLE.sub(r"\1", word) if word.endswith("0") and "." in word else word


def read_schema(path: Path, label: str | None = None) -> Schema:
    """Return the schema that a YAML file declares; refuse a file that cannot be read, or has a mistake.

    Args:
      path: the file.
      label: name of the column that is predicted; None for the file's own `label`.
    """
    where = str(path)
    values = _mapping(where, read_words(path), KEYS)
    columns = values.get("columns")
    if not isinstance(columns, dict) or not columns:
        raise Refusal(where, columns, "columns must be a mapping of column names to their definitions")
    inputs_and_label = columns_of(where, columns)
    missing = MISSING
    if values.get("missing") is not None:
        words = map(plain, _list(where, "missing", values["missing"]))
        missing = ("", *(word for word in words if word))
    definitions = values.get("groups", {})
    if not isinstance(definitions, dict):
        raise Refusal(where, definitions, "groups must be a mapping of column names to their categories")
    groups = columns_of(where, definitions)
    others = {plain(column.name) for column in inputs_and_label}
    for column in groups:
        if not column.categories:
            remedy = "must have categories: their words are the groups"
            raise Refusal(f"{where}: {column.name}", "groups", remedy)
        if plain(column.name) in others:
            raise Refusal(f"{where}: {column.name}", "groups", "is in columns too; remove it from one")
        if column.missing_input or column.is_constrained:
            remedy = "belong to inputs of the model, and groups are none; remove them"
            raise Refusal(f"{where}: {column.name}", "missing, monotone and bound", remedy)
    schema = _labelled(Schema(inputs_and_label, "", missing, groups), label, values.get("label"), where)
    if "smoothing" in values:
        schema = replace(schema, smoothing=_length(where, values["smoothing"]))
    if "pairs" in values:
        schema = replace(schema, pair_names=read_pairs(f"{where}: pairs", values["pairs"], schema.spelling))
    if "weight" in values:
        return extension("tables", "row_weights", "weight", values["weight"]).with_weight(
            schema, values, where
        )
    if "group_weights" not in values:
        return schema
    field = f"{where}: group_weights"
    weights = extension("tables", "group_weights", field, values["group_weights"])
    return weights.with_group_weights(schema, values["group_weights"], field)


def weighted_schema(schema: Schema, path: str | None) -> Schema:
    """Return the schema with a file's weights by group and class; None leaves it unchanged."""
    if path is None:
        return schema
    return extension("tables", "group_weights", "task.group_weights", path).weighted(schema, path)


def model_of_stored(path: Path) -> str:
    """Return the model, `linear` or `gam`, by a schema that a run has stored: a gam has bins of every number."""
    return "linear" if read_schema(path).numbers else "gam"


def _labelled(schema: Schema, label: str | None, declared: object, where: str) -> Schema:
    """Return the schema with its label.

    Args:
      schema: schema of all columns.
      label: name of the column to predict; None for `declared`.
      declared: value of the file's `label`: the name of a column, or a mapping with `kind`.
      where: file of the schema, for a refusal.
    """
    if not isinstance(declared, dict):
        return with_label(schema, label or declared, where)
    field, kind = f"{where}: label", declared.get("kind")
    outcome: Label = extension("tables", "label_of_kind", field, kind)(field, declared, schema.columns)
    first = outcome.columns[0].name
    if label is not None and plain(label) != plain(first):
        raise Refusal("task.label", label, f"{where} declares a label of kind {kind}; leave this out")
    return with_label(replace(schema, kind=outcome), first, where)


def _length(where: str, value: object) -> float:
    """Return the length of smoothing; refuse one that is out of range."""
    length = finite_number(where, "smoothing", value)
    if not 0 <= length <= LONGEST:
        raise Refusal(
            f"{where}: smoothing", f"{length:g}", f"give a number from 0, separate bins, to {LONGEST:g}"
        )
    return length


def columns_of(where: str, definitions: dict[Any, Any]) -> tuple[Column, ...]:
    """Return the columns of a mapping; refuse a name that it has twice."""
    counts = Counter(plain(str(name)) for name in definitions)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise Refusal(where, twice[0], "names two columns; case and spaces are ignored")
    return tuple(_column(f"{where}: {name}", str(name), value) for name, value in definitions.items())


def read_words(path: Path) -> object:
    """Return the content of a YAML file, with every word and number as text; refuse a file that cannot be read."""
    root = composed(path, LIMITS)
    try:
        # Without constructors of types, `no` is a word and not false.
        return None if root is None else BaseConstructor().construct_document(root)
    except yaml.MarkedYAMLError as error:
        raise Refusal("file", str(path), str(error.problem)) from None
    except Exception as error:  # noqa: BLE001 (PyYAML's constructors document no closed set)
        reason = str(error) or type(error).__name__
        raise Refusal("file", str(path), f"cannot be read as YAML ({reason})") from None


def with_label(schema: Schema, label: object, where: str) -> Schema:
    """Return the schema with a label; refuse one that is no column, is the only one, or has keys of inputs.

    Args:
      schema: schema of all columns.
      label: name of the column to predict.
      where: file of the schema, for a refusal.
    """
    by_name = {plain(column.name): column.name for column in schema.columns}
    if not isinstance(label, str) or plain(label) not in by_name:
        raise Refusal(
            "task.label", label, f"name a column of {where}; {nearest(str(label), by_name.values())}"
        )
    schema = replace(schema, label=by_name[plain(label)])
    if not schema.inputs:
        raise Refusal("task.label", label, f"{where} has no other column to predict it from")
    weighted = {plain(column.name) for column in schema.outcome.weighted}
    for column in schema.columns:
        is_label = column in schema.label_columns
        for misplaced, key, remedy in (
            (is_label and column.edges, "edges", "belong to inputs, and this is the label; remove them"),
            (is_label and column.missing_input, "missing", "is refused in a label; remove it"),
            (is_label and column.is_constrained, "monotone and bound", "belong to inputs; remove them"),
            (
                is_label and column.standard,
                "mean and deviation",
                "belong to inputs, and the label is scaled by its bounds; remove them",
            ),
            (not is_label and column.weights, "weights", f"belong to the label, which is {label}"),
            (
                is_label and plain(column.name) not in weighted and column.weights,
                "weights",
                "have no meaning for this kind of label; remove them",
            ),
        ):
            if misplaced:
                raise Refusal(f"{where}: {column.name}", key, remedy)
    return schema


# In the functions below `where` is the field that a refusal names: the file, and the column in it.


def _column(where: str, name: str, definition: object) -> Column:
    """Return the column of a definition, a mapping with keys among COLUMN_KEYS."""
    values = _mapping(where, definition, COLUMN_KEYS)
    required = values.get("required", "false")
    if required not in ("true", "false"):
        raise Refusal(where, required, "required must be true or false")
    column = _with_missing(where, Column(name, required=required == "true"), values.get("missing"))
    if "bound" in values:
        column = replace(column, bound=finite_number(where, "bound", values["bound"]))
        if column.bound <= 0:
            raise Refusal(where, f"{column.bound:g}", "bound must be above 0")
    if "categories" in values:
        return _categorical(where, column, values)
    return _numeric(where, column, values)


def _categorical(where: str, column: Column, values: dict[str, Any]) -> Column:
    """Return the column with the keys of its definition that belong to categories; refuse those of numbers."""
    for key in ("low", "high", "mean", "deviation", "edges", "monotone", *DATES):
        if key in values:
            raise Refusal(where, values[key], f"{key} belongs to a number; remove it here")
    if column.missing is not None:
        remedy = "missing must be category or a list of words, since this column has categories"
        raise Refusal(where, f"{column.missing:g}", remedy)
    column = replace(column, categories=_categories(where, values["categories"]))
    if both := [word for word in column.absent if word in column.codes]:
        raise Refusal(where, both[0], "is in missing and in categories; remove it from one")
    if "weights" not in values:
        return column
    return replace(column, weights=_weights(where, values["weights"], column))


def _numeric(where: str, column: Column, values: dict[str, Any]) -> Column:
    """Return the column with the keys of its definition that belong to numbers; refuse weights."""
    if "weights" in values:
        raise Refusal(where, "weights", "belong to categories; a number has no classes")
    low, high = (finite_number(where, key, values.get(key)) for key in ("low", "high"))
    if not low < high:
        raise Refusal(where, f"{low:g} .. {high:g}", "low must be below high")
    if column.missing is not None and not low <= column.missing <= high:
        raise Refusal(where, f"{column.missing:g}", f"missing must lie between {low:g} and {high:g}")
    edges = _edges(where, values["edges"], low, high) if "edges" in values else ()
    monotone = values.get("monotone", "")
    if monotone and monotone not in DIRECTIONS:
        raise Refusal(where, monotone, f"monotone must be {' or '.join(DIRECTIONS)}")
    standard, column = _standard(where, values, low, high), replace(column, since=_since(where, values))
    return replace(column, low=low, high=high, edges=edges, standard=standard, monotone=monotone)


def _since(where: str, values: dict[str, Any]) -> Any:
    """Return the instant from which a definition's dates count; None if it has none."""
    if not any(key in values for key in DATES):
        return None
    return extension("tables", "since_of", where, "since")(where, values)


def _standard(where: str, values: dict[str, Any], low: float, high: float) -> tuple[float, float] | None:
    """Return the mean and the standard deviation of a number's definition; None if it has neither."""
    keys = [key for key in ("mean", "deviation") if key in values]
    if not keys:
        return None
    if len(keys) < 2 or "edges" in values:
        raise Refusal(where, keys[0], "give mean and deviation together, of a number without edges")
    mean, deviation = (finite_number(where, key, values[key]) for key in keys)
    require_within(where, mean, deviation, low, high)
    return mean, deviation


def require_within(where: str, mean: float, deviation: float, low: float, high: float) -> None:
    """Refuse a mean and a standard deviation that numbers between two bounds cannot have."""
    if not low <= mean <= high or not 0 < deviation <= high - low:
        remedy = f"the mean lies between {low:g} and {high:g}, and the deviation is above 0 and at most their distance"
        raise Refusal(where, f"{mean:g}, {deviation:g}", remedy)


def _edges(where: str, value: object, low: float, high: float) -> tuple[float, ...]:
    """Return the edges of a number's bins, which must ascend strictly between its bounds."""
    if not isinstance(value, list) or not value:
        raise Refusal(where, value, "edges must be a list of numbers, the bounds between bins")
    edges = tuple(finite_number(where, "edges", edge) for edge in value)
    if list(edges) != sorted({low, *edges, high})[1:-1]:
        raise Refusal(where, list(edges), f"edges must ascend, between {low:g} and {high:g}")
    return edges


def _with_missing(where: str, column: Column, value: object) -> Column:
    """Return the column with what `missing` says: words for a missing value, and the number or the input for one."""
    words: tuple[str, ...] = ()
    number = value
    if isinstance(value, dict):
        values = _mapping(f"{where}: missing", value, MISSING_KEYS)
        words, number = _list(where, "missing.words", values.get("words", [])), values.get("value")
    elif isinstance(value, list):
        words, number = _list(where, "missing", value), None
    column = replace(column, absent=tuple(map(plain, words)))
    if number in OWN_INPUT:
        if column.required:
            raise Refusal(
                where, number, "has no rows where missing values are refused; remove it, or required"
            )
        return replace(column, missing_input=True)
    return column if number is None else replace(column, missing=finite_number(where, "missing", number))


def _weights(where: str, value: object, column: Column) -> tuple[float, ...]:
    """Return the weight of each category, 1 by default, scaled so that the largest is 1."""
    if not isinstance(value, dict) or not value:
        raise Refusal(where, value, "weights must be a mapping of categories to their weights")
    weights = [1.0] * column.width
    for word, weight in value.items():
        code = column.codes.get(plain(str(word)))
        if code is None:
            raise Refusal(where, word, f"is no category for weights; {nearest(str(word), column.words)}")
        weights[code] = finite_number(where, "weights", weight)
        if weights[code] <= 0:
            raise Refusal(where, weight, "weights must be above 0")
    largest = max(weights)
    return tuple(weight / largest for weight in weights)


def _categories(where: str, value: object) -> tuple[tuple[str, ...], ...]:
    """Return the spellings of each category, from a list of words or a mapping of words to other spellings."""
    if isinstance(value, dict):
        categories = tuple((str(word), *_list(where, "categories", more)) for word, more in value.items())
    else:
        categories = tuple((word,) for word in _list(where, "categories", value))
    counts = Counter(word for spellings in categories for word in dict.fromkeys(map(plain, spellings)))
    if twice := [word for word, count in counts.items() if count > 1]:
        raise Refusal(where, twice[0], "occurs twice in categories; case and spaces are ignored")
    if len(categories) < 2:
        raise Refusal(where, len(categories), "categories must hold at least two words")
    return categories


def _mapping(where: str, value: object, keys: tuple[str, ...]) -> dict[str, Any]:
    """Return a mapping whose keys are among these; refuse any other value."""
    if not isinstance(value, dict):
        raise Refusal(where, value, f"must be a mapping with the keys {', '.join(keys)}")
    for key in value:
        if key not in keys:
            raise Refusal(where, key, f"there is no such key; {nearest(str(key), keys)}")
    return {str(key): content for key, content in value.items()}


def _list(where: str, key: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise Refusal(where, value, f"{key} must be a list of words")
    return tuple(value)


def finite_number(where: str, key: str, value: object) -> float:
    """Return the number of a key, from the text that `read_words` reads; refuse what is no finite number."""
    if value is None:
        text = f"{key} is missing; give low and high, the plausible range (not the data's own), or categories"
        raise Refusal(where, None, text)
    try:
        return real(where, float(value) if isinstance(value, str) else value)
    except ValueError:
        raise Refusal(where, value, f"{key} must be a number") from None


# --- as text ------------------------------------------------------------------------------------------------------


def column_line(column: Column) -> str:
    """Return a column's definition as a line of a schema's file."""
    return f"  {_word(column.name)}: {{{', '.join(_parts(column))}}}"


def _parts(column: Column) -> Iterator[str]:
    """Yield the keys of a column's definition with their values."""
    if column.categories and all(len(each) == 1 for each in column.categories):
        yield f"categories: {_words(column.words)}"
    elif column.categories:
        pairs = (f"{_word(each[0])}: {_words(each[1:])}" for each in column.categories)
        yield f"categories: {{{', '.join(pairs)}}}"
    else:
        yield f"low: {_digits(column.low)}, high: {_digits(column.high)}"
    if column.since:
        yield from (f"{key}: {_word(value)}" for key, value in column.since.keys.items())
    if column.standard:
        yield f"mean: {_digits(column.standard[0])}, deviation: {_digits(column.standard[1])}"
    if column.edges:
        yield f"edges: [{', '.join(map(_digits, column.edges))}]"
    if column.weights:
        yield f"weights: {_weights_text(column.words, column.weights)}"
    value = "" if column.missing is None else _digits(column.missing)
    if column.missing_input:
        value = OWN_INPUT[not column.categories and not column.edges]
    if column.absent and value:
        yield f"missing: {{words: {_words(column.absent)}, value: {value}}}"
    elif column.absent or value:
        yield f"missing: {value or _words(column.absent)}"
    if column.monotone:
        yield f"monotone: {column.monotone}"
    if column.bound < math.inf:
        yield f"bound: {_digits(column.bound)}"
    if column.required:
        yield "required: true"


def _weights_text(words: tuple[str, ...], weights: tuple[float, ...]) -> str:
    pairs = zip(words, weights, strict=True)
    return f"{{{', '.join(f'{_word(word)}: {_digits(weight)}' for word, weight in pairs)}}}"


def _digits(number: float) -> str:
    return repr(number).removesuffix(".0")


def _words(words: tuple[str, ...]) -> str:
    return f"[{', '.join(map(_word, words))}]"


def _flow(value: object) -> str:
    """Return words, numbers, lists and mappings of them as YAML on one line."""
    if isinstance(value, Mapping):
        pairs: Mapping[str, object] = value  # pyright: ignore[reportUnknownVariableType]
        return f"{{{', '.join(f'{_word(key)}: {_flow(each)}' for key, each in pairs.items())}}}"
    if isinstance(value, tuple):
        items: tuple[object, ...] = value  # pyright: ignore[reportUnknownVariableType]
        return f"[{', '.join(map(_flow, items))}]"
    return _digits(value) if isinstance(value, int | float) else _word(str(value))


def _word(word: str) -> str:
    return word if PLAIN.fullmatch(word) else json.dumps(word, ensure_ascii=False)
