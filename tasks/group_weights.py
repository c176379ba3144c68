"""Weights of examples by group and class, from a file of weights or from the counts of an answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..base.refusal import Refusal
from ..privacy.statistics.fairness import ROWS, reweighing
from ..privacy.statistics.figure import NORMAL_95
from .answer_files import Answered, read_answer
from .table_schema import Schema, plain, read_words, with_group_weights

FIELD = "task.group_weights"
NO_TABLE = (
    "holds no released counts by a column of groups and {}: ask a question of kind crosstable, or of kind fairness with the "
    "criterion equalised_odds, with the categories of both; others do not count groups by class"
)


def weighted_schema(schema: Schema, path: str | None) -> Schema:
    """Return the schema with a file's weights by group and class.

    Args:
      schema: of the tables.
      path: of a YAML file of weights, or of the JSON of an answer; None leaves the schema unchanged.

    Raises:
      Refusal: the file cannot be read, lacks a group or a class, or the schema already has such weights.
    """
    if path is None:
        return schema
    if schema.group_weights is not None:
        raise Refusal(FIELD, path, "the schema also has group_weights; remove one of them")
    answers = read_answer(Path(path), FIELD)
    weights = read_words(Path(path)) if answers is None else _of_answers(answers, schema, path)
    return with_group_weights(schema, weights, path)


def _of_answers(answers: Sequence[Answered], schema: Schema, path: str) -> object:
    """Return the weights computed from the first counts by groups and label."""
    for each in answers:
        odds = each.question.get("criterion") == "equalised_odds"
        keys = ("label", "of") if odds else ("of", "by")
        names = [str(each.question.get(key, "")) for key in keys]
        words = [
            _words(each.question.get("categories" if key == "of" else f"{key}_categories")) for key in keys
        ]
        pairs = zip(each.names, each.values, strict=True)
        values = [value for name, value in pairs if not odds or name.startswith(ROWS)]
        if not (odds or each.question["kind"] == "crosstable") or not values or not all(words):
            continue
        if plain(schema.label) not in map(plain, names):
            continue
        cells, half = np.array(values, np.float64), each.halves[-1]
        if half is None or cells.size != len(words[0]) * len(words[1]):
            raise Refusal(FIELD, path, "is not an answer of fedveil ask (a cross table lacks cells)")
        cells = cells.reshape(len(words[0]), len(words[1]))
        if plain(names[0]) == plain(schema.label):
            cells, words, names = cells.T, words[::-1], names[::-1]
        weights: list[list[float]] = reweighing(cells, half / NORMAL_95).tolist()
        rows = (dict(zip(words[1], row, strict=True)) for row in weights)
        return {names[0]: dict(zip(words[0], rows, strict=True))}
    raise Refusal(FIELD, path, NO_TABLE.format(schema.label))


def _words(value: object) -> list[str]:
    return [str(each) for each in value] if isinstance(value, list) else []
