"""Schema of tables: what each column holds, one for all clients, declared in a YAML file."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from ..base.refusal import Refusal, real
from ..configs.strict import nearest
from ..configs.yaml_guard import check_file

# Spellings of an unknown value, unless the schema declares others.
MISSING = ("", "?", "na", "n/a", "nan", "null", "none")
KEYS = ("label", "missing", "columns", "groups", "group_weights")
COLUMN_KEYS = ("low", "high", "mean", "deviation", "edges", "missing", "required", "categories", "weights")
MISSING_KEYS = ("words", "value")
PLAIN = re.compile(r"[^\W\d][\w ./()-]*[\w.)]|[^\W\d]")


@dataclass(frozen=True)
class Column:
    """Column of a table: a number between two bounds, or one of several words.

    Attributes:
      name: in the header of a table, whatever its case and spaces.
      low, high: bounds of a number; it is cut to them and scaled to -1 .. 1.
      missing: number that stands for a missing one; the middle by default.
      absent: words that stand for a missing value in this column, beside the schema's, as `plain` has them.
      required: whether a missing value is refused.
      categories: for each word its spellings, the word itself first; empty for a number.
      edges: of a number's bins, ascending, between its bounds; each bin is then an input, and a missing number is in none.
        Empty where the number itself is the input.
      weights: of an example of each category in the loss of a label, the largest 1; empty where all are 1.
      standard: mean and standard deviation by which a number that was cut is scaled, in the place of its bounds.
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

    @property
    def scale(self) -> tuple[float, float]:
        """Offset and scale by which a number becomes an input: the middle and half of its range, or mean and deviation."""
        return self.standard or ((self.low + self.high) / 2, (self.high - self.low) / 2)

    @property
    def width(self) -> int:
        """Number of inputs of the model that the column becomes."""
        return len(self.categories) or (len(self.edges) + 1 if self.edges else 1)

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The categories, each by its first spelling."""
        return tuple(spellings[0] for spellings in self.categories)

    @cached_property
    def codes(self) -> Mapping[str, int]:
        """The number of a category by each of its spellings, as `plain` has it."""
        return {plain(each): code for code, spellings in enumerate(self.categories) for each in spellings}


def categorical(name: str, words: Iterable[str]) -> Column:
    """Return a column of words, each of which has one spelling."""
    return Column(name, categories=tuple((word,) for word in words))


@dataclass(frozen=True)
class GroupWeights:
    """Public weights of examples in the loss, by their group and their class; the largest is 1.

    Attributes:
      of: the column whose words are the groups.
      weights: of each class, for each group in the order of its words.
    """

    of: str
    weights: tuple[tuple[float, ...], ...]

    @property
    def unknown(self) -> tuple[float, ...]:
        """Weight of each class where the group is not known: the mean over the groups."""
        return tuple(sum(each) / len(each) for each in zip(*self.weights, strict=True))


@dataclass(frozen=True)
class Schema:
    """Schema of tables.

    Attributes:
      columns: inputs of the model in their order, and the label.
      label: name of the column that is predicted.
      missing: words that stand for a missing value, as `plain` has them.
      groups: columns with categories that are no inputs of the model, and may name groups.
      group_weights: of examples in the loss; None where a group changes nothing.
    """

    columns: tuple[Column, ...]
    label: str
    missing: tuple[str, ...] = field(default=MISSING)
    groups: tuple[Column, ...] = ()
    group_weights: GroupWeights | None = None

    @cached_property
    def target(self) -> Column:
        """The column that is predicted."""
        return next(each for each in self.columns if plain(each.name) == plain(self.label))

    @cached_property
    def inputs(self) -> tuple[Column, ...]:
        """The columns that the model sees."""
        return tuple(each for each in self.columns if each is not self.target)

    @property
    def numbers(self) -> tuple[Column, ...]:
        """The numbers that the model sees themselves, and not their bins."""
        return tuple(each for each in self.inputs if not each.categories and not each.edges)

    @property
    def width(self) -> int:
        """Number of inputs of the model."""
        return sum(each.width for each in self.inputs)

    @property
    def unit(self) -> tuple[float, float]:
        """Offset and scale that turn an output of the model into the unit of the label; 0 and 1 where it has words."""
        return (0.0, 1.0) if self.target.categories else self.target.scale

    def text(self) -> str:
        """Return the schema as the file from which `read_schema` makes it."""
        lines = [f"label: {_word(self.label)}"]
        if self.missing != MISSING:
            lines.append(f"missing: {_words(self.missing)}")
        lines += ["columns:", *map(column_line, self.columns)]
        if self.groups:
            lines += ["groups:", *map(column_line, self.groups)]
        if self.group_weights is not None:
            lines += ["group_weights:", f"  {_word(self.group_weights.of)}:"]
            words = self.group(self.group_weights.of).words
            for word, weights in zip(words, self.group_weights.weights, strict=True):
                lines.append(f"    {_word(word)}: {_weights_text(self.target.words, weights)}")
        return "\n".join([*lines, ""])

    def group(self, name: str) -> Column:
        """Return the column of that name whose categories are groups: one of `groups`, or an input of the model.

        Raises:
          Refusal: there is none, or it holds numbers.
        """
        found = {plain(each.name): each for each in (*self.inputs, *self.groups)}
        if plain(name) not in found:
            remedy = f"is not a column; {nearest(name, (each.name for each in found.values()))}"
            raise Refusal("task.groups", name, remedy)
        column = found[plain(name)]
        if not column.categories:
            remedy = "holds numbers; name a column with categories, whose words are the groups"
            raise Refusal("task.groups", name, remedy)
        return column

    def unbinned(self) -> Schema:
        """Return the schema in which numbers are inputs themselves."""
        return replace(self, columns=tuple(replace(each, edges=()) for each in self.columns))

    def binned(self, bins: int) -> Schema:
        """Return the schema in which every number that the model sees has bins, of equal width unless it declares edges.

        Args:
          bins: number of bins of a column without edges, at least 2.
        """
        return replace(self, columns=tuple(self._binned(each, bins) for each in self.columns))

    def _binned(self, column: Column, bins: int) -> Column:
        if column.categories or column.edges or column is self.target:
            return column
        step = (column.high - column.low) / bins
        edges = tuple(column.low + step * place for place in range(1, bins))
        return replace(column, edges=edges, standard=None)


def plain(text: str) -> str:
    """Return a word as words are compared: without case, outer and double spaces, and 1.0 as 1."""
    word = " ".join(text.lower().split())
    return re.sub(r"^(-?\d+)\.0+$", r"\1", word)


def read_schema(path: Path, label: str | None = None) -> Schema:
    """Return the schema that a YAML file declares.

    Args:
      path: of the file.
      label: of the column that is predicted; None takes the file's own word.

    Raises:
      Refusal: the file cannot be read, or holds a mistake.
    """
    found, where = read_words(path), str(path)
    values = _group(where, found, KEYS)
    columns = values.get("columns")
    if not isinstance(columns, dict) or not columns:
        raise Refusal(where, columns, "columns must be a mapping of column names to their definitions")
    read = tuple(_column(f"{where}: {name}", str(name), each) for name, each in columns.items())
    for name, times in Counter(plain(each.name) for each in read).items():
        if times > 1:
            raise Refusal(where, name, "names two columns; case and spaces are ignored")
    missing = values.get("missing")
    named = {plain(each.name) for each in read}
    words = MISSING if missing is None else tuple(plain(each) for each in _list(where, "missing", missing))
    groups = _groups(where, values.get("groups", {}), named)
    schema = Schema(read, "", ("", *(each for each in words if each)), groups)
    labelled = with_label(schema, label or values.get("label"), where)
    if "group_weights" not in values:
        return labelled
    return with_group_weights(labelled, values["group_weights"], f"{where}: group_weights")


def read_words(path: Path) -> object:
    """Return what a YAML file holds, every word and number of it as text.

    Raises:
      Refusal: the file cannot be read.
    """
    check_file(path)
    try:
        return yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_Words)
    except yaml.MarkedYAMLError as error:
        raise Refusal("file", str(path), str(error.problem)) from None
    except Exception as error:  # noqa: BLE001 (PyYAML's constructors document no closed set)
        said = str(error) or type(error).__name__
        raise Refusal("file", str(path), f"cannot be read as YAML ({said})") from None


def _groups(where: str, found: object, named: set[str]) -> tuple[Column, ...]:
    """Return the columns that name groups and are no inputs."""
    if not isinstance(found, dict):
        raise Refusal(where, found, "groups must be a mapping of column names to their categories")
    read = tuple(_column(f"{where}: {name}", str(name), each) for name, each in found.items())
    for each in read:
        if not each.categories:
            remedy = "must have categories: their words are the groups"
            raise Refusal(f"{where}: {each.name}", "groups", remedy)
        if plain(each.name) in named:
            raise Refusal(f"{where}: {each.name}", "groups", "is in columns too; remove it from one")
    return read


def with_label(schema: Schema, label: object, where: str) -> Schema:
    """Return the schema with the column that is to be predicted.

    Args:
      schema: of all columns.
      label: the name of one.
      where: the schema's file, for a refusal.

    Raises:
      Refusal: there is no such column, or none beside it.
    """
    named = {plain(each.name): each.name for each in schema.columns}
    if not isinstance(label, str) or plain(label) not in named:
        raise Refusal("task.label", label, f"name a column of {where}; {nearest(str(label), named.values())}")
    if len(named) == 1:
        raise Refusal("task.label", label, f"{where} has no other column to predict it from")
    for column in schema.columns:
        if column.edges and plain(column.name) == plain(label):
            remedy = "belong to inputs, and this is the label; remove them"
            raise Refusal(f"{where}: {column.name}", "edges", remedy)
        if column.standard and plain(column.name) == plain(label):
            remedy = "belong to inputs, and the label is scaled by its bounds; remove them"
            raise Refusal(f"{where}: {column.name}", "mean and deviation", remedy)
        if column.weights and plain(column.name) != plain(label):
            remedy = f"belong to the label, which is {label}"
            raise Refusal(f"{where}: {column.name}", "weights", remedy)
    return replace(schema, label=named[plain(label)])


def with_group_weights(schema: Schema, found: object, where: str) -> Schema:
    """Return the schema with weights by group and class, scaled so that the largest is 1.

    Args:
      schema: with its label.
      found: the name of one column of groups; under it each of its words; under each the weight of each class.
      where: they were found, for a refusal.

    Raises:
      Refusal: a group or a class has no weight, or has one that is not above 0.
    """
    if not isinstance(found, dict) or len(found) != 1:
        remedy = (
            "give the name of one column of groups; under it each group, and the weight of each class in it"
        )
        raise Refusal(where, found, remedy)
    target = schema.target
    if not target.categories:
        raise Refusal(where, schema.label, "is a number, and weights by group need classes")
    if target.weights:
        remedy = "has weights too; remove them, or the weights by group"
        raise Refusal(where, schema.label, remedy)
    ((name, rows),) = found.items()
    column = schema.group(str(name))
    table = [
        [_number(where, "a weight", each) for each in _for_each_word(f"{where}: {word}", row, target)]
        for word, row in zip(column.words, _for_each_word(where, rows, column), strict=True)
    ]
    largest = max(max(row) for row in table)
    if min(min(row) for row in table) <= 0:
        raise Refusal(where, min(min(row) for row in table), "weights must be above 0")
    scaled = tuple(tuple(each / largest for each in row) for row in table)
    return replace(schema, group_weights=GroupWeights(column.name, scaled))


def _for_each_word(where: str, found: object, column: Column) -> list[object]:
    """Return what stands under each of a column's words, in their order."""
    if not isinstance(found, dict):
        raise Refusal(where, found, f"must be a mapping with the keys {', '.join(column.words)}")
    under: dict[int, object] = {}
    for word, given in found.items():
        code = column.codes.get(plain(str(word)))
        if code is None or code in under:
            said = "occurs twice" if code in under else f"is not a category of {column.name}"
            raise Refusal(where, word, f"{said}; {nearest(str(word), column.words)}")
        under[code] = given
    for code, word in enumerate(column.words):
        if code not in under:
            raise Refusal(where, word, f"has no weight; give one for each word of {column.name}")
    return [under[code] for code in range(len(column.words))]


