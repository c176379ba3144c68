"""What a task is: a model, a loss, metrics, and the examples of every client.

A task of your own is any class with the members of `Task`; nothing has to be inherited.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..privacy.audit.memorisation import MemorisationProbe
from ..privacy.refusal import Refusal


@dataclass(frozen=True)
class Examples:
    """n examples: `inputs` (n, ...) float32 or int64, `targets` (n,) int64."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)


class Objective(Protocol):
    """What is trained for."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The scalar mean over the batch."""
        ...


@runtime_checkable
class Task(Protocol):
    """A learning problem whose examples are spread over clients.

    `simulated` says that the data are public or made up: then every run starts a ledger of its own.
    """

    @property
    def simulated(self) -> bool: ...

    @property
    def num_clients(self) -> int: ...

    def model(self) -> nn.Module:
        """A new model; the same values on every call, whatever the global random state."""
        ...

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The scalar mean over the batch."""
        ...

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, float]:
        """Means over the examples given, by name."""
        ...

    def client_data(self, client: int) -> Examples:
        """The examples of one client, 0 <= client < num_clients, made when asked for."""
        ...

    def held_out(self) -> Examples:
        """The examples on which the model is evaluated and never trained."""
        ...


@runtime_checkable
class StackedTask(Task, Protocol):
    """A task that can also say the losses of many clients at once, faster than `torch.func.vmap` of `loss` would."""

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Each client's loss, shape (clients,), from outputs (clients, examples, ...) and targets (clients, examples)."""
        ...


@runtime_checkable
class ProbedTask(Task, Protocol):
    """A task that plants secrets of its own making in its clients' data, and can look whether a model has learnt them."""

    def memorisation_probe(self) -> MemorisationProbe | None:
        """The probe that `audit=full` calls at its planned rounds; None if nothing was planted."""
        ...


def check_examples(examples: Examples, num_classes: int, name: str = "data") -> Examples:
    """The same examples, once they are known to be usable for classification.

    Raises Refusal if there is none, if inputs and targets differ in number, if an input is NaN or
    infinite, or if a target is outside 0 .. num_classes - 1.
    """
    inputs, targets = examples.inputs, examples.targets
    if len(targets) == 0:
        raise Refusal(name, 0, "there are no examples; give at least one")
    if len(inputs) != len(targets):
        raise Refusal(name, (len(inputs), len(targets)), "inputs and targets must be equally many")
    broken = int((~torch.isfinite(inputs)).sum()) if inputs.is_floating_point() else 0
    if broken:
        raise Refusal(name, f"{broken} NaN or infinite", "impute or remove these values before training")
    outside = int(((targets < 0) | (targets >= num_classes)).sum())
    if outside:
        raise Refusal(name, f"{outside} labels out of range", f"labels run from 0 to {num_classes - 1}")
    return examples


def fingerprint(examples: Examples) -> str:
    """Return what names a data set on its ledger: SHA-256 over its tensors, wherever and whenever it is loaded."""
    digest = hashlib.sha256()
    for tensor in (examples.inputs, examples.targets):
        array = tensor.contiguous().numpy()
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
