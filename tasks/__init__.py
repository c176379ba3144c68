"""Tasks by name: the shipped ones, and the user's own from modules that the user lists."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cached_property
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..base.extensions import extension, names
from ..base.extras import MODULES, require_extra
from ..base.refusal import Refusal
from ..configs.strict import nearest
from ..messages.training_order import OWN_LAYERS
from .data import Examples, check_examples
from .numpy_task import as_task
from .protocol import PooledTask, Task

if TYPE_CHECKING:
    from torch import Tensor, nn


__all__ = [
    "DEALT",
    "GROUP_EQUAL_ROWS",
    "HELD_ALONE",
    "HELD_BACK",
    "TASKS",
    "Examples",
    "PooledTask",
    "Task",
    "as_run",
    "as_task",
    "check_examples",
    "lacking",
    "load_task",
    "module_of",
]

TASKS = names("task")
DISTRIBUTIONS = {"sklearn": "scikit-learn"}  # names of packages that differ from their module names
MEMBERS = ("simulated", "num_clients", "model", "loss", "metrics", "client_data", "held_out")  # of every task

MODEL = "model"  # option: another model of the task
PLANTED = "mislabelled examples"  # option: seed of odd examples, planted in any task
HELD_BACK = "held back"  # option of every task: share of each client's records that is held out
HELD_ALONE = "held back by itself"  # option: select each record independently of the others
# Option: hold equal records out together, by the rule of earlier releases; only for runs that these began.
GROUP_EQUAL_ROWS = "equal records held back together"
DEALT = "partition of a pool"  # option: how to deal a `PooledTask`'s pool; the partition's keys, num_clients and seed
# Options that every task takes.
OF_ALL = (PLANTED, DEALT, HELD_BACK, HELD_ALONE, GROUP_EQUAL_ROWS, OWN_LAYERS)


def load_task(
    name: str, options: Mapping[str, Any] = MappingProxyType({}), allow: tuple[str, ...] = ()
) -> Task:
    """Return the task of that name, made with its options and wrapped by `as_run`.

    Args:
      name: one of `TASKS`, or "module:Class" for the user's own, which is imported and called.
      options: keyword arguments of the task; a shipped one takes num_clients, partition, alpha and seed. Those of
        `OF_ALL` are for every task and are not passed to it. MODEL replaces the model of a task that has no such
        parameter and, if it is "module:Class", that of any shipped task.
      allow: modules that may be imported for the user's own task or model.

    Raises:
      Refusal: the name is unknown, the module is not allowed or cannot be imported, the task does not take an option,
        or the task itself refuses one.
    """
    is_users = ":" in name
    make = _own(name, allow) if is_users else module_of(name).load
    signature = inspect.signature(make)
    arguments = {key: value for key, value in options.items() if key not in OF_ALL}
    model = arguments.get(MODEL)
    # A shipped task's own parameter takes words such as `student`; a class is set from outside.
    replaces_model = MODEL not in signature.parameters or (":" in str(model) and not is_users)
    if replaces_model:
        arguments.pop(MODEL, None)
    if is_users:
        if hasattr(make, "pool") and not hasattr(make, "client_data"):
            arguments.pop("num_clients", None)  # the partition's; the class has a pool and no clients
        _check_arguments(name, make, arguments)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise Refusal("task", name, f"its options are {signature}; {error}") from error
    try:
        instance = make(**arguments)
        if is_users:
            from .pool import dealt

            instance = dealt(instance, options.get(DEALT))
        task = as_task(instance)
    except (OSError, ValueError) as error:
        raise Refusal("task", name, f"it cannot be made: {type(error).__name__}: {error}") from error
    if not isinstance(task, Task):
        raise Refusal("task", name, f"it lacks {', '.join(lacking(task))}")
    if replaces_model and model is not None:
        from .other_model import with_model

        task = with_model(task, model, allow)
    return as_run(task, options)


def _check_arguments(name: str, make: Callable[..., object], arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that a user's class does not accept, and arguments without a default that are missing."""
    parameters = inspect.signature(make).parameters.values()
    accepted = {p.name: p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    accepts_any = any(each.kind is each.VAR_KEYWORD for each in parameters)
    for key, value in arguments.items():
        if key in accepted or accepts_any:
            continue
        if key == "num_clients":
            remedy = f"{name} does not accept it and has its own; leave it null"
            raise Refusal("task.num_clients", value, remedy)
        remedy = f"{name} takes no such argument; {nearest(key, accepted)}"
        raise Refusal(f"task.args.{key}", value, remedy)
    for key, each in accepted.items():
        if each.default is each.empty and key not in arguments:
            raise Refusal(f"task.args.{key}", None, f"{name} needs it; give it a value")


def as_run(task: Task, options: Mapping[str, Any]) -> Task:
    """Return the task with records held out and, in simulated data, odd examples planted, if the options ask for it.

    Args:
      task: the task as it was made; it is not changed.
      options: those of `load_task`; only those of `OF_ALL` are read here, without DEALT.
    """
    if layers := options.get(OWN_LAYERS):
        own_layers = extension("personal", "own_layers", "personal", "layers")
        task = own_layers.with_own_layers(task, layers)
    if options.get(HELD_BACK) is not None:
        from .held_back import held_back

        task = held_back(
            task,
            options[HELD_BACK],
            alone=options.get(HELD_ALONE, False),
            group_equal_rows=options.get(GROUP_EQUAL_ROWS, False),
        )
    if options.get(PLANTED) is None or not task.simulated:
        return task
    from .mislabelled import mislabelled

    return mislabelled(task, options[PLANTED])


def lacking(task: object) -> list[str]:
    """Return the names of the members of `Task` that an object lacks, for a refusal."""
    return sorted(member for member in MEMBERS if getattr(task, member, None) is None)


def module_of(name: str) -> Any:
    """Return the module of a shipped task, with `load`; refuse an unknown name, and data not installed."""
    if name not in TASKS:
        raise Refusal("task", name, f'choose one of {", ".join(TASKS)}, or your own as "module:Class"')
    if name in MODULES:  # a task with an extra of its own
        require_extra(name, f"task={name}")
    try:
        return extension("task", name, "task", name)
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        package = DISTRIBUTIONS.get(module, module)
        remedy = f"its data come with {package}, which is not installed; install it, or fedveil[simulation]"
        raise Refusal("task", name, remedy) from error


def _own(name: str, allow: tuple[str, ...]) -> Callable[..., object]:
    """Import and return the user's class "module:Class"; refuse a module that is not allowed before its code runs."""
    module, _, attribute = name.partition(":")
    if module not in allow:
        listed = ", ".join(allow) or "none"
        how = f"add --allow-module {module} where a run is read, allow_modules=[{module}] elsewhere"
        raise Refusal("task", name, f"its module is not allowed (allowed: {listed}); {how}")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise Refusal("task", name, f"it cannot be imported: {error}") from error


class AnnouncedTask:
    """Simulated task that is loaded at the first access to its model or data.

    Until then only the number of its clients is known, which is all that a plan needs.
    """

    simulated = True

    def __init__(self, num_clients: int, load: Callable[[], Task]) -> None:
        self.num_clients = num_clients
        self._load = load

    @cached_property
    def _task(self) -> Task:
        return self._load()

    def model(self) -> nn.Module:
        return self._task.model()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self._task.loss(outputs, targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        return self._task.metrics(outputs, targets)

    def client_data(self, client: int) -> Any:
        return self._task.client_data(client)

    def held_out(self) -> Any:
        return self._task.held_out()
