"""Answer files of `fedveil ask`, and their reader for tasks."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.refusal import Refusal, real
from ..configs.yaml_guard import check_file


@dataclass(frozen=True)
class Answered:
    """One question and its answer.

    Attributes:
      question: keys of the question.
      names: of the figures.
      values: of the figures; None for one below the noise.
      halves: half-width of each interval; None likewise.
    """

    question: dict[str, Any]
    names: tuple[str, ...]
    values: tuple[float | None, ...]
    halves: tuple[float | None, ...]


def read_answer(path: Path, field: str) -> list[Answered] | None:
    """Return the questions of an answer's record with their figures; None if the file is not a record.

    Args:
      path: of the file.
      field: its key, for a refusal.

    Raises:
      Refusal: the file cannot be read, or is a broken record.
    """
    check_file(path)
    try:
        record: Any = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or "question" not in record:
        return None
    try:
        pairs = zip(record["question"]["ask"], record["answers"], strict=False)  # none if not released
        return [_answered(dict(question), answer["figures"]) for question, answer in pairs]
    except (Refusal, LookupError, TypeError, ValueError, AttributeError) as problem:
        raise Refusal(field, str(path), f"is not an answer of fedveil ask ({problem})") from problem


def _answered(question: dict[str, Any], figures: Any) -> Answered:
    values = tuple(_number(each["value"]) for each in figures)
    ends = [(_number(each["low"]), _number(each["high"])) for each in figures]
    for each, (low, high) in zip(figures, ends, strict=True):
        if low is not None and high is not None and low > high:
            remedy = "is a reversed interval"
            raise Refusal(str(each.get("name", "figure")), f"{low:g} to {high:g}", remedy)
    halves = tuple(None if low is None or high is None else (high - low) / 2 for low, high in ends)
    return Answered(
        {"kind": "", **question}, tuple(str(each.get("name", "")) for each in figures), values, halves
    )


def _number(value: object) -> float | None:
    return None if value is None else real("figure", value)
