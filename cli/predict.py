"""Verb `fedveil predict`: predictions, as CSV, of the model of a run, of an export or of a client's bundle."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

from ..base.extras import require_extra
from ..base.refusal import Refusal
from ..run.files import RESULT
from .grammar import MovedBase, allow_local_modules, app, argument, flag, option, task_keys, verb
from .table_source import Encoding, Query, tables_at

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn


@verb(app, "predict", "Apply a run's model to data.", panel="Run")
def predict(
    run: Annotated[
        Path, argument("RUN", "Folder of an ended run, an export or a client's bundle.", file_okay=False)
    ],
    data: Annotated[str, argument("DATA", "A table, texts, a folder of them, a .npy file, or a database.")],
    out: Annotated[Path | None, option("FILE", "CSV file to write; printed by default.")] = None,
    allow_module: Annotated[list[str] | None, option("MODULE", "Module of the run's own task.")] = None,
    explain: Annotated[
        str | None, option("METHOD", "Add each input's contribution to the score: integrated_gradients.")
    ] = None,
    interval: Annotated[
        float | None, option("LEVEL", "Add estimates with intervals of this level, noise included: 0.95.")
    ] = None,
    query: Query = None,
    encoding: Encoding = None,
    base: MovedBase = "",
    shared: Annotated[
        bool, flag("--shared", "Of a client: the run's final model instead of its own one.")
    ] = False,
) -> int:
    """Write the prediction of a run's model for each row: the likeliest class and its probability, or a number.

    Of a language model the prediction is the perplexity of each text. A client that has a model of its own predicts with it.

    Example:
      fedveil predict runs/first patients.csv --out predictions.csv
      fedveil predict runs/first patients.csv --explain integrated_gradients
      fedveil predict runs/first patients.csv --interval 0.95
      fedveil predict runs/first ward.duckdb --query "SELECT * FROM stays"
      fedveil predict runs/letters new_letters.jsonl
    """
    from ..tasks.exported import read_export

    allow_local_modules()
    rows = tables_at(data, query, encoding)
    exported, modules = read_export(run), tuple(allow_module or ())
    if explain is not None:
        columns = explanation(run, rows, modules, explain, shared=shared)
    elif exported:
        columns = exported.predict(rows)
    else:
        columns = _predict_of_run(run, rows, modules, task_keys(base), shared)
    if interval is not None:
        columns = columns | intervals(run, rows, modules, interval)
    write(columns, out)
    if out:
        print(f"{out}: {len(next(iter(columns.values())))} predictions ({', '.join(columns)})")
        if explain is not None:
            print(_mean_contributions(columns))
    return 0


def _mean_contributions(columns: Mapping[str, NDArray[Any]]) -> str:
    """Return the mean absolute contribution of each input to the score over the rows, the largest first."""
    names = [*columns]
    inputs = names[names.index("at_baseline") + 1 :]
    means = {name: float(abs(columns[name]).mean()) for name in inputs}
    lines = [f"  {means[name]:8.4f}  {name}" for name in sorted(means, key=lambda each: -means[each])]
    title = "mean contribution of each input, without sign; the rows were not sent, and nothing was charged"
    return "\n".join([title, *lines])


def _predict_of_run(
    run: Path, data: object, allow_modules: tuple[str, ...], keys: Mapping[str, str], shared: bool
) -> dict[str, NDArray[Any]]:
    """Return the predictions of a run's or a device's model, by column name, shape (n,) each; arguments as of `load_model`."""
    require_extra("client", "fedveil predict of a run")
    from ..run.released import predictions

    loaded = load_model(run, allow_modules, keys, shared=shared)
    return predictions(loaded.model, loaded.task, data, loaded.classifies)


def explanation(
    run: Path, data: object, allow_modules: tuple[str, ...], method: str, *, shared: bool = False
) -> dict[str, NDArray[Any]]:
    """Return predictions by column name, shape (n,) each, then score, at_baseline and the contribution of each input.

    Args:
      run: folder of a run or of a client's bundle; an export is refused.
      data: a table, a folder of tables, or a .npy file of inputs.
      allow_modules: modules that may be imported for the run's task.
      method: method of attribution, of which some are refused because they would publish rows of others.
      shared: as of `load_model`.

    Raises:
      Refusal: there is no such method or model, or the data do not suit the model.
    """
    require_extra("client", "an explanation")
    from torch import from_numpy

    from ..run.released import predictions
    from ..tasks.attribution import check_method, explained
    from ..tasks.exported import read_array, read_export, schema_inputs

    check_method(method)
    if read_export(run):
        remedy = "is an export, which has no gradients; name the run that it came from"
        raise Refusal("--explain", str(run), remedy)
    loaded = load_model(run, allow_modules, shared=shared)
    model, schema = loaded.model, getattr(loaded.task, "schema", None)
    outputs = predictions(model, loaded.task, data, loaded.classifies)
    inputs = from_numpy(read_array(data) if schema is None else schema_inputs(schema, data))
    return outputs | explained(model, inputs, schema, loaded.classifies)


def intervals(
    run: Path, data: object, allow_modules: tuple[str, ...], level: float
) -> dict[str, NDArray[Any]]:
    """Return estimates of a run's predictions with intervals that include its noise, by column name, shape (n,) each.

    Args:
      run: folder of a run.
      data: a table, or a folder of tables.
      allow_modules: modules that may be imported for the run's task.
      level: of the intervals, in (0, 1).

    Raises:
      Refusal: it is no run, or the run has no intervals.
    """
    from ..base.extensions import extension
    from ..run.released import require_ended, task_of

    require_ended(run)
    columns = extension("prediction columns", "interval", "--interval", level)
    return columns(run, task_of(run, allow_modules), data, level)


def write(columns: Mapping[str, NDArray[Any]], out: Path | None) -> None:
    """Write columns of shape (n,) as CSV in which a spreadsheet evaluates nothing, to a file or, if None, stdout."""
    import csv

    from .compare import cell

    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    cells = ([f"{each:.6g}" if isinstance(each, float) else cell(each) for each in row] for row in rows)
    try:
        with open(out, "w", newline="", encoding="utf-8") if out else nullcontext(sys.stdout) as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(map(cell, columns))
            writer.writerows(cells)
    except OSError as error:
        if out is None:
            raise
        raise Refusal("--out", str(out), f"cannot be written ({error.strerror})") from None


@dataclass(frozen=True)
class LoadedModel:
    """Model of a run, in evaluation mode.

    Attributes:
      model: network with the released weights.
      task: task of the run; None if a device trains a linear model with NumPy, which has no task.
      classifies: whether its outputs are scores of classes.
    """

    model: nn.Module
    task: Any
    classifies: bool


def load_model(
    folder: Path,
    allow_modules: tuple[str, ...],
    keys: Mapping[str, str] = MappingProxyType({}),
    *,
    shared: bool = False,
) -> LoadedModel:
    """Return the model of a run or of a client's device; if the device has one of its own, a line says which it is.

    Args:
      folder: folder of a run; or a client's bundle, or the state folder in it, which keeps the final model of a run.
      allow_modules: modules that may be imported for the run's task.
      keys: keys of the task whose values replace those of the run.
      shared: whether to take the run's final model of a device that has one of its own.

    Raises:
      Refusal: there is no such run, no model, or the model has another schema than the bundle has now.
    """
    from ..deployment.device import saved_model
    from ..run.released import model_of, require_ended, task_of
    from ..run.run_files import read_object

    if bundle := saved_model.bundle_of(folder):
        saved = saved_model.load_latest(bundle, allow_modules, keys, shared=shared)
        if saved.own or shared:
            print(f"{bundle}: {saved}{'' if shared else '; --shared takes the shared one'}", file=sys.stderr)
        return LoadedModel(saved.model, saved.task, saved.classifies)
    require_ended(folder)
    task = task_of(folder, allow_modules, keys)
    classifies = "accuracy" in read_object(folder / RESULT)["metrics"]
    return LoadedModel(model_of(folder, task), task, classifies)
