"""Engines of DP-SGD by Opacus: its hooks, which hold every example's gradient, and its ghost clipping."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from opacus.grad_sample import GradSampleHooks
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleHooksFastGradientClipping
from torch import Tensor, nn

from ...base.refusal import Refusal
from ...tasks.batch_memory import outputs_of
from ...tasks.data import leaves
from .book_keeping import uses
from .clipped import ClippedParameters, ClippedSums
from .example_gradients import GHOST
from .forward import Forward, are_close, moved_from_zero

if TYPE_CHECKING:
    from ...tasks.data import Inputs


@contextmanager
def hooks(model: nn.Module, forward: Forward, clipped: ClippedParameters) -> Generator[ClippedSums]:
    """Yield the function that computes clipped sums by Opacus' hooks, which hold all examples' gradients at once.

    Args:
      model: to be trained.
      forward: returns outputs and loss of some rows.
      clipped: has the parameters and the clipping norm.
    """
    attached = GradSampleHooks(model, batch_first=True, loss_reduction="mean")

    def clipped_sums(rows: Tensor, batch: int) -> Tensor:
        clipped.clear()
        _, loss = forward(rows, batch)
        loss.backward()
        samples = [_sample_of(parameter) for parameter in clipped.params]
        _check_batch([len(each) for each in samples], batch)
        return clipped.take(samples, len(rows))

    try:
        yield clipped_sums
    finally:
        attached.cleanup()


def _sample_of(parameter: Any) -> Tensor:
    """Return the examples' gradients that the hooks left on a parameter, of all calls of its layer."""
    sample = parameter.grad_sample
    if isinstance(sample, Tensor):
        return sample
    if not isinstance(sample, list):
        raise TypeError("the step does not use a parameter, or its layer has no rule")
    return torch.cat(sample, dim=0)


class OwnGhost(GradSampleHooksFastGradientClipping):
    """Opacus' ghost clipping with fedveil's norms, which are never too small, for the layers in `GHOST`."""

    NORM_SAMPLERS: Mapping[Any, Any] = {**GradSampleHooksFastGradientClipping.NORM_SAMPLERS, **GHOST}


@contextmanager
def ghost(model: nn.Module, forward: Forward, clipped: ClippedParameters) -> Generator[ClippedSums]:
    """Yield the function that computes clipped sums by Opacus' ghost clipping (Li et al. 2022, arXiv:2110.05679).

    One backward pass gives the norms, a second one the sum with weighted losses.

    Arguments as of `hooks`; the model gives one tensor, and its layers have Opacus' rules or those of `GHOST`.

    Raises:
      Refusal: Opacus has no rule for one of the layers.
    """
    options: dict[str, Any] = {"max_grad_norm": clipped.max_grad_norm, "use_ghost_clipping": True}
    attached = OwnGhost(model, batch_first=True, loss_reduction="mean", **options)

    def clipped_sums(rows: Tensor, batch: int) -> Tensor:
        attached.enable_hooks()
        result, loss = forward(rows, batch)
        (outputs,) = leaves(result)
        (back,) = torch.autograd.grad(loss, [outputs], retain_graph=True)
        outputs.backward(back, retain_graph=True)
        _check_batch([len(p._norm_sample) for p in clipped.params], batch)
        weights = attached.get_clipping_coef()
        weights[len(rows) :] = 0
        finite = attached.get_norm_sample().isfinite()[: len(rows)]
        clipped.clear()
        attached.disable_hooks()
        # Each example's loss depends only on its own outputs, so weights on these weight the losses.
        outputs.backward(back * (weights * batch).view(-1, *[1] * (back.dim() - 1)))
        clipped.write([parameter.grad for parameter in clipped.params])
        return finite

    try:
        yield clipped_sums
    except NotImplementedError as error:
        raise Refusal("privacy.gradients", "ghost", f"{error}; use auto or hooks") from None
    finally:
        attached.cleanup()


def ghost_can(model: nn.Module, batch: Inputs) -> bool:
    """Return whether the model gives one tensor, and uses each weight of which ghost clipping computes only norms once."""
    layers = [m for m in model.modules() if type(m) in GradSampleHooksFastGradientClipping.NORM_SAMPLERS]
    used = uses(outputs := outputs_of(model, batch))
    once = all(used[p] == 1 for layer in layers for p in layer.parameters() if p.requires_grad)
    return once and len(outputs) == 1


def hooks_see(model: nn.Module, batch: Inputs) -> bool:
    """Return whether Opacus' hooks find the whole gradient of each example: their mean must be autograd's gradient.

    They do not where a weight is also used outside its layer, or a layer's option has no rule. Ghost clipping would then
    add up whole gradients by the norms of parts.
    """
    parameters: list[Any] = [p for p in model.parameters() if p.requires_grad]
    # Whatever Opacus or the model's own code raises, another engine is chosen.
    with suppress(Exception), ExitStack() as after, moved_from_zero(model, batch) as inputs:
        after.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # of hooks that fire, and of layers that are slow under vmap
        after.callback(model.zero_grad, set_to_none=True)
        after.callback(GradSampleHooks(model, batch_first=True, loss_reduction="mean").cleanup)
        outputs = [each for each in outputs_of(model, inputs) if each.requires_grad]
        torch.autograd.backward([(each * torch.rand(each.shape).to(each)).mean() for each in outputs])
        embeddings: list[Any] = [layer for layer in model.modules() if isinstance(layer, nn.Embedding)]
        for layer in embeddings:
            if layer.padding_idx is not None and layer.weight.requires_grad:
                layer.weight.grad_sample[:, layer.padding_idx] = 0  # as autograd's gradient is
        if any(len(p.grad_sample) != len(leaves(batch)[0]) for p in parameters):
            return False
        return are_close([p.grad_sample.mean(0) for p in parameters], [p.grad for p in parameters])
    return False


def _check_batch(sizes: list[int], batch: int) -> None:
    """Check that each parameter has one gradient for each example of the batch; otherwise a clip bounds something else."""
    if set(sizes) != {batch}:
        remedy = "every trainable layer must see the batch of examples as its first dimension"
        raise Refusal("model", f"{batch} examples became {max(sizes)}", remedy)
