"""Predictions of a run's released model, as CSV."""

from __future__ import annotations

import csv
import json
import sys
from contextlib import nullcontext
from pathlib import Path

from ..privacy.refusal import Refusal
from ..server.run.released import RESULT, model_of, predictions, require_ended, task_of


def predict(run: Path, data: Path, out: Path | None, allow_modules: tuple[str, ...]) -> int:
    """Write what the model of a run says of each row of the data, in their order.

    Args:
      run: folder of the run.
      data: table or folder of tables, or .npy for a run without a schema.
      out: file to write; None prints.
      allow_modules: modules that may be imported for the run's task.

    Returns:
      The exit code.

    Raises:
      Refusal: there is no such run, the data do not suit it, or the file cannot be written.
    """
    if not data.exists():
        raise Refusal("DATA", str(data), "is not there; name a table, a folder of tables or a file .npy")
    require_ended(run)
    task = task_of(run, allow_modules)
    classifies = "accuracy" in json.loads((run / RESULT).read_text(encoding="utf-8"))["metrics"]
    columns = predictions(model_of(run, task), task, data, classifies)
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    shown = ([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row] for row in rows)
    try:
        with open(out, "w", newline="", encoding="utf-8") if out else nullcontext(sys.stdout) as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows(shown)
    except OSError as error:
        if out is None:
            raise
        raise Refusal("--out", str(out), f"cannot be written ({error.strerror})") from None
    if out:
        print(f"{out}: {len(next(iter(columns.values())))} predictions ({', '.join(columns)})")
    return 0
