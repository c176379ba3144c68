"""Which models can be trained with record-level privacy."""

from __future__ import annotations

from opacus.validators import ModuleValidator
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from ..privacy.refusal import Refusal


def check_trainable(model: nn.Module) -> None:
    """Refuse a model whose gradient for one example depends on the others.

    Batch normalisation is refused frozen too: Opacus lets it pass when its parameters do not train, yet in training
    mode it still mixes the examples of a batch, and its running statistics would leave un-noised.

    Raises:
      Refusal: naming the layer and what to put in its place.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm):
            remedy = (
                f"use torch.nn.GroupNorm(groups, {layer.num_features}), which looks at one example at a time"
            )
            raise Refusal("model", f"{name or 'model'}: {type(layer).__name__}", remedy)
    problems = ModuleValidator.validate(model, strict=False)
    if problems:
        raise Refusal("model", type(model).__name__, f"DP-SGD cannot train it: {problems[0]}")
