"""Clipped sums from one backward pass: book-keeping (Bu et al. 2022, arXiv:2210.00038, algorithm 1).

Forward hooks record the inputs of each layer; one backward pass gives the gradients of the layers' outputs, without
those of parameters. Both give each example's norm and, from the norms of all layers, the clipped sum.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ...tasks.batch_memory import outputs_of
from ...tasks.data import leaves
from . import attention, recurrent
from .clipped import ClippedParameters, ClippedSums
from .example_gradients import RULES, LayerCall, Share, norms_of, plain_embedding
from .forward import Forward
from .repeated import Use, combine, share_of_uses, use_of

if TYPE_CHECKING:
    from ...tasks.data import Inputs


class Substitute(NamedTuple):
    """Functions in the place of a layer's own whose products no hook sees.

    Attributes:
      forward: takes the layer, the list of calls and the layer's arguments; returns what the layer does, and appends its
        products to the list.
      obstacle: returns why it cannot, for a layer; None if it can.
    """

    forward: Callable[..., Any]
    obstacle: Callable[[Any], str | None]


SUBSTITUTES: dict[type[nn.Module], Substitute] = {
    nn.MultiheadAttention: Substitute(attention.forward, attention.obstacle),
    **dict.fromkeys((nn.RNN, nn.LSTM, nn.GRU), Substitute(recurrent.forward, recurrent.obstacle)),
}


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Return the layers that have trainable parameters of their own, or use those of a layer below in a substitute's place."""
    pairs = [(layer, layer.parameters(recurse=type(layer) in SUBSTITUTES)) for layer in model.modules()]
    return [layer for layer, parameters in pairs if any(p.requires_grad for p in parameters)]


