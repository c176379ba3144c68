"""Recorded multi-head attention against torch's own: results, and the sums of its products, by option and mask."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared.recorded_calls import sums_of
from torch import Tensor, nn

from fedveil.client.dp_sgd.book_keeping import obstacle, recorded_calls

BATCH, HEADS, LENGTH, WIDTH = 4, 2, 3, 6
KINDS = (None, "bool", "float")


def mask_of(kind: str | None, *shape: int) -> Tensor | None:
    if kind is None:
        return None
    if kind == "float":
        return torch.randn(shape, dtype=torch.float64)
    hidden = torch.rand(shape) > 0.6
    hidden[..., 0] = False  # a place that reads nothing has no weights
    return hidden


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@given(
    batch_first=st.booleans(),
    bias=st.booleans(),
    others=st.sampled_from(["self", "memory", "three"]),
    masks=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS), st.booleans()),
    weights=st.tuples(st.booleans(), st.booleans()),
)
@settings(max_examples=120, deadline=None)
def test_recorded_attention_is_that_of_torch(
    batch_first: bool,
    bias: bool,
    others: str,
    masks: tuple[str | None, str | None, bool],
    weights: tuple[bool, bool],
) -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(WIDTH, HEADS, bias=bias, batch_first=batch_first).double()
    length = LENGTH if others == "self" else LENGTH + 2

    def inputs(places: int) -> Tensor:
        return torch.randn(
            (BATCH, places, WIDTH) if batch_first else (places, BATCH, WIDTH), dtype=torch.float64
        )

    query = inputs(LENGTH)
    key = query if others == "self" else inputs(length)
    value = inputs(length) if others == "three" else key
    options = {
        "attn_mask": mask_of(masks[0], *(() if masks[2] else (BATCH * HEADS,)), LENGTH, length),
        "key_padding_mask": mask_of(masks[1], BATCH, length),
        "need_weights": weights[0],
        "average_attn_weights": weights[1],
    }
    expected = layer(query, key, value, **options)
    of_torch = torch.autograd.grad(expected[0].cos().sum(), list(layer.parameters()))
    with recorded_calls(layer) as calls:
        results = layer(query, key, value, **options)
        edges = [edge for call in calls for edge in call.edges]
        gradients = list(torch.autograd.grad(results[0].cos().sum(), edges))
    torch.testing.assert_close(results, expected)
    sums = sums_of(calls, gradients, BATCH)
    for parameter, gradient in zip(layer.parameters(), of_torch, strict=True):
        torch.testing.assert_close(sums[parameter], gradient)


def test_dropout_of_attention_leaves_out_its_share() -> None:
    """Of weights, as torch's, and only in training."""
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.5, batch_first=True)
    inputs = torch.randn(BATCH, 50, WIDTH)
    with recorded_calls(layer):
        weights = layer(inputs, inputs, inputs, average_attn_weights=False)[1]
        assert 0.45 < float((weights == 0).float().mean()) < 0.55
        layer.eval()
        assert float((layer(inputs, inputs, inputs)[1] == 0).float().mean()) == 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kdim": 5, "vdim": 4}, "an option that has no rule"),
        ({"add_bias_kv": True}, "an option that has no rule"),
        ({"add_zero_attn": True}, "an option that has no rule"),
        ({}, None),
    ],
)
def test_attention_with_further_options_has_an_obstacle(options: dict[str, Any], reason: str | None) -> None:
    class Attentive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options)

        def forward(self, inputs: Tensor) -> Tensor:
            key, value = (inputs[..., : options.get(name, WIDTH)] for name in ("kdim", "vdim"))
            return self.heads(inputs, key, value)[0]

    text = obstacle(Attentive(), torch.zeros(2, LENGTH, WIDTH))
    assert text is None if reason is None else reason in str(text)


def test_attention_of_one_example_without_a_batch_has_an_obstacle() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

        def forward(self, inputs: Tensor) -> Tensor:
            return torch.stack([self.heads(each, each, each)[0] for each in inputs])

    assert obstacle(Single(), torch.zeros(2, LENGTH, WIDTH)) is not None


def test_frozen_heads_leave_their_outputs_recorded() -> None:
    model = nn.TransformerEncoderLayer(WIDTH, HEADS, 8, batch_first=True)
    for parameter in model.self_attn.parameters(recurse=False):
        parameter.requires_grad_(False)
    assert obstacle(model, torch.zeros(2, LENGTH, WIDTH)) is None
    with recorded_calls(model) as calls:
        model(torch.zeros(2, LENGTH, WIDTH))
    recorded = {parameter for call in calls for parameter in call.parameters}
    assert recorded == {parameter for parameter in model.parameters() if parameter.requires_grad}
