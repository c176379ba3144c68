"""Refusal, the one error that a user's mistake raises, and readers of values that raise it."""

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
LONGEST = 400  # characters of a value that a refusal shows
# What to do where a disk or the system fails and not a file: a file behind such an error is whole, and an older copy of a
# ledger in its place would lose entries.
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
    """Request that is declined before anything is written, sent or spent.

    The command line prints it as one sentence, "field=value: remedy", and exits with code 2, without a
    traceback; with code 1 where `disk_failed`.

    Attributes:
      field: name of the argument or key.
      value: of the field; its `repr` is shown.
      remedy: what to do instead, a clause.

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
    try:
        text = repr(value)
        return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}... ({len(text)} characters)"
    except (ValueError, RecursionError):  # CPython writes no whole number of more than 4300 digits
        return "(too large to show)"


def disk_failed(error: BaseException | None) -> bool:
    """Return whether a disk or the system is behind an error: the same request may work later."""
    return disk_remedy(error) is not None


def disk_remedy(error: BaseException | None) -> str | None:
    """Return what to do about the disk or the system behind an error; None where neither is."""
    while error is not None:
        remedy = _REMEDIES.get(error.errno or 0) if isinstance(error, OSError) else None
        if (code := getattr(error, "sqlite_errorcode", None)) is not None:
            remedy = _REMEDIES_OF_SQLITE.get(code & 0xFF)
        if remedy is not None:
            return remedy
        error = error.__cause__ or error.__context__
    return None


def unreadable(error: BaseException, remedy: str, fault: str = "cannot be read") -> str:
    """Return the clause for a file that cannot be used, whose remedy is another where the disk or the system fails.

    Args:
      error: that occurred.
      remedy: for the file itself.
      fault: of the file itself.
    """
    mend, reason = disk_remedy(error), getattr(error, "strerror", None) or error
    return f"{fault} ({reason}); {remedy}" if mend is None else f"cannot be used now ({reason}); {mend}"


@contextmanager
def refusing(field: str, value: object, remedy: str) -> Generator[None]:
    """Turn an error of the operating system in this context into a refusal that includes the error's reason."""
    try:
        yield
    except OSError as error:
        mend = disk_remedy(error)
        raise Refusal(
            field, str(value), f"{remedy} ({error.strerror}){'' if mend is None else f'; {mend}'}"
        ) from error


def word(kind: type[Word], field: str, value: str) -> Word:
    """Read a value as a member of an enumeration of words.

    Raises:
      Refusal: it is not one of them; the sentence lists those that are.
    """
    try:
        return kind(value)
    except ValueError:
        raise Refusal(field, value, f"choose one of {', '.join(kind)}") from None


def real(field: str, value: object) -> float:
    """Read any real number, numpy's scalars included, as a float.

    Args:
      field: for a refusal.
      value: the number; a bool is not accepted.

    Raises:
      Refusal: it is not a finite number.
    """
    huge = isinstance(value, int) and value.bit_length() > 1023  # no float holds it
    if huge or isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise Refusal(field, value, "give a finite number")
    return float(value)


def positive(field: str, value: object) -> float:
    """Read a number above 0 as a float; arguments as of `real`.

    Raises:
      Refusal: it is not.
    """
    number = real(field, value)
    if number <= 0:
        raise Refusal(field, number, "give a number above 0")
    return number


@dataclass(frozen=True)
class Range:
    """Range of a number, in the annotation of a field: above `gt`, at least `ge`, below `lt`, at most `le`, where they are set."""

    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Give pydantic the bounds as its own, so that its errors and its JSON schema tell them."""
        return {**handler(source), **{name: bound for name, bound in vars(self).items() if bound is not None}}

    def words(self, kind: type) -> str:
        """Return the range in words, for a number of this type."""
        if kind is int and self.ge is not None and self.le is not None:
            return f"from {self.ge} to {self.le}"
        bounds = {"above": self.gt, "at least": self.ge, "below": self.lt, "at most": self.le}
        return " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None)

    def check(self, kind: type, field: str, value: object) -> float | int:
        """Return the value as `kind`; Refusal when it has another type or is out of range."""
        if kind is int and type(value) is not int:
            raise Refusal(field, value, "give a whole number")
        number = value if kind is int and isinstance(value, int) else real(field, value)
        bounds = ((name, bound) for name, bound in vars(self).items() if bound is not None)
        if not all(getattr(operator, name)(number, bound) for name, bound in bounds):
            raise Refusal(field, value, f"must be {self.words(kind)}")
        return number


@dataclass(frozen=True)
class Form:
    """Form of a text, in the annotation of a field: its pattern, whether it is printable, and the remedy for another."""

    pattern: str
    remedy: str = "has another form"
    printable: bool = True

    def check(self, kind: type, field: str, value: object) -> str:
        """Return the text; Refusal when it is none, or has another form."""
        if not isinstance(value, str) or (self.printable and not value.isprintable()):
            raise Refusal(field, value, self.remedy)
        if not re.fullmatch(self.pattern, value, re.DOTALL):
            raise Refusal(field, value, self.remedy)
        return value


@dataclass(frozen=True)
class OneOf:
    """Words of which a text must be one, in the annotation of a field."""

    words: tuple[str, ...]

    def check(self, kind: type, field: str, value: object) -> str:
        """Return the text; Refusal when it is none of the words."""
        if isinstance(value, str) and value in self.words:
            return value
        raise Refusal(field, value, f"must be one of {', '.join(self.words)}")
