"""Weights of examples by group and class from a file: of weights, or of an answer whose counts they follow from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..configs.yaml_guard import check_file
from ..privacy.refusal import Refusal
from ..privacy.statistics.fairness import reweighing
from ..privacy.statistics.figure import NORMAL_95
from .table_schema import Schema, plain, read_words, with_group_weights

FIELD = "task.group_weights"
NO_TABLE = (
    "holds no released cross table of a column of groups and {}: ask a question of kind crosstable, with the categories of "
    "both; shares, as of kind fairness, do not tell how large the groups are"
)


def weighted_schema(schema: Schema, path: str | None) -> Schema:
    """Return the schema with the weights by group and class that a file says.

    Args:
      schema: of the tables.
      path: of a YAML file of weights, or of the JSON that a question left; None leaves the schema as it is.

    Raises:
      Refusal: the file cannot be read, leaves out a group or a class, or the schema has such weights itself.
    """
    if path is None:
        return schema
    if schema.group_weights is not None:
        raise Refusal(FIELD, path, "stands in the schema too, as group_weights; take it out of one")
    return with_group_weights(schema, _weights_in(Path(path), schema), path)


def _weights_in(path: Path, schema: Schema) -> object:
    check_file(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return read_words(path)
    if not isinstance(found, dict) or "question" not in found:
        return found
    try:
        return _of_answer(found, schema, path)
    except (LookupError, TypeError, ValueError, AttributeError) as problem:
        if isinstance(problem, Refusal):
            raise
        raise Refusal(FIELD, str(path), f"is no answer of fedveil ask ({problem})") from problem


def _of_answer(record: Any, schema: Schema, path: Path) -> object:
    """Return the weights that follow from the first cross table of groups and label in an answer."""
    label = plain(schema.label)
    for asked, answer in zip(record["question"]["ask"], record["answers"], strict=False):
        if asked["kind"] != "crosstable" or not {"categories", "by_categories"} <= set(asked):
            continue
        if label not in (plain(asked["of"]), plain(asked["by"])):
            continue
        figures = answer["figures"]
        words: list[list[str]] = [asked["categories"], asked["by_categories"]]
        cells = np.array([each["value"] for each in figures], np.float64).reshape(*map(len, words))
        half = (float(figures[0]["high"]) - float(figures[0]["low"])) / 2
        name = asked["of"]
        if plain(name) == label:
            cells, words, name = cells.T, words[::-1], asked["by"]
        weights = reweighing(cells, half / NORMAL_95)
        return {
            name: {
                group: dict(zip(words[1], row, strict=True))
                for group, row in zip(words[0], weights.tolist(), strict=True)
            }
        }
    raise Refusal(FIELD, str(path), NO_TABLE.format(schema.label))
