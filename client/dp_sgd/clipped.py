"""Parameters of a model on which an engine leaves clipped sums of examples' gradients, as `summed_grad`."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .example_gradients import norms_of

# Function that writes the clipped sum over some rows, padded to a number of examples, to `summed_grad` of the parameters,
# and returns whether each row's gradient is finite, shape (rows,). If one is not, the sums are not to be used.
ClippedSums = Callable[[Tensor, int], Tensor]


class ClippedParameters:
    """Trainable parameters, and the norm to which each example's gradient is clipped.

    Attributes:
      params: the parameters, in order; engines give them Opacus' attributes, `grad_sample` and `summed_grad`.
      max_grad_norm: largest L2 norm of an example's gradient.
    """

    def __init__(self, parameters: Iterable[Tensor], max_grad_norm: float) -> None:
        self.params: list[Any] = list(parameters)
        self.max_grad_norm = max_grad_norm

    def norms(self, samples: Sequence[Tensor]) -> Tensor:
        """Return the norm of each example's gradient, shape (B,), float64, given those of each parameter, shapes (B, ...)."""
        return torch.linalg.vector_norm(torch.stack([norms_of(each) for each in samples]).double(), dim=0)

    def zeros(self) -> list[Tensor]:
        """Return a sum of no examples for each parameter."""
        return [torch.zeros_like(parameter, requires_grad=False) for parameter in self.params]

    def write(self, sums: Iterable[Tensor]) -> None:
        """Leave a sum for each parameter, in their order."""
        for parameter, each in zip(self.params, sums, strict=True):
            parameter.summed_grad = each

    def take(self, samples: Sequence[Tensor], count: int) -> Tensor:
        """Leave the clipped sums of the first `count` examples, and return whether each one's gradient is finite.

        Args:
          samples: the examples' gradients of each parameter, shapes (B, ...); those of the padding are overwritten.
          count: number of examples before the padding.

        Returns:
          Shape (count,). If one is not finite, the sums are not to be used.
        """
        for each in samples:
            each[count:] = 0
        weights = (self.max_grad_norm / (self.norms(samples) + 1e-6)).clamp(max=1.0)
        self.write(torch.einsum("i,i...", weights.to(each), each) for each in samples)
        if all(bool(p.summed_grad.sum().isfinite()) for p in self.params):  # so every example's gradient is
            return torch.ones(count, dtype=torch.bool)
        finite = [each.unsqueeze(-1).flatten(1).isfinite().all(1) for each in samples]
        return torch.stack(finite).all(0)[:count]

    def clear(self) -> None:
        """Forget gradients, those of examples, and sums."""
        for parameter in self.params:
            parameter.grad = parameter.grad_sample = parameter.summed_grad = None
