"""Columns of a question about pairs, from the schema of the tables: their label, and few levels of every input."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from ..base.refusal import Refusal
from ..configs.bundle_files import SCHEMA
from ..tasks.table_schema import Column, Schema, plain, read_schema

KIND = "pairs"
BINS = 4  # of a number: docs/evidence/questions.md, "Pairs"
WORDS = 6  # words that are a level each; of more, neighbours share one


def schema_path(task: Mapping[str, Any]) -> Path:
    """Return where the schema of a task's tables is: its own key, or the file in their folder."""
    declared = task.get("schema")
    return Path(str(declared)) if declared else Path(str(task.get("folder") or ".")) / SCHEMA


def with_columns(keys: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return an inquiry's keys, in which each question about pairs has a label and columns.

    Args:
      keys: of the inquiry, unchecked.
      path: schema of the tables, read if a question lacks columns.

    Raises:
      Refusal: a question lacks columns, and there is no schema, or its label is of several columns.
    """
    entries = keys.get("ask")
    if not isinstance(entries, list):
        return dict(keys)
    return {**keys, "ask": [_completed(each, path) for each in cast(list[object], entries)]}


def _completed(entry: object, path: Path) -> object:
    if not isinstance(entry, Mapping):
        return entry
    question = cast(Mapping[str, Any], entry)
    if question.get("kind") != KIND or question.get("columns") is not None:
        return question
    if not path.is_file():
        remedy = "give each column its edges or categories, or name the schema of the tables by task.schema"
        raise Refusal("columns", None, remedy)
    schema = read_schema(path)
    label = _label(schema, question.get("of"))
    inputs = [each for each in schema.inputs if each.name != label.name]
    return {
        **_outcome(label),
        "columns": {each.name: _levels(each) for each in inputs},
        **question,
        "of": label.name,
    }


def _label(schema: Schema, name: object) -> Column:
    """Return the column of a schema's label, or the one of this name, on which pairs act."""
    if name is not None:
        columns = [each for each in schema.columns if plain(each.name) == plain(str(name))]
    else:
        words = [each for each in schema.label_columns if each.categories]
        columns = words or list(schema.label_columns)
    if len(columns) != 1:
        names = ", ".join(each.name for each in schema.label_columns)
        raise Refusal("of", name, f"name one column of the label: {names}")
    return columns[0]


def _outcome(label: Column) -> dict[str, Any]:
    """Return the keys of the label: its bounds, or its categories in two halves, of which the second is the event."""
    if not label.categories:
        return {"low": label.low, "high": label.high}
    middle = len(label.words) // 2
    return {"categories": [list(label.words[:middle]), list(label.words[middle:])]}


def _levels(column: Column) -> list[Any]:
    """Return at most `BINS` bins of a number, of equal width or of its neighbouring edges, or at most `WORDS` groups of words."""
    if column.categories:
        words, count = column.words, min(len(column.words), WORDS)
        starts = [number * len(words) // count for number in range(count + 1)]
        return [list(words[one:two]) for one, two in pairwise(starts)]
    edges = [column.low, *column.edges, column.high]
    if not column.edges:
        step = (column.high - column.low) / BINS
        edges = [column.low + step * number for number in range(BINS + 1)]
    count = min(len(edges) - 1, BINS)
    return [edges[number * (len(edges) - 1) // count] for number in range(count + 1)]
