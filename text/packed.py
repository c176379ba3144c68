"""Linear layers with packed frozen weights: 4 or 8 bits a weight, in the blocks of GGUF.

A block has 32 weights of one row, as in a GGUF file: a scale in float16, for Q4_1 a minimum in float16, and the codes.
Byte k of 4-bit codes has weight k in its low half and weight k + 16 in its high half.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 32  # weights of a block
# Bytes of a block by format, of ggml's ggml-common.h.
Q4_0, Q4_1, Q8_0 = 18, 20, 34
FORMATS = {"Q4_0": Q4_0, "Q4_1": Q4_1, "Q8_0": Q8_0}
BITS = {Q4_0: 4, Q4_1: 4, Q8_0: 8}
PACKING = {4: "Q4_1", 8: "Q8_0"}  # the format into which a float weight is packed, by bits of a weight
MIDDLE = 8  # code of the weight 0 in Q4_0


def pack(weight: Tensor, bits: int) -> Tensor:
    """Return the blocks of a weight as GGUF's own tools quantise it.

    Args:
      weight: shape (outputs, inputs), finite; inputs are a multiple of 32.
      bits: of a weight: 4 (format Q4_1) or 8 (Q8_0).

    Returns:
      Blocks, uint8, shape (outputs, inputs / 32, bytes of a block).
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    packed = quantize(weight.float().numpy(), GGMLQuantizationType[PACKING[bits]])
    return torch.from_numpy(packed).view(len(weight), weight.shape[1] // BLOCK, -1)


def unpack(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight of blocks, shape (outputs, inputs): computed in float32, then rounded once to `dtype`."""
    scale = _halves(blocks, 0)
    if blocks.shape[-1] == Q8_0:
        return blocks[..., 2:].view(torch.int8).float().mul_(scale).flatten(1).to(dtype)
    minimum = -MIDDLE * scale
    if blocks.shape[-1] == Q4_1:
        minimum = _halves(blocks, 2)
    codes = blocks[..., -BLOCK // 2 :]
    weight = torch.empty(*blocks.shape[:-1], BLOCK)
    torch.mul(codes & 0x0F, scale, out=weight[..., : BLOCK // 2])
    torch.mul(codes >> 4, scale, out=weight[..., BLOCK // 2 :])
    return weight.add_(minimum).flatten(1).to(dtype)


def _halves(blocks: Tensor, start: int) -> Tensor:
    """Return the float16 number at a byte of each block as float32, shape (outputs, blocks of a row, 1)."""
    return blocks[..., start : start + 2].contiguous().view(torch.float16).float()


class _Product(torch.autograd.Function):
    """Product of inputs with a packed weight; the float weight is computed again in the backward pass, not stored."""

    generate_vmap_rule = True

    @staticmethod
    def forward(inputs: Tensor, blocks: Tensor) -> Tensor:
        """Return inputs times the transposed weight."""
        return nn.functional.linear(inputs, unpack(blocks, inputs.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        """Store the blocks, which the layer owns anyway."""
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        """Return the gradient of the inputs; the weight has none."""
        (blocks,) = ctx.saved_tensors
        (gradient,) = grad_outputs
        return gradient @ unpack(blocks, gradient.dtype), None


class PackedLinear(nn.Module):
    """Frozen linear layer with packed weights, for inputs of any float type.

    Attributes:
      blocks: buffer, uint8, shape (out_features, in_features / 32, bytes of a block).
      bias: buffer, shape (out_features,); or (), 0 for a layer without one.
    """

    blocks: Tensor
    bias: Tensor

    def __init__(self, blocks: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = len(blocks), blocks.shape[1] * BLOCK
        self.register_buffer("blocks", blocks)
        self.register_buffer("bias", bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the layer's outputs, shape (..., out_features), in the inputs' type."""
        product: Any = _Product.apply(inputs, self.blocks)
        return (product + self.bias).to(product.dtype)

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """Return the weight, shape (out_features, in_features), as a new tensor."""
        return unpack(self.blocks, dtype)

    def extra_repr(self) -> str:
        """Return sizes and bits for the module's repr."""
        bits = BITS[self.blocks.shape[-1]]
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={bits}"
