"""Exchange between the two halves of a protected job: the sum's parameters, and what a reply contains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...privacy.mechanisms.sum_spec import SumSpec, cells_for

VECTOR = "fedveil.vector"  # the one array of a reply
SPEC = "fedveil.spec"  # the one entry of its meta: clipping norm and cells
PLAIN = (bool, int, float, str, type(None))  # values of a model that are no arrays, and are not averaged

Layout = dict[str, tuple[int, ...]]
Model = Mapping[str, Any]


def float_arrays(model: Model) -> dict[str, NDArray[np.floating]]:
    """Return the arrays of a model that are averaged, by name: all floating-point ones, in the model's order.

    Raises:
      TypeError: a value is neither an array of NumPy nor a plain value.
      ValueError: no array is averaged.
    """
    for name, value in model.items():
        if not isinstance(value, (np.ndarray, *PLAIN)):
            raise TypeError(f"{name} is a {type(value).__name__}, not an array of NumPy")
    arrays = {k: v for k, v in model.items() if isinstance(v, np.ndarray) and v.dtype.kind == "f"}
    if not arrays:
        raise ValueError("the model has no floating-point array")
    return arrays


def layout_of(model: Model) -> Layout:
    """Return the shapes of the arrays that are averaged, by name."""
    return {name: array.shape for name, array in float_arrays(model).items()}


def spec_of(clipping_norm: float, layout: Layout) -> SumSpec:
    """Return the public parameters of a sum of updates, which both halves derive from the model."""
    return SumSpec(clipping_norm, cells=cells_for(sum(map(math.prod, layout.values()))))


def terms_of(spec: SumSpec) -> list[float]:
    """Return what a reply says of the parameters with which its vector was made."""
    return [float(spec.step), float(spec.cells)]
