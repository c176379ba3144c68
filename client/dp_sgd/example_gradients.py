"""Gradients of single examples in a layer, from the layer's inputs and the gradients of its outputs.

Norms are computed from Gram matrices if these are smaller than the gradients (Goodfellow 2015, arXiv:1510.01799; Bu et
al. 2022, arXiv:2210.00038, section 3), otherwise from the gradients of a few examples at a time, and for embeddings
from the indices.

A norm that is computed too small lets a record exceed its clip, and the author of the model controls the numbers. So a
norm includes a bound on the float32 rounding of its squares, and a gradient that is not held counts at least a
`LOUDEST`-th of the total length of its terms, because terms that cancel leave their rounding in the sum.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import grad as kernels
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear


class Share(NamedTuple):
    """Contributions of a batch's examples to one layer.

    Attributes:
      grad_samples: gradients held for every example because they are small, shapes (B, ...), by parameter.
      norms: of each example's other gradients, shapes (B,).
      sums: returns the weighted sums of those other gradients, by parameter, for weights of the examples, shape (B,).
    """

    grad_samples: dict[Any, Tensor]
    norms: Sequence[Tensor] = ()
    sums: Callable[[Tensor], dict[Any, Tensor]] = lambda _: {}


class LayerCall(NamedTuple):
    """Products of one layer in a forward pass.

    Attributes:
      layer: of the model.
      parameters: trainable ones whose whole gradient the share is.
      share_of: returns the share, for `inputs` and the gradients at `edges`.
      inputs: of the products, shapes (B, ...); an empty tensor if the layer did not take one tensor.
      versions: numbers of in-place changes of the inputs before the call.
      edges: of the products in torch's graph, where a backward pass reads their gradients.
    """

    layer: nn.Module
    parameters: Sequence[Tensor]
    share_of: Callable[[Sequence[Tensor], Sequence[Tensor]], Share]
    inputs: Sequence[Tensor]
    versions: Sequence[int]
    edges: Sequence[GradientEdge]

    @classmethod
    def of(
        cls,
        layer: nn.Module,
        parameters: Sequence[Tensor],
        share_of: Callable[[Sequence[Tensor], Sequence[Tensor]], Share],
        inputs: Sequence[Tensor],
        products: Sequence[Tensor],
    ) -> "LayerCall":
        """Return the record of products that were just computed."""
        inputs = [each.detach() for each in inputs]
        edges = [get_gradient_edge(each) for each in products]
        return cls(layer, parameters, share_of, inputs, [each._version for each in inputs], edges)

    def holds(self, batch: int) -> bool:
        """Return whether the inputs still are those of the call, and have an entry for each of so many examples."""
        pairs = zip(self.inputs, self.versions, strict=True)
        return all(len(each) == batch and each._version == version for each, version in pairs)


# Function from a layer, its inputs, shape (B, ...), and the gradients of its outputs, shape (B, ...), to its share.
Rule = Callable[[Any, Tensor, Tensor], Share]

CHUNK = 1 << 18  # numbers of a layer to work on at a time: 1 MiB stays in a core's second-level cache
VECTOR = 16  # float32 numbers that a processor multiplies at a time
CACHED = 1 << 21  # numbers of a layer that are held in any case: 8 MiB stay in a processor's last cache
GRAM = 3  # multiplications of a gradient in the time of one of a Gram matrix, which is in double precision and smaller
BUFFER_RATIO = 2  # single gradients are held up to this many times the size of inputs and output gradients
DEEP = 16  # channels of a group from which a CPU gains by its kernel over a product of copied windows

LOUDEST = 1024.0  # rounding to float32 moves such a part by less than 2^10 / 2^24 of the norm
ADDED = 1 << 16  # squares summed at a time, so that their float32 sum is accurate to 0.1 %
LOST = 2.0**-63  # the root of the smallest normal float32: squares of smaller numbers are rounded or zero


def norms_of(values: Tensor) -> Tensor:
    """Return the norm of each example, shape (B,), never too small, even if its squares underflow float32.

    Squares are summed in blocks so small that none is lost in rounding: of 10^8 a third could be.
    """
    flat = values.unsqueeze(-1).flatten(1)  # a scalar parameter's have one dimension alone
    parts = [torch.linalg.vector_norm(part, dim=1) for part in flat.split(ADDED, 1)]
    whole = parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack(parts), dim=0)
    return whole + LOST * math.sqrt(flat.shape[1])


def not_below(norms: Tensor, lengths: Tensor) -> Tensor:
    """Return the norms of sums, shape (n,), raised to a `LOUDEST`-th of the total of their terms' `lengths`, shape (n, L)."""
    return torch.maximum(norms, lengths.sum(1).to(norms.dtype) / LOUDEST)


