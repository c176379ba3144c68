"""Task protocol: a model, a loss, metrics and the data of every client, and the check of a model.

A task of your own is any class with the members of `Task`; nothing has to be inherited.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from ..base.refusal import Refusal

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from ..messages.local_training import LocalTraining
    from ..privacy.audit.memorisation import MemorisationProbe


@runtime_checkable
class PooledTask(Protocol):
    """Task with one pool of data, which a partition splits into clients, instead of `num_clients` and `client_data`.

    The natural partition uses `groups()`, if the task has it: the owner of each example, shape (n,).
    """

    def pool(self) -> Any:
        """Return all clients' data, in any form that `Task.client_data` supports."""
        ...

    def labels(self) -> Any:
        """Return the class of each example of the pool, shape (n,)."""
        ...


class Objective(Protocol):
    """Training objective: a loss function of outputs and targets."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss over a batch, a scalar.

        Args:
          outputs: outputs of the model, shape (n, ...).
          targets: shape (n,).
        """
        ...


@runtime_checkable
class Task(Protocol):
    """Learning problem whose examples are distributed over clients; a class with these members needs no base class.

    Example:
      >>> import torch
      >>> import fedveil as fv
      >>> class Coins:
      ...     simulated, num_clients = True, 30
      ...
      ...     def model(self):
      ...         net = torch.nn.Linear(4, 2)
      ...         torch.nn.init.zeros_(net.weight)
      ...         torch.nn.init.zeros_(net.bias)
      ...         return net
      ...
      ...     def loss(self, outputs, targets):
      ...         return torch.nn.functional.cross_entropy(outputs, targets)
      ...
      ...     def metrics(self, outputs, targets):
      ...         return {"accuracy": (outputs.argmax(1) == targets).float().mean().item()}
      ...
      ...     def client_data(self, client):
      ...         inputs = torch.randn(20, 4, generator=torch.Generator().manual_seed(client))
      ...         return fv.Examples(inputs, (inputs.sum(1) > 0).long())
      ...
      ...     def held_out(self):
      ...         return self.client_data(1000)
      >>> isinstance(Coins(), fv.Task)
      True
      >>> fv.simulate(Coins(), num_rounds=2, quiet=True).status
      'completed'
    """

    @property
    def simulated(self) -> bool:
        """Whether the data are public or synthetic; if so, every run starts its own ledger.

        Real data need a fixed name: `data_id`, an attribute of the task, or the run's `task.data_id`.
        """
        ...

    @property
    def num_clients(self) -> int:
        """Number of clients, at least 1."""
        ...

    def model(self) -> nn.Module:
        """Return a new model with the same values on every call, independent of the global random state."""
        ...

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss over a batch, a scalar.

        Args:
          outputs: outputs of the model: a tensor of shape (n, ...), a tuple, or an object such as ModelOutput.
          targets: shape (n, ...).
        """
        ...

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Return means over the examples by name; for lazily read data, means of batches are averaged.

        Args:
          outputs: outputs of the model, shape (n, ...).
          targets: shape (n,).
        """
        ...

    def client_data(self, client: int) -> Any:
        """Return the data of one client, 0 <= client < num_clients.

        Supported forms are `Examples`, a pair (inputs, targets) of tensors or arrays, `LazyExamples`, and a data set of
        torch or Hugging Face.
        """
        ...

    def held_out(self) -> Any:
        """Return evaluation data, which are never trained on, in any form that `client_data` supports.

        Their metrics have no noise, so they are shown only if the data are public: simulated data, or real data if the
        task has `held_out_public = True` or the run `task.held_out=public`.
        """
        ...


@runtime_checkable
class ColumnTask(Task, Protocol):
    """Task whose clients can answer questions about columns of their data (`fedveil ask`)."""

    def columns(self, client: int) -> Mapping[str, Any]:
        """Return the columns of `client_data(client)` by name, one value per row: numbers, NaN if missing, or strings."""
        ...


@runtime_checkable
class StackedTask(Task, Protocol):
    """Task that also computes the losses of many clients at once, faster than `torch.func.vmap` of `loss`."""

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return each client's mean loss, shape (clients,).

        Args:
          outputs: outputs of the model, shape (clients, n, ...).
          targets: shape (clients, n).
        """
        ...


@runtime_checkable
class SizedTask(Task, Protocol):
    """Task that returns its clients' numbers of examples without creating them, for plans of large populations."""

    def client_size(self, client: int) -> int:
        """Return the number of examples in `client_data(client)`."""
        ...


