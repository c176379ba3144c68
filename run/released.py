"""Released model of a run, read from its folder with its task, and applied to data."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..base.bounded_decoding import read_json
from ..base.refusal import Refusal
from ..configs.strict import leaves
from .files import BASE, CONFIG, MODEL, RESULT
from .run_files import read_config

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from ..tasks import Task

NO_KEYS: Mapping[str, Any] = MappingProxyType({})


def require_ended(folder: Path) -> None:
    """Refuse a folder without a run, or with an unfinished one."""
    if not (folder / CONFIG).is_file():
        raise Refusal("folder", str(folder), "holds no run; name a folder that fedveil simulate has made")
    if not (folder / RESULT).is_file():
        raise Refusal("folder", str(folder), "its run has not ended; resume it with simulate(resume=...)")


def model_run_of(plain: dict[str, Any]) -> Path | None:
    """Return the run whose model a question names, and replace it by the model's hash; None if it names none.

    Args:
      plain: keys of the question, modified in place.

    Raises:
      Refusal: there is no such run, or it has no model.
    """
    if plain.get("model") is None:
        return None
    run = Path(str(plain["model"]))
    if not (run / MODEL).is_file():
        raise Refusal("model", str(run), "is not the folder of a run with a model; name one")
    plain["model"] = hashlib.sha256((run / MODEL).read_bytes()).hexdigest()
    return run


def released_file(run: Path | None, digest: str | None, task: Task) -> bytes | None:
    """Return the file of the model that a question is about; None without one.

    Args:
      run: as `model_run_of` returns it.
      digest: SHA-256 of the file, as the question gives it.
      task: task of the clients that are asked.

    Raises:
      Refusal: the question names another model, the run has not ended, or it has another task.
    """
    if (run is None) != (digest is None):
        raise Refusal("model", digest, "name the run by its folder")
    if run is None:
        return None
    from ..tasks.model_columns import read_released

    require_ended(run)
    file = (run / MODEL).read_bytes()
    if hashlib.sha256(file).hexdigest() != digest:
        raise Refusal("model", str(run), "has changed since the question was read; ask again")
    try:
        read_released(task.model(), file)
    except Refusal as refusal:
        raise Refusal("model", str(run), refusal.remedy) from refusal
    return file


def config_of(folder: Path) -> dict[str, Any]:
    """Return the configuration of the run in this folder, with its references resolved."""
    return dict(read_config(folder / CONFIG)[0])


def task_of(folder: Path, allow_modules: tuple[str, ...] = (), keys: Mapping[str, Any] = NO_KEYS) -> Task:
    """Return the task of the run in `folder`.

    The module of a task whose runs store the form of their inputs has `released(folder, task)`: from the run's folder and
    the keys of its task it returns the name and the options of `load_task`, so that no client's data are needed.

    Args:
      folder: of a run.
      allow_modules: modules that may be imported for it.
      keys: keys of the task whose values replace those of the run, such as the path of a base that was moved.

    Raises:
      Refusal: it cannot be loaded, or has no such key.
    """
    from ..tasks import DEALT, load_task, module_of

    config = config_of(folder)
    partition = config.get("partition")
    if others := sorted(keys.keys() - config["task"].keys()):
        name = config["task"]["name"]
        raise Refusal(f"--{others[0]}", keys[others[0]], f"task={name} has no {others[0]}; leave it out")
    task = {**config["task"], **keys}
    if lost := next((pair for pair in leaves(task) if str(pair[1]).startswith("${")), None):
        text = "cannot be resolved; set what it takes from the environment"
        raise Refusal(f"task.{lost[0]}", lost[1], text)
    if not task.get("target") and hasattr(module := module_of(task["name"]), "released"):
        name, form = module.released(folder, task)
        return load_task(name, form, allow_modules)
    options = {"folder": task["folder"]} if task.get("folder") else dict(task.get("args") or {})
    if task.get("model") is not None:
        options["model"] = task["model"]
    if task.get("target") and task.get("num_clients") is not None:
        options["num_clients"] = task["num_clients"]
    if task.get("target") and partition is not None:
        options[DEALT] = {
            **partition,
            "num_clients": task.get("num_clients"),
            "seed": config.get("seed") or 0,
        }
    return load_task(task.get("target") or task["name"], options, allow_modules)


def model_of(folder: Path, task: Task) -> nn.Module:
    """Return the released model in evaluation mode.

    Raises:
      Refusal: it is of another task, or was trained on another base.
    """
    from ..tasks.arrays import hash_of_base
    from ..tasks.model_columns import read_released

    base = folder / BASE
    if base.is_file() and read_json(base.read_bytes()) != {"sha256": hash_of_base(task)}:
        raise Refusal("model", str(folder), "was trained on another base than the task now has; restore that")
    model = task.model()
    read_released(model, (folder / MODEL).read_bytes())
    return model.eval()


def predictions(
    model: Callable[..., Tensor], task: Task, data: object, classifies: bool
) -> dict[str, NDArray[Any]]:
    """Return a model's outputs for each row of the data, by column name, shape (n,) each.

    Args:
      model: in evaluation mode.
      task: that the model was trained for.
      data: of a run on tables a file, a folder or a data frame; of one on texts a file or a folder; of any other a file
        .npy, or an array, of the model's inputs, shape (n, ...).
      classifies: whether outputs without a schema are logits of classes.

    Raises:
      Refusal: the data do not suit the model.
    """
    import torch

    from ..tasks.batch_memory import outputs_apart
    from ..tasks.exported import read_array
    from ..tasks.numpy_model import columns
    from ..tasks.protocol import PredictingTask

    inputs = task.encode(data) if isinstance(task, PredictingTask) else torch.from_numpy(read_array(data))
    try:
        with torch.no_grad():
            outputs = outputs_apart(model, inputs)
    except (RuntimeError, IndexError) as error:
        remedy = f"does not suit the model: {_row_of(task) or str(error).splitlines()[0]}"
        raise Refusal("data", _describe_tensor(inputs), remedy) from None
    if outputs.shape[:1] != inputs.shape[:1]:
        raise Refusal("data", f"shape {tuple(inputs.shape)}", "must be a list of rows, shape (n, ...)")
    return task.decode(outputs) if isinstance(task, PredictingTask) else columns(outputs.numpy(), classifies)


def _row_of(task: Task) -> str:
    """Return what a row of the task's inputs is; nothing where its data are not here."""
    from ..tasks.data import as_data, placeholder

    with suppress(Exception):
        rows: Any = placeholder(as_data(task.held_out()), 1)
        return f"a row is {_describe_tensor(rows.squeeze(0))}"
    return ""


def _describe_tensor(inputs: Any) -> str:
    """Return shape and type of a tensor in words."""
    return f"shape {tuple(inputs.shape)}, {str(inputs.dtype).removeprefix('torch.')}"
