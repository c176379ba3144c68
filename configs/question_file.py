"""File of questions in YAML, and the options by which a command line or a program replaces its keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

from ..base.refusal import Refusal

COSTS = ("epsilon", "noise_multiplier")  # keys that are not sent to clients


def _option(metavar: str, text: str) -> Any:
    """Return a field that is None by default, with its metavar and help on a command line."""
    return field(default=None, metadata={"metavar": metavar, "help": text})


@dataclass(frozen=True)
class InquiryOptions:
    """Options of an inquiry that replace its file's keys; None leaves a key as it is."""

    name: str | None = _option("NAME", "Name of the answer.")
    purpose: str | None = _option("WORD", "Purpose, which owners permit or refuse.")
    why: str | None = _option("TEXT", "Explanation of the purpose for the owners.")
    unit: str | None = _option(
        "client|record", "Unit of privacy: a whole client, or one row, the default of tables."
    )
    records: float | None = _option("N", "Bound on the rows of a client that count in full.")
    epsilon: float | None = _option("E", "Epsilon that the answer may cost.")
    noise_multiplier: float | None = _option("Z", "Noise multiplier, instead of an epsilon.")

    def over(self, plain: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keys of an inquiry's file, replaced by the options that are set."""
        return {**plain, **options_in(self)}


@dataclass(frozen=True)
class QuestionOptions:
    """Options of one question that is in no file; None where an option is not used."""

    low: float | None = _option("X", "Lower bound of a number.")
    high: float | None = _option("X", "Upper bound of a number.")
    edges: str | None = _option("X,X,..", "Edges of a histogram's bins.")
    categories: str | None = _option("A,B,..", "Categories of a histogram.")
    resolution: float | None = _option("X", "Largest half-width of an interval.")
    at_least: float | None = _option("N", "Lower bound on the number of rows, to plan an interval.")


def options_in(options: InquiryOptions | QuestionOptions) -> dict[str, Any]:
    """Return the options that are not None, by name."""
    values = {each.name: getattr(options, each.name) for each in fields(options)}
    return {name: value for name, value in values.items() if value is not None}


def read_question_file(path: Path) -> dict[str, Any]:
    """Return the keys of a YAML file of questions, unchecked; refuse a file that cannot be read, or is no group of keys."""
    import yaml  # an extra installs it, which other verbs do not need

    from .yaml_guard import check_file

    try:
        check_file(path)
        keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise Refusal("questions", str(path), f"cannot be read as YAML: {reason}") from None
    if not isinstance(keys, dict):
        raise Refusal("questions", str(path), "is no group of keys: name, records and ask")
    return {str(key): value for key, value in cast(dict[Any, Any], keys).items()}
