"""Engines of DP-SGD that give each example a pass of its own: one after the other, or all at once by torch's vmap."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...tasks.batch_memory import outputs_of
from ...tasks.data import leaves, mapped
from ..training.sgd import gradients_of
from .clipped import ClippedParameters, ClippedSums
from .forward import Forward, are_close, moved_from_zero

if TYPE_CHECKING:
    from ...tasks.data import Inputs

SLOW = "There is a performance drop"  # warning of a kernel that vmap repeats in a loop, slower than passes one by one


@contextmanager
def one_by_one(model: nn.Module, forward: Forward, clipped: ClippedParameters) -> Generator[ClippedSums]:
    """Yield the function that computes clipped sums by one pass for each example, for any model; arguments as of `hooks`."""
    del model
    parameters = clipped.params

    def clipped_sums(rows: Tensor, batch: int) -> Tensor:
        del batch
        sums = clipped.zeros()
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


@contextmanager
def by_vmap(model: nn.Module, forward: Forward, clipped: ClippedParameters) -> Generator[ClippedSums]:
    """Yield the function that computes clipped sums by one pass that torch repeats for all examples at once.

    It holds all examples' gradients. Examples whose loss vmap cannot repeat are taken one by one.

    Arguments as of `hooks`; the model is one that `repeats` accepts.
    """
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    names = [name_of[id(parameter)] for parameter in clipped.params]
    samples_of = _gradients_by(model, lambda inputs, targets: forward.of(inputs, targets)[1].reshape(()))

    with one_by_one(model, forward, clipped) as alone, warnings.catch_warnings():
        warnings.filterwarnings("ignore", SLOW)  # of a kernel that only the loss calls

        def clipped_sums(rows: Tensor, batch: int) -> Tensor:
            inputs, targets = forward.read(rows, batch)
            values = {name: p.detach() for name, p in zip(names, clipped.params, strict=True)}
            samples: dict[str, Tensor] = {}
            with suppress(Exception):  # of an example, of its loss or of vmap: passes one by one tell
                samples = samples_of(values, inputs, targets)
            if not samples:
                return alone(rows, batch)
            # A gradient in which the examples agree is one in memory.
            return clipped.take([samples[name].contiguous() for name in names], len(rows))

        yield clipped_sums


class _Loss(nn.Module):
    """Loss of one example, with the parameters of a model."""

    def __init__(self, model: nn.Module, loss: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, inputs: Any, targets: Any) -> Tensor:
        return self.loss(*(mapped(lambda each: each.unsqueeze(0), tree) for tree in (inputs, targets)))


def _gradients_by(model: nn.Module, loss: Callable[[Any, Any], Tensor]) -> Callable[..., dict[str, Tensor]]:
    """Return the function of each example's gradients, by the name of a parameter, shapes (B, ...).

    It takes the trained parameters by name, inputs and targets of a batch. A layer's random draws differ between examples.
    """
    module = _Loss(model, loss)

    def loss_of(values: dict[str, Tensor], inputs: Any, targets: Any) -> Tensor:
        renamed = {f"model.{name}": value for name, value in values.items()}
        return functional_call(module, renamed, (inputs, targets))

    repeated = vmap(grad(loss_of), in_dims=(None, 0, 0), randomness="different")

    def gradients(values: dict[str, Tensor], inputs: Any, targets: Any) -> dict[str, Tensor]:
        with sdpa_kernel(
            SDPBackend.MATH
        ):  # made of products, which vmap batches; it repeats others in a loop
            return repeated(values, inputs, targets)

    return gradients


def repeats(model: nn.Module, batch: Inputs) -> bool:
    """Return whether vmap can repeat a pass of the model for each example of a batch, and finds each whole gradient.

    It cannot repeat each kernel, and a parameter is not replaced where the model reads it from elsewhere than a layer.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    count = len(leaves(batch)[0])

    def squares(inputs: Inputs, targets: Any = None) -> Tensor:
        del targets
        return torch.stack([each.float().square().sum() for each in outputs_of(model, inputs)]).sum()

    # Whatever the model's code or torch raises, another engine is chosen.
    with suppress(Exception), ExitStack() as after, moved_from_zero(model, batch) as inputs:
        after.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("error", SLOW)
        values = {name: p.detach() for name, p in parameters.items()}
        samples_of = _gradients_by(model, squares)
        if any(len(each) != count for each in samples_of(values, inputs, inputs).values()):
            return False
        after.callback(model.train)
        model.eval()  # each pass would draw its own dropout
        sums = [each.sum(0) for each in samples_of(values, inputs, inputs).values()]
        return are_close(sums, gradients_of(squares(inputs), list(parameters.values())))
    return False
