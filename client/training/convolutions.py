"""Convolutional networks of several clients at once: their channels side by side, in groups that read one client's each.

A processor convolves few channels at a fraction of its speed, and more of them faster, as long as what a step computes
stays in its caches: hence stacks of few clients, and of networks with few channels alone.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Layers = list[tuple[str, nn.Module]]  # each with the prefix of its parameters' names

ELEMENTWISE = (nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU)
POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
MAX_PARAMETERS = 200_000  # above it, stacked parameters exceed the caches
CACHED = 1 << 18  # numbers in the largest tensor of a stack's step


def convolutional(model: nn.Module) -> Layers:
    """Return the layers of a network of convolutions, then linear layers, that can be stacked; none for any other model."""
    if type(model) is not nn.Sequential or not torch.backends.mkldnn.is_available():
        return []
    layers = list(_leaves(model, ""))
    flat = [number for number, (_, layer) in enumerate(layers) if type(layer) is nn.Flatten]
    once = len({id(layer) for _, layer in layers}) == len(layers)
    few = sum(p.numel() for p in model.parameters()) <= MAX_PARAMETERS
    if len(flat) != 1 or not (once and few and any(type(each) is nn.Conv2d for _, each in layers)):
        return []
    images, numbers = layers[: flat[0]], layers[flat[0] :]
    if all(_of_images(each) for _, each in images) and all(_of_numbers(each) for _, each in numbers):
        return layers
    return []


def _leaves(model: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers of nested sequences in their order, with the prefixes of their parameters' names."""
    for name, layer in model._modules.items():  # pyright: ignore[reportPrivateUsage] (which names a layer at each use)
        if type(layer) is nn.Sequential:
            yield from _leaves(layer, f"{prefix}{name}.")
        elif isinstance(layer, nn.Module):
            yield f"{prefix}{name}.", layer


def _of_images(layer: nn.Module) -> bool:
    """Return whether a layer treats each image alone and has a form in groups of channels."""
    if isinstance(layer, nn.MaxPool2d) and layer.return_indices:
        return False
    if type(layer) is nn.Conv2d:
        return layer.padding_mode == "zeros"
    return type(layer) in (*ELEMENTWISE, *POOLS, nn.GroupNorm)


def _of_numbers(layer: nn.Module) -> bool:
    """Return whether a layer flattens images, or treats each row of numbers alone."""
    if isinstance(layer, nn.Flatten):
        return (layer.start_dim, layer.end_dim) == (1, -1)
    return type(layer) in (*ELEMENTWISE, nn.Linear)


def most_clients(layers: Layers, example: Tensor, rows: int) -> int:
    """Return how many clients' steps of so many rows pay in one stack; at most 1 where none do.

    Args:
      layers: as `convolutional` returns them.
      example: inputs of one example, shape (1, channels, height, width).
      rows: of each client's step.
    """
    largest, values = example.numel(), example
    with torch.no_grad():
        for _, layer in layers:
            values = layer(values)
            largest = max(largest, values.numel())
    return CACHED // (largest * rows)


def forward_images(layers: Layers, weights: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    """Return the outputs of all clients' networks, shape (clients, n, ...).

    Args:
      layers: as `convolutional` returns them.
      weights: of the layers, shape (clients, ...).
      inputs: shape (clients, n, channels, height, width).
    """
    clients = len(inputs)
    values = _channels_last(inputs.transpose(0, 1).flatten(1, 2))
    for name, layer in layers:
        own = {part: weights[f"{name}{part}"] for part, _ in layer.named_parameters()}
        flat: dict[str, Any] = {part: value.flatten(0, 1) for part, value in own.items()}
        if isinstance(layer, nn.Conv2d):
            flat["weight"] = _channels_last(flat["weight"])
            padding: Any = layer.padding
            options = (layer.stride, padding, layer.dilation, clients * layer.groups)
            values = functional.conv2d(values, flat["weight"], flat.get("bias"), *options)
        elif isinstance(layer, nn.GroupNorm):
            values = functional.group_norm(values, clients * layer.num_groups, **flat, eps=layer.eps)
        elif isinstance(layer, nn.Flatten):
            values = values.unflatten(1, (clients, -1)).flatten(2).transpose(0, 1)
        elif isinstance(layer, nn.Linear):
            weight, *bias = own.values()
            values = sum((each.unsqueeze(1) for each in bias), values @ weight.mT)
        else:
            values = layer(values)
    return values


def _channels_last(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last)
