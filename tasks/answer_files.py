"""Answer files of `fedveil ask`, and their reader for tasks."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.refusal import Refusal, real
from ..configs.yaml_guard import check_file


@dataclass(frozen=True)
class Answered:
    """One question and the figures of its answer.

    Attributes:
      question: keys of the question, with `kind`.
      names: name of each figure.
      values: value of each figure; None for one below the noise.
      halves: half-width of each figure's interval; None for one without an interval.
    """

    question: dict[str, Any]
    names: tuple[str, ...]
    values: tuple[float | None, ...]
    halves: tuple[float | None, ...]


def read_answer(path: Path, field: str) -> list[Answered] | None:
    """Return the questions of an answer with their figures, None for a file of another kind; refuse a broken one.

    Args:
      path: of the file.
      field: configuration key that names the file, for a refusal.
    """
    check_file(path)
    try:
        record: Any = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or "question" not in record:
        return None
    try:
        # `answers` is empty if nothing was released.
        pairs = zip(record["question"]["ask"], record["answers"], strict=False)
        return [_answered(dict(question), answer["figures"]) for question, answer in pairs]
    except (Refusal, LookupError, TypeError, ValueError, AttributeError) as problem:
        raise Refusal(field, str(path), f"is not an answer of fedveil ask ({problem})") from problem


def _answered(question: dict[str, Any], figures: Any) -> Answered:
    """Return a question with its figures, mappings of name, value, low and high."""
    names = tuple(str(each.get("name", "")) for each in figures)
    values = tuple(_number(each["value"]) for each in figures)
    return Answered({"kind": "", **question}, names, values, tuple(map(_half_width, figures)))


def _half_width(figure: Any) -> float | None:
    """Return half of the width of a figure's interval; None if it has none."""
    low, high = _number(figure["low"]), _number(figure["high"])
    if low is None or high is None:
        return None
    if low > high:
        raise Refusal(str(figure.get("name", "figure")), f"{low:g} to {high:g}", "is a reversed interval")
    return (high - low) / 2


def _number(value: object) -> float | None:
    return None if value is None else real("figure", value)
