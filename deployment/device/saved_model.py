"""Saved model of a device, loaded with the task of its bundle: a run's final model, or the owner's made from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

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
from ...tasks.arrays import agreement_of, holds_arrays, load_arrays
from ...tasks.data import data_of
from ...tasks.protocol import Task
from .client_bundle import DEVICE_FILE, OWN_FILES, DeviceFile
from .run_end import OWN_MODEL, final_model, sha256_of_final
from .stored_layers import layers_of_run

if TYPE_CHECKING:
    from ...export.export import Order, Source
    from ...personal.state import OwnModel

OF_RUN = "the final model of a run: epsilon is that of the run, which its operator reports"
NO_KEYS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class SavedModel:
    """Model that a device saved.

    Attributes:
      model: network with its weights, in evaluation mode.
      task: task of the bundle; None for a linear model of NumPy, which has no task.
      classifies: whether its outputs are scores of classes.
      file: of its arrays.
      run: name of the run that it is of, or that it was trained on from.
      own: the owner's own model; None if this is the run's.
      lacks: names of layers that stayed at this client, and that the run's model lacks.
    """

    model: nn.Module
    task: Task | None
    classifies: bool
    file: Path
    run: str
    own: OwnModel | None = None
    lacks: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"its own model, from that of run {self.run}" if self.own else f"the model of run {self.run}"


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


def own_model_of(bundle: Path) -> OwnModel | None:
    """Return a device's own model; None if it has none that was made from the final model that it has now.

    Where layers of the final model stayed here, it is the whole model.

    Raises:
      Refusal: its file cannot be read.
    """
    settings = _settings(bundle)
    state = bundle / settings.state
    final = final_model(state)
    if final and (layers := layers_of_run(state, settings.task, final.run)):
        from ...personal.choice import OWN, Choice
        from ...personal.state import OwnModel

        whole, keys = {**final.arrays, **layers}, {"layers": sorted(layers)}
        return OwnModel(final.run, final.sha256, Choice(OWN, 1.0, 0, {}), keys, whole)
    if not (state / OWN_MODEL).is_file():  # then the extension need not be here
        return None
    from ...personal.state import read_own

    own = read_own(state / OWN_MODEL)
    return own if own and own.shared == sha256_of_final(state) else None


def load_latest(
    bundle: Path,
    allow_modules: tuple[str, ...] = (),
    keys: Mapping[str, str] = NO_KEYS,
    *,
    shared: bool = False,
) -> SavedModel:
    """Return the owner's own model, if it was made from the final model of the last run, else that final model.

    Arguments and errors as of `load_saved`; with `shared` it is the final model in any case.
    """
    own = None if shared else own_model_of(bundle)
    if own is None:
        return load_saved(bundle, allow_modules, keys)
    return load_own(bundle, own, allow_modules, keys)


def load_own(
    bundle: Path, own: OwnModel, allow_modules: tuple[str, ...] = (), keys: Mapping[str, str] = NO_KEYS
) -> SavedModel:
    """Return a device's own model, loaded; arguments and errors as of `load_saved` and `own_model_of`."""
    saved = _loaded(bundle, allow_modules, keys)
    if not holds_arrays(saved.model, own.arrays):
        remedy = f"has other arrays than run {saved.run}; start the client, which makes it anew"
        raise Refusal("personal", str(saved.file.with_name(OWN_MODEL)), remedy)
    load_arrays(saved.model, own.arrays)
    return replace(saved, own=own, file=saved.file.with_name(OWN_MODEL))


