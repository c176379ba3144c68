"""Audits of a correct run that alarm by chance once in a billion runs, not once in a hundred: a test may run a hundred.

As a script: `seldom_alarms.py WORDS` is `fedveil WORDS`.
"""

import sys
from dataclasses import replace
from typing import Any

ALPHA = 1e-9


def seldom_alarm() -> None:
    """Lower alpha in this process where noise is the system's: that of a seeded run alarms always or never."""
    from fedveil.audit import observer as audit

    true = audit._terms
    if true.__module__ != audit.__name__:
        return

    def terms(federation: Any, *planted: Any) -> Any:
        made = true(federation, *planted)
        return replace(made, alpha=min(made.alpha, ALPHA)) if federation.seed is None else made

    audit._terms = terms


if __name__ == "__main__":
    from fedveil.__main__ import main

    if sys.argv[1:2] == ["server"]:
        seldom_alarm()
    sys.exit(main())
