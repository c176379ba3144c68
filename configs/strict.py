"""Strict reading of one section of a configuration: by type, by range, no conversions, no unknown keys."""

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from typing import Any

from ..privacy.refusal import Refusal

LONGEST_SHOWN = 60
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
    return f"known: {', '.join(names)}" if names else "there is nothing to set here"


class Section:
    """One mapping of the configuration. Each reader returns a value in range, or notes a mistake.

    After a mistake a reader returns its own placeholder so that reading goes on and every mistake of the
    configuration is told at once; whoever reads must look at ``mistakes`` before using any value.

    Args:
        values: the resolved mapping.
        shown: the same mapping unresolved: what messages may repeat (an interpolation can hide a secret).
        path: where it stands, for messages; empty for the whole configuration.
        mistakes: the list that all sections of one configuration share.
    """

    def __init__(
        self, values: Mapping[str, Any], shown: Mapping[str, Any], path: str, mistakes: list[Refusal]
    ) -> None:
        self._values = values
        self._shown = shown
        self._path = path
        self._read: set[str] = set()
        self.mistakes = mistakes

    def refuse(self, key: str, remedy: str) -> None:
        shown = self._shown.get(key)
        if key not in self._values:
            remedy = f"is missing; {remedy.removesuffix(', not null')}"
        if isinstance(shown, str) and len(shown) > LONGEST_SHOWN:
            shown = shown[:LONGEST_SHOWN] + "..."
        self.mistakes.append(Refusal(self._name(key), shown, remedy))

    def section(self, key: str, options: Sequence[str] = ()) -> "Section":
        """Return the mapping below ``key``; a missing or different value is a mistake and reads as empty."""
        value = self._take(key)
        if not isinstance(value, Mapping):
            self.refuse(key, f"must be one of {', '.join(options)}" if options else "must be a group of keys")
            return Section({}, {}, self._name(key), [])
        return Section(value, self._shown[key], self._name(key), self.mistakes)

    def real(
        self,
        key: str,
        *,
        above: float = -math.inf,
        at_least: float = -math.inf,
        below: float = math.inf,
        at_most: float = math.inf,
        hint: str = "",
    ) -> float:
        value = self._take(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.refuse(key, f"must be a number, not {_kind(value)}")
            return 1.0
        number = float(value) if abs(value) < 2**1000 else math.inf
        if not math.isfinite(number):
            self.refuse(key, "must be finite")
        elif not (above < number < below and at_least <= number <= at_most):
            self.refuse(key, f"must be {_range(above, at_least, below, at_most)}{hint}")
        return number

    def optional_real(
        self,
        key: str,
        *,
        above: float = -math.inf,
        at_least: float = -math.inf,
        below: float = math.inf,
        hint: str = "",
    ) -> float | None:
        if self._null(key):
            return None
        return self.real(key, above=above, at_least=at_least, below=below, hint=hint)

    def whole(self, key: str, *, at_least: int, at_most: int) -> int:
        value = self._take(key)
        if isinstance(value, bool) or not isinstance(value, int):
            self.refuse(key, f"must be a whole number, not {_kind(value)}")
            return at_least
        if not at_least <= value <= at_most:
            self.refuse(key, f"must be from {at_least} to {at_most}")
            return at_least
        return value

    def flag(self, key: str) -> bool:
        value = self._take(key)
        if not isinstance(value, bool):
            self.refuse(key, f"must be true or false, not {_kind(value)}")
            return False
        return value

    def word(self, key: str, known: Sequence[str]) -> str:
        """One of the known words; empty after a mistake."""
        value = self._take(key)
        if isinstance(value, str) and value in known:
            return value
        self.refuse(key, f"must be one of {', '.join(known)}")
        return ""

    def optional_text(self, key: str) -> str | None:
        """Return a non-empty string without line breaks or NUL, or null."""
        value = self._take(key)
        if value is None:
            return None
        if not isinstance(value, str) or not value or not value.isprintable():
            self.refuse(key, "must be a line of text or null")
            return None
        return value

    def text(self, key: str) -> str:
        """Return a non-empty line of text; empty after a mistake."""
        if self._null(key) or key not in self._values:
            self.refuse(key, "must be a line of text")
        return self.optional_text(key) or ""

    def matching(self, key: str, pattern: re.Pattern[str], form: str) -> str:
        """Text of the form that the pattern describes; empty after a mistake."""
        value = self._take(key)
        if isinstance(value, str) and pattern.fullmatch(value):
            return value
        self.refuse(key, f"must be {form}")
        return ""

    def hexadecimal(self, key: str, length: int) -> str:
        """`length` bytes in hexadecimal."""
        return self.matching(key, re.compile(f"[0-9a-f]{{{2 * length}}}"), f"{length} bytes in hexadecimal")

    def texts(self, key: str) -> tuple[str, ...]:
        """Return a list of lines of text."""
        value = self._take(key)
        if not isinstance(value, list) or not all(
            isinstance(each, str) and each.isprintable() for each in value
        ):
            self.refuse(key, "must be a list of lines of text")
            return ()
        return tuple(value)

    def groups(self, key: str) -> tuple[Mapping[str, Any], ...]:
        """Return a list, not empty, of mappings."""
        value = self._take(key)
        if not isinstance(value, list) or not value or not all(isinstance(each, Mapping) for each in value):
            self.refuse(key, "must be a list of groups of keys")
            return ()
        return tuple(value)

    def optional_day(self, key: str) -> date | None:
        """Return a day, written YYYY-MM-DD without quotes, or null."""
        value = self._take(key)
        if value is not None and type(value) is not date:
            self.refuse(key, "must be a day, YYYY-MM-DD without quotes")
            return None
        return value

    def target(self, key: str, allowed: Sequence[str]) -> str | None:
        """``module:Class`` whose module the user has listed; null is a mistake."""
        value = self._take(key)
        if not isinstance(value, str) or not TARGET.fullmatch(value):
            self.refuse(key, "must name a class as 'module:Class'")
            return None
        module = value.partition(":")[0]
        if module not in allowed:
            self.refuse(key, f"'{module}' is not among the modules you allow; add allow_modules=[{module}]")
            return None
        return value

    def names(self, key: str) -> tuple[str, ...]:
        """Return a list of dotted Python names."""
        value = self._take(key)
        if not isinstance(value, list):
            self.refuse(key, "must be a list of module names, for instance [my_task]")
            return ()
        bad = [
            name
            for name in value
            if not (isinstance(name, str) and all(map(str.isidentifier, name.split("."))))
        ]
        if bad:
            self.refuse(key, "must hold module names only, for instance [my_task]")
        return tuple(str(name) for name in value)

    def parameters(self, key: str) -> dict[str, float | int | str | bool]:
        """Return a flat mapping of numbers, words and switches, for a constructor."""
        value = self._take(key)
        if not isinstance(value, Mapping):
            self.refuse(key, "must be a group of keys")
            return {}
        inner = Section(value, self._shown[key], self._name(key), self.mistakes)
        for name, parameter in value.items():
            finite = not isinstance(parameter, float) or math.isfinite(parameter)
            if not (isinstance(parameter, str | int | float) and finite):
                inner.refuse(str(name), "must be a finite number, a word, true or false")
        return {str(name): parameter for name, parameter in value.items()}

    def given(self, key: str) -> bool:
        """Whether the key has a value."""
        return self._take(key) is not None

    def done(self) -> None:
        """Note every key that nobody has read, with the nearest known one."""
        for key in self._values:
            if key not in self._read and key != "_target_":  # that one is refused wherever it stands
                unread = self._read - {"name"}
                self.refuse(str(key), f"there is no such key; {nearest(str(key), unread)}")

    def _take(self, key: str) -> Any:
        self._read.add(key)
        return self._values.get(key)

    def _null(self, key: str) -> bool:
        return key in self._values and self._take(key) is None

    def _name(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else key


def _kind(value: object) -> str:
    return {"NoneType": "null", "str": "text", "bool": "a switch", "float": "a fraction"}.get(
        type(value).__name__, f"a {type(value).__name__}"
    )


def _range(above: float, at_least: float, below: float, at_most: float) -> str:
    bounds = [
        f"above {above:g}" if above > -math.inf else "",
        f"at least {at_least:g}" if at_least > -math.inf else "",
        f"below {below:g}" if below < math.inf else "",
        f"at most {at_most:g}" if at_most < math.inf else "",
    ]
    return " and ".join(bound for bound in bounds if bound)
