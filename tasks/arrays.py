"""Arrays of a model that are sent: its trainable parameters and buffers, read, and loaded in place."""

import copy
import hashlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from types import NoneType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..privacy.refusal import Refusal
from .protocol import PredictingTask, Task


def load_arrays(model: nn.Module, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    """Copy arrays into the model's parameters and buffers, in place.

    Args:
      model: whose state takes the values.
      arrays: by name of the model's state dictionary, with its shapes.
    """
    own = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, value in arrays.items():
            own[name].copy_(torch.from_numpy(np.require(value, requirements=["C", "W"])))


def emptied(model: nn.Module) -> nn.Module:
    """Return the model without the values of its trainable parameters, which need no memory until `holding` sets them."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.new_empty(0)
    return model


@contextmanager
def holding(model: nn.Module, arrays: Mapping[str, NDArray[np.generic]]) -> Generator[None]:
    """Set copies of arrays in an emptied model within the context.

    Args:
      model: changed in place.
      arrays: by name of the model's state dictionary, with its shapes.
    """
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            parameter.data = parameter.data.new_empty(arrays[name].shape)
    try:
        load_arrays(model, arrays)
        yield
    finally:
        emptied(model)


def read_arrays(model: nn.Module) -> dict[str, NDArray[np.generic]]:
    """Return copies of the model's trainable parameters and its buffers, by name.

    A frozen parameter is equal in every model of the task, and is not sent.
    """
    return {name: _copy(value) for name, value in _travelling(model).items()}


def lent_arrays(model: nn.Module) -> dict[str, NDArray[np.generic]]:
    """Return the result of `read_arrays`, in the model's own memory if that may be overwritten; see `memory_alone`.

    A change of such an array changes the model, which must be loaded before its next use.
    """
    travelling = _travelling(model)
    alone = memory_alone(model.state_dict(), travelling)
    return {name: alone[name] if name in alone else _copy(value) for name, value in travelling.items()}


def memory_alone(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, NDArray[Any]]:
    """Return the memory, by name, of the tensors that are contiguous, on the CPU, and not shared.

    Args:
      tensors: all that a model has, without gradients.
      names: of those to examine.
    """
    held = Counter(each.untyped_storage().data_ptr() for each in tensors.values())
    wanted = {name: tensors[name] for name in names}
    return {
        name: each.numpy()
        for name, each in wanted.items()
        if each.device.type == "cpu" and each.is_contiguous() and held[each.untyped_storage().data_ptr()] == 1
    }


def _travelling(model: nn.Module) -> dict[str, Tensor]:
    named = model.named_parameters(remove_duplicate=False)  # tied weights have several names
    frozen = {name for name, parameter in named if not parameter.requires_grad}
    return {name: value for name, value in model.state_dict().items() if name not in frozen}


def _copy(value: Tensor) -> NDArray[np.generic]:
    return value.numpy().copy() if value.device.type == "cpu" else value.cpu().numpy()


def agreement_of(task: Task) -> str | None:
    """Return the hash of the parts that a server and its clients must share, SHA-256 in hexadecimal.

    It covers the schema of the inputs and the arrays of the model; None for a task without a schema.
    """
    if not isinstance(task, PredictingTask):
        return None
    digest = hashlib.sha256()
    for name, content in sorted(task.beside_the_model().items()):
        digest.update(f"{name} {len(content)}\n".encode() + content)
    for name, array in sorted(read_arrays(task.model()).items()):
        digest.update(f"{name} {array.shape} {array.dtype}\n".encode())
    return digest.hexdigest()


def dimension_of(task: Task) -> int:
    """Return the coordinates of an update, those of the model's floating-point arrays; Refusal of types that NumPy lacks."""
    found = {name: each for name, each in _travelling(task.model()).items() if each.is_floating_point()}
    for name, each in found.items():
        if each.dtype == torch.bfloat16:
            remedy = "cannot travel; make it float32, and let engine.dtype=bfloat16 compute"
            raise Refusal("model", f"{name} in bfloat16", remedy)
    return sum(each.numel() for each in found.values())


def memory_of(model: nn.Module) -> Callable[[], None]:
    """Return a function that restores the model's present state besides its arrays.

    These are buffers that are not persistent, and attributes of its layers that are numbers, texts, tensors or
    containers of them. Attributes that were created since are removed. Otherwise a layer could carry information about
    its inputs there from one client to the next. Objects of other kinds are not changed.
    """
    kept: list[tuple[dict[str, Any], frozenset[str], dict[str, Any]]] = []
    for module in model.modules():
        hidden: set[str] = module._non_persistent_buffers_set  # pyright: ignore[reportPrivateUsage]
        buffers: dict[str, Any] = module._buffers  # pyright: ignore[reportPrivateUsage]
        attributes = {
            name: value
            for name, value in vars(module).items()
            if name not in _OF_EVERY_MODULE and _plain(value)
        }
        for where, values in (
            (buffers, {name: buffers[name] for name in hidden}),
            (vars(module), attributes),
        ):
            copied = {name: _copied(value) for name, value in values.items()}
            kept.append((where, frozenset(where), copied))

    def put_back() -> None:
        for where, names, values in kept:
            for name in where.keys() - names:
                del where[name]
            for name, value in values.items():
                where[name] = _copied(value)

    return put_back


def _copied(value: Any) -> Any:
    """Return a copy of mutable values; a computed tensor is recomputed at each call, and is returned itself."""
    computed = isinstance(value, torch.Tensor) and not value.is_leaf
    return value if computed or isinstance(value, _IMMUTABLE) else copy.deepcopy(value)


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_IMMUTABLE = (int, float, str, bytes, NoneType)


def _plain(value: object) -> bool:
    if isinstance(value, list | tuple | set):
        return all(_plain(each) for each in value)
    if isinstance(value, dict):
        return all(_plain(each) for each in value.values())
    return isinstance(value, (*_IMMUTABLE, torch.Tensor, np.ndarray)) and not isinstance(value, nn.Parameter)
