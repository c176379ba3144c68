"""Training of a client's own models, on its own training rows; nothing of it leaves the client.

There are two: the released model after some steps, and a model that saw this client alone, which is the task's initial
model trained on the same rows. With a pull the steps minimise Ditto's personal
objective (Li et al. 2021, arXiv:2012.04221, eq. 2): the client's loss plus pull / 2 times the squared distance to the
released model. Only the final shared model is in that objective, so it is minimised after the release: the rounds compute
nothing for it, no state lies between them, and their sums are those of a run without personal models, bit by bit. The
pull is an implicit (proximal) step after each step of the loss, which is stable at any learning rate: a gradient of the
pull diverges once learning rate times pull exceeds 2, and tasks here train with rates up to 8.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..base.refusal import Refusal
from ..client.training.sgd import gradients_of, layout_of, seed_layers, steps_of, train
from ..configs.privacy_settings import RecordLevel, levels_of
from ..messages.local_training import LocalTraining, Optimizer
from ..tasks.arrays import base_check, load_arrays, memory_of, read_arrays, sent_state
from ..tasks.data import Data, laid_out, run_on
from ..tasks.protocol import Task, own_training
from .settings import personal_of
from .steps import LOCAL_RATE, LOCAL_STEPS, RATE_SHARE, own_batches, steps_of_epoch

if TYPE_CHECKING:
    from ..configs.schema import FederationSettings

Arrays = Mapping[str, NDArray[np.generic]]
Precision = Callable[[], AbstractContextManager[Any]]

SHOWN = 6  # names of arrays in a refusal


@dataclass(frozen=True)
class OwnTraining:
    """Parameters of a client's own training after the release.

    Attributes:
      steps: number of steps from the released model, at least 1.
      learning_rate: of each step, above 0.
      batch_size: examples of a step, at least 1.
      pull: weight of the pull to the released model, at least 0.
      layers: patterns, as of `fnmatch`, of the names of parameters that train; empty for all.
      optimizer: of the steps.
    """

    steps: int
    learning_rate: float
    batch_size: int
    pull: float = 0.0
    layers: tuple[str, ...] = ()
    optimizer: Optimizer = field(default_factory=Optimizer)

    @property
    def training(self) -> LocalTraining:
        """The same parameters, as local training has them, without the pull."""
        return LocalTraining(
            learning_rate=self.learning_rate, batch_size=self.batch_size, optimizer=self.optimizer
        )


@dataclass(frozen=True, eq=False)
class _Course:
    """Course of own training of one client; the model is trained in place.

    Attributes:
      task, model, data, own, precision: as of `train_own`.
      key: of the orders of batches.
    """

    task: Task
    model: nn.Module
    data: Data
    own: OwnTraining
    key: int
    precision: Precision

    def begin(self, arrays: Arrays) -> None:
        """Load the arrays from which the steps begin, and seed what its layers draw."""
        load_arrays(self.model, arrays)
        seed_layers(self.key, 0, self.data, next(self.model.parameters()).device)

    def train(self, steps: int, names: Collection[str], pull: float) -> None:
        """Take some steps in the model.

        Args:
          steps: number of steps, at least 1.
          names: names of the parameters that train.
          pull: weight of the pull to where the steps begin.
        """
        training = self.own.training
        count, size = len(self.data), training.batch_size
        of_epoch = steps_of_epoch(count, size)
        if own_training(self.task) is not None:  # whole passes over the data
            whole = replace(training, local_epochs=-(-steps // of_epoch))
            train(self.model, self.task, self.data, whole, 0, self.key)
            return
        parameters = [p for name, p in self.model.named_parameters() if name in names and p.requires_grad]
        layout = layout_of(self.model)
        start = [p.detach().clone() for p in parameters] if pull else []
        share = training.learning_rate * pull / (1 + training.learning_rate * pull)
        descent = steps_of(self.task, parameters, [], training, of_epoch)
        self.model.train()
        for batch in own_batches(count, size, steps, self.key):
            inputs, targets = self.data.batch(torch.from_numpy(batch))
            with self.precision():
                loss = self.task.loss(run_on(self.model, laid_out(inputs, layout)), targets)
            with torch.no_grad():
                descent.take(gradients_of(loss, parameters))
                for value, origin in zip(parameters, start, strict=False):  # without a pull there is no start
                    value.lerp_(origin, share)


def train_own(
    task: Task,
    model: nn.Module,
    data: Data,
    shared: Arrays,
    own: OwnTraining,
    key: int,
    precision: Precision = nullcontext,
) -> None:
    """Train the released model on, in `model`; the same key gives the same bits.

    Args:
      task: gives the loss.
      model: a model of the task, whose arrays are replaced.
      data: the client's training rows, at least one, on the model's device.
      shared: arrays of the released model, by name.
      own: parameters of the training.
      key: of the orders of batches and of the draws of layers, at least 0.
      precision: returns the context in which the model and its loss run.

    Raises:
      Refusal: as of `check_own`.
    """
    trained = check_own(task, model, own)
    with _course(task, model, data, own, key, precision) as course:
        course.begin(shared)
        course.train(own.steps, trained, own.pull)
        # Statistics of layers that do not train.
        load_arrays(model, {name: value for name, value in shared.items() if name not in trained})


def train_local(
    task: Task, model: nn.Module, data: Data, own: OwnTraining, key: int, precision: Precision = nullcontext
) -> None:
    """Train the task's initial model, in `model`, for more and longer steps; arguments as of `train_own`."""
    own = replace(own, learning_rate=LOCAL_RATE * own.learning_rate)
    with _course(task, model, data, own, key, precision) as course:
        course.begin(read_arrays(task.model()))
        course.train(LOCAL_STEPS * own.steps, sent_state(model).keys(), 0.0)


