"""Arrays of a model that are sent: its trainable parameters and buffers, read, and loaded in place."""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from types import NoneType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from ..base.refusal import Refusal
from .data import run_on
from .protocol import PredictingTask, Task

OWN = "fedveil_own"  # attribute of a model: names of trained parameters and buffers that stay at their client
COPIED = 1 << 16  # largest number of entries with which a tensor of the base is compared with a copy
BASE_REMEDY = (
    "the base is equal at all clients and is not sent: keep a frozen module in evaluation mode, by an own `train` of the "
    "model; of a module without parameters that is to change, set track_running_stats = True"
)


def load_arrays(model: nn.Module, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    """Copy arrays, by the names of a model's state dictionary, into its parameters and buffers, in place."""
    own = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, value in arrays.items():
            own[name].copy_(torch.from_numpy(np.require(value, requirements=["C", "W"])))


def emptied(model: nn.Module) -> nn.Module:
    """Free the memory of the model's sent parameters and return it; `holding` gives them values again."""
    for parameter in _sent_parameters(model).values():
        parameter.data = parameter.data.new_empty(0)
    return model


def _sent_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the model's trainable parameters by all their names, without those that stay at their client."""
    parameters, own = model.named_parameters(remove_duplicate=False), own_names(model)
    return {name: each for name, each in parameters if each.requires_grad and name not in own}


def final_arrays(task: object, arrays: dict[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
    """Return the arrays of a model that is used after training, in the form that its task declares; `arrays` without one.

    Args:
      task: of the model; `final_model`, a function of arrays, gives such a form, and may be None or absent.
      arrays: of the whole model, by name.
    """
    change: Callable[[dict[str, NDArray[Any]]], dict[str, NDArray[Any]]] | None = getattr(
        task, "final_model", None
    )
    return arrays if change is None else change(arrays)


@contextmanager
def holding(model: nn.Module, arrays: Mapping[str, NDArray[np.generic]]) -> Generator[None]:
    """Load arrays into an `emptied` model for a block; empty it again afterwards."""
    for name, parameter in _sent_parameters(model).items():
        parameter.data = parameter.data.new_empty(arrays[name].shape)
    try:
        load_arrays(model, arrays)
        yield
    finally:
        emptied(model)


def read_arrays(model: nn.Module) -> dict[str, NDArray[np.generic]]:
    """Return copies of the model's trainable parameters and its buffers, by name, without what stays at its client.

    The base, see `base_of`, is equal in every model of the task, and is not sent.
    """
    return {name: _copy(value) for name, value in sent_state(model).items()}


def lent_arrays(model: nn.Module) -> dict[str, NDArray[np.generic]]:
    """Return the arrays of `read_arrays`, in the model's own memory where `memory_alone` allows it, else as copies.

    The caller overwrites them with the update and so destroys the model, which must be loaded before its next use.
    """
    sent = sent_state(model)
    alone = memory_alone(model.state_dict(), sent)
    return {name: alone[name] if name in alone else _copy(value) for name, value in sent.items()}


def memory_alone(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, NDArray[Any]]:
    """Return, by name, arrays that may be written in place: writing one changes that tensor and no other.

    A tensor is left out unless it is on the CPU, contiguous, and shares its memory with no other tensor of the model.

    Args:
      tensors: all tensors of a model, without gradients.
      names: names of the tensors to examine.
    """
    # Subclasses, such as packed weights of other libraries, may be tensors without memory of their own.
    plain = {name: tensor for name, tensor in tensors.items() if type(tensor) is Tensor}
    uses = Counter(tensor.untyped_storage().data_ptr() for tensor in plain.values())
    return {
        name: plain[name].numpy()
        for name in names
        if name in plain
        and plain[name].device.type == "cpu"
        and plain[name].is_contiguous()
        and uses[plain[name].untyped_storage().data_ptr()] == 1
    }


def _copy(value: Tensor) -> NDArray[np.generic]:
    """Return a tensor's values in new memory."""
    return value.numpy().copy() if value.device.type == "cpu" else value.cpu().numpy()


# --- what is sent, and the base ---------------------------------------------------------------------------------


def own_names(model: nn.Module) -> frozenset[str]:
    """Return the names of the trained parameters and buffers that stay at their client; most models have none."""
    return getattr(model, OWN, frozenset())


def own_state(model: nn.Module) -> dict[str, Tensor]:
    """Return what is trained and stays at its client, by name, without copies."""
    own = own_names(model)
    return {name: value for name, value in trained_state(model).items() if name in own} if own else {}


def sent_state(model: nn.Module) -> dict[str, Any]:
    """Return what is sent, by name, without copies: what is trained, without what stays at its client."""
    own = own_names(model)
    return {name: value for name, value in trained_state(model).items() if name not in own}


def trained_state(model: nn.Module) -> dict[str, Any]:
    """Return what is trained, by name, without copies: the model's state dictionary without its base."""
    modules = dict(model.named_modules(remove_duplicate=False))  # tied weights have several names
    kinds = {path: _trained(modules, path) for path in modules}

    def is_trained(name: str) -> bool:
        """Return whether an entry of the state dictionary is trained."""
        path, _, own = name.rpartition(".")
        while path not in modules:  # of packed weights, which add entries under a parameter's name
            path, _, own = path.rpartition(".")
        parameter = modules[path]._parameters.get(own)  # pyright: ignore[reportPrivateUsage]
        return kinds[path] if parameter is None else parameter.requires_grad

    return {name: value for name, value in model.state_dict().items() if is_trained(name)}


def _trained(modules: Mapping[str, nn.Module], path: str) -> bool:
    """Return whether a module's buffers belong to what is trained.

    They do if it has a trainable parameter of its own. A module without parameters says so itself, by the attribute
    that torch's normalisations have, `track_running_stats`: buffers of a packed or constant base look the same, and
    noise would spoil these. Buffers of a trained parameter's parametrisation go with that parameter. A module with a
    frozen parameter and no trained one is a part of the base, whatever its attribute.
    """
    module = modules[path]
    own = [parameter.requires_grad for parameter in module.parameters(recurse=False)]
    above = modules[path.rpartition(".")[0]]
    if path and isinstance(above, ParametrizationList):
        return any(parameter.requires_grad for parameter in above.parameters(recurse=False))
    return (any(own) or not own) and bool(getattr(module, "track_running_stats", any(own)))


def base_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's base by name: frozen parameters, and the buffers of modules that do not train.

    It is equal at all clients and in every model of the task, so it is in no message and in no sum.
    """
    parameters = model.named_parameters(remove_duplicate=False)
    tensors = chain(parameters, model.named_buffers(remove_duplicate=False))
    state, trained = model.state_dict().keys(), trained_state(model).keys()
    return {name: value for name, value in tensors if name in state and name not in trained}


def copy_with_base(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose base has the memory of the original's; it must not be changed in either.

    Tensors of other libraries, such as packed weights, and what is not in the state dictionary are copied.
    """
    memo: dict[int, Any] = {}
    for value in base_of(model).values():
        if type(value) is nn.Parameter:
            memo[id(value)] = nn.Parameter(value.detach(), requires_grad=False)
        elif type(value) is Tensor:
            memo[id(value)] = value.detach()
    return copy.deepcopy(model, memo)


def holds_arrays(model: nn.Module, arrays: Mapping[str, NDArray[np.generic]]) -> bool:
    """Return whether a checkpoint's or released model's arrays have the names, shapes and types that the model sends.

    Buffers of its base may be among them, since earlier versions sent these as well.
    """
    buffers_of_base = dict(model.named_buffers()).keys() & base_of(model).keys()
    expected = {name: (value.shape, value.dtype) for name, value in read_arrays(model).items()}
    forms = {
        name: (value.shape, value.dtype) for name, value in arrays.items() if name not in buffers_of_base
    }
    return forms == expected


def base_check(model: nn.Module) -> Callable[[], None]:
    """Return a function that refuses a base that differs from the present one.

    A base that a client's training changed holds information on its data, which no release covers. A tensor of over
    `COPIED` numbers, or of another library, is compared by its count of changes: copies would double the memory.
    """
    base = base_of(model)
    copies = {name: value.detach().clone() for name, value in base.items() if _is_small(value)}
    versions = {name: value._version for name, value in base.items()}
    layers = [*model.modules()]
    # `base` keeps its tensors alive, so no other has the id of one.
    forms = [_form(layer) for layer in layers]

    def require() -> None:
        is_same = not base or forms == [_form(layer) for layer in layers]
        present = base if is_same else base_of(model)
        for name, value in base.items():
            now = present.get(name)
            if name in copies:
                unchanged = now is not None and _equal(now, copies[name])
            else:
                unchanged = now is value and value._version == versions[name]
            if not unchanged:
                raise Refusal("model", f"{name} of the base is changed by training", BASE_REMEDY)

    return require


def _form(layer: nn.Module) -> tuple[Any, ...]:
    """Return what decides which tensors of a layer are in the base: as long as it is the same, so are they."""
    parameters = layer._parameters.items()  # pyright: ignore[reportPrivateUsage]
    transient = layer._non_persistent_buffers_set  # pyright: ignore[reportPrivateUsage]
    buffers = layer._buffers.items()  # pyright: ignore[reportPrivateUsage]
    return (
        [*layer._modules.items()],  # pyright: ignore[reportPrivateUsage]
        [(name, id(value), getattr(value, "requires_grad", None)) for name, value in parameters],
        [(name, id(value)) for name, value in buffers if name not in transient],
        getattr(layer, "track_running_stats", None),
    )


def copied_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of a model's buffers by name, without large ones of whole numbers in its base, the packed weights.

    `base_check` compares those by their count of changes, and copies would double the memory.
    """
    buffers = dict(model.named_buffers(remove_duplicate=False))
    large = {n for n, value in buffers.items() if not value.is_floating_point() and value.numel() > COPIED}
    if large:
        large &= base_of(model).keys()
    return {name: value.detach().clone() for name, value in buffers.items() if name not in large}


def _is_small(value: Tensor) -> bool:
    return value.numel() <= COPIED and type(value) in (Tensor, nn.Parameter)


def _equal(now: Tensor, before: Tensor) -> bool:
    """Return whether two tensors are equal in shape, type and values; NaN equals NaN."""
    if now.shape != before.shape or now.dtype != before.dtype:
        return False
    is_equal = torch.equal(now, before)
    if is_equal or not now.is_floating_point():
        return is_equal
    return torch.allclose(now.double(), before.double(), rtol=0, atol=0, equal_nan=True)


def check_base(task: Task, inputs: Any) -> list[str]:
    """Refuse a model whose base is changed by a pass in training mode.

    Args:
      task: creates the model.
      inputs: inputs of two examples or more.

    Returns:
      The names of floating-point buffers that are sent although the pass did not change them; noise would move these.
    """
    model = task.model().train()
    buffers = {name: value for name, value in model.named_buffers() if value.is_floating_point()}
    sent_buffers = {name: buffers[name].clone() for name in sent_state(model).keys() & buffers}
    if not sent_buffers and not base_of(model):
        return []
    require_unchanged = base_check(model)
    # Inputs on which the model fails are refused elsewhere, by a sentence of their own.
    with torch.random.fork_rng(devices=[]), torch.no_grad(), suppress(Exception):
        run_on(model, inputs)
    require_unchanged()
    return sorted(name for name, value in sent_buffers.items() if _equal(model.get_buffer(name), value))


def agreement_of(task: Task) -> str | None:
    """Return the hash of the parts that a server and its clients must share, SHA-256 in hexadecimal.

    It covers the schema of the inputs, names, shapes and types of the model's arrays, and its base; None without a schema
    and a base.
    """
    model, base = task.model(), hash_of_base(task)
    if not base and not isinstance(task, PredictingTask):
        return None
    digest = hashlib.sha256(base.encode())
    if isinstance(task, PredictingTask):
        for name, content in sorted(task.beside_the_model().items()):
            digest.update(f"{name} {len(content)}\n".encode() + content)
    for name, array in sorted(read_arrays(model).items()):
        digest.update(f"{name} {array.shape} {array.dtype}\n".encode())
    return digest.hexdigest()


def hash_of_base(task: Task) -> str:
    """Return the SHA-256 of a task's base in hexadecimal: names, shapes, types and values; empty without a base."""
    model = task.model()
    if not base_of(model):
        return ""
    digest, trained = hashlib.sha256(), trained_state(model).keys()
    for name, value in sorted(model.state_dict().items()):
        if name in trained or not isinstance(value, Tensor):
            continue
        tensor = value
        if type(value) not in (Tensor, nn.Parameter) and value.is_floating_point():
            tensor = value.dequantize()  # packed weights of another library
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def dimension_of(task: Task) -> int:
    """Return the number of an update's coordinates, the model's floating-point numbers; refuse what cannot be sent."""
    dimension = 0
    for name, each in sent_state(task.model()).items():
        if not isinstance(each, Tensor) or is_lazy(each):
            what = f"{name} of type {type(each).__name__}"
            raise Refusal("model", what, "is no array and cannot travel; keep it out of the state dictionary")
        if each.dtype == torch.bfloat16:
            remedy = "cannot travel; make it float32, and let engine.dtype=bfloat16 compute"
            raise Refusal("model", f"{name} in bfloat16", remedy)
        dimension += each.numel() if each.is_floating_point() else 0
    return dimension


def memory_of(model: nn.Module) -> Callable[[], None]:
    """Return a function that restores the model's present state besides its arrays.

    These are parameters and buffers that stay at their client, buffers that are not persistent, and attributes of its
    layers that are numbers, texts, tensors or containers of them. Attributes that were created since are removed. Otherwise a layer could carry information about
    its inputs there from one client to the next. Objects of other kinds are not changed.
    """
    snapshots: list[_Snapshot] = []
    own = {name: value.clone() for name, value in own_state(model).items()}
    for module in model.modules():
        buffers: dict[str, Any] = module._buffers  # pyright: ignore[reportPrivateUsage]
        attributes = vars(module)
        not_persistent: set[str] = module._non_persistent_buffers_set  # pyright: ignore[reportPrivateUsage]
        plain = [n for n, value in attributes.items() if n not in _OF_EVERY_MODULE and _is_plain(value)]
        snapshots += [_Snapshot.of(buffers, not_persistent), _Snapshot.of(attributes, plain)]

    def put_back() -> None:
        for snapshot in snapshots:
            snapshot.restore()
        for name, value in own_state(model).items():
            value.copy_(own[name])

    return put_back


@dataclass(frozen=True)
class _Snapshot:
    """Some values of a layer's dictionary of attributes or buffers at one time.

    Attributes:
      target: the dictionary, which training changes in place.
      names: all its names at that time.
      values: copies of the values to restore.
    """

    target: dict[str, Any]
    names: frozenset[str]
    values: dict[str, Any]

    @classmethod
    def of(cls, target: dict[str, Any], restored: Iterable[str]) -> _Snapshot:
        return cls(target, frozenset(target), {name: _copied(target[name]) for name in restored})

    def restore(self) -> None:
        """Put the copies back, and remove names that were added since."""
        for name in self.target.keys() - self.names:
            del self.target[name]
        for name, value in self.values.items():
            self.target[name] = _copied(value)


def _copied(value: Any) -> Any:
    """Return a copy of a mutable value; a computed tensor, which each call of the layer computes anew, as it is."""
    computed = isinstance(value, torch.Tensor) and not value.is_leaf
    return value if computed or isinstance(value, _IMMUTABLE) else copy.deepcopy(value)


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_IMMUTABLE = (int, float, str, bytes, NoneType)


def _is_plain(value: object) -> bool:
    """Return whether `memory_of` restores a value: a number, a text, a tensor, an array, or a container of them."""
    if isinstance(value, list | tuple | set):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return isinstance(value, (*_IMMUTABLE, torch.Tensor, np.ndarray)) and not isinstance(value, nn.Parameter)
