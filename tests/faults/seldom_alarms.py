"""Audits of a correct run that alarm by chance once in a billion runs, not once in a hundred: a test may run a hundred.

As a script: `seldom_alarms.py WORDS` is `fedveil WORDS`.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

ALPHA = 1e-9


def seldom_terms(true: Callable[..., Any]) -> Callable[..., Any]:
    """Return the terms of an audit with a lower alpha where noise is the system's, for the observer's own function."""

    def terms(federation: Any, *planted: Any) -> Any:
        made = true(federation, *planted)
        return replace(made, alpha=min(made.alpha, ALPHA)) if federation.seed is None else made

    return terms


def seldom_alarm() -> None:
    """Let audits of this process alarm seldom."""
    from fedveil.audit import observer

    observer._terms = seldom_terms(observer._terms)


if __name__ == "__main__":
    from fedveil.__main__ import main

    if sys.argv[1:2] == ["server"]:
        seldom_alarm()
    sys.exit(main())
