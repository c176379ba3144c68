"""Multi-head attention whose products are recorded: nn.MultiheadAttention multiplies its inputs where no hook sees it.

It multiplies queries, keys and values by the rows of one matrix inside one function of torch, and calls no module for
the outputs. What is computed here is the same, by the options of that class.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .example_gradients import LayerCall, record_products, record_unknown


def obstacle(layer: Any) -> str | None:
    """Return why this attention cannot be recorded; None if it can."""
    if layer.in_proj_weight is None or layer.bias_k is not None or layer.add_zero_attn:
        return "MultiheadAttention has an option that has no rule"
    return None


def forward(
    layer: Any,
    calls: list[LayerCall],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return what the layer returns for the same arguments, and append its products to `calls`."""
    if query.dim() != 3:
        record_unknown(layer, calls)
        return nn.MultiheadAttention.forward(
            layer,
            query,
            key,
            value,
            key_padding_mask,
            need_weights,
            attn_mask,
            average_attn_weights,
            is_causal,
        )
    queries, keys, values = _heads(layer, calls, query, key, value)
    mask = _mask(queries, keys, attn_mask, key_padding_mask)
    dropout = layer.dropout if layer.training else 0.0
    weights = None
    if need_weights:
        scores = queries @ keys.mT / math.sqrt(layer.head_dim)
        weights = functional.softmax(scores if mask is None else scores + mask, -1)
        weights = functional.dropout(weights, dropout)
        mixed = weights @ values
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        mixed = functional.scaled_dot_product_attention(queries, keys, values, mask, dropout)
    outputs = layer.out_proj(mixed.transpose(1, 2).flatten(2))
    return outputs if layer.batch_first else outputs.transpose(0, 1), weights


def _heads(layer: Any, calls: list[LayerCall], *tensors: Tensor) -> list[Tensor]:
    """Return queries, keys and values of each head, shapes (B, heads, L, E / heads), and record their products."""
    one = all(each is tensors[0] for each in tensors)  # self-attention: one product for all three
    inputs = [each if layer.batch_first else each.transpose(0, 1) for each in tensors[: 1 if one else 3]]
    products = record_products(layer, calls, layer.in_proj_weight, layer.in_proj_bias, inputs)
    parts = products[0].chunk(3, 2) if one else products
    return [each.unflatten(2, (layer.num_heads, -1)).transpose(1, 2) for each in parts]


def _mask(queries: Tensor, keys: Tensor, attention: Tensor | None, padding: Tensor | None) -> Tensor | None:
    """Return the sum of the masks, -infinity where nothing is read, which broadcasts to shape (B, heads, L, S); or None.

    Args:
      queries: shape (B, heads, L, E / heads).
      keys: shape (B, heads, S, E / heads).
      attention: shape (L, S) or (B * heads, L, S), bool or added to the scores.
      padding: shape (B, S), bool or added to the scores.
    """
    masks: list[Tensor] = []
    if attention is not None:
        masks.append(attention if attention.dim() == 2 else attention.unflatten(0, queries.shape[:2]))
    if padding is not None:
        masks.append(padding.view(len(keys), 1, 1, -1))
    added = [
        queries.new_zeros(m.shape).masked_fill_(m, -math.inf) if m.dtype == torch.bool else m for m in masks
    ]
    return sum(added[1:], added[0]) if added else None
