"""Local training without record-level privacy: plain SGD, one model per process, no copies it can avoid."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .tasks.protocol import Examples, Task


@dataclass(frozen=True)
class SGD:
    """How a client trains.

    Attributes:
      learning_rate: above 0.
      local_epochs: passes over the client's data, at least 1.
      batch_size: examples of a step, at least 1; the last step of an epoch takes what is left.
      proximal_mu: weight of FedProx's pull towards the global model (Li et al. 2020, arXiv:1812.06127, eq. 2).
    """

    learning_rate: float
    local_epochs: int
    batch_size: int
    proximal_mu: float = 0.0


def batches_of(
    records: int, sgd: SGD, generator: Callable[[], np.random.Generator]
) -> Iterator[NDArray[np.intp]]:
    """Yield the shuffled batches of every local epoch; one batch that holds everything is not shuffled."""
    shuffle = generator() if sgd.batch_size < records else None
    for _ in range(sgd.local_epochs):
        order = np.arange(records) if shuffle is None else shuffle.permutation(records)
        for start in range(0, records, sgd.batch_size):
            yield order[start : start + sgd.batch_size]


def load_arrays(model: nn.Module, arrays: Mapping[str, NDArray[np.generic]]) -> None:
    """Copy arrays into the model's parameters and buffers, in place."""
    own = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, value in arrays.items():
            own[name].copy_(torch.from_numpy(np.require(value, requirements=["C", "W"])))


def read_arrays(model: nn.Module) -> dict[str, NDArray[np.generic]]:
    """Return copies of the model's parameters and buffers."""
    return {name: value.detach().numpy().copy() for name, value in model.state_dict().items()}


def train(
    model: nn.Module, task: Task, examples: Examples, sgd: SGD, generator: Callable[[], np.random.Generator]
) -> float:
    """Train the model in place and return the mean loss of its steps, before each step was taken."""
    model.train()
    layout = _layout(model, examples)
    parameters = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in parameters] if sgd.proximal_mu else []
    losses: list[Tensor] = []
    for batch in batches_of(len(examples), sgd, generator):
        index = torch.from_numpy(batch)
        inputs = examples.inputs[index].contiguous(memory_format=layout)
        loss = task.loss(model(inputs), examples.targets[index])
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            if sgd.proximal_mu:
                pulls = zip(gradients, parameters, start, strict=True)
                gradients = [g.add(p - origin, alpha=sgd.proximal_mu) for g, p, origin in pulls]
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(gradient, alpha=sgd.learning_rate)
        losses.append(loss.detach())
    return float(torch.stack(losses).mean())


def _layout(model: nn.Module, examples: Examples) -> torch.memory_format:
    """Return the memory layout to train in; channels-last makes convolutions on a CPU up to twice as fast.

    The model's parameters are brought into it once; only float rounding can tell the difference.
    """
    kernels = [p for p in model.parameters() if p.dim() == 4]
    if not kernels or examples.inputs.dim() != 4:
        return torch.contiguous_format
    for kernel in kernels:
        # `to`, since `contiguous` leaves a kernel of one input channel as it is, and the convolution follows its strides.
        kernel.data = kernel.data.to(memory_format=torch.channels_last)
    return torch.channels_last
