"""Training without record-level privacy, in the process's single model and with as few copies as possible."""

# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false
# torch's optimisers use the same calls, which have no public names.

import copy
import math
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ...messages.local_training import LocalTraining
from ...privacy.mechanisms.randomness import Randomness
from ...tasks.arrays import base_check, trained_state
from ...tasks.data import Data, Examples, laid_out, run_on
from ...tasks.optimizers import follow_epochs, optimizer_of
from ...tasks.protocol import Task, own_training
from .batches import seeds_of, shuffled_batches

Precision = Callable[[], AbstractContextManager[Any]]


def train(
    model: nn.Module,
    task: Task,
    data: Data,
    training: LocalTraining,
    client: int,
    key: int,
    precision: Precision = nullcontext,
) -> float | None:
    """Train the model in place and return the mean of the losses before each step.

    A task with its own training function trains a copy, whose arrays are taken over: other changes to the copy cannot
    reach another client. Its return value is the loss, None if it has none.

    Args:
      model: in the state that the server sent.
      task: gives the loss.
      data: the client's own.
      training: optimiser, learning rate, epochs, batch size and weight of FedProx's pull.
      client: number of the client; with `key` it decides the order of the examples.
      key: of the round.
      precision: returns the context in which the model and its loss run.
    """
    if not model.training:
        model.train()
    if (task_training := own_training(task)) is not None:
        return _by_itself(task_training, model, data, training)
    parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    layout = layout_of(model)
    start = [p.detach().clone() for p in parameters] if training.proximal_mu else []
    steps = steps_of(task, parameters, start, training, -(-len(data) // training.batch_size))
    losses: list[Tensor] = []
    for batch in shuffled_batches(
        len(data), training.batch_size, training.local_epochs, client=client, key=key
    ):
        inputs, targets = data.batch(torch.from_numpy(batch))
        with precision():
            loss = task.loss(run_on(model, laid_out(inputs, layout)), targets)
        with torch.no_grad():  # frees the gradients before the next ones are computed
            steps.take(gradients_of(loss, parameters))
        losses.append(loss.detach())
    # Read at the end, so that a GPU is not synchronised at every step.
    return math.fsum(torch.stack(losses).cpu().tolist()) / len(losses)


def _by_itself(
    task_training: Callable[[nn.Module, Any, LocalTraining], float | None],
    model: nn.Module,
    data: Data,
    training: LocalTraining,
) -> float | None:
    """Train a copy by the task's own function, load its arrays into the model, and return the function's loss."""
    copied = copy.deepcopy(model)
    require_base = base_check(copied)
    loss = task_training(copied, data, training)
    require_base()
    trained = copied.state_dict()
    with torch.no_grad():
        for name, value in trained_state(model).items():
            if value.shape != trained[name].shape:
                raise ValueError(f"{name} became {tuple(trained[name].shape)}")
            value.copy_(trained[name])
    return None if loss is None else float(loss)


def gradients_of(loss: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the gradients, zeros where the loss does not depend on a parameter."""
    # torch's own `materialize_grads` costs as much as a small layer.
    gradients = cast(Sequence[Tensor | None], torch.autograd.grad(loss, parameters, allow_unused=True))
    return [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)]


@dataclass(frozen=True, eq=False)
class Steps:
    """Optimisation steps of one client, or of several at once, in place.

    Attributes:
      values: the parameters, with a leading dimension for clients if several are trained at once.
      start: the parameters that the server sent, for FedProx's pull; otherwise unused.
      training: learning rate and weight of that pull.
      optimizer: of the values; None for plain SGD.
    """

    values: list[Tensor]
    start: Sequence[Tensor]
    training: LocalTraining
    optimizer: Any = None

    def take(self, gradients: Sequence[Tensor]) -> None:
        """Take one step, given gradients of the values' shapes."""
        if self.training.proximal_mu:
            pulls = zip(gradients, self.values, self.start, strict=True)
            gradients = [g.add(p - origin, alpha=self.training.proximal_mu) for g, p, origin in pulls]
        if self.optimizer is None:
            torch._foreach_add_(self.values, list(gradients), alpha=-self.training.learning_rate)
            return
        for value, gradient in zip(self.values, gradients, strict=True):
            value.grad = gradient
        self.optimizer.step()
        for value in self.values:
            value.grad = None

    def keep_first(self, clients: int) -> None:
        """Train only the first clients further: drop the others' parameters, and the optimiser's state of them."""
        if len(self.values[0]) == clients:
            return
        for number, value in enumerate(self.values):
            first = self.values[number] = value[:clients]
            if self.optimizer is not None:
                state = self.optimizer.state.pop(value, {})
                parts = {k: v[:clients] for k, v in state.items() if getattr(v, "shape", None) == value.shape}
                self.optimizer.state[first] = {**state, **parts}
        if self.optimizer is not None:
            self.optimizer.param_groups[0]["params"] = list(self.values)


def steps_of(
    task: object, values: Sequence[Tensor], start: Sequence[Tensor], training: LocalTraining, epoch: int = 1
) -> Steps:
    """Return the steps that train `values`, in `epoch` steps an epoch; other arguments as of `Steps`.

    Their optimiser, which a task may define itself, is new, so its state reaches neither another client nor the next round.
    """
    optimizer = optimizer_of(task, values, training)
    if optimizer is not None:
        follow_epochs(optimizer, epoch)
    return Steps(list(values), start, training, optimizer)


def layout_of(model: nn.Module) -> torch.memory_format:
    """Return the layout of images in memory in which a CPU trains the model fastest; results differ by float rounding.

    With channels last, convolutions are up to twice as fast, and torch's group normalisation is up to 16 times as slow.
    """
    convolves = any(p.dim() == 4 for p in model.parameters())
    normalises = any(isinstance(layer, nn.GroupNorm) for layer in model.modules())
    return torch.channels_last if convolves and not normalises else torch.contiguous_format


def with_fast_kernels(model: nn.Module) -> nn.Module:
    """Return the model after changing its kernels, in place, to the layout that `layout_of` returns."""
    layout = layout_of(model)
    for kernel in model.parameters():
        if kernel.dim() == 4:
            # `to`, since `contiguous` does not change a kernel with one input channel, whose layout the convolution
            # uses.
            kernel.data = kernel.data.to(memory_format=layout)
    return model


def key_of_round(seed: int | None, number: int) -> int:
    """Return the key of a round's order of examples and of its layers' draws; without a seed a new one at each call."""
    return int(Randomness(seed).stream("training", number).uint64(1)[0])


def seed_layers(key: int, client: int, data: Data, device: torch.device) -> None:
    """Seed torch's own generators, from which layers such as Dropout draw, for one client of a round.

    For data that are read batch by batch, the generators of Python and NumPy, which transforms use, are seeded as well.

    Args:
      key: of the round.
      client: number of the client.
      data: of the client.
      device: of the model, whose generator is seeded in addition to the CPU's.
    """
    seed = int(seeds_of(key, [client])[0])
    # `torch.manual_seed` would also seed absent devices, and store a stack trace for each at every call.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
    if not isinstance(data, Examples):
        random.seed(seed)
        np.random.seed(seed % 2**32)