def load_saved(
    bundle: Path, allow_modules: tuple[str, ...] = (), keys: Mapping[str, str] = NO_KEYS
) -> SavedModel:
    """Return the final model of a run that a device has saved, for the task in its bundle.

    Args:
      bundle: folder of the client's bundle.
      allow_modules: modules that may be imported for its task, with those of the bundle.
      keys: keys of the task whose values replace those of the bundle.

    Raises:
      Refusal: there is no model, it has another schema than the bundle has now, or layers of it stayed here.
    """
    saved = _loaded(bundle, allow_modules, keys)
    if saved.lacks:
        remedy = f"the shared model lacks {', '.join(saved.lacks[:4])}, which stay at this client; predict without --shared, export with --personal"
        raise Refusal("model", saved.run, remedy)
    return saved


def _loaded(bundle: Path, allow_modules: tuple[str, ...], keys: Mapping[str, str]) -> SavedModel:
    """Return the final model of a run, with initial values of layers that stayed here; arguments as of `load_saved`."""
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
        return SavedModel(model.eval(), None, True, state / MODEL, metadata.get("run", ""))
    options = {**choice.options, **choice.args, **choice.shared(bundle), **keys}
    if metadata.get("moments"):  # means and deviations by which the run scaled inputs
        options["moments"] = read_json(metadata["moments"])
    allowed, run = (*choice.allow_modules, *allow_modules), metadata.get("run", "")
    layers = layers_of_run(state, choice, run)
    if layers:
        from ...personal.own_layers import option_of

        options |= option_of(layers)
    task = load_task(choice.target or choice.name or "", options, allowed)
    # The run agreed on a hash of schema and arrays; with another schema the model's inputs would mean something else.
    if metadata.get("agreement") and metadata["agreement"] != agreement_of(task):
        remedy = f"is not the schema or model of run {metadata.get('run')}, whose model is saved; restore it"
        raise Refusal("schema", str(options.get("schema")), remedy)
    classifies = (
        choice.name not in OWN_FILES
        and not data_of(task, choice.client).batch(torch.arange(1))[1].is_floating_point()
    )
    model = model_of(state, task)
    if layers:
        from ...personal.own_layers import without_own_layers

        task = without_own_layers(task)
        model = task.model().eval()
        load_arrays(model, load_file(state / MODEL))
    return SavedModel(model, task, classifies, state / MODEL, run, lacks=tuple(sorted(layers)))


def export_saved(bundle: Path, order: Order) -> tuple[Path, dict[str, Any]]:
    """Export the final model of a run that a device has saved or, with `order.personal`, the owner's own model.

    Args:
      bundle: folder of the client's bundle.
      order: as of `export.export.export`.

    Raises:
      Refusal: there is no such model, it is a linear model of NumPy, or as of `export.export.export_from`.
    """
    choice = _settings(bundle).task
    if order.client is not None:
        raise Refusal("--client", order.client, "is of a simulation; a device has one client, leave it out")
    if choice.kind is not None:
        remedy = f"any program reads {MODEL} and {OWN_MODEL} in its state folder, weight and bias; copy them"
        raise Refusal("RUN", str(bundle), remedy)
    # Public inputs may not lie in the bundle, where the device's data are.
    keys = {"name": choice.name or "custom", "folder": str(bundle), **choice.options}
    from ...export.export import export_from  # PyYAML, which no device needs for training

    return export_from(bundle, keys, order, lambda: _source(bundle, keys, order))


def _source(bundle: Path, keys: Mapping[str, Any], order: Order) -> Source:
    """Return the source of an export; arguments as of `export_saved`, `keys` are those of the task."""
    saved = load_latest(bundle, order.allow_modules, order.keys, shared=not order.personal)
    if order.personal and saved.own is None:
        remedy = (
            "has no own model of its final model; give client.toml a table personal, and start the client"
        )
        raise Refusal("--personal", str(bundle), remedy)
    assert saved.task is not None  # only a linear model of NumPy has none
    classifies = bool(getattr(saved.task, "classes", saved.classifies))
    from ...export.export import Source, own_source

    source = Source(saved.file, {"task": keys}, saved.task, saved.model, (), classifies, False)
    return own_source(source, saved.file) if saved.own else replace(source, statement=OF_RUN)
