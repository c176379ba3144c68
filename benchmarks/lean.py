"""Floor of the comparison: local training in a plain PyTorch loop, one model in place, no messages, no engine, no exact noise."""

# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false

from __future__ import annotations

import torch
from torch import Tensor, nn

from .stopwatch import Stopwatch
from .workload import BATCH_SIZE, CLIPPING_NORM, LEARNING_RATE, NOISE_MULTIPLIER, Size, build, examples_of


def run_lean(
    workload: str, size: Size, watch: Stopwatch, channels_last: bool, device: torch.device | None = None
) -> None:
    """Train, clip in float32, add, add Gaussian noise of torch's generator, move the model; once for each round.

    Args:
      workload: a key of `workload.MODELS`.
      size: how many clients and rounds.
      watch: notes when rounds end.
      channels_last: lay images out in memory with the channels last.
      device: on which the model trains; None: the processor.
    """
    torch.set_num_threads(1)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = build(workload).to(device)
    if channels_last:
        model = model.to(memory_format=layout)  # type: ignore[call-overload]
    parameters: list[Tensor] = [each for each in model.parameters() if each.requires_grad]
    start = [p.detach().clone() for p in parameters]
    for number in range(size.rounds + 1):
        total = [torch.zeros_like(p) for p in start]
        for position in range(size.cohort):
            client = (number * size.cohort + position) % size.clients
            with torch.no_grad():
                torch._foreach_copy_(parameters, start)
            inputs, targets = (each.to(device) for each in examples_of(workload, client))
            _train(model, parameters, inputs, targets, layout)
            _add_clipped(total, parameters, start)
        with torch.no_grad():
            for value, moved in zip(start, total, strict=True):
                moved.add_(torch.randn_like(moved), alpha=NOISE_MULTIPLIER * CLIPPING_NORM)
                value.add_(moved, alpha=1 / size.cohort)
        watch.lap()


def _train(
    model: nn.Module, parameters: list[Tensor], inputs: Tensor, targets: Tensor, layout: torch.memory_format
) -> None:
    order = torch.randperm(len(inputs))
    for first in range(0, len(inputs), BATCH_SIZE):
        index = order[first : first + BATCH_SIZE]
        outputs = model(inputs[index].contiguous(memory_format=layout))
        gradients = torch.autograd.grad(nn.functional.cross_entropy(outputs, targets[index]), parameters)
        with torch.no_grad():
            torch._foreach_add_(parameters, gradients, alpha=-LEARNING_RATE)


def _add_clipped(total: list[Tensor], parameters: list[Tensor], start: list[Tensor]) -> None:
    with torch.no_grad():
        torch._foreach_sub_(parameters, start)
        norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(parameters))))
        torch._foreach_add_(total, parameters, alpha=min(1.0, CLIPPING_NORM / max(norm, 1e-12)))
