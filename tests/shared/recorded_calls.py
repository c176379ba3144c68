"""Gradients of a model's parameters, from the recorded calls of its layers."""

from typing import Any

import torch
from torch import Tensor

from fedveil.client.dp_sgd.example_gradients import LayerCall


def sums_of(calls: list[LayerCall], gradients: list[Tensor], batch: int) -> dict[Any, Tensor]:
    """The gradients of the parameters, as the sums of all examples' shares."""
    sums: dict[Any, Tensor] = {}
    for call in calls:
        share = call.share_of(call.inputs, [gradients.pop(0) for _ in call.edges])
        sums |= {parameter: value.sum(0) for parameter, value in share.grad_samples.items()}
        sums |= share.sums(torch.ones(batch, dtype=torch.float64))
    return sums