def lengths_of(parts: Tensor) -> Tensor:
    """Return the norms of vectors, shape (n, L), from shape (n, L, K)."""
    return norms_of(parts.flatten(0, 1)).view(len(parts), -1)


def _norms_by_ghost(layer: Any, activations: list[Tensor], backward: Tensor) -> dict[Any, Tensor]:
    """Return the norms of a layer's gradients, shape (B,), by parameter, for Opacus' ghost clipping.

    Opacus' own rules multiply squares in float32, and lose half the digits of gradients that cancel. `activations` are
    the layer's inputs, and `backward` the gradients of its outputs for the sum of the examples' losses.
    """
    gradients = backward.reshape(len(backward), -1, backward.shape[-1])
    if isinstance(layer, nn.Embedding):
        (norms,) = _embedding(layer, activations[0], backward).norms
        return {layer.weight: not_below(norms.to(backward.dtype), lengths_of(gradients))}
    inputs = activations[0].reshape(len(backward), -1, layer.in_features).to(backward.dtype)
    norms_by_parameter: dict[Any, Tensor] = {}
    if _learns(layer, "weight"):
        norms_by_parameter[layer.weight] = _cancelling(inputs, gradients)
    if _learns(layer, "bias"):
        norms_by_parameter[layer.bias] = not_below(norms_of(gradients.sum(1)), lengths_of(gradients))
    return norms_by_parameter


GHOST = dict.fromkeys((nn.Linear, nn.Embedding), _norms_by_ghost)  # layers whose norms Opacus computes itself


def _learns(layer: nn.Module, name: str) -> bool:
    """Return whether a layer has a trainable parameter with this name."""
    parameter = getattr(layer, name, None)
    return parameter is not None and parameter.requires_grad


def _products(pairs: Iterable[tuple[Tensor, Tensor]], buffer: Tensor | None) -> Tensor:
    """Return the norms, shape (N,), of examples' gradients: sums over positions of outer products.

    A pair is inputs, shape (n, L, K), and output gradients, shape (n, L, O), of some examples at a time. The buffer, if
    any, keeps the gradients, shape (N, O, K), for the weighted sums.
    """
    norms: list[Tensor] = []
    start = 0
    for inputs, gradients in pairs:
        if buffer is not None:
            products = torch.bmm(gradients.mT, inputs, out=buffer[start : start + len(inputs)])
            start += len(inputs)
            norms.append(norms_of(products))
        elif inputs.shape[1] == 1:
            norms.append(norms_of(inputs) * norms_of(gradients))
        else:
            norms.append(_cancelling(inputs, gradients))
    return torch.cat(norms) if len(norms) > 1 else norms[0]


def _cancelling(inputs: Tensor, gradients: Tensor) -> Tensor:
    """Return the norms, shape (n,), of gradients that are not held, from arguments as in a pair of `_products`."""
    positions, size = inputs.shape[1], inputs.shape[2] + gradients.shape[2]
    if GRAM * positions * size < inputs.shape[2] * gradients.shape[2]:
        # In double precision, since in float32 a Gram matrix loses half the digits of cancelling gradients.
        wide, high = inputs.double(), gradients.double()
        grams = torch.bmm(wide, wide.mT).mul_(torch.bmm(high, high.mT))
        norms = grams.sum((1, 2)).clamp_(min=0).sqrt_().to(inputs.dtype)
    else:
        norms = norms_of(torch.bmm(gradients.mT, inputs))
    return not_below(norms, lengths_of(inputs) * lengths_of(gradients))


