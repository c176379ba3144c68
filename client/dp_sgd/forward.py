"""Forward pass of some rows of a client's data, from which an engine of DP-SGD takes gradients."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...base.refusal import Refusal
from ...tasks.data import Batches, laid_out, mapped, padded, run_on
from ...tasks.protocol import Objective

if TYPE_CHECKING:
    from ...tasks.data import Inputs

DIFFERENCE = 1e-3  # relative difference of gradients that rounding to float32 does not reach


class TaskFailed(Exception):
    """Failure of a task's own code on examples: an engine's caller leaves out the one at fault, as the failure would reveal it."""


@dataclass(frozen=True, eq=False)
class Forward:
    """Forward pass, which raises `TaskFailed` for what may depend on the examples.

    Attributes:
      model: its layers.
      task: gives the loss, a mean over a batch.
      data: the client's own.
      layout: memory format of images.
      layers: all layers of the model, listed once: a walk takes as long as a small layer.
    """

    model: nn.Module
    task: Objective
    data: Batches
    layout: torch.memory_format
    layers: Sequence[Any]

    def __call__(self, rows: Tensor, count: int) -> tuple[Any, Tensor]:
        """Return outputs and mean loss of the rows, padded to `count`."""
        return self.of(*self.read(rows, count))

    def read(self, rows: Tensor, count: int) -> tuple[Any, Any]:
        """Return inputs and targets of the rows, padded to `count`."""
        _forget_call(self.layers)
        try:
            return padded(self.data.batch(rows), count)
        except Exception as error:  # a refusal too: it may be due to the form of one record
            raise TaskFailed from error

    def of(self, inputs: Any, targets: Any) -> tuple[Any, Tensor]:
        """Return outputs and mean loss of a batch."""
        try:
            outputs = run_on(self.model, laid_out(inputs, self.layout))
            loss = self.task.loss(outputs, targets)
            if not loss.requires_grad:
                raise ValueError("the loss of these examples is constant")
            return outputs, loss
        except (Refusal, NotImplementedError):  # caused by the model, for any examples
            raise
        except Exception as error:
            raise TaskFailed from error


def _forget_call(layers: Sequence[Any]) -> None:
    """Delete the state that a failed forward pass left in Opacus' hooks, which would wait for its backward pass."""
    for layer in layers:
        vars(layer).pop("activations", None)
        vars(layer).pop("max_batch_len", None)
        for parameter in layer._parameters.values():
            if hasattr(parameter, "_forward_counter"):
                parameter._forward_counter = 0
                vars(parameter).pop("_current_grad_sample", None)


@contextmanager
def moved_from_zero(model: nn.Module, batch: Inputs) -> Generator[Inputs]:
    """Yield inputs for a trial of an engine, with weights and inputs moved from zero, where a gradient may be zero by chance.

    The model's weights and the random state are restored after it.
    """
    with ExitStack() as after, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        parameters: list[Any] = [p for p in model.parameters() if p.requires_grad]
        for p in parameters:
            after.callback(setattr, p, "data", p.data)
            p.data = p.data + torch.randn(p.shape).to(p) / 100
        yield mapped(lambda each: each + torch.rand(each.shape).to(each), batch)


def are_close(gradients: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Return whether gradients of the same parameters are equal but for rounding."""
    pairs = zip(gradients, others, strict=True)
    lengths, differences = torch.tensor([(float(b.norm()), float((a - b).norm())) for a, b in pairs]).T
    return bool((differences <= DIFFERENCE * (lengths + DIFFERENCE * lengths.norm())).all())
