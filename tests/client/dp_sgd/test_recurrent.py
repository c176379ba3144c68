"""Recorded recurrent layers against torch's own: results, gradients, and the sums of their products."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared.recorded_calls import sums_of
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from fedveil.client.dp_sgd.book_keeping import obstacle, recorded_calls

KINDS: dict[str, Any] = {
    "tanh": nn.RNN,
    "relu": lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options),
    "gru": nn.GRU,
    "lstm": nn.LSTM,
}


def flat(results: Any) -> list[Tensor]:
    outputs, last = results
    return [outputs, *(last if isinstance(last, tuple) else [last])]


def weighted(results: list[Tensor]) -> Tensor:
    """A scalar that depends on every number of the results."""
    return sum((each * torch.arange(each.numel()).view(each.shape).cos()).sum() for each in results)  # type: ignore[return-value]


@given(
    kind=st.sampled_from(sorted(KINDS)),
    options=st.fixed_dictionaries(
        {"num_layers": st.integers(1, 3)}
        | dict.fromkeys(("bidirectional", "batch_first", "bias"), st.booleans())
    ),
    sizes=st.tuples(*[st.integers(1, 5)] * 4),
    has_start=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_recorded_layer_is_that_of_torch(
    kind: str, options: dict[str, Any], sizes: tuple[int, int, int, int], has_start: bool
) -> None:
    torch.manual_seed(0)
    batch, length, width, units = sizes
    layer = KINDS[kind](width, units, **options).double()
    shape = (batch, length, width) if options["batch_first"] else (length, batch, width)
    inputs = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    cells = options["num_layers"] * (1 + options["bidirectional"])
    starts = [
        torch.randn(cells, batch, units, dtype=torch.float64, requires_grad=True)
        for _ in range((1 + (kind == "lstm")) * has_start)
    ]
    start: Any = None if not starts else tuple(starts) if kind == "lstm" else starts[0]
    expected = flat(layer(inputs, start))
    of_torch = torch.autograd.grad(weighted(expected), [inputs, *starts, *layer.parameters()])
    with recorded_calls(layer) as calls:
        results = flat(layer(inputs, start))
        edges = [edge for call in calls for edge in call.edges]
        gradients = list(torch.autograd.grad(weighted(results), [inputs, *starts, *edges]))
    assert layer.forward.__func__ is type(layer).forward
    torch.testing.assert_close(results, expected)
    torch.testing.assert_close(gradients[: 1 + len(starts)], list(of_torch[: 1 + len(starts)]))
    sums = sums_of(calls, gradients[1 + len(starts) :], batch)
    for parameter, gradient in zip(layer.parameters(), of_torch[1 + len(starts) :], strict=True):
        torch.testing.assert_close(sums[parameter], gradient)


class Cells(nn.Module):
    """A layer whose states are read in some way."""

    def __init__(self, way: str, **options: Any) -> None:
        super().__init__()
        self.way = way
        self.cells = nn.LSTM(3, 3, batch_first=True, **options)
        self.others = nn.LSTM(3, 3, batch_first=True)
        if way == "tied":
            self.others.weight_hh_l0 = self.cells.weight_hh_l0

    def forward(self, inputs: Tensor) -> Tensor:
        if self.way == "unbatched":
            return torch.stack([self.others(self.cells(each)[0])[0] for each in inputs])
        if self.way == "packed":
            return self.others(self.cells(pack_sequence(list(inputs)))[0])[0].data
        if self.way == "discarded":
            self.cells(inputs)
            return self.others(inputs)[0]
        outputs = self.others(self.cells(inputs)[0])[0]
        if self.way == "twice":
            outputs = self.cells(outputs)[0]
        return outputs @ self.cells.weight_hh_l0[:3] if self.way == "apart" else outputs


@pytest.mark.parametrize(
    ("way", "options", "reason"),
    [
        ("once", {}, None),
        ("once", {"num_layers": 2, "dropout": 0.5, "bidirectional": False}, None),
        ("once", {"proj_size": 2}, "LSTM with proj_size has no rule"),
        ("twice", {}, "used 2 times"),
        ("apart", {}, "used 2 times"),
        ("tied", {}, "used 2 times"),
        ("discarded", {}, "no output reads what LSTM computes"),
        ("unbatched", {}, "LSTM do not hold one entry for each example"),
        ("packed", {}, "LSTM do not hold one entry for each example"),
    ],
)
def test_layer_that_cannot_be_recorded_has_an_obstacle(
    way: str, options: dict[str, Any], reason: str | None
) -> None:
    model = Cells(way, **options)
    if "proj_size" in options:
        model.others = nn.LSTM(2, 3, batch_first=True)
    text = obstacle(model, torch.zeros(2, 4, 3))
    assert text is None if reason is None else reason in str(text)
