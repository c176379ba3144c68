"""Layers that stay at their client: parts of a model that never travel, and their files from round to round.

A head or normalisation layers stay (FedPer, Arivazhagan et al. 2019, arXiv:1912.00818; LG-FedAvg, Liang et al. 2020,
arXiv:2001.01523; FedBN, Li et al. 2021, arXiv:2102.07623), and the other parts are summed as in any run: the model is
marked where it is made, so that `tasks.arrays.sent_state` leaves the layers out of every message, sum and checkpoint.

Accounting is that of whole clients. The layers of a client depend on its own records and on releases, so its vector in a
round still does, and is clipped and noised like any other. They also depend on the client's own earlier draws, which are
secret in a Poisson cohort: given all draws of the other clients, its coin of a round is independent of its layers, and
a mixture over them of dominated pairs is dominated. Correlated noise with secret turns is refused: there a round's noise
stands in others. A record has no such guarantee: the layers have seen it without noise.

A file holds the layers after a round. Training in a round begins with those of the newest round before it, so that a
round that is repeated after a kill has the same bits.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load
from torch import Tensor, nn

from ..base.bounded_decoding import build
from ..base.durable_files import replace_file
from ..base.refusal import Refusal
from ..base.tensor_file import safetensors_parts
from ..messages.client_settings import ClientSettings
from ..messages.training_order import OWN_LAYERS, OwnLayers, display_name
from ..tasks.arrays import OWN, load_arrays, own_state, trained_state
from ..tasks.protocol import Task

ROUNDS = "fedveil_own_rounds"  # attribute of a marked model: `OwnLayers.rounds`
LAYERS = "layers"  # folder of the files
SUFFIX = ".safetensors"
MAX_RUNS = 4  # whose layers are stored; those of earlier ones are dropped
NOT_MEASURED = "personal.layers: the released model lacks these layers, so it is not evaluated; clients' whole models are"
Arrays = Mapping[str, NDArray[np.generic]]
AnyTask = TypeVar("AnyTask", bound=Task)


@dataclass(frozen=True)
class MarkedModel:
    """Factory of a task's model with the mark of its layers that stay.

    Attributes:
      task: makes the model.
      layers: that stay at their client.
    """

    task: Task
    layers: OwnLayers

    def __call__(self) -> nn.Module:
        model = self.task.model()
        setattr(model, OWN, own_names_of(model, self.layers.patterns))
        setattr(model, ROUNDS, self.layers.rounds)
        return model


def with_own_layers(task: AnyTask, layers: Mapping[str, Any]) -> AnyTask:
    """Return a copy of the task whose model has layers that stay at their client.

    Its held-out metrics are not shown: a released model has no such layers.

    Args:
      task: any task; it is not changed.
      layers: an `OwnLayers` as plain data.

    Raises:
      Refusal: the patterns do not suit the model, the task shapes whole models, or it has slots.
    """
    copied, make_model = copy(task), MarkedModel(task, build(OwnLayers, dict(layers)))
    if getattr(task, "final_model", None):
        remedy = (
            "stay at their clients, and the task's monotone and bound shape a whole model; use personal=after"
        )
        raise Refusal("personal.layers", list(make_model.layers.patterns), remedy)
    make_model()  # refuses patterns that do not suit it
    try:
        object.__setattr__(copied, "model", make_model)
        object.__setattr__(copied, "held_out_public", False)
        object.__setattr__(copied, "not_measured", NOT_MEASURED)
    except AttributeError as error:
        remedy = (
            f"{type(task).__name__} has slots, or a held_out_public that cannot be set; give it a __dict__"
        )
        raise Refusal("personal.layers", list(make_model.layers.patterns), remedy) from error
    return copied


def without_own_layers(task: AnyTask) -> AnyTask:
    """Return a copy of a task of `with_own_layers` that is of whole models."""
    copied = copy(task)
    marked = cast(MarkedModel, task.model)
    object.__setattr__(copied, "model", marked.task.model)
    return copied


def own_names_of(model: nn.Module, patterns: tuple[str, ...]) -> frozenset[str]:
    """Return the names of a model's trained parameters and buffers that match a pattern.

    Raises:
      Refusal: a pattern matches none, no parameter is left that travels, or one that stays is tied to one that travels.
    """
    trained: dict[str, Any] = trained_state(model)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in trained):
            remedy = f"matches nothing that trains; the names are {', '.join(trained)}"
            raise Refusal("personal.layers", pattern, remedy)
    own = {name for name in trained if any(fnmatchcase(name, pattern) for pattern in patterns)}
    if not any(value.is_floating_point() for name, value in trained.items() if name not in own):
        raise Refusal("personal.layers", list(patterns), "leaves nothing that travels; name fewer layers")
    sent = {_memory(value): name for name, value in trained.items() if name not in own}
    for name in sorted(own):
        if other := sent.get(_memory(trained[name])):
            remedy = f"{name} is {other}, which travels; name both or none"
            raise Refusal("personal.layers", list(patterns), remedy)
    return frozenset(own)


def _memory(value: Tensor) -> tuple[int, Any]:
    """Return where a tensor's numbers are: equal for tied weights; by itself for a tensor without numbers."""
    return (value.untyped_storage().data_ptr(), value.storage_offset()) if value.numel() else (0, id(value))


