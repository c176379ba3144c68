"""Norms of matrices with several uses, which no rounding makes too small."""

import torch
from torch import nn

from fedveil.client.dp_sgd import repeated


def test_uses_of_a_matrix_that_cancel_keep_a_norm() -> None:
    """A word's vector and the weight that reads it get gradients that differ by a part in 2^8."""
    for width, places in ((64, 1), (4, 6)):  # by Gram matrices, and by whole gradients
        embedding, layer = nn.Embedding(30, width), nn.Linear(width, 30, bias=False)
        layer.weight = embedding.weight
        indices, rows = torch.randint(30, (4, places)), torch.randn(4, places, width)
        outputs = nn.functional.one_hot(indices, 30) * -(1 + 2.0**-8)
        uses = [repeated.Use(layer, rows, outputs), repeated.Use(embedding, rows, indices)]
        (norms,) = repeated.share_of_uses(layer.weight, uses).norms
        exact = torch.einsum("nli,nlo->noi", rows.double(), outputs.double() * 2.0**-8 / (1 + 2.0**-8))
        exact = exact.flatten(1).norm(dim=1)
        assert bool((norms >= exact * (1 - 1e-3)).all()) and bool((norms <= 2 * exact).all())
