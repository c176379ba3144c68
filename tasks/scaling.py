"""Scaling of numbers by their mean and standard deviation, from the answer of a charged question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..privacy.refusal import Refusal
from .answer_files import Answered, read_answer
from .table_schema import Column, Schema, plain, require_within

FIELD = "task.scaling"
ASKED = "asked"
MEAN, DEVIATION = "mean", "standard deviation"
ASK_FIRST = (
    "a run does not ask by itself: ask first (fedveil ask, a question of kind variance for each number), and give the JSON "
    "that it leaves"
)


def standardised(schema: Schema, path: str | None) -> Schema:
    """Return the schema by which each number becomes an input of mean 0 and variance 1, as an answer says.

    Args:
      schema: of the tables.
      path: of the JSON that a question left, of kind variance for each number that the model sees; None leaves the schema.

    Raises:
      Refusal: the file holds no such answer for a number, or one within other bounds than the schema's.
    """
    if path is None:
        return schema
    if path == ASKED:
        raise Refusal(FIELD, path, ASK_FIRST)
    numbers = [each for each in schema.inputs if not each.categories and not each.edges]
    if not numbers:
        raise Refusal(FIELD, path, "the model sees no number that could be scaled; leave it out")
    answers = read_answer(Path(path), FIELD)
    if answers is None:
        raise Refusal(FIELD, path, "is no answer of fedveil ask; give the JSON that it leaves")
    scaled = {each.name: _standard(each, answers, path) for each in numbers}
    columns = (replace(each, standard=scaled.get(each.name)) for each in schema.columns)
    return replace(schema, columns=tuple(columns))


def _standard(column: Column, answers: Sequence[Answered], path: str) -> tuple[float, float]:
    """Return the mean and the standard deviation of a column."""
    where = f"{FIELD}: {column.name}"
    if column.standard is not None:
        raise Refusal(where, path, "has a mean and a deviation in the schema too; take them out of one")
    for each in answers:
        if each.asked["kind"] != "variance" or plain(str(each.asked.get("of"))) != plain(column.name):
            continue
        bounds = each.asked.get("low"), each.asked.get("high")
        if bounds != (column.low, column.high):
            told = f"was asked within {bounds[0]} and {bounds[1]}"
            remedy = f"the schema declares {column.low:g} and {column.high:g}; ask within these"
            raise Refusal(where, path, f"{told}, and {remedy}")
        said = dict(zip(each.names, each.values, strict=True))
        mean, deviation = said.get(MEAN), said.get(DEVIATION)
        if mean is None or deviation is None or deviation <= 0:
            remedy = "ask again with more epsilon, or write mean and deviation into the schema"
            raise Refusal(where, path, f"cannot be said there; {remedy}")
        require_within(where, mean, deviation, column.low, column.high)
        return mean, deviation
    raise Refusal(
        where, path, "is a number of which it holds no variance; ask a question of that kind for it too"
    )
