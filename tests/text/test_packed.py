"""Packed layers compute as the float layers of their weights do, and their blocks are those of GGUF's own tools."""

from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from torch import Tensor, nn

from fedveil.text.packed import FORMATS, PackedLinear, pack, unpack

NONE = torch.zeros(())


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", sorted(FORMATS))
def test_a_weight_is_what_gguf_reads(kind: str) -> None:
    form = GGMLQuantizationType[kind]
    for weight in (drawn(5, 96), torch.zeros(2, 32), drawn(3, 64) * 1e-4, drawn(3, 64) + 5):
        data = quantize(weight.numpy(), form)
        blocks = torch.from_numpy(data).view(len(weight), -1, FORMATS[kind])
        assert np.array_equal(unpack(blocks, torch.float32).numpy(), dequantize(data, form))


@pytest.mark.parametrize(("bits", "error"), [(4, 1 / 15), (8, 1 / 127)])
def test_a_code_is_within_half_a_step(bits: int, error: float) -> None:
    weight = drawn(7, 64)
    spans = weight.view(7, 2, 32).amax(-1) - weight.view(7, 2, 32).amin(-1)
    errors = (unpack(pack(weight, bits), torch.float32) - weight).view(7, 2, 32).abs().amax(-1)
    assert (errors <= 0.51 * error * spans + 2e-3).all()  # scale and minimum have 11 bits
    assert errors.max() > 1e-4


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bias", [NONE, torch.arange(6.0)])
def test_outputs_and_gradients_are_those_of_a_float_layer(bits: int, bias: Tensor) -> None:
    layer = PackedLinear(pack(drawn(6, 64), bits), bias)
    plain = nn.Linear(64, 6)
    plain.weight.data, plain.bias.data = layer.weight_in(torch.float64), bias.double().expand(6)
    inputs = drawn(2, 3, 64, seed=1).double().requires_grad_()
    same = inputs.detach().clone().requires_grad_()
    torch.testing.assert_close(layer(inputs), plain(same))
    direction = drawn(2, 3, 6, seed=2).double()
    (layer(inputs) * direction).sum().backward()
    (plain(same) * direction).sum().backward()
    torch.testing.assert_close(inputs.grad, same.grad)
    assert torch.autograd.gradcheck(layer, (drawn(2, 64).double().requires_grad_(),))
    assert layer.blocks.grad is None
    assert [*layer.parameters()] == []


def test_per_example_gradients_pass_through() -> None:
    layer = PackedLinear(pack(drawn(6, 64), 4), NONE)
    inputs = drawn(5, 64, seed=1)

    def score(each: Tensor) -> Tensor:
        return layer(each).square().sum()

    mapped: Any = torch.func.vmap(torch.func.grad(score))(inputs)
    torch.testing.assert_close(mapped, torch.stack([torch.func.grad(score)(each) for each in inputs]))


def test_no_float_weight_is_saved_for_backward() -> None:
    layer = PackedLinear(pack(drawn(128, 64), 4), NONE)
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(drawn(2, 64).requires_grad_())
    assert [tensor.data_ptr() for tensor in saved] == [layer.blocks.data_ptr()]


def test_a_change_of_type_leaves_the_weight() -> None:
    layer = PackedLinear(pack(drawn(6, 64), 4), NONE)
    before = layer.weight_in(torch.float32)
    assert torch.equal(layer.to(torch.bfloat16).weight_in(torch.float32), before)
    assert layer(drawn(2, 64).bfloat16()).dtype == torch.bfloat16
    assert repr(layer) == "PackedLinear(in_features=64, out_features=6, bits=4)"
