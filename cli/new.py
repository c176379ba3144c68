"""Projects that begin from a template, run at once and have a test that passes."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from ..privacy.refusal import Refusal

TEMPLATES = Path(__file__).parent / "templates"
OWNERS, ROWS, COLUMNS = 8, 120, 6
HELD_OUT_ROWS = 400
SIMULATE = "fedveil simulate --config-dir . --config-name project"
COMMANDS = {"csv": SIMULATE, "torch": SIMULATE, "sklearn": SIMULATE, "flower": "python run.py"}


def new(folder: Path, source: str) -> int:
    """Make a project.

    Args:
      folder: to make; it must not hold anything.
      source: of which kind, a key of `COMMANDS`.

    Returns:
      The exit code.

    Raises:
      Refusal: the kind does not exist, or the folder cannot be made or holds something.
    """
    if source not in COMMANDS:
        raise Refusal("--from", source, f"choose one of {', '.join(COMMANDS)}")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise Refusal("folder", str(folder), "holds something already; name a new one")
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(TEMPLATES / source, folder, dirs_exist_ok=True, ignore=ignored)
        if source == "csv":
            _write_tables(folder / "data")
    except OSError as error:
        raise Refusal("folder", str(folder), f"cannot be made ({error.strerror})") from None
    print(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    print(f"  cd {folder} && {COMMANDS[source]}")
    print(f"  cd {folder} && python -m pytest")
    return 0


def _write_tables(folder: Path) -> None:
    """Write a table for each of several owners, and one that is nobody's, of made-up rows."""
    folder.mkdir()
    stream = np.random.default_rng(0)
    towards = np.linspace(-1, 1, COLUMNS)
    header = ",".join([*(f"column_{number}" for number in range(COLUMNS)), "label"])
    names = [*(f"owner_{number}.csv" for number in range(OWNERS)), "held_out.csv"]
    for name in names:
        rows = stream.standard_normal((HELD_OUT_ROWS if name == "held_out.csv" else ROWS, COLUMNS))
        labels = stream.random(len(rows)) < 1 / (1 + np.exp(-4 * rows @ towards))
        table = np.column_stack([rows.round(3), labels])
        lines = [",".join([*(f"{cell:g}" for cell in row[:-1]), str(int(row[-1]))]) for row in table]
        (folder / name).write_text("\n".join([header, *lines]) + "\n")
