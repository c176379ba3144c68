"""Clipped sums from one backward pass: book-keeping (Bu et al. 2022, arXiv:2210.00038, algorithm 1).

Forward hooks record the inputs of each layer; one backward pass gives the gradients of the layers' outputs, without
those of parameters. Both give each example's norm and, from the norms of all layers, the clipped sum.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call

from ...tasks.data import leaves, padded_size, run_on
from .example_gradients import RULES, Share, norms_of, plain_embedding

if TYPE_CHECKING:
    from ...tasks.data import Inputs

# Returns the outputs for the examples in these rows, padded to a given number, and the loss, their mean.
Forward = Callable[[Tensor, int], tuple[Any, Tensor]]
# Leaves the clipped sum over these rows on the parameters, and returns whether each example's gradient is finite.
ClippedSums = Callable[[Tensor], Tensor]


class Noted(NamedTuple):
    """Call of one layer.

    Attributes:
      layer: the called one.
      inputs: of the call, shape (n, ...).
      version: number of in-place changes of the inputs before the call.
      edge: of the outputs in torch's graph.
    """

    layer: nn.Module
    inputs: Tensor
    version: int
    edge: GradientEdge


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Return the layers that have trainable parameters of their own."""
    return [m for m in model.modules() if any(p.requires_grad for p in m.parameters(recurse=False))]


@contextmanager
def noting(model: nn.Module) -> Generator[list[Noted]]:
    """Yield a list to which each call of a trainable layer is appended."""
    notes: list[Noted] = []

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        only = inputs[0].detach() if len(inputs) == 1 else torch.empty(0)
        notes.append(Noted(layer, only, only._version, get_gradient_edge(output)))

    handles = [layer.register_forward_hook(note) for layer in layers_of(model)]
    try:
        yield notes
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def book_keeping(model: nn.Module, forward: Forward, optimizer: DPOptimizer) -> Generator[ClippedSums]:
    """Give the function that computes clipped sums, of a model for which `obstacle` is None; arguments as of `hooks`."""
    layers = len(layers_of(model))
    with noting(model) as notes:

        def clipped_sums(rows: Tensor) -> Tensor:
            notes.clear()
            batch = padded_size(len(rows))
            _, loss = forward(rows, batch)
            calls = tuple(notes)
            if len(calls) != layers:
                raise RuntimeError(f"{len(calls)} calls of {layers} layers")
            backward = torch.autograd.grad(loss, [call.edge for call in calls])
            with torch.no_grad():
                return _clip(calls, backward, len(rows), batch, optimizer)

        yield clipped_sums


def _clip(
    calls: tuple[Noted, ...], backward: tuple[Tensor, ...], rows: int, batch: int, optimizer: DPOptimizer
) -> Tensor:
    shares: list[Share] = []
    for call, gradients in zip(calls, backward, strict=True):
        if len(call.inputs) != batch or call.inputs._version != call.version:
            raise RuntimeError(f"{type(call.layer).__name__} does not hold one entry for each example")
        shares.append(RULES[type(call.layer)](call.layer, call.inputs, gradients))
    grad_samples = {parameter: value for share in shares for parameter, value in share.grad_samples.items()}
    small = torch.cat([backward[0].new_empty(batch, 0), *[g.flatten(1) for g in grad_samples.values()]], 1)
    parts = torch.stack([norms_of(small), *[norm for share in shares for norm in share.norms]])
    norms = torch.linalg.vector_norm(parts.double(), dim=0) * batch  # the loss is a mean
    finite = norms.isfinite()[:rows]
    if bool(finite.all()):
        # As Opacus clips.
        factors = (optimizer.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
        weights = (factors * batch).to(small.dtype)
        weights[rows:] = 0
        sums = (weights @ small).split([parameter.numel() for parameter in grad_samples])
        _set_sums({p: value.view(p.shape) for p, value in zip(grad_samples, sums, strict=True)})
        for share in shares:
            _set_sums(share.sums(weights))
    return finite


def _set_sums(sums: dict[Any, Tensor]) -> None:
    for parameter, value in sums.items():
        parameter.summed_grad = value


def obstacle(model: nn.Module, batch: Inputs) -> str | None:
    """Return why this engine cannot train the model, or None.

    Args:
      model: is run once.
      batch: inputs of some examples; their values are irrelevant.
    """
    for layer in layers_of(model):
        names = [name for name, _ in layer.named_parameters(recurse=False)]
        if type(layer) not in RULES or not {"weight", "bias"}.issuperset(names):
            return f"{type(layer).__name__} has no rule"
        if isinstance(layer, nn.Embedding) and not plain_embedding(layer):
            return "Embedding has an option that has no rule"
    with noting(model) as notes:
        used = uses(outputs_of(model, batch))
    for parameter in model.parameters():
        if parameter.requires_grad and used[parameter] != 1:
            return f"a parameter is used {used[parameter]} times"
    for call in notes:
        if len(call.inputs) != len(leaves(batch)[0]) or call.inputs._version != call.version:
            return f"the inputs of {type(call.layer).__name__} do not hold one entry for each example"
    return None


def outputs_of(model: nn.Module, batch: Inputs) -> list[Tensor]:
    """Return the tensors that the model, run once in training mode, returns; its buffers stay as they are."""
    model.train()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.random.fork_rng(devices=[]):
        return leaves(run_on(lambda *args, **fields: functional_call(model, buffers, args, fields), batch))


def uses(outputs: Sequence[Tensor]) -> Counter[Tensor]:
    """Return how often these outputs use each trainable parameter."""
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
