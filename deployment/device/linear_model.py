"""Linear model of classes in NumPy: examples, probabilities, and gradients of the cross-entropy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float32]
Labels = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Table:
    """Examples with their targets.

    Attributes:
      inputs: shape (n, d).
      targets: shape (n,), at least 0.
    """

    inputs: Matrix
    targets: Labels

    def __len__(self) -> int:
        return len(self.targets)

    def only(self, rows: NDArray[Any]) -> Table:
        """Return some of the examples; `rows` are their positions, or a mask."""
        return Table(self.inputs[rows], self.targets[rows])


def gradients_of(weight: Matrix, bias: Matrix, batch: Table) -> tuple[np.float32, Matrix, Matrix]:
    """Return the mean cross-entropy on a batch and its gradients; arguments as of `train`."""
    inputs, targets = batch.inputs, batch.targets
    rows = np.arange(len(targets))
    log_probabilities = log_softmax(inputs @ weight.T + bias)
    loss = -log_probabilities[rows, targets].mean()
    # The gradient of the mean cross-entropy with respect to the outputs: (softmax - one-hot target) / batch size.
    gradient = np.exp(log_probabilities)
    gradient[rows, targets] -= 1
    gradient /= np.float32(len(targets))
    return loss, gradient.T @ inputs, gradient.sum(0)


def log_softmax(outputs: Matrix) -> Matrix:
    """Return the logarithms of the probabilities of outputs, shape (n, classes)."""
    shifted = outputs - outputs.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
