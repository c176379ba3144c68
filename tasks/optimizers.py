"""Optimisers of a client's parameters: of torch.optim, the task's own, and Adam without the bias of the noise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..base.refusal import Refusal
from ..messages.local_training import OPTIMIZERS, LocalTraining
from .protocol import Task, check_own_training

ELEMENTWISE = frozenset(OPTIMIZERS) - {"auto", "dp_adambc", "adafactor", "muon"}
"""Optimisers whose step of a coordinate depends only on its own gradients, so that stacked models can share one."""


class AdamBC(torch.optim.Adam):
    """Adam on noised gradients, with the variance of the noise taken out of the second moments (DP-AdamBC).

    Tang, Shpilevskiy and Lecuyer 2023 (arXiv:2312.14334, algorithm 1). It uses only released gradients; its `eps` is
    the lower bound of the second moment, the paper's gamma'. Weight decay is decoupled, as AdamW's.
    """

    def __init__(self, parameters: Iterable[Tensor], variance: float, **options: Any) -> None:
        """Create the optimiser; `variance` is that of the noise on each coordinate of a gradient, options are Adam's."""
        super().__init__(parameters, **options)
        self.variance = variance

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one step."""
        for group in self.param_groups:
            rate, (beta1, beta2) = group["lr"], group["betas"]
            for param in [each for each in group["params"] if each.grad is not None]:
                state, gradient = self.state[param], param.grad
                if not state:
                    state.update(steps=0, mean=torch.zeros_like(param), square=torch.zeros_like(param))
                state["steps"] += 1
                state["mean"].lerp_(gradient, 1 - beta1)
                state["square"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                square = state["square"] / (1 - beta2 ** state["steps"]) - self.variance
                mean = state["mean"] / (1 - beta1 ** state["steps"])
                param.mul_(1 - rate * group["weight_decay"])
                param.addcdiv_(mean, square.clamp_(min=group["eps"]).sqrt_(), value=-rate)


def own_optimizer(task: object) -> Callable[[Sequence[Tensor]], torch.optim.Optimizer] | None:
    """Return the task's function from parameters to an optimiser, if it has one."""
    make = getattr(task, "optimizer", None)
    return cast(Callable[[Sequence[Tensor]], torch.optim.Optimizer], make) if callable(make) else None


def optimizer_of(
    task: object, parameters: Sequence[Tensor], training: LocalTraining, noise: float | None = None
) -> torch.optim.Optimizer | None:
    """Return a new optimiser of the parameters; None stands for plain SGD.

    Args:
      task: may define `optimizer(parameters)`, which the name `auto` selects.
      parameters: parameters to train.
      training: settings of the round: name and options of the optimiser, and the learning rate.
      noise: standard deviation of DP-SGD's noise on each coordinate of a gradient; None without it.

    Raises:
      Refusal: the optimiser rejects its options or these parameters, or the task's own has other parameters.
    """
    optimizer, own = training.optimizer, own_optimizer(task)
    if optimizer.name == "auto" and own is not None:
        return _with_these_parameters(own(parameters), parameters)
    if optimizer.plain:
        return None
    from ..configs.optimizers import CLASSES, keywords_of  # plain SGD does without this import

    options: dict[str, Any] = dict(optimizer.options)
    if not options.keys() <= keywords_of(optimizer.name).keys():
        raise Refusal(
            "optimizer", optimizer.name, f"has no keyword {', '.join(options)}; give those of torch's class"
        )
    try:
        if optimizer.name == "dp_adambc":
            if noise is None:
                remedy = "needs the noise of DP-SGD; use adam, or privacy=record"
                raise Refusal("optimizer", optimizer.name, remedy)
            return AdamBC(parameters, noise**2, lr=training.learning_rate, **options)
        return CLASSES[optimizer.name](parameters, lr=training.learning_rate, **options)
    except (ValueError, TypeError, RuntimeError) as error:
        raise Refusal("optimizer", optimizer.name, f"torch refuses it: {error}") from error


def _with_these_parameters(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]
) -> torch.optim.Optimizer:
    """Return a task's optimiser; refuse one with other parameters, since a reused one holds another client's state."""
    expected = {id(parameter) for parameter in parameters}
    groups: list[dict[str, Any]] = getattr(optimizer, "param_groups", [])
    if any(id(parameter) not in expected for group in groups for parameter in group["params"]):
        remedy = "the task's optimizer(parameters) has other parameters; make a new one from those given"
        raise Refusal("optimizer", type(optimizer).__name__, remedy)
    return optimizer


def follow_epochs(optimizer: object, steps: int) -> None:
    """Pass the number of steps of an epoch to an optimiser's learning-rate schedules that count epochs.

    Args:
      optimizer: a task's own may have functions `by_epochs` that take this number, one for each schedule.
      steps: number of steps of an epoch, at least 1.
    """
    for follow in getattr(optimizer, "by_epochs", ()):
        follow(steps)


def check_optimizer(task: Task, training: LocalTraining, noise: float | None = None) -> None:
    """Refuse training settings that the task's model does not support, before anything is spent.

    Args:
      task: defines the model, and optionally the optimiser.
      training: settings of a round.
      noise: as in `optimizer_of`; privacy is at the record level unless it is None.
    """
    from ..configs.optimizers import mistakes_of_options

    check_own_training(task, training, records=noise is not None)
    for mistake in mistakes_of_options(training.optimizer):
        raise mistake
    is_own = training.optimizer.name == "auto" and own_optimizer(task) is not None
    if training.optimizer.plain and not is_own:
        return
    if is_own and training.schedule.changes:
        remedy = "the task's own optimizer has its own rates; leave it out, or name an optimizer"
        raise Refusal("schedule", training.schedule.name, remedy)
    parameters = [p for p in task.model().parameters() if p.requires_grad]
    optimizer: Any = optimizer_of(task, parameters, training, noise)
    if is_own:  # again with another model, to detect state kept from the first call
        optimizer_of(task, [p.detach().clone().requires_grad_() for p in parameters], training, noise)
    if not isinstance(optimizer, torch.optim.Optimizer | None):
        remedy = f"the task's optimizer(parameters) returned a {type(optimizer).__name__}; return one of torch.optim"
        raise Refusal("optimizer", training.optimizer.name, remedy)
    if optimizer is None:
        return
    if training.local_epochs == 1 and getattr(optimizer, "by_epochs", ()):
        remedy = "the task's optimizer has a schedule by epochs, but exists for one round; use more epochs"
        raise Refusal("local_epochs", 1, f"{remedy} a round, or count steps")
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    name = type(optimizer).__name__
    try:
        optimizer.step()
    except (TypeError, RuntimeError, ValueError) as error:
        remedy = f"it must step from gradients only, without a closure ({error})"
        raise Refusal("optimizer", name, remedy) from error
    if not all(bool(parameter.isfinite().all()) for parameter in parameters):
        raise Refusal("optimizer", name, "a step on gradients of 0 is not finite; give other options")
