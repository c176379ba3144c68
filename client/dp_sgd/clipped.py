"""Clipped sums on the parameters of a model: norms of examples' gradients, and sums under `summed_grad`."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor

from .example_gradients import norms_of
from .sketched import SketchedOptimizer


def norms(optimizer: DPOptimizer, samples: Sequence[Tensor]) -> Tensor:
    """Return the norm of each example's gradient or, under compression, of its compressed values, shape (B,), float64.

    `samples` are the examples' gradients of each parameter, shapes (B, ...).
    """
    if isinstance(optimizer, SketchedOptimizer):
        return optimizer.norms(samples)
    return torch.linalg.vector_norm(torch.stack([norms_of(each) for each in samples]).double(), dim=0)


def write_sums(parameters: Sequence[Any], sums: Iterable[Tensor]) -> None:
    for parameter, each in zip(parameters, sums, strict=True):
        parameter.summed_grad = each
