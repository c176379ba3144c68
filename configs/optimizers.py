"""Optimizers by name: each one's class in torch.optim, and the keywords and values that its constructor takes."""

import inspect
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch

from ..base.refusal import Refusal
from ..messages.local_training import Optimizer, Option
from .strict import nearest

HOW = (
    "lr",
    "maximize",
    "capturable",
    "differentiable",
)  # the rate has a key; the others say how a class computes
OF_ADAMBC = ("betas", "eps", "weight_decay")  # of Adam's; tasks.optimizers.AdamBC has no other


def class_of(name: str) -> type[torch.optim.Optimizer]:
    """Return torch's class for a name of `OPTIMIZERS`; `dp_adambc` has keywords of Adam, with their ranges."""
    wanted = "adam" if name == "dp_adambc" else name
    classes = (each for key, each in vars(torch.optim).items() if key.lower() == wanted)
    return next(each for each in classes if isinstance(each, type))


@cache
def keywords_of(name: str) -> Mapping[str, Option]:
    """Return the keywords of a class that are numbers, switches or lists of numbers, with its defaults; none of `auto`."""
    if name == "auto":
        return {}
    return {
        key: float(each.default) if type(each.default) is int and each.annotation is not int else each.default
        for key, each in inspect.signature(class_of(name)).parameters.items()
        if isinstance(each.default, bool | int | float | tuple)
        and key not in HOW
        and (name != "dp_adambc" or key in OF_ADAMBC)
    }


def as_torch_types(name: str, options: Mapping[str, Option]) -> dict[str, Option]:
    """Return the options with whole numbers as fractions, unless torch's keyword is a whole number."""
    fractions = {key for key, default in keywords_of(name).items() if type(default) is float}
    return {
        key: float(value) if type(value) is int and key in fractions else value
        for key, value in options.items()
    }


def mistakes_of_options(optimizer: Optimizer) -> Iterator[Refusal]:
    """Yield a refusal of each option that the class does not take, or else of the value that its constructor refuses."""
    name, options, known = optimizer.name, dict(optimizer.options), keywords_of(optimizer.name)
    remedies = {key: _remedy(name, known, key, value) for key, value in options.items()}
    mistakes = [Refusal(f"optimizer.{key}", options[key], text) for key, text in remedies.items() if text]
    yield from mistakes
    error = None if mistakes or not options else _error(name, options)
    if error is None:
        return
    for key, value in options.items():  # the one without which torch takes the others
        if _error(name, {other: options[other] for other in options if other != key}) is None:
            remedy = f"torch refuses it ({error}); leave it out, or give another: torch's own is {known[key]}"
            yield Refusal(f"optimizer.{key}", value, remedy)
            return
    yield Refusal("optimizer", name, f"torch refuses its options ({error}); leave them out, or give others")


def _remedy(name: str, known: Mapping[str, Option], key: str, value: Option) -> str:
    """Return what to do about an option by torch's signature alone; nothing if it is right."""
    if key not in known:
        return f"{name} has no such keyword; {nearest(key, [*known, 'lr'])}"
    match known[key]:
        case bool():
            return "" if isinstance(value, bool) else "must be true or false"
        case int():
            return "" if type(value) is int else "must be a whole number"
        case float():
            return "" if type(value) in (int, float) else "must be a number"
        case numbers:
            right = isinstance(value, tuple) and len(value) == len(numbers)
            return "" if right else f"must be a list of {len(numbers)} numbers"


def _error(name: str, options: Mapping[str, Any]) -> Exception | None:
    """Return what torch's constructor raises for one matrix, which Muon wants; None if it takes the options."""
    try:
        class_of(name)([torch.zeros(2, 2, requires_grad=True)], **options)
    except (ValueError, TypeError, ArithmeticError) as error:
        return error
    return None
