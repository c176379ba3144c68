"""Lightning task: a LightningModule, trained by its own `training_step`, `validation_step` and `configure_optimizers`.

This file does not import Lightning: the module does, under either of its two package names.
"""

import copy
import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...base.refusal import Refusal
from ..data import Data, as_data, run_on, with_targets
from . import made_once

LIGHTNING = ("lightning", "pytorch_lightning", "torch")  # packages whose methods are not the user's
# Prefixes (HOOKS) and names (STEPS) of methods that only a `Trainer` calls; without one, the user's would do nothing.
HOOKS = ("on_train_", "on_before_", "on_after_", "on_fit_", "on_validation_")
STEPS = (
    "backward",
    "configure_callbacks",
    "configure_gradient_clipping",
    "configure_model",
    "lr_scheduler_step",
    "optimizer_step",
    "optimizer_zero_grad",
    "setup",
    "transfer_batch_to_device",
)


class LightningTask:
    """Task from a LightningModule.

    `training_step` gives the loss of a batch in a `DataLoader`'s form. `configure_optimizers` gives the optimiser, new
    for every client and round; at the record level it gets noised means. Values that `validation_step` logs on the
    held-out data are the metrics. Values that `training_step` logs are dropped.

    Args:
      module: returns a new LightningModule, for example its class if it takes no arguments.
      clients: the data of each client, in any form that `Task.client_data` may return.
      held_out: data on which the model is evaluated.
      simulated: whether the data are public or made up.

    Raises:
      Refusal: the module relies on a `Trainer`.
    """

    def __init__(
        self, module: Callable[[], Any], clients: Sequence[Any], held_out: Any, *, simulated: bool = False
    ) -> None:
        self.simulated, self.num_clients = simulated, len(clients)
        self._module: Any = made_once(module)
        self._clients, self._held_out = clients, held_out
        _check_hooks(self._module)
        _optimizer_of(self._module)  # refuses optimisers and schedules that cannot be used
        if len(data := self.held_out()):  # one step, which shows errors early
            with torch.random.fork_rng(devices=[]):
                run_on(self.model().train(), data.batch(torch.arange(min(2, len(data))))[0])

    @property
    def name(self) -> str:
        """Name of the module's class."""
        return type(self._module).__name__

    def model(self) -> nn.Module:
        """Return a new model; its `module` is the LightningModule."""
        return Stepping(copy.deepcopy(self._module))

    def optimizer(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        """Return a new optimiser of `configure_optimizers` for these parameters, in the order of the module's own."""
        optimizer = _optimizer_of(self._module)
        trainable = (p for p in self._module.parameters() if p.requires_grad)
        substitutes = dict(zip(trainable, parameters, strict=True))
        for group in optimizer.param_groups:
            group["params"] = [substitutes[p] for p in group["params"] if p in substitutes]
        states = {substitutes[p]: state for p, state in optimizer.state.items() if p in substitutes}
        optimizer.state = defaultdict(dict, states)
        return optimizer

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """Return the loss that `training_step` returned.

        Args:
          outputs: of the model.
          targets: unused; the batch holds them.
        """
        return outputs["loss"]

    def metrics(self, outputs: Any, targets: Tensor) -> dict[str, float]:
        """Return the values that `validation_step` logged.

        Args:
          outputs: of the model, in evaluation mode.
          targets: unused; the batch holds them.
        """
        return {name: float(value) for name, value in outputs.items() if name != "loss"}

    def client_data(self, client: int) -> Data:
        """Return the data of one client, with the targets in the batch."""
        return with_targets(as_data(self._clients[client]))

    def held_out(self) -> Data:
        """Return the held-out data, with the targets in the batch."""
        return with_targets(as_data(self._held_out))


class Stepping(nn.Module):
    """Model that returns for a batch the loss of a LightningModule, and its logged values in evaluation mode.

    For a single input, which has no targets, it returns the module's outputs.
    """

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, *parts: Any, **fields: Any) -> Any:
        if len(parts) == 1:
            return self.module(parts[0])
        batch = fields or parts
        loss = self._step("training_step", batch, lambda *_, **__: None)
        if isinstance(loss, Mapping):
            loss = cast(Mapping[str, Any], loss)["loss"]
        if not isinstance(loss, Tensor):
            remedy = "must return the loss of every batch; none can be skipped"
            raise Refusal("training_step", f"returned {type(loss).__name__}", remedy)
        logged: dict[str, Any] = {}

        def record(name: str, value: Any, *args: Any, **options: Any) -> None:
            if not isinstance(value, Tensor | int | float):
                remedy = "log a number for each batch; metrics that accumulate over batches are not supported"
                raise Refusal("self.log", f"{name}: {type(value).__name__}", remedy)
            logged[name] = torch.as_tensor(value).detach()

        if not self.training and _is_own(self.module, "validation_step"):
            self._step("validation_step", batch, record)
        return {**logged, "loss": loss}

    def _step(self, name: str, batch: Any, log: Callable[..., None]) -> Any:
        """Call a step of the module, with `log` as its `self.log` during the call; refuse one that uses a Trainer."""
        step, own = getattr(self.module, name), vars(self.module)
        own["log"] = log
        try:
            return step(batch, *_zeros(step))
        except RuntimeError as error:
            if "Trainer" in str(error):
                remedy = "there is no Trainer: do not use it in a step"
                raise Refusal(f"{type(self.module).__name__}.{name}", "self.trainer", remedy) from error
            raise
        finally:
            del own["log"]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Apply `fn`, as `to` does; the LightningModule, which stores the name of its device, must follow its parameters."""
        applied = super()._apply(fn, recurse)
        if (first := next(self.module.parameters(), None)) is not None:
            self.module.to(first.device)
        return applied


def _zeros(step: Callable[..., Any]) -> list[int]:
    """Return a 0 for each argument that a step requires after the batch, such as the batch's index, unknown here."""
    needed = list(inspect.signature(step).parameters.values())[1:]
    return [0 for each in needed if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD]


