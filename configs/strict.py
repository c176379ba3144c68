"""Strict reading of one section of a configuration: by type, by range, no conversions, no unknown keys."""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date
from typing import Any, cast

from ..base.refusal import Refusal

LONGEST_SHOWN = 60
MOST_KNOWN = 60
TYPES = {"NoneType": "null", "str": "text", "bool": "a switch", "float": "a fraction"}
TARGET = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class Mistakes(Refusal):
    """Every mistake of one configuration; ``str`` is one sentence a line."""

    def __init__(self, each: Sequence[Refusal]) -> None:
        super().__init__(each[0].field, each[0].value, each[0].remedy)
        self.each = tuple(each)

    def __str__(self) -> str:
        return "\n".join(str(mistake) for mistake in self.each)


def nearest(word: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` or, when nothing is near, ``; known: a, b``."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{near[0]}'?"
    more = f" and {len(names) - MOST_KNOWN} more" if len(names) > MOST_KNOWN else ""  # of a table's columns
    return f"known: {', '.join(names[:MOST_KNOWN])}{more}" if names else "there is nothing to set here"


def shortened(value: object) -> object:
    """Return a value for a message: of a long text only the beginning."""
    return f"{value[:LONGEST_SHOWN]}..." if isinstance(value, str) and len(value) > LONGEST_SHOWN else value


def type_of(value: object) -> str:
    """Return a value's type in a user's words."""
    return TYPES.get(type(value).__name__, f"a {type(value).__name__}")


def leaves(node: object, above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield what groups of keys hold, by dotted keys.

    Args:
        node: a group, or what stands in one.
        above: its key.
    """
    if not isinstance(node, Mapping):
        yield above, node
        return
    for key, value in cast(Mapping[Any, Any], node).items():
        yield from leaves(value, f"{above}.{key}" if above else str(key))


class Section:
    """One mapping of the configuration. Each reader returns a value in range, or notes a mistake.

    After a mistake a reader returns a placeholder, so that reading continues and all mistakes of the configuration are
    reported at once; the caller must check ``mistakes`` before it uses any value.

    Args:
        values: the mapping.
        path: where it stands, for messages; empty for the whole configuration.
        mistakes: the list that all sections of one configuration share.
    """

    def __init__(self, values: Mapping[str, Any], path: str, mistakes: list[Refusal]) -> None:
        self._values = values
        self._path = path
        self._read: set[str] = set()
        self.mistakes = mistakes

    def refuse(self, key: str, remedy: str) -> None:
        """Note a mistake of a key."""
        if key not in self._values:
            remedy = f"is missing; {remedy.removesuffix(', not null')}"
        self.mistakes.append(Refusal(self._name(key), shortened(self._values.get(key)), remedy))

    def section(self, key: str) -> "Section":
        """Return the mapping below ``key``; a missing or different value is a mistake and reads as empty."""
        value = self._take(key)
        if not isinstance(value, Mapping):
            self.refuse(key, "must be a group of keys")
            return Section({}, self._name(key), [])
        return Section(value, self._name(key), self.mistakes)

    def real(
        self, key: str, *, above: float = -math.inf, at_least: float = -math.inf, below: float = math.inf
    ) -> float:
        """Return a finite number in the range."""
        value = self._take(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.refuse(key, f"must be a number, not {type_of(value)}")
            return 1.0
        number = float(value) if abs(value) < 2**1000 else math.inf
        if not math.isfinite(number):
            self.refuse(key, "must be finite")
        elif not (above < number < below and at_least <= number):
            bounds = ("above", above), ("at least", at_least), ("below", below)
            told = " and ".join(f"{word} {bound:g}" for word, bound in bounds if math.isfinite(bound))
            self.refuse(key, f"must be {told}")
        return number

    def optional_real(self, key: str, *, above: float = -math.inf) -> float | None:
        """Return a finite number in the range, or null."""
        null = key in self._values and self._take(key) is None
        return None if null else self.real(key, above=above)

    def whole(self, key: str, *, at_least: int, at_most: int) -> int:
        """Return a whole number in the range."""
        value = self._take(key)
        if isinstance(value, bool) or not isinstance(value, int):
            self.refuse(key, f"must be a whole number, not {type_of(value)}")
        elif not at_least <= value <= at_most:
            self.refuse(key, f"must be from {at_least} to {at_most}")
        else:
            return value
        return at_least

    def flag(self, key: str) -> bool:
        """Return true or false."""
        value = self._take(key)
        if not isinstance(value, bool):
            self.refuse(key, f"must be true or false, not {type_of(value)}")
        return value is True

    def word(self, key: str, known: Sequence[str]) -> str:
        """Return one of the known words; empty after a mistake."""
        return self._held(key, lambda value: value in known, f"must be one of {', '.join(known)}")

    def optional_text(self, key: str) -> str | None:
        """Return a non-empty string without line breaks or NUL, or null."""
        if self._take(key) is None:
            return None
        return self._held(key, str.isprintable, "must be a line of text or null") or None

    def text(self, key: str) -> str:
        """Return a non-empty line of text; empty after a mistake."""
        if self._take(key) is None:
            self.refuse(key, "must be a line of text")
        return self.optional_text(key) or ""

    def matching(self, key: str, pattern: re.Pattern[str], form: str) -> str:
        """Return text of the form that the pattern describes; empty after a mistake."""
        return self._held(key, lambda value: pattern.fullmatch(value) is not None, f"must be {form}")

    def hexadecimal(self, key: str, length: int) -> str:
        """Return `length` bytes in hexadecimal."""
        return self.matching(key, re.compile(f"[0-9a-f]{{{2 * length}}}"), f"{length} bytes in hexadecimal")

    def texts(self, key: str) -> tuple[str, ...]:
        """Return a list of lines of text."""
        return self._listed(
            key, lambda each: isinstance(each, str) and each.isprintable(), "must be a list of lines of text"
        )

    def whole_numbers(self, key: str) -> tuple[int, ...]:
        """Return a list of whole numbers."""
        return self._listed(key, lambda each: type(each) is int, "must be a list of whole numbers")

    def all_keys(self) -> tuple[str, ...]:
        """Return the keys of the section, for one whose keys are the user's."""
        return tuple(self._values)

    def groups(self, key: str) -> tuple[Mapping[str, Any], ...]:
        """Return a list, not empty, of mappings."""
        remedy = "must be a list of groups of keys"
        if self._take(key) == []:
            self.refuse(key, remedy)
        return self._listed(key, lambda each: isinstance(each, Mapping), remedy)

    def optional_day(self, key: str) -> date | None:
        """Return a day, written YYYY-MM-DD without quotes, or null."""
        value = self._take(key)
        if value is not None and type(value) is not date:
            self.refuse(key, "must be a day, YYYY-MM-DD without quotes")
            return None
        return value

    def target(self, key: str, allowed: Sequence[str]) -> str | None:
        """Return ``module:Class`` whose module the user has listed; null is a mistake."""
        form = "must name a class as 'module:Class'"
        value = self._held(key, lambda text: TARGET.fullmatch(text) is not None, form)
        module = value.partition(":")[0]
        if value and module not in allowed:
            self.refuse(key, f"'{module}' is not among the modules you allow; add allow_modules=[{module}]")
        return value or None

    def names(self, key: str) -> tuple[str, ...]:
        """Return a list of dotted Python names."""
        return self._listed(
            key,
            lambda each: isinstance(each, str) and all(map(str.isidentifier, each.split("."))),
            "must be a list of module names, for instance [my_task]",
        )

    def parameters(self, key: str) -> dict[str, float | int | str | bool]:
        """Return a flat mapping of numbers, words and switches, for a constructor."""
        inner = self.section(key)
        for name, parameter in inner._values.items():
            finite = not isinstance(parameter, float) or math.isfinite(parameter)
            if not (isinstance(parameter, str | int | float) and finite):
                inner.refuse(str(name), "must be a finite number, a word, true or false")
        return {str(name): parameter for name, parameter in inner._values.items()}

    def arguments(self, key: str) -> dict[str, Any]:
        """Return a mapping of numbers, words, switches and lists of them, for a constructor."""
        inner = self.section(key)
        for name, argument in inner._values.items():
            for each in cast(list[Any], argument) if isinstance(argument, list) else [argument]:
                if not isinstance(each, str | int | float) or (
                    isinstance(each, float) and not math.isfinite(each)
                ):
                    inner.refuse(str(name), "must be a finite number, a word, true, false or a list of them")
        return {str(name): argument for name, argument in inner._values.items()}

    def given(self, key: str) -> bool:
        """Return whether the key has a value."""
        return self._take(key) is not None

    def done(self) -> None:
        """Note every unread key, with the nearest known one."""
        for key in self._values:
            if key not in self._read:
                self.refuse(str(key), f"there is no such key; {nearest(str(key), self._read - {'name'})}")

    def _held(self, key: str, right: Callable[[str], bool], remedy: str) -> str:
        """Return a text that is not empty, and right; empty after a mistake."""
        value = self._take(key)
        if isinstance(value, str) and value and right(value):
            return value
        self.refuse(key, remedy)
        return ""

    def _listed(self, key: str, right: Callable[[Any], bool], remedy: str) -> tuple[Any, ...]:
        """Return a list whose items are all right; empty after a mistake."""
        value = self._take(key)
        if isinstance(value, list) and all(map(right, value)):
            return tuple(value)
        self.refuse(key, remedy)
        return ()

    def _take(self, key: str) -> Any:
        self._read.add(key)
        return self._values.get(key)

    def _name(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else key
