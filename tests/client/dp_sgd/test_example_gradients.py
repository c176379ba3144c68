"""Norms of single examples' gradients, which no rounding makes too small."""

import torch
from torch import nn

from fedveil.client.dp_sgd import example_gradients


def test_a_norm_of_many_numbers_loses_none_of_them() -> None:
    """Each of these squares is below half the last digit of one, and a million of them are not."""
    values = torch.full((1, 1_000_000), 2.4e-4)
    values[:, :8] = 1
    exact = float(values.double().norm())
    assert exact * (1 - 5e-4) <= float(example_gradients.norms_of(values)) <= exact * (1 + 1e-6)


def test_gram_matrices_count_cancelling_gradients() -> None:
    """Two positions whose gradients cancel but for a part in 256; in float32 their Gram matrix would not see it."""
    layer = nn.Linear(64, 64, bias=False)
    inputs, gradients = torch.randn(4, 2, 64), torch.randn(4, 2, 64)
    inputs[:, 1], gradients[:, 1] = inputs[:, 0], -gradients[:, 0] * (1 + 2.0**-8)
    (norms,) = example_gradients.RULES[nn.Linear](layer, inputs, gradients).norms
    exact = torch.einsum("nti,nto->noi", inputs.double(), gradients.double()).flatten(1).norm(dim=1)
    torch.testing.assert_close(norms.double(), exact, rtol=1e-6, atol=0)
