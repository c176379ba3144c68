"""Saved model of a device, loaded with the task of its bundle: a run's final model, or the owner's made from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from torch import nn

from ...base.bounded_decoding import read_json
from ...base.refusal import Refusal
from ...configs.bundle_files import read_toml
from ...run.files import MODEL
from ...run.released import model_of
from ...tasks import load_task
from ...tasks.arrays import agreement_of, load_arrays
from ...tasks.data import data_of
from ...tasks.protocol import Task
from .client_bundle import DEVICE_FILE, OWN_FILES, DeviceFile

NO_KEYS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class SavedModel:
    """Model that a device saved.

    Attributes:
      model: network with its weights, in evaluation mode.
      task: task of the bundle; None for a linear model of NumPy, which has no task.
      classifies: whether its outputs are scores of classes.
    """

    model: nn.Module
    task: Task | None
    classifies: bool


def bundle_of(folder: Path) -> Path | None:
    """Return the client's bundle that a folder is, or whose state folder it is; None if it is neither, as a run's is."""
    if (folder / DEVICE_FILE).is_file():
        return folder
    above = folder.resolve().parent
    if (above / DEVICE_FILE).is_file() and (above / _settings(above).state).resolve() == folder.resolve():
        return above
    return None


def _settings(bundle: Path) -> DeviceFile:
    return read_toml(DeviceFile, bundle / DEVICE_FILE)


def load_saved(
    bundle: Path, allow_modules: tuple[str, ...] = (), keys: Mapping[str, str] = NO_KEYS
) -> SavedModel:
    """Return the model that a device has saved at the end of a run, for the task in its bundle.

    Args:
      bundle: folder of the client's bundle.
      allow_modules: modules that may be imported for its task, with those of the bundle.
      keys: keys of the task whose values replace those of the bundle.

    Raises:
      Refusal: there is no model, or it has another schema than the bundle has now.
    """
    settings = _settings(bundle)
    state, choice = bundle / settings.state, settings.task
    if not (state / MODEL).is_file():
        raise Refusal("folder", str(bundle), "holds no model; a completed run saves one")
    with safe_open(state / MODEL, "numpy") as file:
        metadata: dict[str, str] = file.metadata() or {}
    if choice.kind is not None:  # a linear model that NumPy trained, without a task
        arrays = load_file(state / MODEL)
        model = nn.Linear(*arrays["weight"].shape[::-1])
        load_arrays(model, arrays)
        return SavedModel(model.eval(), None, True)
    options = {**choice.options, **choice.args, **choice.shared(bundle), **keys}
    if metadata.get("moments"):  # means and deviations by which the run scaled inputs
        options["moments"] = read_json(metadata["moments"])
    task = load_task(choice.target or choice.name or "", options, (*choice.allow_modules, *allow_modules))
    # The run agreed on a hash of schema and arrays; with another schema the model's inputs would mean something else.
    if metadata.get("agreement") and metadata["agreement"] != agreement_of(task):
        remedy = f"is not the schema or model of run {metadata.get('run')}, whose model is saved; restore it"
        raise Refusal("schema", str(options.get("schema")), remedy)
    classifies = (
        choice.name not in OWN_FILES
        and not data_of(task, choice.client).batch(torch.arange(1))[1].is_floating_point()
    )
    return SavedModel(model_of(state, task), task, classifies)
