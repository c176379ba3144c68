"""Weights of examples by group and class, from a file of weights or from the counts of an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """Return the schema with a file's weights by group and class; refuse a file that lacks some.

    Args:
      schema: of the tables.
      path: a YAML file of weights, or the JSON file of an answer; None leaves the schema unchanged.
    """
    if path is None:
        return schema
    if schema.group_weights is not None:
        raise Refusal(FIELD, path, "the schema also has group_weights; remove one of them")
    answers = read_answer(Path(path), FIELD)
    weights = read_words(Path(path)) if answers is None else _of_answers(answers, schema, path)
    return with_group_weights(schema, weights, path)


@dataclass(frozen=True)
class _Axis:
    """Rows or columns of a table of counts: a column of the clients' tables, and its words."""

    name: str
    words: list[str]


def _axis(question: Mapping[str, Any], key: str) -> _Axis:
    """Return the axis that a question's key names: of, by or label."""
    words = question.get("categories" if key == "of" else f"{key}_categories")
    return _Axis(str(question.get(key, "")), list(map(str, words)) if isinstance(words, list) else [])


def _of_answers(answers: Sequence[Answered], schema: Schema, path: str) -> object:
    """Return weights, as a file of them has them, from the first answer that counts groups by label; refuse none."""
    for answer in answers:
        question, label = answer.question, plain(schema.label)
        is_fairness = question.get("criterion") == "equalised_odds"
        if not is_fairness and question["kind"] != "crosstable":
            continue
        rows, columns = (_axis(question, key) for key in (("label", "of") if is_fairness else ("of", "by")))
        figures = zip(answer.names, answer.values, strict=True)
        counts = [value for name, value in figures if not is_fairness or name.startswith(ROWS)]
        if not counts or not rows.words or not columns.words:
            continue
        if label not in (plain(rows.name), plain(columns.name)):
            continue
        half_width = answer.halves[-1]  # of every count: NORMAL_95 times the noise's standard deviation
        if half_width is None or len(counts) != len(rows.words) * len(columns.words):
            raise Refusal(FIELD, path, "is not an answer of fedveil ask (a cross table lacks cells)")
        cells = np.array(counts, np.float64).reshape(len(rows.words), len(columns.words))
        if plain(rows.name) == label:
            rows, columns, cells = columns, rows, cells.T
        weights: list[list[float]] = reweighing(cells, half_width / NORMAL_95).tolist()
        by_class = [dict(zip(columns.words, row, strict=True)) for row in weights]
        return {rows.name: dict(zip(rows.words, by_class, strict=True))}
    raise Refusal(FIELD, path, NO_TABLE.format(schema.label))
