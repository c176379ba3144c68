"""Multi-head attention whose products are recorded: nn.MultiheadAttention multiplies its inputs where no hook sees it.

It multiplies queries, keys and values by the rows of one matrix inside one function of torch, and calls no module for
the outputs. What is computed here is the same, by the options of that class.
"""

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .example_gradients import LayerCall, batch_first, record_products, record_unknown

SIGNATURE = inspect.signature(nn.MultiheadAttention.forward)


def obstacle(layer: Any) -> str | None:
    """Return why this attention cannot be recorded; None if it can."""
    names = {name for name, _ in layer.named_parameters(recurse=False)}
    if layer.add_zero_attn or not names <= {"in_proj_weight", "in_proj_bias"}:
        return "MultiheadAttention has an option that has no rule"
    return None


def forward(
    layer: Any, calls: list[LayerCall], *arguments: Any, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Return what the layer returns for the same arguments, and append its products to `calls`."""
    bound = SIGNATURE.bind(layer, *arguments, **options)
    bound.apply_defaults()
    call = bound.arguments
    tensors = [call[name] for name in ("query", "key", "value")]
    if tensors[0].dim() != 3:
        record_unknown(layer, calls)
        return nn.MultiheadAttention.forward(layer, *arguments, **options)
    queries, keys, values = _heads(layer, calls, tensors)
    masks = _masks(queries, call["attn_mask"], call["key_padding_mask"])
    dropout = layer.dropout * layer.training
    weights = None
    if call["need_weights"]:
        scores = sum(masks, queries @ keys.mT / math.sqrt(layer.head_dim))
        weights = functional.dropout(functional.softmax(scores, -1), dropout)
        mixed = weights @ values
        weights = weights.mean(1) if call["average_attn_weights"] else weights
    else:
        mask = sum(masks[1:], masks[0]) if masks else None
        mixed = functional.scaled_dot_product_attention(queries, keys, values, mask, dropout)
    return batch_first(layer, layer.out_proj(mixed.transpose(1, 2).flatten(2))), weights


def _heads(layer: Any, calls: list[LayerCall], tensors: list[Tensor]) -> list[Tensor]:
    """Return queries, keys and values of each head, shapes (B, heads, L, E / heads), and record their products."""
    parameters = [*layer.parameters(recurse=False)]
    if all(each is tensors[0] for each in tensors):  # self-attention: one product for all three
        (products,) = record_products(layer, calls, parameters, [batch_first(layer, tensors[0])])
        parts = products.chunk(3, 2)
    else:
        parts = record_products(layer, calls, parameters, [batch_first(layer, each) for each in tensors])
    return [each.unflatten(2, (layer.num_heads, -1)).transpose(1, 2) for each in parts]


def _masks(queries: Tensor, attention: Tensor | None, padding: Tensor | None) -> list[Tensor]:
    """Return what is added to the scores, -infinity where nothing is read, in shapes that broadcast to theirs.

    Args:
      queries: shape (B, heads, L, E / heads).
      attention: shape (L, S) or (B * heads, L, S), bool or added to the scores.
      padding: shape (B, S), bool or added to the scores.
    """
    masks: list[Tensor] = []
    if attention is not None:
        masks.append(attention if attention.dim() == 2 else attention.unflatten(0, queries.shape[:2]))
    if padding is not None:
        masks.append(padding.view(len(queries), 1, 1, -1))
    return [
        queries.new_zeros(m.shape).masked_fill_(m, -math.inf) if m.dtype == torch.bool else m for m in masks
    ]
