"""Keys of a schema's label: the columns and numbers that its kind takes, and refusals of all others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..base.extensions import extension, names
from ..base.refusal import Refusal, real
from ..configs.strict import nearest
from ..tasks.labels import Label
from ..tasks.table_schema import Column, plain

REFUSED_KINDS = {
    "cox": "its partial likelihood compares records, so no record's part is bounded; use kind: survival, whose loss sums each "
    "record's own hazards"
}


@dataclass(frozen=True)
class DeclaredLabel:
    """Label as a schema declares it by its kind.

    Attributes:
      field: what a refusal names: the file, and its key.
      values: texts, lists and mappings by key, without `kind`.
      columns: all columns of the schema.
    """

    field: str
    values: Mapping[str, Any]
    columns: tuple[Column, ...]


@dataclass(frozen=True)
class LabelKeys:
    """Keys of a label: what a schema declares, and the keys that the kind takes.

    Attributes:
      declared: the label in the schema.
      names: the keys; others are refused.
    """

    declared: DeclaredLabel
    names: Sequence[str]

    def __post_init__(self) -> None:
        for key, value in self.declared.values.items():
            if key not in self.names:
                raise Refusal(self.field(key), value, nearest(key, self.names))

    def field(self, key: str) -> str:
        """Return what a refusal of a key names."""
        return f"{self.declared.field}.{key}"

    def column(self, key: str) -> Column:
        """Return the column that a key names; refuse a missing key and an unknown column."""
        return self._column(key, self.declared.values.get(key))

    def several(self, key: str) -> tuple[Column, ...]:
        """Return the columns that a key lists, at least two; refuse one that occurs twice."""
        value = self.declared.values.get(key)
        names: list[object] = value if isinstance(value, list) else []  # pyright: ignore[reportUnknownVariableType]
        if len({plain(str(each)) for each in names}) < max(2, len(names)):
            raise Refusal(self.field(key), value, "must be a list of at least two different columns")
        return tuple(self._column(key, each) for each in names)

    def _column(self, key: str, name: object) -> Column:
        for column in self.declared.columns:
            if plain(column.name) == plain(str(name)):
                return column
        remedy = f"must name a column; {nearest(str(name), [each.name for each in self.declared.columns])}"
        raise Refusal(self.field(key), name, remedy)

    def number(self, key: str, default: float) -> float:
        """Return the number of a key, or its default; refuse what is no finite number."""
        return self.as_number(key, self.declared.values.get(key, default))

    def as_number(self, key: str, value: object) -> float:
        """Return a value of a key as a finite number, or refuse it."""
        field = self.field(key)
        try:
            return real(field, float(value) if isinstance(value, str) else value)
        except ValueError:
            raise Refusal(field, value, "must be a number") from None


def label_of_kind(field: str, declared: Mapping[Any, Any], columns: tuple[Column, ...]) -> Label:
    """Return the label that a schema declares by its kind.

    Args:
      field: what a refusal names: the file, and its key.
      declared: value of the file's `label`, a mapping with `kind`.
      columns: all columns of the schema.

    Raises:
      Refusal: there is no such kind, or its keys are wrong.
    """
    keys: dict[str, Any] = {str(key): value for key, value in declared.items()}
    kind = keys.pop("kind", None)
    if kind in REFUSED_KINDS:
        raise Refusal(field, kind, REFUSED_KINDS[str(kind)])
    if kind not in (kinds := names("label")):
        remedy = f"kind must be one of {', '.join(kinds)}; of one column of categories or numbers, give its name alone"
        raise Refusal(field, kind, remedy)
    return extension("label", str(kind), field, kind)(DeclaredLabel(field, keys, columns))
