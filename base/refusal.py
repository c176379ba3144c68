"""Refusal: the exception for a user's mistake, and checks of arguments and fields that raise it."""

import errno
import math
import operator
import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from numbers import Real
from typing import Any, TypeVar

Word = TypeVar("Word", bound=StrEnum)
LONGEST = 400  # characters of a value's repr; a refusal shortens a longer one
# Remedies for errors of the disk or the system. They never advise to restore a file: it is intact, and an older copy of a
# ledger would lack entries.
_ROOM, _MEND = "make room on its disk (df -h, df -i)", "mend its disk"
_WRITABLE = "mount its disk for writing (mount -o remount,rw), or mend it"
_FILES = "close files, or raise the limit of open files (LimitNOFILE, ulimit -n)"
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), _ROOM),
    **dict.fromkeys((errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE), _MEND),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), _FILES),
    errno.EROFS: _WRITABLE,
}
_REMEDIES_OF_SQLITE = {  # by the low byte of its codes, https://sqlite.org/rescode.html
    13: _ROOM,  # SQLITE_FULL
    10: _MEND,  # SQLITE_IOERR
    8: _WRITABLE,  # SQLITE_READONLY
    14: f"{_ROOM}, or {_FILES}",  # SQLITE_CANTOPEN: SQLite keeps the system's reason to itself
    5: "wait for the program that reads or writes it, or end it",  # SQLITE_BUSY
}


class Refusal(Exception):
    """Invalid argument, key or file; the request is declined before anything is written, sent or spent.

    The command line prints one sentence, "field=value: remedy", without a traceback. Its exit code is 2, or 1 if the
    disk or the operating system failed (`disk_failed`).

    Attributes:
      field: name of the argument or key.
      value: value of the field; the sentence shows its `repr`.
      remedy: what to do instead, a clause without a full stop.

    Example:
      >>> import fedveil as fv
      >>> try:
      ...     fv.Budget("client", target_epsilon=-1, target_delta=1e-4)
      ... except fv.Refusal as refusal:
      ...     print(refusal)
      target_epsilon=-1.0: give a number above 0
    """

    def __init__(self, field: str, value: object, remedy: str) -> None:
        super().__init__(f"{field}={_render(value)}: {remedy}")
        self.field = field
        self.value = value
        self.remedy = remedy


def _render(value: object) -> str:
    """Return a value's repr for a refusal; of a long one only the beginning."""
    try:
        text = repr(value)
        return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}... ({len(text)} characters)"
    except (ValueError, RecursionError):  # CPython writes no whole number of more than 4300 digits
        return "(too large to show)"


def disk_failed(error: BaseException | None) -> bool:
    """Return whether the disk or the operating system caused an error, so that the same request may succeed later."""
    return bool(disk_remedy(error))


def disk_remedy(error: BaseException | None) -> str:
    """Return the remedy for an error of the disk or the operating system, or one that it caused; empty for any other."""
    while error:
        system_code = (isinstance(error, OSError) and error.errno) or 0
        sqlite_code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if remedy := _REMEDIES.get(system_code) or _REMEDIES_OF_SQLITE.get(sqlite_code):
            return remedy
        error = error.__cause__ or error.__context__
    return ""


def unreadable(error: BaseException, remedy: str, fault: str = "cannot be read") -> str:
    """Return a refusal's clause for a file that cannot be used: fault, reason and remedy.

    Args:
      error: exception from the use of the file.
      remedy: what to do about the file; replaced if the disk or the operating system failed.
      fault: what is wrong with the file; replaced likewise.
    """
    reason = getattr(error, "strerror", None) or error
    if of_disk := disk_remedy(error):
        return f"cannot be used now ({reason}); {of_disk}"
    return f"{fault} ({reason}); {remedy}"


