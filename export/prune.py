"""Pruning of a released model: whole channels, which are cut out, or single weights, which become zero.

It looks at the model's values alone, so it is post-processing of what was released.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import prune

from ..base.refusal import Refusal

What = Literal["channels", "weights"]
OPTION, WEIGHTS = "--prune", "weights:"
PREFIXES: Mapping[What, str] = {"channels": "", "weights": WEIGHTS}
# Modules and functions that treat each channel alone and alike: what they give for one does not depend on the others.
ALONE: tuple[type[nn.Module], ...] = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish),
    *(nn.Tanh, nn.Sigmoid, nn.Hardtanh, nn.Softplus, nn.Identity, nn.Dropout, nn.Dropout2d),
)
POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
DIMENSIONS: Mapping[type[nn.Module], str] = {nn.Linear: "features", nn.Conv2d: "channels"}
FUNCTIONS = {
    *(
        "tanh",
        "relu",
        "sigmoid",
        "gelu",
        "silu",
        "elu",
        "selu",
        "leaky_relu",
        "softplus",
        "dropout",
        "hardtanh",
    )
}


@dataclass(frozen=True)
class Pruning:
    """How much of a model is removed.

    Attributes:
      share: of the channels of each layer that can be cut, or of all weights, in [0, 1); 0 leaves the model whole.
      what: channels are cut out; weights become zero.
    """

    share: float = 0.0
    what: What = "channels"

    def __str__(self) -> str:
        return f"{PREFIXES[self.what]}{self.share:g}"


NO_PRUNING = Pruning()


@dataclass(frozen=True)
class Cut:
    """A layer whose outputs only one other layer reads.

    Attributes:
      layer: name of the Linear or Conv2d layer.
      norms: names of the batch normalisations between both.
      reader: name of the Linear or Conv2d layer that reads them.
    """

    layer: str
    norms: tuple[str, ...]
    reader: str


def pruning_of(text: str) -> Pruning:
    """Return the pruning that `SHARE` or `weights:SHARE` names; refuse another word, and a share outside (0, 1)."""
    what: What = "channels"
    if text.startswith(WEIGHTS):
        what = "weights"
    with suppress(ValueError):
        pruning = Pruning(float(text.removeprefix(WEIGHTS)), what)
        if 0 < pruning.share < 1:
            return pruning
    raise Refusal(OPTION, text, "give a share of the channels, such as 0.5, or of the weights: weights:0.5")


def pruned(model: nn.Module, pruning: Pruning) -> tuple[nn.Module, dict[str, Any]]:
    """Return a pruned copy of a model, in evaluation mode, and the entry of its card.

    Single weights stay zero while the copy is trained, until `settle` writes the zeros into its parameters.

    Raises:
      Refusal: no layer of the model can be cut.
    """
    result = copy.deepcopy(model).eval()
    entry: dict[str, Any] = {"what": pruning.what, "share": pruning.share}
    if pruning.what == "weights":
        return result, {**entry, "zeros": _zero_weights(result, pruning.share)}
    cuts = cuts_of(result)
    sizes = {cut.layer: cut_out(result, cut, pruning.share) for cut in cuts}
    layers = {name: size for name, size in sizes.items() if size[1] < size[0]}
    if not layers:
        remedy = f"{type(model).__name__} has no layer whose channels only one other layer reads; give {WEIGHTS}{pruning}"
        raise Refusal(OPTION, str(pruning), remedy)
    return result, {**entry, "layers": layers}


def settle(model: nn.Module) -> None:
    """Write the zeros of single weights into the parameters of a pruned model."""
    for module in model.modules():
        for name in [each.removesuffix("_mask") for each, _ in module.named_buffers(recurse=False)]:
            if hasattr(module, f"{name}_orig"):
                prune.remove(module, name)


# --- single weights -------------------------------------------------------------------------------------------------


def _zero_weights(model: nn.Module, share: float) -> float:
    """Set the smallest weights of all matrices and kernels to zero; return the share of all parameters that are zero."""
    matrices = [
        (module, name)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() > 1 and parameter.is_floating_point()
    ]
    if not matrices:
        raise Refusal(OPTION, f"{WEIGHTS}{share:g}", f"{type(model).__name__} has no matrix of weights")
    prune.global_unstructured(matrices, prune.L1Unstructured, amount=share)
    zeros = sum(int((getattr(module, name) == 0).sum()) for module, name in matrices)
    return zeros / sum(each.numel() for each in model.parameters())


# --- channels -------------------------------------------------------------------------------------------------------


def cuts_of(model: nn.Module) -> list[Cut]:
    """Return the layers of a model that can be cut, in the order of its operations; refuse one that cannot be traced."""
    try:
        graph: Any = fx.symbolic_trace(model).graph
    except Exception as error:  # noqa: BLE001 (any code of a model may fail on stand-ins for tensors)
        remedy = (
            f"{type(model).__name__} cannot be traced ({str(error).splitlines()[0]}); give {WEIGHTS}SHARE"
        )
        raise Refusal(OPTION, "channels", remedy) from None
    modules = dict(model.named_modules())
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    holders = Counter(id(each) for module in modules.values() for each in module.parameters(recurse=False))
    single = {
        name: module
        for name, module in modules.items()
        if calls[name] == 1 and all(holders[id(each)] == 1 for each in module.parameters(recurse=False))
    }
    layers = [node for node in graph.nodes if _is_layer(node, single)]
    return [cut for cut in (_cut_of(node, single) for node in layers) if cut]


def _is_layer(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Return whether an operation is a Linear or Conv2d layer of `modules`."""
    module = _module(node, modules)
    return type(module) is nn.Linear or (type(module) is nn.Conv2d and module.groups == 1)


