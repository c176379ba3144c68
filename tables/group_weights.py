"""Weights of examples by group and class, from a file of weights or from the counts of an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..base.refusal import Refusal
from ..configs.strict import nearest
from ..privacy.statistics.fairness import ROWS, reweighing
from ..privacy.statistics.figure import NORMAL_95
from ..tasks.answer_files import Answered, read_answer
from ..tasks.table_schema import Column, GroupWeights, Schema, finite_number, plain, read_words

FIELD = "task.group_weights"
NO_TABLE = (
    "holds no released counts by a column of groups and {}: ask a question of kind crosstable, or of kind fairness with the "
    "criterion equalised_odds, with the categories of both; others do not count groups by class"
)


def weighted(schema: Schema, path: str) -> Schema:
    """Return the schema with a file's weights by group and class; refuse a file that lacks some.

    Args:
      schema: of the tables.
      path: a YAML file of weights, or the JSON file of an answer.
    """
    if schema.group_weights is not None:
        raise Refusal(FIELD, path, "the schema also has group_weights; remove one of them")
    answers = read_answer(Path(path), FIELD)
    weights = read_words(Path(path)) if answers is None else _of_answers(answers, schema, path)
    return with_group_weights(schema, weights, path)


def with_group_weights(schema: Schema, value: object, where: str) -> Schema:
    """Return the schema with weights by group and class, scaled so that the largest is 1; refuse a missing one.

    Args:
      schema: schema with its label.
      value: a mapping from the name of one column of groups to its words, and from each to the weight of each class.
      where: file or key of the value, for a refusal.
    """
    if not isinstance(value, dict) or len(value) != 1:
        remedy = (
            "give the name of one column of groups; under it each group, and the weight of each class in it"
        )
        raise Refusal(where, value, remedy)
    target = schema.target
    if schema.weight is not None:
        raise Refusal(where, schema.weight.name, "weighs the rows too; remove one of them")
    if not schema.outcome.words:
        raise Refusal(where, schema.label, "has no classes, which weights by group need")
    if target.weights:
        raise Refusal(where, schema.label, "has weights too; remove them, or the weights by group")
    ((name, rows),) = value.items()
    groups = schema.group(str(name))
    weights = [
        [finite_number(where, "a weight", weight) for weight in _by_word(f"{where}: {group}", row, target)]
        for group, row in zip(groups.words, _by_word(where, rows, groups), strict=True)
    ]
    if (smallest := min(map(min, weights))) <= 0:
        raise Refusal(where, smallest, "weights must be above 0")
    largest = max(map(max, weights))
    scaled = tuple(tuple(weight / largest for weight in row) for row in weights)
    return replace(schema, group_weights=GroupWeights(groups.name, scaled))


def _by_word(where: str, value: object, column: Column) -> list[object]:
    """Return the values of a mapping by a column's words, one for each word, in the order of the words."""
    if not isinstance(value, dict):
        raise Refusal(where, value, f"must be a mapping with the keys {', '.join(column.words)}")
    by_code: dict[int, object] = {}
    for word, content in value.items():
        code = column.codes.get(plain(str(word)))
        if code is None or code in by_code:
            fault = "occurs twice" if code in by_code else f"is not a category of {column.name}"
            raise Refusal(where, word, f"{fault}; {nearest(str(word), column.words)}")
        by_code[code] = content
    for code, word in enumerate(column.words):
        if code not in by_code:
            raise Refusal(where, word, f"has no weight; give one for each word of {column.name}")
    return [by_code[code] for code in range(len(column.words))]


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
