"""Scaling of numbers by their mean and standard deviation, from the answer of a charged question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..base.refusal import Refusal
from ..configs.strict import nearest
from ..privacy.statistics.figure import Figure
from ..privacy.statistics.inquiry import MAX_QUESTIONS
from .answer_files import Answered, read_answer
from .table_schema import Column, Schema, plain, require_within

FIELD = "task.scaling"
ASKED = "asked"
MEAN, DEVIATION = "mean", "standard deviation"
# Largest half-width of a deviation's interval, relative to the deviation, with which a run scales by its answer.
PRECISION = 0.5

Moments = Mapping[str, tuple[float, float]]  # by a column of numbers, their mean and standard deviation


def standardised(schema: Schema, path: str | None) -> Schema:
    """Return the schema that scales each number to mean 0 and variance 1 by an answer.

    Args:
      schema: schema of the tables.
      path: JSON file of answers, one of kind variance for each number of the model; None leaves the schema unchanged, and
        so does ASKED, since `with_moments` follows when the run has asked.

    Raises:
      Refusal: the file lacks such an answer for a number, or has one within bounds other than the schema's.
    """
    if path is None:
        return schema
    numbers = _numbers(schema, path)
    if path == ASKED:
        return schema
    if not Path(path).exists():
        raise Refusal(FIELD, path, f"is no file; {nearest(path, (ASKED,))}")
    answers = read_answer(Path(path), FIELD)
    if answers is None:
        raise Refusal(FIELD, path, "is not an answer of fedveil ask; give its JSON file")
    return with_moments(schema, {each.name: _standard(each, answers, path) for each in numbers})


def with_moments(schema: Schema, moments: Moments) -> Schema:
    """Return the schema that scales some numbers by other moments; refuse moments that its columns cannot have.

    Args:
      schema: schema of the tables.
      moments: mean and deviation by the name of a number of the model.
    """
    numbers = {each.name for each in schema.numbers}
    for name, (mean, deviation) in moments.items():
        if name not in numbers:
            raise Refusal(FIELD, name, "is not a number of the model; both sides need one schema")
        column = next(each for each in schema.columns if each.name == name)
        require_within(f"{FIELD}: {name}", mean, deviation, column.low, column.high)
    columns = (replace(each, standard=moments.get(each.name, each.standard)) for each in schema.columns)
    return replace(schema, columns=tuple(columns))


def scaling_questions(schema: Schema) -> list[dict[str, Any]]:
    """Return a run's questions about mean and variance of its numbers; refuse none and too many."""
    numbers = [each for each in _numbers(schema, ASKED) if each.standard is None]
    if not 1 <= len(numbers) <= MAX_QUESTIONS:
        text = f"asks about 1 to {MAX_QUESTIONS} numbers; write mean and deviation of others into the schema"
        raise Refusal(FIELD, f"{len(numbers)} numbers", text)
    return [
        {"name": each.name, "kind": "variance", "of": each.name, "low": each.low, "high": each.high}
        for each in numbers
    ]


def moments_of(answers: Mapping[str, Sequence[Figure]]) -> dict[str, tuple[float, float]]:
    """Return mean and deviation by column, without those of too little PRECISION, which stay scaled by bounds."""
    moments: dict[str, tuple[float, float]] = {}
    for name, figures in answers.items():
        by_name = {each.name: each for each in figures}
        mean, deviation = by_name[MEAN], by_name[DEVIATION]
        if not mean.has_value or not deviation.has_value or deviation.value <= 0:
            continue
        if (deviation.high - deviation.low) / 2 <= PRECISION * deviation.value:
            moments[name] = float(mean.value), float(deviation.value)
    return moments


def _numbers(schema: Schema, path: str) -> tuple[Column, ...]:
    """Return the numbers that are inputs of the model; refuse a scaling without any."""
    if not schema.numbers:
        raise Refusal(FIELD, path, "the model has no number to scale; leave it out")
    return schema.numbers


def _standard(column: Column, answers: Sequence[Answered], path: str) -> tuple[float, float]:
    """Return the mean and the standard deviation of a column from the first answer about its variance."""
    where = f"{FIELD}: {column.name}"
    if column.standard is not None:
        raise Refusal(where, path, "also has a mean and a deviation in the schema; remove one of them")
    for each in answers:
        if each.question["kind"] != "variance" or plain(str(each.question.get("of"))) != plain(column.name):
            continue
        bounds = each.question.get("low"), each.question.get("high")
        if bounds != (column.low, column.high):
            fault = f"was asked within {bounds[0]} and {bounds[1]}"
            remedy = f"the schema declares {column.low:g} and {column.high:g}; ask within these"
            raise Refusal(where, path, f"{fault}, and {remedy}")
        by_name = dict(zip(each.names, each.values, strict=True))
        mean, deviation = by_name.get(MEAN), by_name.get(DEVIATION)
        if mean is None or deviation is None or deviation <= 0:
            remedy = "ask again with more epsilon, or write mean and deviation into the schema"
            raise Refusal(where, path, f"is not estimated there; {remedy}")
        require_within(where, mean, deviation, column.low, column.high)
        return mean, deviation
    remedy = "is a number without a variance there; ask a question of that kind for it as well"
    raise Refusal(where, path, remedy)