class _Words(yaml.BaseLoader):
    """Text as it stands, so that `no` is a word and no switch."""


def _column(where: str, name: str, found: object) -> Column:
    values = _group(where, found, COLUMN_KEYS)
    required = _switch(where, values.get("required", "false"))
    absent, missing = _missing(where, values.get("missing"))
    if "categories" in values:
        for key in ("low", "high", "mean", "deviation", "edges"):
            if key in values:
                raise Refusal(where, values[key], f"{key} belongs to a number; remove it here")
        if missing is not None:
            remedy = "missing must be a list of words, since this column has categories"
            raise Refusal(where, f"{missing:g}", remedy)
        column = Column(
            name, required=required, categories=_categories(where, values["categories"]), absent=absent
        )
        if both := [each for each in absent if each in column.codes]:
            raise Refusal(where, both[0], "is in missing and in categories; remove it from one")
        return replace(
            column, weights=_weights(where, values["weights"], column) if "weights" in values else ()
        )
    if "weights" in values:
        raise Refusal(where, "weights", "belong to categories; a number has no classes")
    low, high = (_number(where, key, values.get(key)) for key in ("low", "high"))
    if not low < high:
        raise Refusal(where, f"{low:g} .. {high:g}", "low must be below high")
    if missing is not None and not low <= missing <= high:
        raise Refusal(where, f"{missing:g}", f"missing must lie between {low:g} and {high:g}")
    edges = _edges(where, values["edges"], low, high) if "edges" in values else ()
    standard = _standard(where, values, low, high)
    return Column(name, low, high, missing, required, absent=absent, edges=edges, standard=standard)


