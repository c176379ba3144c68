"""Cache of what a machine computes or downloads once, for all runs of its user."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder of the cache: $XDG_CACHE_HOME/fedveil, by default ~/.cache/fedveil."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedveil"