def _buffer(inputs: Tensor, gradients: Tensor, *shape: int) -> Tensor | None:
    """Return memory of this shape for each example's gradient; None if it is large compared with the arguments."""
    return gradients.new_empty(shape) if _small(inputs, gradients, math.prod(shape)) else None


def _small(inputs: Tensor, gradients: Tensor, count: int) -> bool:
    """Return whether so many numbers, the gradients of all examples, are few beside the arguments, or fit in a cache."""
    return count <= max(CACHED, BUFFER_RATIO * (inputs.numel() + gradients.numel()))


def _linear(layer: Any, inputs: Tensor, gradients: Tensor) -> Share:
    """Return the share of a linear layer, as `Rule`; dimensions between batch and features are positions."""
    batch = len(inputs)
    inputs = inputs.reshape(batch, -1, layer.in_features).contiguous()
    gradients = gradients.reshape(batch, -1, layer.out_features).contiguous()
    bias = {layer.bias: gradients.sum(1)} if _learns(layer, "bias") else {}
    if not layer.weight.requires_grad:
        return Share(bias)
    share = share_of_matrix(layer.weight, inputs, gradients)
    return share._replace(grad_samples=bias)


def share_of_matrix(weight: nn.Parameter, inputs: Tensor, gradients: Tensor) -> Share:
    """Return the share of a matrix that multiplies inputs.

    Args:
      weight: the matrix, shape (O, K).
      inputs: shape (B, L, K).
      gradients: of the products, shape (B, L, O).
    """
    norms, weight_sum = _matrix(inputs, gradients)

    def sums(weights: Tensor) -> dict[Any, Tensor]:
        return {weight: weight_sum(weights)}

    return Share({}, [norms], sums)


def share_of_rows(
    parameters: Sequence[nn.Parameter], inputs: Sequence[Tensor], gradients: Sequence[Tensor]
) -> Share:
    """Return the share of a matrix whose rows multiply several inputs in turn: as many linear layers, one below another.

    Args:
      parameters: the matrix, shape (O, K), and its bias, shape (O,), if it has one.
      inputs: of each part of the rows, shapes (B, L, K); L may differ.
      gradients: of each part's products, shapes (B, L, rows of the part).
    """
    weight, *biases = parameters
    grad_samples: dict[Any, Tensor] = {
        bias: torch.cat([each.sum(1) for each in gradients], 1) for bias in biases if bias.requires_grad
    }
    if not weight.requires_grad:
        return Share(grad_samples)
    parts = [_matrix(x, g) for x, g in zip(inputs, gradients, strict=True)]

    def sums(weights: Tensor) -> dict[Any, Tensor]:
        return {weight: torch.cat([weight_sum(weights) for _, weight_sum in parts])}

    return Share(grad_samples, [norms for norms, _ in parts], sums)


def record_products(
    layer: nn.Module, calls: list[LayerCall], parameters: Sequence[nn.Parameter], inputs: Sequence[Tensor]
) -> list[Tensor]:
    """Return the products of inputs and parts of a matrix's rows, and append them to `calls`; arguments as of `share_of_rows`.

    Autograd knows nothing of the matrix here: `share_of_rows` gives its gradient.
    """
    parts = zip(*(each.detach().chunk(len(inputs)) for each in parameters), strict=True)
    products = [nn.functional.linear(x, *part) for x, part in zip(inputs, parts, strict=True)]
    for each in products:
        if not each.requires_grad:
            each.requires_grad_()
    trained = [each for each in parameters if each.requires_grad]
    calls.append(LayerCall.of(layer, trained, partial(share_of_rows, parameters), inputs, products))
    return products


