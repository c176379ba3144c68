"""SGD without record-level privacy, in the one model of a process and with as few copies as possible."""

# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false
# torch's optimisers make the same calls; there is no public name for them.

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ...configs.local_training import LocalTraining
from ...tasks.protocol import Examples, Task
from .batches import shuffled_batches


def train(
    model: nn.Module, task: Task, examples: Examples, training: LocalTraining, client: int, key: int
) -> float:
    """Train the model in place and return the mean loss of its steps, each before the step was taken.

    Args:
      model: in the state that the server sent.
      task: gives the loss.
      examples: the client's own.
      training: learning rate, epochs, batch size and weight of FedProx's pull.
      client: number of the client; with `key` it decides the order of the examples.
      key: of the round.
    """
    if not model.training:
        model.train()
    parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    kernels = examples.inputs.dim() == 4 and any(p.dim() == 4 for p in parameters)
    layout = torch.channels_last if kernels else torch.contiguous_format
    start = [p.detach().clone() for p in parameters] if training.proximal_mu else []
    losses: list[float] = []
    for batch in shuffled_batches(
        len(examples), training.batch_size, training.local_epochs, clients=[client], key=key
    ):
        index = torch.from_numpy(batch[0])
        inputs = examples.inputs[index].contiguous(memory_format=layout)
        loss = task.loss(model(inputs), examples.targets[index])
        gradients = _gradients(loss, parameters)
        with torch.no_grad():
            descend(parameters, gradients, start, training)
        losses.append(loss.item())
    return math.fsum(losses) / len(losses)


def _gradients(loss: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the gradients, zeros where the loss does not depend on a parameter."""
    # torch's own `materialize_grads` takes as long as a small layer.
    found = cast(Sequence[Tensor | None], torch.autograd.grad(loss, parameters, allow_unused=True))
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]


def descend(
    values: Sequence[Tensor], gradients: Sequence[Tensor], start: Sequence[Tensor], training: LocalTraining
) -> None:
    """Take one step in place.

    Args:
      values: the parameters, each with a leading dimension for clients where several are trained at once.
      gradients: of the same shapes.
      start: the parameters as the server sent them, towards which FedProx pulls; otherwise unused.
      training: learning rate and weight of that pull.
    """
    if training.proximal_mu:
        pulls = zip(gradients, values, start, strict=True)
        gradients = [g.add(p - origin, alpha=training.proximal_mu) for g, p, origin in pulls]
    torch._foreach_add_(list(values), list(gradients), alpha=-training.learning_rate)


def with_fast_kernels(model: nn.Module) -> nn.Module:
    """Return the model with its kernels in channels-last layout, in which a CPU convolves up to twice as fast.

    Results differ by float rounding only.
    """
    for kernel in model.parameters():
        if kernel.dim() == 4:
            # `to`, since `contiguous` leaves a kernel of one input channel as it is, and the convolution follows it.
            kernel.data = kernel.data.to(memory_format=torch.channels_last)
    return model
