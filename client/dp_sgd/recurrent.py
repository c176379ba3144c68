"""Recurrent layers whose products are recorded: torch computes all steps of nn.RNN, nn.LSTM and nn.GRU where no hook sees them.

A cell's products with the inputs are those of a linear layer. Those with its states are computed step by step in a scan,
whose backward pass returns the gradients of both. Results are those of torch's layers, up to rounding.

Shapes: T steps, B examples, G gates of H units. Steps come first, then examples.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .example_gradients import LayerCall, Share, batch_first, record_unknown, share_of_rows


class _Rnn(torch.autograd.Function):
    """Scan of nn.RNN.

    The scans take products with the inputs, shape (T, B, G * H), zeros of that shape in whose place stand the products
    with the states, the weight of the states, shape (G * H, H), its bias, and the state before the first step,
    shape (B, H). They return the states of all steps, shape (T, B, H).

    This one also takes whether its activation is tanh; otherwise it is ReLU.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        states: Tensor,
        weight: Tensor,
        bias: Tensor,
        start: Tensor,
        tanh: bool,
    ) -> Tensor:
        """Return the states."""
        outputs = inputs + bias
        state, turned = start, weight.t()
        for output in outputs.unbind():
            output.addmm_(state, turned)
            state = output.tanh_() if tanh else output.relu_()
        ctx.save_for_backward(outputs, weight)
        ctx.tanh = tanh
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Return the gradients of the products and of the start."""
        outputs, weight = ctx.saved_tensors
        derivative = 1 - outputs.square() if ctx.tanh else (outputs > 0).to(outputs)
        backs, of_start = _backs(gradients[0], derivative.unsqueeze(2), weight)
        products = backs.mul_(derivative)
        return products, products, None, None, of_start, None


class _Gru(torch.autograd.Function):
    """Scan of nn.GRU, whose gates are reset, update and candidate; see `_Rnn`."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, states: Tensor, weight: Tensor, bias: Tensor, start: Tensor
    ) -> Tensor:
        """Return the states."""
        gates, of_states, turned = inputs.clone(), torch.empty_like(inputs), weight.t()
        outputs = inputs.new_empty(*inputs.shape[:2], start.shape[1])
        size, state = 2 * start.shape[1], start
        for gate, product, output in zip(gates.unbind(), of_states.unbind(), outputs.unbind(), strict=True):
            torch.addmm(bias, state, turned, out=product)
            switches = gate[:, :size].add_(product[:, :size]).sigmoid_()
            reset, update = switches.chunk(2, 1)
            candidate = gate[:, size:].addcmul_(reset, product[:, size:]).tanh_()
            state = torch.lerp(candidate, state, update, out=output)
        ctx.save_for_backward(gates, of_states[..., size:].clone(), outputs, weight, start)
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Return the gradients of the products and of the start."""
        gates, state, outputs, weight, start = ctx.saved_tensors
        reset, update, candidate = gates.chunk(3, 2)
        before = torch.cat([start[None], outputs[:-1]])
        of_candidate = (1 - update) * (1 - candidate.square())
        of_reset = of_candidate * state * reset * (1 - reset)
        of_update = (before - candidate) * update * (1 - update)
        factors = torch.stack([of_reset, of_update, of_candidate * reset], 2)
        backs, of_start = _backs(gradients[0], factors, weight, update)
        of_inputs = torch.cat([of_reset * backs, of_update * backs, of_candidate * backs], 2)
        return of_inputs, factors.mul_(backs.unsqueeze(2)).flatten(2), None, None, of_start


def _backs(
    gradients: Tensor, factors: Tensor, weight: Tensor, carried: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the gradients of all states, shape (T, B, H), and of the start, shape (B, H).

    Args:
      gradients: of the outputs, shape (T, B, H).
      factors: by which a state's gradient gives those of the products with the state before, shape (T, B, G, H).
      weight: of the states, shape (G * H, H).
      carried: factor by which a state's gradient reaches the state before outside the products, shape (T, B, H).
    """
    backs, products = gradients.clone(memory_format=torch.contiguous_format), torch.empty_like(factors[0])
    earlier = (
        torch.zeros_like(backs[0]),
        *backs.unbind()[:-1],
    )  # the start, then the states before each step
    for step in range(len(backs) - 1, -1, -1):
        torch.mul(factors[step], backs[step][:, None], out=products)
        if carried is not None:
            earlier[step].addcmul_(backs[step], carried[step])
        earlier[step].addmm_(products.flatten(1), weight)
    return backs, earlier[0]


