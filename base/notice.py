"""Notices: lines for the person who runs a command."""

from __future__ import annotations

import sys
from contextlib import suppress


def warn(text: str) -> None:
    """Print one line of warning to stderr."""
    say(f"warning: {text}", failed=True)


def say(text: str, failed: bool = False) -> None:
    """Print one line to stdout, or to stderr if a command failed; a closed terminal or pipe ends no run."""
    with suppress(OSError):
        print(text, file=sys.stderr if failed else sys.stdout, flush=True)
