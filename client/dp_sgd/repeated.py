"""Matrices that several layers or calls use: tied weights, and layers that are called more than once in a pass.

An example's gradient of such a matrix is the sum over its uses, so its norm needs all of them. A use by a linear layer
adds outer products of inputs and output gradients. A use by an embedding adds outer products of output gradients and
unit vectors, whose indices stand for them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .example_gradients import (
    CHUNK,
    GRAM,
    LayerCall,
    Share,
    embedding_share,
    lengths_of,
    norms_of,
    not_below,
    share_of_matrix,
    without_padding,
)

MATRICES = {nn.Linear, NonDynamicallyQuantizableLinear, nn.Embedding}
AFFINE = {nn.LayerNorm, nn.RMSNorm, nn.GroupNorm}  # whose gradients are held, and are added up


class Use(NamedTuple):
    """Factors of the examples' gradients in one use of a matrix, shape (O, K): outer products at L positions, added up.

    Attributes:
      layer: that uses the matrix.
      inputs: shape (B, L, K).
      outputs: shape (B, L, O), or the indices of unit vectors, shape (B, L).
    """

    layer: Any
    inputs: Tensor
    outputs: Tensor


def combine(layers: Sequence[nn.Module]) -> bool:
    """Return whether there is a rule for a parameter that these layers use, one for each call."""
    kinds = {type(layer) for layer in layers}
    return len(layers) == 1 or (bool(kinds) and (kinds <= MATRICES or kinds <= AFFINE))


def use_of(call: LayerCall, gradients: Sequence[Tensor]) -> tuple[Share, list[Use]]:
    """Return the share of a call whose parameters have further uses, and of its matrix the use in place of norms.

    Raises:
      RuntimeError: the layer has no rule for that.
    """
    layer: Any = call.layer
    if not combine([layer, layer]):
        raise RuntimeError(f"{type(layer).__name__} does not use each parameter once")
    if type(layer) in AFFINE:
        return call.share_of(call.inputs, gradients), []
    inputs, back = call.inputs[0], gradients[0].reshape(len(gradients[0]), -1, gradients[0].shape[-1])
    if isinstance(layer, nn.Embedding):
        indices = inputs.reshape(len(inputs), -1)
        return Share({}), [Use(layer, without_padding(layer, indices, back), indices)]
    bias = {parameter: back.sum(1) for parameter in call.parameters if parameter is layer.bias}
    if not layer.weight.requires_grad:
        return Share(bias), []
    return Share(bias), [Use(layer, inputs.reshape(len(inputs), -1, layer.in_features), back)]


def share_of_uses(weight: nn.Parameter, uses: Sequence[Use]) -> Share:
    """Return the share of a matrix with these uses."""
    linear = [use for use in uses if use.outputs.dim() == 3]
    embedded = [use for use in uses if use.outputs.dim() == 2]
    factors = [torch.cat([use[n] for use in part], 1) for part in (linear, embedded) if part for n in (1, 2)]
    if not embedded:
        return share_of_matrix(weight, *factors)
    if not linear:
        return embedding_share(weight, factors[1], factors[0])
    inputs, outputs, rows, indices = factors

    def sums(weights: Tensor) -> dict[Any, Tensor]:
        scale = weights[:, None, None]
        total = (outputs * scale).flatten(0, 1).t() @ inputs.flatten(0, 1)
        return {weight: total.index_add_(0, indices.flatten(), (rows * scale).flatten(0, 1))}

    size = max(weight.numel(), (inputs.shape[1] + rows.shape[1]) ** 2, inputs.shape[1] * len(weight))
    parts = (each.split(max(1, CHUNK // size)) for each in factors)
    return Share({}, [torch.cat([_norms(*part) for part in zip(*parts, strict=True)])], sums)


def _norms(inputs: Tensor, outputs: Tensor, rows: Tensor, indices: Tensor) -> Tensor:
    """Return the norms, shape (n,), of gradients that both a linear layer and an embedding give, from factors as in `Use`."""
    lengths = torch.cat([lengths_of(inputs) * lengths_of(outputs), lengths_of(rows)], 1)
    positions, (size, high) = lengths.shape[1], (inputs.shape[2], outputs.shape[2])
    if GRAM * positions * (size + high) < size * high:
        # In double precision, since in float32 a Gram matrix loses half the digits of cancelling gradients.
        sides, wide = torch.cat([inputs, rows], 1).double(), outputs.double()
        crossed = wide.gather(2, indices[:, None].expand(-1, wide.shape[1], -1))
        upper = torch.cat([wide @ wide.mT, crossed], 2)
        lower = torch.cat([crossed.mT, (indices[:, :, None] == indices[:, None]).double()], 2)
        grams = torch.cat([upper, lower], 1).mul_(sides @ sides.mT)
        norms = grams.sum((1, 2)).clamp_(min=0).sqrt_().to(inputs.dtype)
    else:
        products = torch.bmm(outputs.mT, inputs)
        first = torch.arange(len(products), device=indices.device)[:, None] * high  # each example's row 0
        products.flatten(0, 1).index_add_(0, (indices + first).flatten(), rows.flatten(0, 1))
        norms = norms_of(products)
    return not_below(norms, lengths)