def _cut_of(node: fx.Node, modules: Mapping[str, nn.Module]) -> Cut | None:
    """Return the cut of a layer; None unless each of its channels goes on alone to one other layer.

    Args:
      node: operation of the layer.
      modules: by name, those that are called once and share no parameter.
    """
    name, norms, is_flat = str(node.target), list[str](), False
    layer = cast("nn.Linear | nn.Conv2d", modules[name])
    while len(node.users) == 1:
        (node,) = node.users
        if _is_layer(node, modules):
            reader = cast("nn.Linear | nn.Conv2d", modules[str(node.target)])
            return Cut(name, tuple(norms), str(node.target)) if _reads(reader, layer, is_flat) else None
        if _flattens(node, modules) and isinstance(layer, nn.Conv2d):
            is_flat = True
        elif _is_norm(node, modules, len(layer.weight)):
            norms.append(str(node.target))
        elif not _is_alone(node, modules, is_flat):
            return None
    return None


def _reads(reader: nn.Linear | nn.Conv2d, layer: nn.Linear | nn.Conv2d, is_flat: bool) -> bool:
    """Return whether the channels of a layer are those of its reader, each several inputs of it if `is_flat`."""
    if is_flat:
        return isinstance(reader, nn.Linear) and reader.in_features % len(layer.weight) == 0
    return type(reader) is type(layer) and reader.weight.shape[1] == len(layer.weight)


def _flattens(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Return whether an operation flattens all dimensions but the first."""
    module = _module(node, modules)
    if isinstance(module, nn.Flatten):
        return (module.start_dim, module.end_dim) == (1, -1)
    return _function(node) == "flatten" and node.args[1:] == (1,) and not node.kwargs


def _is_norm(node: fx.Node, modules: Mapping[str, nn.Module], channels: int) -> bool:
    """Return whether an operation is a batch normalisation of so many channels."""
    module = _module(node, modules)
    return isinstance(module, NORMS) and module.num_features == channels


def _is_alone(node: fx.Node, modules: Mapping[str, nn.Module], is_flat: bool) -> bool:
    """Return whether an operation treats each channel alone; pictures are no longer there once they are flat."""
    module = _module(node, modules)
    return (
        isinstance(module, ALONE)
        or (isinstance(module, POOLS) and not is_flat)
        or _function(node) in FUNCTIONS
    )


def _module(node: fx.Node, modules: Mapping[str, nn.Module]) -> nn.Module:
    """Return the module of an operation; an empty one if it has none of `modules`."""
    if node.op == "call_module":
        return modules.get(str(node.target), nn.Module())
    return nn.Module()


def _function(node: fx.Node) -> str:
    """Return the name of the function or method of an operation; empty if it is a module, an input or the output."""
    if node.op == "call_method":
        return str(node.target)
    if node.op == "call_function":
        return getattr(node.target, "__name__", "")
    return ""


def cut_out(model: nn.Module, cut: Cut, share: float) -> tuple[int, int]:
    """Remove a share of a layer's channels from the model, and what its reader made of them; return both numbers.

    Those go whose weights, times those by which they are read, have the least norms. One always stays.

    Args:
      model: changed in place.
      cut: of the model.
      share: of the channels, in (0, 1); rounded down.
    """
    layer, reader = (
        cast("nn.Linear | nn.Conv2d", model.get_submodule(each)) for each in (cut.layer, cut.reader)
    )
    norms = [cast("nn.BatchNorm1d | nn.BatchNorm2d", model.get_submodule(each)) for each in cut.norms]
    count = len(layer.weight)
    # (outputs, channels, inputs of a channel): several of a flattened picture.
    columns = reader.weight.detach().reshape(len(reader.weight), count, -1)
    scale = layer.weight.detach().flatten(1).norm(dim=1)
    for norm in norms:
        scale = torch.ones(count)
        if norm.affine:
            scale = norm.weight.detach().abs()
    order = torch.argsort(scale * columns.norm(dim=(0, 2)), descending=True, stable=True)
    channels = order[: max(1, count - int(share * count))].sort().values
    _take(layer, ("weight", "bias"), channels)
    for norm in norms:
        _take(norm, ("weight", "bias", "running_mean", "running_var"), channels)
        norm.num_features = len(channels)
    shape = (len(reader.weight), -1, *reader.weight.shape[2:])
    reader.weight = nn.Parameter(columns[:, channels].reshape(shape).clone(), reader.weight.requires_grad)
    setattr(layer, f"out_{DIMENSIONS[type(layer)]}", len(channels))
    setattr(reader, f"in_{DIMENSIONS[type(reader)]}", reader.weight.shape[1])
    return count, len(channels)


def _take(module: nn.Module, names: Sequence[str], channels: Tensor) -> None:
    """Leave the entries of these channels in the tensors of a module, as far as it has them."""
    for name in names:
        tensor = getattr(module, name)
        if isinstance(tensor, nn.Parameter):
            setattr(module, name, nn.Parameter(tensor.detach()[channels].clone(), tensor.requires_grad))
        elif isinstance(tensor, Tensor):
            setattr(module, name, tensor[channels].clone())
