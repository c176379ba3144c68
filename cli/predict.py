"""Predictions of a run's released model, or of an exported one, as CSV."""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ..base.extras import require_extra
from ..base.refusal import Refusal
from ..tasks.exported import read_export
from .csv_cells import cell


def predict(
    run: Path, data: Path, out: Path | None, allow_modules: tuple[str, ...], explain: str | None = None
) -> int:
    """Write the outputs of a run's model for each row of the data, in order.

    Arguments as of `fedveil predict`.

    Returns:
      The exit code.

    Raises:
      Refusal: there is no such run, or no model that was made by the schema that is here now; the data do not suit it,
        or the file cannot be written.
    """
    if not data.exists():
        raise Refusal("DATA", str(data), "does not exist; name a table, a folder of them or a .npy file")
    exported = read_export(run)
    if explain is not None:
        columns = explanation(run, data, allow_modules, explain)
    else:
        columns = _released(run, data, allow_modules) if exported is None else exported.predict(data)
    write(columns, out)
    if out:
        print(f"{out}: {len(next(iter(columns.values())))} predictions ({', '.join(columns)})")
        if explain is not None:
            print(_means_of(columns))
    return 0


def _means_of(columns: Mapping[str, NDArray[Any]]) -> str:
    """Return what each input adds to the score, or takes from it, on average over the rows, the largest first."""
    names = [*columns]
    parts = names[names.index("at_baseline") + 1 :]
    means = {name: float(abs(columns[name]).mean()) for name in parts}
    lines = [f"  {means[name]:8.4f}  {name}" for name in sorted(means, key=lambda each: -means[each])]
    said = "mean contribution of each input, without sign; the rows were not sent, and nothing was charged"
    return "\n".join([said, *lines])


def _released(run: Path, data: Path, allow_modules: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    require_extra("client", "fedveil predict of a run")
    from ..run.released import predictions
    from .run_model import model_and_task

    model, task, classifies = model_and_task(run, allow_modules)
    return predictions(model, task, data, classifies)


def explanation(
    run: Path, data: Path, allow_modules: tuple[str, ...], method: str
) -> dict[str, NDArray[Any]]:
    """Return predictions by column name, shape (n,) each, and what each input adds to the score of what is said.

    Args:
      run: folder of a run or of a client's bundle; an export is refused.
      data: as of `predict`.
      allow_modules: as of `predict`.
      method: how it is explained.

    Raises:
      Refusal: the method carries others' rows, or there is no such model.
    """
    require_extra("client", "an explanation")
    from torch import from_numpy

    from ..run.released import predictions
    from ..tasks.attribution import check_method, explained
    from ..tasks.exported import read_array, schema_inputs
    from .run_model import model_and_task

    check_method(method)
    if read_export(run) is not None:
        remedy = "is an export, which has no gradients; name the run that it came from"
        raise Refusal("--explain", str(run), remedy)
    model, task, classifies = model_and_task(run, allow_modules)
    schema = getattr(task, "schema", None)
    said = predictions(model, task, data, classifies)
    inputs = from_numpy(read_array(data) if schema is None else schema_inputs(schema, data))
    classifies = bool(task.classes) if schema is not None else classifies
    return said | explained(model, inputs, schema, classifies)


def write(columns: Mapping[str, NDArray[Any]], out: Path | None) -> None:
    """Write columns of shape (n,) as CSV, of which a spreadsheet runs nothing; None prints.

    Raises:
      Refusal: the file cannot be written.
    """
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    shown = ([f"{each:.6g}" if isinstance(each, float) else cell(each) for each in row] for row in rows)
    try:
        with open(out, "w", newline="", encoding="utf-8") if out else nullcontext(sys.stdout) as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(map(cell, columns))
            writer.writerows(shown)
    except OSError as error:
        if out is None:
            raise
        raise Refusal("--out", str(out), f"cannot be written ({error.strerror})") from None
