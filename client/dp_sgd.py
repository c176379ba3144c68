"""Local training with record-level privacy: DP-SGD (Abadi et al. 2016, arXiv:1607.00133) on Opacus' hooks.

Opacus takes per-example gradients and clips them; the batches, the noise and the count of what it all reveals are
ours. Opacus' hooks attach to the model as it is (``wrap_model=False``), so parameter names stay what the server
knows, and its clipping runs in the optimiser it ships. The noise comes from a cryptographic stream.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from opacus.grad_sample import GradSampleHooks
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from ..privacy.mechanisms.gaussian import standard_normal
from ..privacy.mechanisms.randomness import Stream
from ..privacy.planning import Plan
from .batches import PoissonBatches
from .tasks.protocol import Examples, Task
from .training import SGD


class StreamNoiseOptimizer(DPOptimizer):
    """Opacus' optimiser, with noise from a cryptographic stream in place of torch's generator."""

    def __init__(self, optimizer: torch.optim.Optimizer, stream: Stream, **options: Any) -> None:
        super().__init__(optimizer, **options)
        self.stream = stream

    def add_noise(self) -> None:
        """Add N(0, (noise_multiplier * max_grad_norm)^2) to every coordinate of the clipped sum."""
        std = self.noise_multiplier * self.max_grad_norm
        parameter: Any  # Opacus keeps its sums as attributes that torch's type does not know
        for parameter in self.params:
            noise = torch.from_numpy(standard_normal(parameter.numel(), self.stream)).to(parameter.dtype)
            parameter.grad = (parameter.summed_grad + std * noise.view_as(parameter)).view_as(parameter)


def train_privately(
    model: nn.Module, task: Task, examples: Examples, sgd: SGD, plan: Plan, streams: tuple[Stream, Stream]
) -> None:
    """Train the model in place by DP-SGD; `plan.event()` accounts for all of its steps.

    Args:
      model: without batch normalisation, in the state the server sent.
      task: gives the loss, a mean over a batch.
      examples: the client's own.
      sgd: learning rate and FedProx weight; epochs and batches come from the plan.
      plan: its sampling is `PoissonBatches`, its clipping norm bounds each example's gradient.
      streams: for the batches, and for the noise.
    """
    assert isinstance(plan.sampling, PoissonBatches)
    draws, noise = streams
    expected = max(1, round(plan.sampling.sample_rate * len(examples)))
    # What a layer writes into a buffer while it trains follows the data and has no noise: it is put back.
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    hooks = GradSampleHooks(model, batch_first=True, loss_reduction="mean")
    try:
        optimizer = StreamNoiseOptimizer(
            torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=sgd.learning_rate),
            noise,
            noise_multiplier=plan.noise_std / plan.clipping_norm,
            max_grad_norm=plan.clipping_norm,
            expected_batch_size=expected,
        )
        start = [p.detach().clone() for p in optimizer.params] if sgd.proximal_mu else []
        model.train()
        with warnings.catch_warnings():
            # What torch warns about is wanted: the hooks read the outputs' gradients, and inputs need none.
            warnings.filterwarnings("ignore", "Full backward hook is firing")
            for batch in plan.sampling.draw(len(examples), draws):
                _step(model, task, examples, torch.from_numpy(batch), optimizer)
                if sgd.proximal_mu:
                    _pull(optimizer.params, start, sgd)
    finally:
        hooks.cleanup()
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])


def _step(model: nn.Module, task: Task, examples: Examples, batch: Tensor, optimizer: DPOptimizer) -> None:
    optimizer.zero_grad()
    if len(batch) == 0:
        # A step without examples still moves by noise alone: its absence would tell that the batch was empty.
        parameter: Any
        for parameter in optimizer.params:
            parameter.grad_sample = torch.zeros((0, *parameter.shape), dtype=parameter.dtype)
    else:
        task.loss(model(examples.inputs[batch]), examples.targets[batch]).backward()
    optimizer.step()


def _pull(parameters: list[nn.Parameter], start: list[Tensor], sgd: SGD) -> None:
    """Take FedProx's proximal step; it reads no data."""
    with torch.no_grad():
        for parameter, origin in zip(parameters, start, strict=True):
            parameter.add_(parameter - origin, alpha=-sgd.learning_rate * sgd.proximal_mu)
