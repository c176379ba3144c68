"""Arrays of a model that travel: its trainable parameters and its buffers, read, and loaded in place."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .protocol import Task


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


def read_arrays(model: nn.Module) -> dict[str, NDArray[np.generic]]:
    """Return copies of the model's trainable parameters and its buffers, by name.

    A frozen parameter is the same in every model that the task makes, and does not travel.
    """
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    kept = (item for item in model.state_dict().items() if item[0] not in frozen)
    return {name: value.detach().numpy().copy() for name, value in kept}


def dimension_of(task: Task) -> int:
    """Return the number of coordinates of an update: those of the model's floating-point arrays."""
    return sum(value.size for value in read_arrays(task.model()).values() if value.dtype.kind == "f")
