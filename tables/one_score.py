"""Linear model with one score and several offsets: its outputs are the score plus each offset."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def one_score(inputs: int, offsets: Sequence[float], reach: int | None = None) -> nn.Module:
    """Return a model whose score starts at zero, with outputs of shape (n, offsets).

    It is made of linear layers alone, so that every way to compute gradients of single records knows it. The second has a
    weight of ones, which is not trained, sent or saved; the parameters are `0.weight` and `1.bias`.

    Args:
      inputs: number of inputs.
      offsets: public values at which the offsets start.
      reach: number of outputs that have the score, from the first on; the others are their offsets. None for all.
    """
    score = nn.Linear(inputs, 1, bias=False, device="meta")  # on which no random number is drawn
    score.weight = nn.Parameter(torch.zeros(1, inputs))
    spread = nn.Linear(1, len(offsets), device="meta")
    weight = torch.ones(len(offsets), 1)
    weight[len(offsets) if reach is None else reach :] = 0
    spread.weight = nn.Parameter(weight, requires_grad=False)
    spread.bias = nn.Parameter(torch.tensor(offsets, dtype=torch.float32))
    return nn.Sequential(score, spread)