def _is_own(module: object, name: str) -> bool:
    """Return whether the user's class, and not only Lightning's, defines a method of that name."""
    owner = next((each for each in type(module).__mro__ if name in vars(each)), object)
    return owner.__module__.partition(".")[0] not in (*LIGHTNING, "builtins")


def _check_hooks(module: Any) -> None:
    """Refuse hooks that only a `Trainer` would call."""
    name = type(module).__name__
    if not hasattr(module, "configure_optimizers"):
        raise Refusal("module", name, "must be a LightningModule's class, or a function that returns one")
    if not module.automatic_optimization:
        remedy = "fedveil takes the steps, clips and adds noise; return the loss instead"
        raise Refusal(f"{name}.automatic_optimization", False, remedy)
    for hook in dir(type(module)):
        if (hook in STEPS or hook.startswith(HOOKS)) and _is_own(module, hook):
            remedy = "there is no Trainer to call it; move its code into training_step or validation_step"
            raise Refusal(name, hook, remedy)


def _optimizer_of(module: Any) -> torch.optim.Optimizer:
    """Return the optimiser of `configure_optimizers`, whose steps advance its schedules; refuse several, and none."""
    field = f"{type(module).__name__}.configure_optimizers"
    try:
        optimizers, schedules = _optimizers_and_schedules(module.configure_optimizers())
    except RuntimeError as error:
        if "Trainer" not in str(error):
            raise
        raise Refusal(field, "self.trainer", "there is no Trainer; use numbers of your own") from error
    if len(optimizers) != 1 or not isinstance(optimizers[0], torch.optim.Optimizer):
        kinds = [type(each).__name__ for each in optimizers]
        raise Refusal(field, kinds, "return one optimizer of torch.optim, with groups if need be")
    for schedule in schedules:
        _follow(optimizers[0], schedule if isinstance(schedule, dict) else {"scheduler": schedule}, field)
    return optimizers[0]


def _optimizers_and_schedules(value: Any) -> tuple[list[Any], list[Any]]:
    """Return optimisers and schedules from any form in which `configure_optimizers` may return them."""
    if isinstance(value, dict):
        schedule = cast(dict[str, Any], value).get("lr_scheduler")
        return [value["optimizer"]], [] if schedule is None else [schedule]
    if not isinstance(value, list | tuple):
        return [value], []
    several = list(cast(Sequence[Any], value))
    if several and isinstance(several[0], list | tuple):
        optimizers, schedules = several
        return list(optimizers), schedules if isinstance(schedules, list) else [schedules]
    return _optimizers_and_schedules(several[0]) if len(several) == 1 else (several, [])


def _follow(optimizer: torch.optim.Optimizer, schedule: dict[str, Any], field: str) -> None:
    """Advance a schedule with the optimiser's steps, or with its epochs once `follow_epochs` passes their length.

    The schedule is Lightning's dictionary of scheduler, interval and frequency; a refusal names `field`.
    """
    scheduler, frequency = schedule["scheduler"], schedule.get("frequency", 1)
    name, interval = type(scheduler).__name__, schedule.get("interval", "epoch")
    if name == "ReduceLROnPlateau":
        raise Refusal(field, name, "a client monitors no metric; use a schedule of steps or epochs")
    if interval not in ("step", "epoch"):
        raise Refusal(field, f"{name} by {interval}", 'give "interval": "step" or "epoch"')

    def follow(steps_per_interval: int) -> None:
        period = steps_per_interval * frequency
        # After its last step a schedule such as OneCycleLR's keeps its rate.
        last = getattr(scheduler, "total_steps", None) or math.inf
        steps = 0

        def count(*_: object) -> None:
            nonlocal steps
            steps += 1
            if steps % period == 0 and steps // period < last:
                scheduler.step()

        optimizer.register_step_post_hook(count)

    if interval == "step":
        follow(1)
    else:
        # `follow_epochs` calls it once before training, with the number of steps of an epoch.
        with_epochs: Any = optimizer
        with_epochs.by_epochs = [*getattr(optimizer, "by_epochs", ()), follow]