def _standard(where: str, values: dict[str, Any], low: float, high: float) -> tuple[float, float] | None:
    """Return the mean and the standard deviation of a number; None where it has none."""
    given = [key for key in ("mean", "deviation") if key in values]
    if not given:
        return None
    if len(given) < 2 or "edges" in values:
        raise Refusal(where, given[0], "give mean and deviation together, of a number without edges")
    mean, deviation = (_number(where, key, values[key]) for key in given)
    require_within(where, mean, deviation, low, high)
    return mean, deviation


def require_within(where: str, mean: float, deviation: float, low: float, high: float) -> None:
    """Refuse a mean and a standard deviation that no numbers between two bounds have."""
    if not low <= mean <= high or not 0 < deviation <= high - low:
        remedy = f"the mean lies between {low:g} and {high:g}, and the deviation is above 0 and at most their distance"
        raise Refusal(where, f"{mean:g}, {deviation:g}", remedy)


def _edges(where: str, found: object, low: float, high: float) -> tuple[float, ...]:
    """Return the edges of a number's bins."""
    if not isinstance(found, list) or not found:
        raise Refusal(where, found, "edges must be a list of numbers, the bounds between bins")
    edges = tuple(_number(where, "edges", each) for each in found)
    if list(edges) != sorted({low, *edges, high})[1:-1]:
        raise Refusal(where, list(edges), f"edges must ascend, between {low:g} and {high:g}")
    return edges