@contextmanager
def refusing(field: str, value: object, remedy: str) -> Generator[None]:
    """Convert an `OSError` of the block into a `Refusal` with these parts, its reason, and a remedy if the disk failed."""
    try:
        yield
    except OSError as error:
        clauses = (f"{remedy} ({error.strerror})", disk_remedy(error))
        raise Refusal(field, str(value), "; ".join(filter(None, clauses))) from error


def word(kind: type[Word], field: str, value: str) -> Word:
    """Return the member of a string enumeration that has this value.

    Raises:
      Refusal: no member has the value; the sentence lists the valid ones.
    """
    try:
        return kind(value)
    except ValueError:
        raise Refusal(field, value, f"choose one of {', '.join(kind)}") from None


def real(field: str, value: object) -> float:
    """Return a real number as a float.

    Args:
      field: name of the field, for a refusal.
      value: an int, a float or a NumPy scalar; a bool is refused.

    Raises:
      Refusal: the value is not a finite number.
    """
    huge = isinstance(value, int) and value.bit_length() > 1023  # no float holds it
    if huge or isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise Refusal(field, value, "give a finite number")
    return float(value)


def positive(field: str, value: object) -> float:
    """Return a number above 0 as a float; arguments as of `real`.

    Raises:
      Refusal: the value is not a finite number above 0.
    """
    number = real(field, value)
    if number <= 0:
        raise Refusal(field, number, "give a number above 0")
    return number


@dataclass(frozen=True)
class Range:
    """Range of a field's number, in its annotation: ``Annotated[float, Range(gt=0, le=1)]``; None sets no bound."""

    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None

    @property
    def bounds(self) -> dict[str, float]:
        """Bounds that are set, by the names of the comparisons in `operator`, and of pydantic's."""
        return {name: bound for name, bound in vars(self).items() if bound is not None}

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Add the bounds to pydantic's schema, for its errors and its JSON schema."""
        return {**handler(source), **self.bounds}

    def words(self, kind: type) -> str:
        """Return the range of an int or a float in words, such as "above 0 and at most 1"."""
        if kind is int and self.bounds.keys() >= {"ge", "le"}:
            return f"from {self.ge} to {self.le}"
        words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
        return " and ".join(f"{words[name]} {bound:g}" for name, bound in self.bounds.items())

    def check(self, kind: type, field: str, value: object) -> float | int:
        """Return the value as `kind`, int or float; raise Refusal if it has another type or is out of range."""
        if kind is int and type(value) is not int:
            raise Refusal(field, value, "give a whole number")
        number = value if kind is int and isinstance(value, int) else real(field, value)
        if not all(getattr(operator, name)(number, bound) for name, bound in self.bounds.items()):
            raise Refusal(field, value, f"must be {self.words(kind)}")
        return number


@dataclass(frozen=True)
class Form:
    """Form of a field's text, in its annotation: a regular expression for the whole text, and the remedy for a mismatch.

    A text that is not printable, such as two lines, does not match; `printable=False` allows it.
    """

    pattern: str
    remedy: str = "has another form"
    printable: bool = True

    def check(self, kind: type, field: str, value: object) -> str:
        """Return the text; raise Refusal if it is not a string, or does not match. `kind` is not used, unlike in `Range`."""
        if not isinstance(value, str) or (self.printable and not value.isprintable()):
            raise Refusal(field, value, self.remedy)
        if not re.fullmatch(self.pattern, value, re.DOTALL):
            raise Refusal(field, value, self.remedy)
        return value


@dataclass(frozen=True)
class OneOf:
    """Valid words of a field's text, in its annotation: ``Annotated[str, OneOf(("yes", "no"))]``."""

    words: tuple[str, ...]

    def check(self, kind: type, field: str, value: object) -> str:
        """Return the text; raise Refusal if it is not one of the words. `kind` is not used, unlike in `Range`."""
        if isinstance(value, str) and value in self.words:
            return value
        raise Refusal(field, value, f"must be one of {', '.join(self.words)}")
