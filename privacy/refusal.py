"""Refusal, the one error that a user's mistake raises, and readers of values that raise it."""

import math
from enum import StrEnum
from numbers import Real
from typing import TypeVar

Word = TypeVar("Word", bound=StrEnum)


class Refusal(Exception):
    """A request that is declined before anything is written, sent or spent.

    The command line prints it as one sentence and exits non-zero; nobody sees a traceback for it.
    """

    def __init__(self, field: str, value: object, remedy: str) -> None:
        super().__init__(f"{field}={value!r}: {remedy}")
        self.field = field
        self.value = value
        self.remedy = remedy


def word(kind: type[Word], field: str, value: str) -> Word:
    """Read ``value`` as a member of ``kind``; Refusal naming ``field`` and the words that are known."""
    try:
        return kind(value)
    except ValueError:
        raise Refusal(field, value, f"choose one of {', '.join(kind)}") from None


def real(field: str, value: object) -> float:
    """Read any real number, numpy's scalars included, as a finite ``float``; Refusal naming ``field``."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise Refusal(field, value, "give a finite number")
    return float(value)