class TrainingTask(Task, Protocol):
    """Task with its own training function, such as another library's loop; it supports client-level privacy only.

    The update is the trained model minus the received one, clipped like any other. The function is called with a copy
    of the model, and torch's generator is seeded for the client. It must store no state between calls, in the task or
    elsewhere: one client's data would affect another client's update, and clipping would not bound that effect.
    """

    def train(self, model: nn.Module, data: Any, training: LocalTraining) -> float | None:
        """Train the model in place and return its mean loss; None if it has no mean loss.

        Args:
          model: model from the server, in training mode.
          data: data of one client: `len(data)` examples, of which `data.batch(rows)` returns (inputs, targets).
          training: epochs, batch size and learning rate of this round, which the function may ignore.
        """
        ...


def own_training(task: object) -> Callable[[nn.Module, Any, LocalTraining], float | None] | None:
    """Return the training function of a `TrainingTask`; None for any other task."""
    train = getattr(task, "train", None)
    return cast("Callable[[nn.Module, Any, LocalTraining], float | None]", train) if callable(train) else None


def check_own_training(task: object, training: LocalTraining, records: bool) -> None:
    """Refuse settings that a task's own training function does not support.

    Args:
      task: any task; one without such a function passes.
      training: settings of local training.
      records: whether privacy is at the record level.
    """
    if own_training(task) is None:
        return
    numpy_task = getattr(task, "own", None)  # the user's class in a `FromArrays`
    owner, method = (task, "train") if numpy_task is None else (numpy_task, "fit")
    name = f"{type(owner).__name__}.{method}"
    if records:
        remedy = (
            "supports only client-level privacy, since it does not clip examples' gradients; use privacy=client_central "
            "or client_distributed, or a task without train"
        )
        raise Refusal("privacy", "record", f"{name} {remedy}")
    if training.optimizer.name != "auto":
        raise Refusal("optimizer", training.optimizer.name, f"{name} has its own optimizer; leave this out")
    if callable(check := getattr(owner, "check_training", None)):
        check(training)


@runtime_checkable
class ProbedTask(Task, Protocol):
    """Task that plants secrets in its clients' data and can test whether a model has memorised them."""

    def memorisation_probe(self) -> MemorisationProbe | None:
        """Return the probe that `audit=full` calls at its planned rounds; None if nothing was planted."""
        ...


@runtime_checkable
class GroupedTask(Task, Protocol):
    """Task with groups of examples, such as age groups, for fairness metrics; an example's groups never leave its client.

    Groups of one attribute do not overlap: an example is in one of them, or in none.
    """

    @property
    def group_words(self) -> Mapping[str, tuple[str, ...]]:
        """Names of the groups of each attribute; constants that do not depend on data."""
        ...

    def groups(self, client: int) -> Mapping[str, Tensor]:
        """Return by attribute the group number of each example of a client, shape (n,), int64, -1 if unknown."""
        ...


@runtime_checkable
class PredictingTask(Task, Protocol):
    """Task that preprocesses raw data to inputs and interprets outputs."""

    def beside_the_model(self) -> Mapping[str, bytes]:
        """Return the files, by name, that a run saves with its model, such as the parameters of preprocessing."""
        ...

    def encode(self, data: object) -> Tensor:
        """Return the model's inputs, shape (n, ...), for a file, a folder or a data frame."""
        ...

    def decode(self, outputs: Tensor) -> dict[str, NDArray[Any]]:
        """Return predictions by column name, shape (n,) each, for outputs of the model."""
        ...


def check_trainable(model: nn.Module) -> None:
    """Put a model into training mode; refuse one with batch normalisation, which DP-SGD cannot train.

    Batch normalisation is refused even with frozen parameters, because it mixes the examples of a batch; one that the
    model itself keeps in evaluation mode is accepted. `check_independence` tests all other layers, and the engine
    `one_by_one` can train every model that passes.
    """
    from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

    model.train()
    for name, layer in model.named_modules():
        if isinstance(layer, _BatchNorm) and layer.training:
            remedy = (
                f"use torch.nn.GroupNorm(groups, {layer.num_features}), which normalises each example alone"
            )
            raise Refusal("model", f"{name or 'model'}: {type(layer).__name__}", remedy)
