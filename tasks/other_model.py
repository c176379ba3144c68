"""Model in place of a task's own: a class given by name, with equal values wherever it is created."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from ..base.refusal import Refusal
from .protocol import Task

if TYPE_CHECKING:
    from torch import nn

STUDENT = "student"  # name of a task's shipped small model
SEED = 0  # of the values of a model of a class given by name


@dataclass(frozen=True)
class OtherModel:
    """Factory of a model, in place of a task's `model`.

    Attributes:
      target: `module:Class`, called without arguments.
    """

    target: str

    def __call__(self) -> nn.Module:
        return model_named(self.target, "task.model")


def model_named(target: str, field: str) -> nn.Module:
    """Return a new model of a class, with the same values on every call; refuse a class that makes none.

    Args:
      target: `module:Class`, called without arguments.
      field: configuration key or option that names the class, for refusals.
    """
    import torch  # takes a second

    module, _, name = target.partition(":")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            model = getattr(import_module(module), name)()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        remedy = f"name a class as module:Class that takes no arguments ({type(error).__name__}: {error})"
        raise Refusal(field, target, remedy) from None
    if not isinstance(model, torch.nn.Module):
        raise Refusal(field, target, f"makes a {type(model).__name__}; it must make a torch.nn.Module")
    return model


def with_model(task: Task, target: str, allow: tuple[str, ...]) -> Task:
    """Return the task with another model; refuse a class that is not allowed, or makes no model.

    Args:
      task: a task, which is not changed.
      target: `module:Class` of the model.
      allow: modules that may be imported.
    """
    if ":" not in target:
        remedy = "mnist5k and fashion_mnist ship with one; name a class of your own as module:Class"
        raise Refusal("task.model", target, remedy)
    if (module := target.partition(":")[0]) not in allow:
        remedy = f"list its module among the allowed ones (now: {', '.join(allow) or 'none'}): allow_modules=[{module}]"
        raise Refusal("task.model", target, remedy)
    if getattr(task, "own", None) is not None:
        remedy = "the task trains arrays itself and has no torch model; leave it out"
        raise Refusal("task.model", target, remedy)
    make_model = OtherModel(target)
    make_model()  # refuses a class that makes no model
    copied = copy(task)
    try:
        object.__setattr__(copied, "model", make_model)
    except AttributeError as error:
        remedy = f"{type(task).__name__} has slots; give it a __dict__, or the model in its own code"
        raise Refusal("task.model", target, remedy) from error
    return copied