def batch_first(layer: Any, values: Tensor) -> Tensor:
    """Return inputs or outputs with the batch as first dimension, and the second one first for a layer without `batch_first`."""
    return values if layer.batch_first else values.transpose(0, 1)


def record_unknown(layer: nn.Module, calls: list[LayerCall]) -> None:
    """Append a call to `calls` that holds no examples, so that this engine does not train the model."""
    calls.append(LayerCall.of(layer, [], partial(share_of_rows, []), [torch.empty(0)], []))


def _matrix(inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return the norms of the gradients of a matrix, shape (B,), and the function of their weighted sums, shape (O, K).

    Args:
      inputs: of each use of the matrix, shape (B, L, K); examples or positions may come first in memory.
      gradients: of its products with the inputs, shape (B, L, O), in the same order.
    """
    batch, positions, size = inputs.shape
    outputs = gradients.shape[2]
    turned = size < min(VECTOR, outputs)  # transposed gradients, see `_convolution`
    shape = (size, outputs) if turned else (outputs, size)
    single = positions == 1  # the norm is a product of norms
    buffer = None if single else _buffer(inputs, gradients, batch, *shape)
    few = batch if single else max(1, CHUNK // (size * outputs))  # examples at a time
    one, other = (gradients, inputs) if turned else (inputs, gradients)
    norms = _products(zip(one.split(few), other.split(few), strict=True), buffer)

    def weight_sum(weights: Tensor) -> Tensor:
        if buffer is not None:
            total = (weights @ buffer.flatten(1)).view(shape)
            return total.t() if turned else total
        scale = weights[:, None, None]
        narrow = size < outputs  # scale the smaller factor
        sides = (gradients, inputs * scale) if narrow else (gradients * scale, inputs)
        if not gradients.is_contiguous():
            sides = [each.transpose(0, 1) for each in sides]
        output_side, input_side = (each.flatten(0, 1) for each in sides)
        return output_side.t() @ input_side

    return norms, weight_sum


def _windows(layer: Any, padded: Tensor, outputs: Sequence[int]) -> Tensor:
    """Return the inputs of each output of a convolution, shape (n * groups, L, K).

    L are the outputs of a channel, of shape `outputs`; K are the inputs of one in its group.
    """
    batch, channels = len(padded), layer.in_channels // layer.groups
    example, channel, *steps = padded.stride()
    places = [(n, step * by) for n, step, by in zip(outputs, steps, layer.stride, strict=True)]
    kernel = [(n, step * by) for n, step, by in zip(layer.kernel_size, steps, layer.dilation, strict=True)]
    # One channel is copied along the image's rows, several are copied along the channels.
    axes = (*kernel, *places) if channels == 1 else (*places, *kernel, (channels, channel))
    shape, strides = zip((batch, example), (layer.groups, channel * channels), *axes, strict=True)
    view = padded.as_strided(shape, strides)
    count, positions = batch * layer.groups, math.prod(outputs)
    if channels == 1:
        return view.reshape(count, -1, positions).mT
    return view.reshape(count, positions, -1)


def _convolution(layer: Any, inputs: Tensor, gradients: Tensor) -> Share:
    """Return the share of a convolution, as `Rule`: a linear layer on the windows of its inputs, in each of its groups."""
    bias = {layer.bias: gradients.flatten(2).sum(2)} if _learns(layer, "bias") else {}
    weight = layer.weight
    if not weight.requires_grad:
        return Share(bias)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    sides = layer._reversed_padding_repeated_twice
    padded = nn.functional.pad(inputs, sides, mode) if any(sides) else inputs
    batch, outputs, *places = gradients.shape
    deep = layer.in_channels // layer.groups >= DEEP and gradients.is_cpu
    if deep and _small(inputs, gradients, batch * weight.numel()):
        return _deep_convolution(layer, padded, gradients, bias)
    size, each = weight[0].numel(), outputs // layer.groups  # inputs and channels of an output in a group
    # Gradients are held transposed if that makes their last dimension longer: it is what fills a processor's vectors.
    turned = size < max(VECTOR, 2 * each)
    shape = (size, each) if turned else (each, size)
    buffer = _buffer(inputs, gradients, batch * layer.groups, *shape)
    few = max(1, CHUNK // (math.prod(places) * size * layer.groups))  # examples at a time

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the factors of some examples' gradients: windows and output gradients, in the order of `_products`."""
        for images, back in zip(padded.split(few), gradients.split(few), strict=True):
            heads = back.movedim(1, -1).reshape(len(back), math.prod(places), layer.groups, -1)
            windows, heads = _windows(layer, images, places), heads.transpose(1, 2).flatten(0, 1)
            yield (heads, windows) if turned else (windows, heads)

    norms = _products(pairs(), buffer).view(batch, -1)

    def sums(weights: Tensor) -> dict[Any, Tensor]:
        if buffer is not None:
            weight_sum = (weights @ buffer.view(batch, -1)).view(layer.groups, *buffer.shape[1:])
            weight_sum = weight_sum.mT.contiguous() if turned else weight_sum
            return {weight: weight_sum.view(outputs, *layer.kernel_size, -1).movedim(-1, 1)}
        scaled = gradients * weights.view(-1, *[1] * (gradients.dim() - 1))
        return {weight: _kernel_gradient(layer, padded, scaled)}

    return Share(bias, norms.unbind(1), sums)


def _kernel_gradient(layer: Any, padded: Tensor, gradients: Tensor) -> Tensor:
    """Return the gradient of a convolution's kernels, summed over examples.

    Args:
      layer: the convolution.
      padded: its inputs with their padding, shape (B, C, ...); (1, N C, ...) makes N examples groups of one, whose kernels'
        gradients are returned one below another.
      gradients: of its outputs, shape (B, O, ...) or (1, N O, ...).
    """
    gradient_of = (kernels.conv1d_weight, kernels.conv2d_weight, kernels.conv3d_weight)[padded.dim() - 3]
    examples = gradients.shape[1] // layer.out_channels
    shape = [examples * layer.out_channels, *layer.weight.shape[1:]]
    return gradient_of(padded, shape, gradients, layer.stride, 0, layer.dilation, examples * layer.groups)


def _deep_convolution(layer: Any, padded: Tensor, gradients: Tensor, bias: dict[Any, Tensor]) -> Share:
    """Return the share of a convolution of many channels: some examples at a time are the groups of one convolution.

    Args:
      layer: the convolution.
      padded: its inputs with their padding, shape (B, C, ...).
      gradients: of its outputs, shape (B, O, ...).
      bias: the gradients of its bias, if it learns one.
    """
    buffer = gradients.new_empty(len(gradients), *layer.weight.shape)
    few = max(1, 2 * CHUNK // (padded[0].numel() + gradients[0].numel() + buffer[0].numel()))
    for images, back, part in zip(*(each.split(few) for each in (padded, gradients, buffer)), strict=True):
        one = [each.contiguous().flatten(0, 1)[None] for each in (images, back)]
        part.copy_(_kernel_gradient(layer, *one).view(part.shape))

    def sums(weights: Tensor) -> dict[Any, Tensor]:
        return {layer.weight: (weights @ buffer.flatten(1)).view(layer.weight.shape)}

    return Share(bias, [norms_of(buffer)], sums)


def _embedding(layer: Any, inputs: Tensor, gradients: Tensor) -> Share:
    """Return the share of an embedding, as `Rule`: the gradient of a row is the sum over the positions with its index."""
    indices = inputs.reshape(len(inputs), -1)
    return embedding_share(layer.weight, indices, without_padding(layer, indices, gradients))


def without_padding(layer: Any, indices: Tensor, gradients: Tensor) -> Tensor:
    """Return the gradients of an embedding's outputs, shape (B, L, K), zero at its index of padding, which has none.

    Args:
      layer: the embedding.
      indices: shape (B, L).
      gradients: of the outputs, B L K numbers in any shape.
    """
    rows = gradients.reshape(*indices.shape, -1)
    if layer.padding_idx is None:
        return rows
    return rows.masked_fill((indices == layer.padding_idx).unsqueeze(2), 0)


def embedding_share(weight: nn.Parameter, indices: Tensor, gradients: Tensor) -> Share:
    """Return the share of an embedding's matrix.

    Args:
      weight: the matrix, shape (rows, K).
      indices: shape (B, L).
      gradients: of the outputs, shape (B, L, K).
    """
    batch, size = len(indices), weight.shape[1]
    rows = gradients.clone(memory_format=torch.contiguous_format).view(-1, size)
    # An example's rows of one index are added up in the first of them, so that its gradient is rounded by itself.
    sorted_indices, order = indices.sort(stable=True)
    # Whether a sorted place has the index of the place before it.
    again = sorted_indices[:, 1:] == sorted_indices[:, :-1]
    examples, places = (torch.arange(n, device=indices.device) for n in indices.shape)
    order += len(places) * examples[:, None]  # positions among the rows of all examples
    # Sorted place where each place's index begins, without that of place 0.
    first = places[1:].masked_fill(again, 0).cummax(1).values
    later = order[:, 1:][again]
    rows.index_add_(0, order.gather(1, first)[again], rows[later])
    rows[later] = 0
    norms = torch.linalg.vector_norm(norms_of(rows).view(batch, -1).double(), dim=1)

    def sums(weights: Tensor) -> dict[Any, Tensor]:
        total = torch.zeros_like(weight, requires_grad=False)
        weighted = (rows.view(batch, -1) * weights[:, None]).view(-1, size)
        return {weight: total.index_add_(0, indices.flatten(), weighted)}

    return Share({}, [norms], sums)


def _layer_norm(layer: Any, inputs: Tensor, gradients: Tensor) -> Share:
    """Return the share of a layer normalisation, as `Rule`."""
    normal = nn.functional.layer_norm(inputs, layer.normalized_shape, eps=layer.eps)
    between = tuple(range(1, inputs.dim() - len(layer.normalized_shape)))
    return _affine(layer, normal, gradients, between)


def _rms_norm(layer: Any, inputs: Tensor, gradients: Tensor) -> Share:
    """Return the share of a normalisation by the root of the mean square, as `Rule`."""
    normal = nn.functional.rms_norm(inputs, layer.normalized_shape, eps=layer.eps)
    between = tuple(range(1, inputs.dim() - len(layer.normalized_shape)))
    return _affine(layer, normal, gradients, between)


def _group_norm(layer: Any, inputs: Tensor, gradients: Tensor) -> Share:
    """Return the share of a group normalisation, as `Rule`."""
    # Of images with channels last, torch's kernel takes up to 16 times as long.
    normal = nn.functional.group_norm(inputs.contiguous(), layer.num_groups, eps=layer.eps)
    return _affine(layer, normal, gradients.contiguous(), tuple(range(2, inputs.dim())))


def _affine(layer: Any, normal: Tensor, gradients: Tensor, over: tuple[int, ...]) -> Share:
    """Return the share of weight * normal + bias, whose gradients are sums over the dimensions `over`; overwrite `normal`."""
    grad_samples: dict[Any, Tensor] = {}
    if _learns(layer, "bias"):
        grad_samples[layer.bias] = gradients.sum(over) if over else gradients
    if _learns(layer, "weight"):
        products = normal.mul_(gradients)
        grad_samples[layer.weight] = products.sum(over) if over else products
    return Share(grad_samples)


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    NonDynamicallyQuantizableLinear: _linear,  # of attention's outputs
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
    nn.Embedding: _embedding,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
    nn.GroupNorm: _group_norm,
}


def plain_embedding(layer: nn.Embedding) -> bool:
    """Return whether an embedding's gradient is the sum over its indices, and no option changes its weights."""
    return layer.max_norm is None and not layer.scale_grad_by_freq and not layer.sparse
