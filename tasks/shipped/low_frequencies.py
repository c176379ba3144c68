"""Small linear model of pictures: a softmax over the lowest spatial frequencies of each channel, by a cosine transform.

Coarse shapes separate most classes, so few coordinates keep most of the accuracy. The transform is given by a formula
and is not a parameter: only one linear layer is trained, sent and stored.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..classification import softmax_regression


class LowFrequencies(nn.Module):
    """Softmax over low frequencies. It starts at zero, where every class is equally likely.

    Args:
      channels: number of channels of an input, which is flat: channels x side x side.
      side: pixels of a channel along one axis.
      order: bound on the sum of the frequencies along both axes.
      classes: number of outputs.
      mix: linear combinations of the channels to transform, shape (combinations, channels); None for each channel.
    """

    rows: Tensor
    mix: Tensor | None

    def __init__(self, channels: int, side: int, order: int, classes: int, mix: Tensor | None = None) -> None:
        super().__init__()
        self.channels, self.side, self.order = channels, side, order
        self.register_buffer("rows", cosines(side, order), persistent=False)
        self.register_buffer("mix", mix, persistent=False)
        size = (channels if mix is None else len(mix)) * order * (order + 1) // 2
        self.head = softmax_regression(size, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits, shape (..., classes), for inputs of shape (..., channels x side x side)."""
        leading = inputs.shape[:-1]
        planes = inputs.reshape(*leading, self.channels, self.side * self.side)
        if self.mix is not None:
            planes = torch.matmul(self.mix, planes)
        square = planes.reshape(*leading, planes.shape[-2], self.side, self.side)
        low = torch.matmul(torch.matmul(self.rows, square), self.rows.transpose(0, 1))
        coefficients = torch.cat([low[..., row, : self.order - row] for row in range(self.order)], -1)
        return self.head(coefficients.reshape(*leading, -1))


def cosines(side: int, order: int) -> Tensor:
    """Return the first vectors of the orthonormal discrete cosine transform, shape (order, side), float32.

    It is the transform DCT-II of Ahmed, Natarajan and Rao 1974.
    """
    frequencies, places = torch.arange(order)[:, None], torch.arange(side)[None]
    rows = torch.cos(math.pi * frequencies * (2 * places + 1) / (2 * side)) * math.sqrt(2 / side)
    rows[0] /= math.sqrt(2)
    return rows
