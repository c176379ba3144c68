"""Released model of a run, read from its folder with the task that it belongs to, and applied to data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...privacy.refusal import Refusal

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from ...tasks import Task

CONFIG, RESULT, MODEL = "config.yaml", "result.json", "model.safetensors"
TABLES = ("csv", "census", "star")  # tasks whose runs keep the schema that makes their inputs


def require_ended(folder: Path) -> None:
    """Refuse a folder that holds no run, or one that has not ended."""
    if not (folder / CONFIG).is_file():
        raise Refusal("folder", str(folder), "holds no run; name a folder that fedveil simulate has made")
    if not (folder / RESULT).is_file():
        raise Refusal("folder", str(folder), "its run has not ended; go on with simulate(resume=...)")


def config_of(folder: Path) -> dict[str, Any]:
    """Return the configuration that ran in this folder."""
    import yaml

    from ...configs.yaml_guard import check_file

    check_file(folder / CONFIG)
    return yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))


def task_of(folder: Path, allow_modules: tuple[str, ...] = ()) -> Task:
    """Return the task of the run in `folder`; no module is imported because a folder says so.

    Args:
      folder: of the run.
      allow_modules: modules that may be imported for a task of one's own.

    Raises:
      Refusal: the task cannot be loaded.
    """
    from ...tasks import DEALT, load_task

    config = config_of(folder)
    asked, partition = config["task"], config.get("partition")
    if asked["name"] in TABLES:
        kept = {"schema": str(folder / "schema.yaml"), "model": asked["model"]}
        return load_task(
            "csv", kept | {name: asked[name] for name in ("hidden", "groups", "bins") if name in asked}
        )
    options = {"folder": asked["folder"]} if asked.get("folder") else dict(asked.get("args") or {})
    if asked.get("target") and asked.get("num_clients") is not None:
        options["num_clients"] = asked["num_clients"]
    if asked.get("target") and partition is not None:
        options[DEALT] = {
            **partition,
            "num_clients": asked.get("num_clients"),
            "seed": config.get("seed") or 0,
        }
    return load_task(asked.get("target") or asked["name"], options, allow_modules)


def model_of(folder: Path, task: Task) -> nn.Module:
    """Return the released model in evaluation mode.

    Args:
      folder: of the run.
      task: of the run.
    """
    from safetensors.torch import load_file

    from ...tasks.arrays import load_arrays

    model = task.model()
    load_arrays(model, {name: value.numpy() for name, value in load_file(folder / MODEL).items()})
    return model.eval()


def predictions(
    model: Callable[..., Tensor], task: Task, data: object, classifies: bool
) -> dict[str, NDArray[Any]]:
    """Return what a model says of each row of the data, by column name, shape (n,) each.

    Args:
      model: in evaluation mode.
      task: that the model was trained for.
      data: of a run on tables a file, a folder or a data frame; of any other a file .npy, or an array, of the model's
        inputs, shape (n, ...).
      classifies: whether outputs without a schema are logits of classes.

    Raises:
      Refusal: the data do not suit the model.
    """
    import torch

    from ...tasks.exported import read_array
    from ...tasks.numpy_model import columns
    from ...tasks.protocol import PredictingTask

    inputs = task.encode(data) if isinstance(task, PredictingTask) else torch.from_numpy(read_array(data))
    try:
        with torch.no_grad():
            outputs = model(inputs)
    except (RuntimeError, IndexError) as error:
        shape = f"shape {tuple(inputs.shape)}"
        raise Refusal("data", shape, f"does not suit the model: {str(error).splitlines()[0]}") from None
    return task.decode(outputs) if isinstance(task, PredictingTask) else columns(outputs.numpy(), classifies)