@contextmanager
def recorded_calls(model: nn.Module) -> Generator[list[LayerCall]]:
    """Yield a list to which each call of a trainable layer is appended.

    Layers in `SUBSTITUTES` compute by functions that record their products of matrices, since no hook sees those.
    """
    calls: list[LayerCall] = []

    def record(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        only = inputs if len(inputs) == 1 else (torch.empty(0),)
        own = [p for p in layer.parameters(recurse=False) if p.requires_grad]
        calls.append(LayerCall.of(layer, own, partial(_share_of, layer), only, [output]))

    with ExitStack() as after:
        for layer in layers_of(model):
            if type(layer) in SUBSTITUTES:
                after.callback(vars(layer).pop, "forward", None)
                vars(layer)["forward"] = partial(SUBSTITUTES[type(layer)].forward, layer, calls)
            else:
                after.callback(layer.register_forward_hook(record).remove)
        yield calls


def _share_of(layer: nn.Module, inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Share:
    return RULES[type(layer)](layer, inputs[0], gradients[0])


@contextmanager
def book_keeping(model: nn.Module, forward: Forward, clipped: ClippedParameters) -> Generator[ClippedSums]:
    """Yield the function that computes clipped sums by book-keeping, on a model without `obstacle`; arguments as of `hooks`."""
    parameters = {p for p in model.parameters() if p.requires_grad}
    with recorded_calls(model) as calls:

        def clipped_sums(rows: Tensor, batch: int) -> Tensor:
            calls.clear()
            _, loss = forward(rows, batch)
            if not uses_of(calls).keys() >= parameters:
                raise RuntimeError(f"{len(calls)} calls do not use every parameter")
            backward = torch.autograd.grad(loss, [edge for call in calls for edge in call.edges])
            with torch.no_grad():
                return _clip(calls, backward, len(rows), batch, clipped)

        yield clipped_sums


def uses_of(calls: Sequence[LayerCall]) -> Counter[Tensor]:
    """Return how many calls use each parameter."""
    return Counter(parameter for call in calls for parameter in call.parameters)


def _clip(
    calls: Sequence[LayerCall], backward: Sequence[Tensor], rows: int, batch: int, clipped: ClippedParameters
) -> Tensor:
    """Write the clipped sums over the first `rows` of the `batch` examples, as `ClippedSums`; the others are padding.

    `backward` are the gradients of the calls' outputs for the mean loss. If one row's is not finite, nothing is written.
    """
    shares = _shares(calls, backward, batch)
    grad_samples: dict[Any, Tensor] = {}
    for share in shares:
        for parameter, value in share.grad_samples.items():
            if parameter in grad_samples:
                value = value + grad_samples[parameter]
            grad_samples[parameter] = value
    # Gradients that are held for every example, one row for each.
    small = torch.cat([backward[0].new_empty(batch, 0), *[g.flatten(1) for g in grad_samples.values()]], 1)
    parts = torch.stack([norms_of(small), *[norm for share in shares for norm in share.norms]])
    norms = torch.linalg.vector_norm(parts.double(), dim=0) * batch  # the loss is a mean
    finite = norms.isfinite()[:rows]
    if bool(finite.all()):
        factors = (clipped.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)  # as Opacus clips
        weights = (factors * batch).to(small.dtype)
        weights[rows:] = 0  # of the padding
        sums = (weights @ small).split([parameter.numel() for parameter in grad_samples])
        _set_sums({p: value.view(p.shape) for p, value in zip(grad_samples, sums, strict=True)})
        for share in shares:
            _set_sums(share.sums(weights))
    return finite


def _shares(calls: Sequence[LayerCall], backward: Sequence[Tensor], batch: int) -> list[Share]:
    """Return the shares of the calls, in which each parameter has norms once; arguments as of `_clip`."""
    shares: list[Share] = []
    matrices: dict[Any, list[Use]] = {}  # uses of each matrix that has several
    following, used = iter(backward), uses_of(calls)
    for call in calls:
        if not call.holds(batch):
            raise RuntimeError(f"{type(call.layer).__name__} does not hold one entry for each example")
        gradients = list(islice(following, len(call.edges)))
        if all(used[parameter] == 1 for parameter in call.parameters):
            shares.append(call.share_of(call.inputs, gradients))
            continue
        share, uses = use_of(call, gradients)
        shares.append(share)
        for use in uses:
            matrices.setdefault(use.layer.weight, []).append(use)
    if any(matrices.keys() & share.grad_samples.keys() for share in shares):
        raise RuntimeError("a matrix is used in a layer that has no rule for it")
    return shares + [share_of_uses(weight, uses) for weight, uses in matrices.items()]


def _set_sums(sums: dict[Any, Tensor]) -> None:
    for parameter, value in sums.items():
        parameter.summed_grad = value


def obstacle(model: nn.Module, batch: Inputs) -> str | None:
    """Return why this engine cannot train the model; None if it can.

    Args:
      model: is run once.
      batch: inputs of some examples; their values are irrelevant.
    """
    for layer in layers_of(model):
        if "forward" in vars(layer):
            return f"{type(layer).__name__} has a forward function of its own"
        names = [name for name, _ in layer.named_parameters(recurse=False)]
        if type(layer) in SUBSTITUTES:
            if reason := SUBSTITUTES[type(layer)].obstacle(layer):
                return reason
        elif type(layer) not in RULES or not {"weight", "bias"}.issuperset(names):
            return f"{type(layer).__name__} has no rule"
        if isinstance(layer, nn.Embedding) and not plain_embedding(layer):
            return "Embedding has an option that has no rule"
    with recorded_calls(model) as calls:
        outputs = [each for each in outputs_of(model.train(), batch) if each.requires_grad]
        used = uses(outputs)
    for call in calls:
        if not call.holds(len(leaves(batch)[0])):
            return f"the inputs of {type(call.layer).__name__} do not hold one entry for each example"
    users: dict[Any, list[nn.Module]] = {}
    for call in calls:
        if type(call.layer) in SUBSTITUTES:  # whose products use no parameter in the graph
            used.update(call.parameters)
        for parameter in call.parameters:
            users.setdefault(parameter, []).append(call.layer)
    for parameter in model.parameters():
        layers = users.get(parameter, [])
        if parameter.requires_grad and (used[parameter] != len(layers) or not combine(layers)):
            return f"a parameter is used {used[parameter]} times, {len(layers)} of them in layers"
    edges = [(call.layer, edge) for call in calls for edge in call.edges]
    sums: list[Any] = [each.sum() for each in outputs]
    gradients = torch.autograd.grad(sums, [edge for _, edge in edges], allow_unused=True)
    for (layer, _), gradient in zip(edges, cast("Sequence[Tensor | None]", gradients), strict=True):
        if gradient is None:
            return f"no output reads what {type(layer).__name__} computes"
    return None


def uses(outputs: Sequence[Tensor]) -> Counter[Tensor]:
    """Return how often the graph that computed these outputs uses each trainable parameter."""
    used: Counter[Tensor] = Counter()
    nodes: list[Any] = [each.grad_fn for each in outputs if each.grad_fn is not None]
    visited = set(nodes)
    while nodes:
        for following, _ in nodes.pop().next_functions:
            if hasattr(following, "variable"):
                used[following.variable] += 1
            elif following is not None and following not in visited:
                visited.add(following)
                nodes.append(following)
    return used