def _missing(where: str, found: object) -> tuple[tuple[str, ...], float | None]:
    """Return the words that stand for a missing value, and the number that stands in for one."""
    if isinstance(found, dict):
        values = _group(f"{where}: missing", found, MISSING_KEYS)
        words = _list(where, "missing.words", values.get("words", []))
        value = values.get("value")
    else:
        words, value = (_list(where, "missing", found), None) if isinstance(found, list) else ((), found)
    number = None if value is None else _number(where, "missing", value)
    return tuple(plain(each) for each in words), number


def _weights(where: str, found: object, column: Column) -> tuple[float, ...]:
    """Return the weight of each category, scaled so that the largest is 1; one that is not named weighs as 1 did."""
    if not isinstance(found, dict) or not found:
        raise Refusal(where, found, "weights must be a mapping of categories to their weights")
    weights = dict.fromkeys(range(column.width), 1.0)
    for word, given in found.items():
        code = column.codes.get(plain(str(word)))
        if code is None:
            raise Refusal(where, word, f"is no category for weights; {nearest(str(word), column.words)}")
        weights[code] = _number(where, "weights", given)
        if weights[code] <= 0:
            raise Refusal(where, given, "weights must be above 0")
    largest = max(weights.values())
    return tuple(each / largest for each in weights.values())


