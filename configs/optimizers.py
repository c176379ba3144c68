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

# Keywords that are no options: the rate has a key of its own, and the others choose an implementation.
FIXED = ("lr", "maximize", "capturable", "differentiable")
OF_ADAMBC = ("betas", "eps", "weight_decay")  # keywords of Adam that tasks.optimizers.AdamBC has too
CLASSES: Mapping[str, type[Any]] = {
    key.lower(): each for key, each in vars(torch.optim).items() if isinstance(each, type)
} | {"dp_adambc": torch.optim.Adam}
"""Classes of torch.optim by their names in small letters, as in `OPTIMIZERS`; `dp_adambc` has the constructor of Adam."""


@cache
def keywords_of(name: str) -> Mapping[str, Option]:
    """Return an optimizer's keywords that are numbers, switches or lists of numbers, with torch's defaults."""
    defaults = {key: each.default for key, each in inspect.signature(CLASSES[name]).parameters.items()}
    used = OF_ADAMBC if name == "dp_adambc" else defaults
    return {k: defaults[k] for k in used if k not in FIXED and isinstance(defaults[k], int | float | tuple)}


def mistakes_of_options(optimizer: Optimizer) -> Iterator[Refusal]:
    """Yield a refusal of each option that the class does not have, or whose value has another type or is refused."""
    name, options = optimizer.name, dict(optimizer.options)
    for key, value in optimizer.options:
        keywords = keywords_of(name)  # not of a task's own optimiser, which has no options
        if key not in keywords:
            remedy = f"{name} has no such keyword; {nearest(key, [*keywords, 'lr'])}"
        elif isinstance(value, bool) != isinstance(keywords[key], bool) or np.shape(value) != np.shape(
            keywords[key]
        ):
            remedy = f"give a value of the kind of torch's own, which is {keywords[key]}"
        elif (error := _error(name, options)) and error != _error(name, {**options, key: keywords[key]}):
            # With torch's default in its place the other options have another error, or none: this one is mistaken.
            remedy = f"torch refuses it ({error}); give another value, or leave it out"
        else:
            continue
        yield Refusal(f"optimizer.{key}", value, remedy)


def _error(name: str, options: Mapping[str, Any]) -> str:
    """Return the error of torch's constructor for options, with one matrix, which Muon needs; empty without an error."""
    try:
        CLASSES[name]([torch.zeros(2, 2, requires_grad=True)], **options)
    except (ValueError, TypeError) as error:
        return str(error)
    return ""