# --- files --------------------------------------------------------------------------------------------------------


def layers_folder(folder: Path, client: int, run: str = "") -> Path:
    """Return the folder of a client's layers; the same for a run that is resumed under another name on ledgers.

    Args:
      folder: of the personal models, of a simulated run or of a device.
      client: number of the client, from 0.
      run: name of the run on a device, which takes part in several; empty in the folder of a simulated run.
    """
    digest = hashlib.sha256(display_name(run).encode()).hexdigest()[:16] if run else ""
    return folder / LAYERS / digest / f"client-{client:03}"


def _folder_of(settings: ClientSettings, client: int, run: str) -> Path:
    """Return the folder of a client's layers, by its settings; other arguments as of `layers_folder`."""
    return layers_folder(Path(settings.own_folder), client, run if settings.device else "")


def load_own(model: nn.Module, settings: ClientSettings, client: int, run: str, number: int) -> None:
    """Load a client's layers, as they were before a round, into a model that has its initial ones; without a file these stay.

    Args:
      model: with the mark of the layers.
      settings: of the client; they name the folder.
      client: number of the client, from 0.
      run: name of the run on ledgers.
      number: of the round.

    Raises:
      Refusal: the file is damaged, or of another model.
    """
    if path := _newest(_folder_of(settings, client, run), number - 1):
        load_arrays(model, _read(path, model))


def store_own(model: nn.Module, settings: ClientSettings, client: int, run: str, number: int) -> None:
    """Store the layers that a client trained in a round, and delete files that no round begins with any more.

    Arguments as of `load_own`. A device flushes them to the disk, so that they survive a power cut; a simulation, which
    stores those of every client in every round, does not: only a kill leaves them whole there.
    """
    own = _folder_of(settings, client, run)
    if not own.is_dir():
        own.mkdir(mode=0o700, parents=True)
        if settings.device:
            _drop_earlier_runs(own.parent.parent)
    replace_file(_file(own, number), safetensors_parts(own_arrays(model)), flush=bool(settings.device))
    numbers = _numbers(own)
    oldest = max([0, *(each for each in numbers if each <= number - getattr(model, ROUNDS))])
    for each in numbers:
        if not oldest <= each <= number:
            _file(own, each).unlink(missing_ok=True)


def own_arrays(model: nn.Module) -> dict[str, NDArray[np.generic]]:
    """Return copies of a model's layers that stay, by name."""
    return {name: np.array(value.cpu().numpy()) for name, value in own_state(model).items()}


def whole_model(model: nn.Module, shared: Arrays, folder: Path) -> Arrays:
    """Return the arrays of a client's own model: a released shared part, and the layers that the client stored last.

    Args:
      model: with the mark of the layers, and their initial values, which a client that never trained has; it is changed.
      shared: arrays of the released model.
      folder: of the client's layers, as of `layers_folder`.
    """
    path = _newest(folder)
    return {**shared, **(_read(path, model) if path else own_arrays(model))}


def stored_layers(folder: Path) -> Arrays:
    """Return the layers that a client stored last, by name; none if it stored none.

    Args:
      folder: of the client's layers, as of `layers_folder`.

    Raises:
      Refusal: the file is damaged.
    """
    path = _newest(folder)
    return _load(path) if path else {}


def option_of(layers: Arrays) -> dict[str, Any]:
    """Return the option by which a task marks stored layers, for `load_task`; empty without layers."""
    return {OWN_LAYERS: {"patterns": [*map(escape, layers)], "rounds": 1}} if layers else {}


def _load(path: Path) -> Arrays:
    """Return the arrays of a file of layers; refuse one that is damaged."""
    try:
        return load(path.read_bytes())
    except (SafetensorError, ValueError) as error:
        remedy = "is damaged; delete it, and the client begins with initial layers"
        raise Refusal("file", str(path), remedy) from error


def _read(path: Path, model: nn.Module) -> Arrays:
    """Return the arrays of a file of layers; refuse one that is damaged, or of another model."""
    arrays = _load(path)
    forms = {name: (value.shape, value.dtype) for name, value in arrays.items()}
    if forms != {name: (value.shape, value.dtype) for name, value in own_arrays(model).items()}:
        raise Refusal("file", str(path), "has the layers of another model; delete it, or restore the model")
    return arrays


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:06}{SUFFIX}"


def _number(path: Path) -> int:
    return int(path.name.removesuffix(SUFFIX))


def _numbers(folder: Path) -> list[int]:
    """Return the numbers of the rounds whose layers a folder has, ascending."""
    return sorted(_number(path) for path in folder.glob(f"[0-9]*{SUFFIX}"))


def _newest(folder: Path, last: float = float("inf")) -> Path | None:
    """Return the file of the newest round up to `last`; None if there is none."""
    numbers = [number for number in _numbers(folder) if number <= last]
    return _file(folder, numbers[-1]) if numbers else None


def _drop_earlier_runs(folder: Path) -> None:
    """Delete the layers of all runs in a folder but the newest ones."""
    runs = sorted(folder.iterdir(), key=lambda each: each.stat().st_mtime_ns, reverse=True)
    for each in runs[MAX_RUNS:]:
        shutil.rmtree(each, ignore_errors=True)
