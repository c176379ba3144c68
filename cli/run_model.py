"""Model of a run, or of a client's bundle, with its task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from torch import nn

from ..base.bounded_decoding import read_json
from ..base.refusal import Refusal
from ..configs.bundle_files import SCHEMA, read_toml
from ..deployment.device.client_bundle import DEFAULTS, DEVICE_FILE, TABLES, DeviceFile, read_settings
from ..run.files import MODEL, RESULT
from ..run.released import model_of, require_ended, task_of
from ..run.run_files import read_object
from ..tasks import load_task
from ..tasks.arrays import agreement_of, load_arrays
from ..tasks.data import data_of


def model_and_task(folder: Path, allow_modules: tuple[str, ...]) -> tuple[nn.Module, Any, bool]:
    """Return a model in evaluation mode, its task, and whether it classifies.

    Args:
      folder: of a run; or a client's bundle, or the state folder in it, which keeps the final model of a run.
      allow_modules: modules that may be imported for the run's task.

    Raises:
      Refusal: there is no such run, or no model that was made by the schema that is here now.
    """
    bundle = _bundle_of(folder)
    return _of_run(folder, allow_modules) if bundle is None else _of_device(bundle, allow_modules)


def _of_run(run: Path, allow_modules: tuple[str, ...]) -> tuple[nn.Module, Any, bool]:
    """Return a run's model and task, and whether it classifies."""
    require_ended(run)
    task = task_of(run, allow_modules)
    classifies = "accuracy" in read_object(run / RESULT)["metrics"]
    return model_of(run, task), task, classifies


def _bundle_of(folder: Path) -> Path | None:
    """Return the client's bundle that a folder is, or whose state folder it is."""
    for bundle in (folder, folder.resolve().parent):
        if (bundle / DEVICE_FILE).is_file() and (
            bundle == folder or (bundle / _settings(bundle).state).resolve() == folder.resolve()
        ):
            return bundle
    return None


def _settings(bundle: Path) -> DeviceFile:
    return read_toml(bundle / DEVICE_FILE, read_settings, DEFAULTS)


def _of_device(bundle: Path, allow_modules: tuple[str, ...]) -> tuple[nn.Module, Any, bool]:
    """Return the model that a device keeps, its task, and whether it classifies."""
    settings = _settings(bundle)
    state, choice = bundle / settings.state, settings.task
    if not (state / MODEL).is_file():
        raise Refusal("folder", str(bundle), "holds no model; a completed run saves one")
    with safe_open(state / MODEL, "numpy") as file:
        told: dict[str, str] = file.metadata() or {}
        if choice.kind is not None:
            kept = load_file(state / MODEL)
            model = nn.Linear(*kept["weight"].shape[::-1])
            load_arrays(model, kept)
            return model.eval(), None, True
    options = {**choice.options, **choice.args}
    if choice.name == TABLES:
        options["schema"] = str(bundle / str(choice.options.get("schema", SCHEMA)))
        options |= {"moments": read_json(told["moments"])} if told.get("moments") else {}
    task = load_task(choice.target or choice.name or "", options, (*choice.allow_modules, *allow_modules))
    if told.get("agreement") and told["agreement"] != agreement_of(task):
        remedy = f"is not the schema or model of run {told.get('run')}, whose model is saved; restore it"
        raise Refusal("schema", str(options.get("schema")), remedy)
    classifies = (
        choice.name != TABLES
        and not data_of(task, choice.client).batch(torch.arange(1))[1].is_floating_point()
    )
    return model_of(state, task), task, classifies
