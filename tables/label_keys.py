"""Keys of a schema's label: the columns and numbers that its kind takes, and refusals of all others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..base.refusal import Refusal, real
from ..configs.strict import nearest
from ..tasks.table_schema import Column, plain


@dataclass(frozen=True)
class LabelKeys:
    """Keys of a label in a schema.

    Attributes:
      field: what a refusal names: the file, and its key.
      values: texts, lists and mappings by key, without `kind`.
      columns: all columns of the schema.
    """

    field: str
    values: Mapping[str, object]
    columns: Sequence[Column]

    def check(self, names: Sequence[str]) -> None:
        """Refuse a key that is not among these names."""
        for key in self.values:
            if key not in names:
                raise Refusal(f"{self.field}.{key}", self.values[key], nearest(key, names))

    def column(self, key: str) -> Column:
        """Return the column that a key names; refuse a missing key and an unknown column."""
        return self._column(key, self.values.get(key))

    def several(self, key: str) -> tuple[Column, ...]:
        """Return the columns that a key lists, at least two; refuse one that occurs twice."""
        value = self.values.get(key)
        names: list[object] = value if isinstance(value, list) else []  # pyright: ignore[reportUnknownVariableType]
        if len({plain(str(each)) for each in names}) < max(2, len(names)):
            raise Refusal(f"{self.field}.{key}", value, "must be a list of at least two different columns")
        return tuple(self._column(key, each) for each in names)

    def _column(self, key: str, name: object) -> Column:
        for column in self.columns:
            if plain(column.name) == plain(str(name)):
                return column
        remedy = f"must name a column; {nearest(str(name), [each.name for each in self.columns])}"
        raise Refusal(f"{self.field}.{key}", name, remedy)

    def number(self, key: str, default: float) -> float:
        """Return the number of a key, or its default; refuse what is no finite number."""
        return self.as_number(key, self.values.get(key, default))

    def as_number(self, key: str, value: object) -> float:
        """Return a value of a key as a finite number, or refuse it."""
        field = f"{self.field}.{key}"
        try:
            return real(field, float(value) if isinstance(value, str) else value)
        except ValueError:
            raise Refusal(field, value, "must be a number") from None
