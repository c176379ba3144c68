"""Notices: lines for the person who runs a command."""

from __future__ import annotations

import sys
from contextlib import suppress


def warn(text: str) -> None:
    """Print one line of warning to stderr."""
    say(f"warning: {text}", failed=True)


def say(text: str, failed: bool = False) -> None:
    """Print one line of a person's report; rounds that are paid for outlive the terminal or pipe that shows them."""
    with suppress(OSError):
        print(text, file=sys.stderr if failed else sys.stdout, flush=True)