@contextmanager
def _course(
    task: Task, model: nn.Module, data: Data, own: OwnTraining, key: int, precision: Precision
) -> Generator[_Course]:
    """Yield the course of own training, and check that it leaves the base as it was, and nothing in the model's layers."""
    initial, require_base = memory_of(model), base_check(model)
    yield _Course(task, model, data, own, key, precision)
    initial()
    require_base()


def check_own(task: Task, model: nn.Module, own: OwnTraining) -> set[str]:
    """Return the names of the model's arrays that own training changes.

    Args:
      task: any task.
      model: a model of it.
      own: parameters of the training.

    Raises:
      Refusal: no name matches `own.layers`, or the task's own training function has neither a pull nor layers.
    """
    names = set(sent_state(model))
    trained = {
        name for name in names if not own.layers or any(fnmatchcase(name, each) for each in own.layers)
    }
    if own_training(task) is not None and (own.pull or own.layers):
        field, value = ("personal.layers", list(own.layers)) if own.layers else ("personal.pull", own.pull)
        remedy = f"{type(task).__name__} trains by a function of its own, which has neither; use personal=after without it"
        raise Refusal(field, value, remedy)
    if not trained & {name for name, p in model.named_parameters() if p.requires_grad}:
        some = ", ".join(sorted(names)[:SHOWN])
        raise Refusal("personal.layers", list(own.layers), f"matches no parameter; the model has {some}")
    return trained


def own_training_of(settings: FederationSettings, task: Task) -> OwnTraining:
    """Return the parameters of own training that a run's settings give.

    Args:
      settings: settings of a run with personal models.
      task: of the run; one of tables states what suits it.
    """
    personal, training = personal_of(settings), settings.local_training
    is_clipped = any(isinstance(each, RecordLevel) for each in levels_of(settings.privacy))
    plain = (is_clipped and settings.task.learning_rate) or training.learning_rate
    return OwnTraining(
        steps=personal.steps,
        learning_rate=personal.learning_rate or usual_rate(plain, task, is_clipped),
        batch_size=personal.batch_size or training.batch_size,
        pull=personal.pull,
        layers=personal.layers,
        optimizer=without_noise(training.optimizer),
    )


def usual_rate(rate: float, task: Task, is_clipped: bool) -> float:
    """Return the learning rate of own training where none is set.

    Args:
      rate: of local training.
      task: one of tables states the rate that suits its records.
      is_clipped: whether that rate is for clipped gradients of records, and the task's is used if it has one.
    """
    curvature, length = getattr(task, "curvature", None), getattr(task, "squared_length", None)
    if is_clipped and curvature is not None and length is not None:
        rate = 1 / (curvature * length)  # half of the rate at which descent diverges
    return RATE_SHARE * rate


def without_noise(optimizer: Optimizer) -> Optimizer:
    """Return an optimiser of local training for own training: one that takes out the variance of noise finds none."""
    return Optimizer("adam", optimizer.options) if optimizer.name == "dp_adambc" else optimizer
