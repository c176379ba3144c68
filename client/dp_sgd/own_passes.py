"""Engine of DP-SGD that gives each example a pass of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..training.sgd import gradients_of
from .clipped import ClippedParameters
from .forward import Forward

ClippedSums = Callable[[Tensor, int], Tensor]


@contextmanager
def one_by_one(model: nn.Module, forward: Forward, clipped: ClippedParameters) -> Generator[ClippedSums]:
    """Yield the function that computes clipped sums by one pass for each example, for any model; arguments as of `hooks`."""
    del model
    parameters = clipped.params

    def clipped_sums(rows: Tensor, batch: int) -> Tensor:
        del batch
        sums = [torch.zeros_like(parameter, requires_grad=False) for parameter in parameters]
        for row in rows.split(1):
            _, loss = forward(row, 1)
            gradients = gradients_of(loss, parameters)
            norm = float(clipped.norms([each.unsqueeze(0) for each in gradients]))
            if math.isfinite(norm):
                for total, gradient in zip(sums, gradients, strict=True):
                    total.add_(gradient, alpha=min(1.0, clipped.max_grad_norm / (norm + 1e-6)))
        clipped.write(sums)
        return torch.ones(len(rows), dtype=torch.bool)

    yield clipped_sums