def _categories(where: str, found: object) -> tuple[tuple[str, ...], ...]:
    if isinstance(found, dict):
        read = tuple((str(word), *_list(where, "categories", more)) for word, more in found.items())
    else:
        read = tuple((each,) for each in _list(where, "categories", found))
    owners: dict[str, int] = {}
    for code, each in enumerate(spelling for spellings in read for spelling in {plain(s) for s in spellings}):
        if each in owners:
            raise Refusal(where, each, "occurs twice in categories; case and spaces are ignored")
        owners[each] = code
    if len(read) < 2:
        remedy = "categories must hold at least two words"
        raise Refusal(where, len(read), remedy)
    return read


def _group(where: str, found: object, keys: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise Refusal(where, found, f"must be a mapping with the keys {', '.join(keys)}")
    for key in found:
        if key not in keys:
            raise Refusal(where, key, f"there is no such key; {nearest(str(key), keys)}")
    return {str(key): value for key, value in found.items()}


def _list(where: str, key: str, found: object) -> tuple[str, ...]:
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise Refusal(where, found, f"{key} must be a list of words")
    return tuple(found)


def _number(where: str, key: str, found: object) -> float:
    if found is None:
        remedy = (
            f"{key} is missing; give low and high, the plausible range (not the data's own), or categories"
        )
        raise Refusal(where, None, remedy)
    try:
        return real(where, float(found)) if isinstance(found, str) else real(where, found)
    except ValueError:
        raise Refusal(where, found, f"{key} must be a number") from None


def _switch(where: str, found: object) -> bool:
    if found not in ("true", "false"):
        raise Refusal(where, found, "required must be true or false")
    return found == "true"


# --- as text ------------------------------------------------------------------------------------------------------


def column_line(column: Column) -> str:
    """Return a column's line in the file of a schema."""
    return f"  {_word(column.name)}: {{{', '.join(_parts(column))}}}"


def _parts(column: Column) -> Iterator[str]:
    if column.categories and all(len(each) == 1 for each in column.categories):
        yield f"categories: {_words(column.words)}"
    elif column.categories:
        pairs = (f"{_word(each[0])}: {_words(each[1:])}" for each in column.categories)
        yield f"categories: {{{', '.join(pairs)}}}"
    else:
        yield f"low: {_digits(column.low)}, high: {_digits(column.high)}"
    if column.standard:
        yield f"mean: {_digits(column.standard[0])}, deviation: {_digits(column.standard[1])}"
    if column.edges:
        yield f"edges: [{', '.join(map(_digits, column.edges))}]"
    if column.weights:
        yield f"weights: {_weights_text(column.words, column.weights)}"
    if column.absent and column.missing is not None:
        yield f"missing: {{words: {_words(column.absent)}, value: {_digits(column.missing)}}}"
    elif column.absent:
        yield f"missing: {_words(column.absent)}"
    elif column.missing is not None:
        yield f"missing: {_digits(column.missing)}"
    if column.required:
        yield "required: true"


def _weights_text(words: tuple[str, ...], weights: tuple[float, ...]) -> str:
    pairs = zip(words, weights, strict=True)
    return f"{{{', '.join(f'{_word(word)}: {_digits(weight)}' for word, weight in pairs)}}}"


def _digits(number: float) -> str:
    return repr(number).removesuffix(".0")


def _words(words: tuple[str, ...]) -> str:
    return f"[{', '.join(map(_word, words))}]"


def _word(word: str) -> str:
    return word if PLAIN.fullmatch(word) else json.dumps(word, ensure_ascii=False)