class _Lstm(torch.autograd.Function):
    """Scan of nn.LSTM, whose gates are entry, forget, new and output; see `_Rnn`.

    It also takes the memory before the first step, and returns the last one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        states: Tensor,
        weight: Tensor,
        bias: Tensor,
        start: Tensor,
        memory: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return the states and the last memory."""
        gates, turned = inputs + bias, weight.t()
        outputs, memories, bounded = (gates.new_empty(3, *gates.shape[:2], start.shape[1])).unbind()
        state, current, size = start, memory, start.shape[1]
        for gate, *results in zip(
            *(each.unbind() for each in (gates, outputs, memories, bounded)), strict=True
        ):
            gate.addmm_(state, turned)
            gate[:, : 2 * size].sigmoid_()
            gate[:, 2 * size : 3 * size].tanh_()
            gate[:, 3 * size :].sigmoid_()
            entry, forget, new, output = gate.chunk(4, 1)
            current = torch.mul(forget, current, out=results[1]).addcmul_(entry, new)
            state = torch.mul(output, torch.tanh(current, out=results[2]), out=results[0])
        ctx.save_for_backward(gates, memories, bounded, weight, memory)
        return outputs, current.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Return the gradients of the products, of the start and of the memory before it."""
        gates, memories, bounded, weight, memory = ctx.saved_tensors
        entry, forget, new, output = gates.chunk(4, 2)
        of_memory = output * (1 - bounded.square())
        of_output = bounded * output * (1 - output)
        entered = torch.cat([memory[None], memories[:-1]])
        through = [new * entry * (1 - entry), entered * forget * (1 - forget), entry * (1 - new.square())]
        products = torch.stack([*through, of_output], 2)
        backs, memory_back = gradients[0].clone(memory_format=torch.contiguous_format), gradients[1].clone()
        # Gradients of the start, then of the states before each step.
        earlier = (torch.zeros_like(memory), *backs.unbind()[:-1])
        parts = (products.flatten(2), products[:, :, :3], products[:, :, 3], of_memory, forget, backs)
        steps = zip(*(each.unbind() for each in parts), earlier, strict=True)
        for product, gated, last, factor, passing, back, before in reversed([*steps]):
            memory_back.addcmul_(back, factor)
            gated.mul_(memory_back[:, None])
            last.mul_(back)
            before.addmm_(product, weight)
            memory_back.mul_(passing)
        of_products = products.flatten(2)
        return of_products, of_products, None, None, earlier[0], memory_back


def obstacle(layer: Any) -> str | None:
    """Return why the products of this layer cannot be recorded; None if they can."""
    return f"{type(layer).__name__} with proj_size has no rule" if layer.proj_size else None


def forward(layer: Any, calls: list[LayerCall], input: Any, hx: Any = None) -> Any:
    """Return what the layer returns for the same arguments, and append its products to `calls`."""
    if not isinstance(input, Tensor) or input.dim() != 3:
        record_unknown(layer, calls)
        return type(layer).forward(layer, input, hx)
    values = batch_first(layer, input).transpose(0, 1)
    turns = 1 + layer.bidirectional
    starts = _starts(layer, values, hx)
    ends: list[list[Tensor]] = []  # of each cell: the last state, and of an LSTM the last memory
    for number in range(layer.num_layers):
        if number and layer.training:
            values = functional.dropout(values, layer.dropout)
        results: list[Tensor] = []
        for index in range(number * turns, (number + 1) * turns):
            outputs, *memory = _cell(layer, calls, values.flip(0) if index % turns else values, index, starts)
            ends.append([outputs[-1], *memory])
            results.append(outputs.flip(0) if index % turns else outputs)
        values = torch.cat(results, 2) if len(results) > 1 else results[0]
    last = [torch.stack(each) for each in zip(*ends, strict=True)]
    return batch_first(layer, values.transpose(0, 1)), tuple(last) if last[1:] else last[0]


def _starts(layer: Any, values: Tensor, hx: Any) -> Sequence[Tensor]:
    """Return the states before the first step, and of an LSTM the memories, shape (cells, B, H) each."""
    if hx is not None:
        return [hx] if isinstance(hx, Tensor) else list(hx)
    cells = layer.num_layers * (1 + layer.bidirectional)
    return [values.new_zeros(cells, values.shape[1], layer.hidden_size)] * (1 + isinstance(layer, nn.LSTM))


def _cell(
    layer: Any, calls: list[LayerCall], values: Tensor, index: int, starts: Sequence[Tensor]
) -> Sequence[Tensor]:
    """Return the states of one cell's steps, shape (T, B, H), and of an LSTM the last memory; append its products to `calls`."""
    parameters = layer.all_weights[index]
    of_inputs, of_states = parameters[::2], parameters[1::2]  # a weight, and a bias if the layer has one
    products = functional.linear(values, *(each.detach() for each in of_inputs))
    zeros = products.new_zeros(()).expand_as(products).requires_grad_()
    if not products.requires_grad:
        products.requires_grad_()
    weight, *bias = (each.detach() for each in of_states)
    bias = bias or [weight.new_zeros(len(weight))]
    first = [start[index] for start in starts]
    results: Any
    if isinstance(layer, nn.RNN):
        results = _Rnn.apply(products, zeros, weight, *bias, *first, layer.mode == "RNN_TANH")
    else:
        results = (_Lstm if isinstance(layer, nn.LSTM) else _Gru).apply(
            products, zeros, weight, *bias, *first
        )
    outputs, *memory = [results] if isinstance(results, Tensor) else results
    _record(layer, calls, of_inputs, values, products)
    _record(layer, calls, of_states, torch.cat([first[0][None], outputs[:-1]]), zeros)
    return [outputs, *memory]


def _record(
    layer: nn.Module, calls: list[LayerCall], parameters: Sequence[Any], inputs: Tensor, products: Tensor
) -> None:
    """Append the products of inputs, shape (T, B, K), and a weight, shape (G * H, K), to `calls`."""

    def share_of(inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Share:
        return share_of_rows(parameters, inputs, [each.transpose(0, 1) for each in gradients])

    trained = [each for each in parameters if each.requires_grad]
    calls.append(LayerCall.of(layer, trained, share_of, [inputs.transpose(0, 1)], [products]))
