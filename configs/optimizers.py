"""Optimizers by name: each one's class in torch.optim, and the keywords and values that its constructor takes."""

import inspect
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch

from ..base.refusal import Refusal
from ..messages.local_training import Optimizer, Option
from .strict import nearest

# Keywords that are no options: the rate has a key of its own, and the others say how a class computes.
FIXED = ("lr", "maximize", "capturable", "differentiable")
OF_ADAMBC = ("betas", "eps", "weight_decay")  # of Adam's; tasks.optimizers.AdamBC uses no other
CLASSES: Mapping[str, type[Any]] = {
    key.lower(): each for key, each in vars(torch.optim).items() if isinstance(each, type)
} | {"dp_adambc": torch.optim.Adam}
"""Classes of torch.optim by their names in small letters, which are those of `OPTIMIZERS`; of `dp_adambc` it is Adam."""


@cache
def keywords_of(name: str) -> Mapping[str, Option]:
    """Return the keywords of a class that are numbers, switches or lists of numbers, with torch's own values."""
    defaults = {key: each.default for key, each in inspect.signature(CLASSES[name]).parameters.items()}
    used = OF_ADAMBC if name == "dp_adambc" else defaults
    return {k: defaults[k] for k in used if k not in FIXED and isinstance(defaults[k], int | float | tuple)}


def mistakes_of_options(optimizer: Optimizer) -> Iterator[Refusal]:
    """Yield a refusal of each option that the class does not take, or else of the value that its constructor refuses."""
    name, options = optimizer.name, dict(optimizer.options)
    for key, value in optimizer.options:
        keywords = keywords_of(name)
        if key not in keywords:
            remedy = f"{name} has no such keyword; {nearest(key, [*keywords, 'lr'])}"
        elif len({(isinstance(each, bool), np.shape(each)) for each in (value, keywords[key])}) == 2:
            remedy = f"give a value of the kind of torch's own, which is {keywords[key]}"
        elif (error := _error(name, options)) and error != _error(name, {**options, key: keywords[key]}):
            remedy = f"torch refuses it ({error}); give another value, or leave it out"
        else:
            continue
        yield Refusal(f"optimizer.{key}", value, remedy)


def _error(name: str, options: Mapping[str, Any]) -> str:
    """Return what torch's constructor says against options, with one matrix, as Muon wants; nothing if it takes them."""
    try:
        CLASSES[name]([torch.zeros(2, 2, requires_grad=True)], **options)
    except (ValueError, TypeError) as error:
        return str(error)
    return ""
