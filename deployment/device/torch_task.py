"""Task of a device's owner with torch: one task and one model, loaded once for all messages."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Message, RecordDict

from ...base.refusal import Refusal
from ...client.app import train_round
from ...client.workbench import Workbench
from ...messages.client_settings import ClientSettings
from ...messages.training_order import OF_ORDERS, TrainingOrder
from ...privacy.budget import Unit
from ...privacy.statistics.columns import Table
from ...privacy.statistics.evaluation import Evaluation
from ...privacy.statistics.inquiry import Inquiry
from ...questions.answers import Measured
from ...questions.client import measured_at, table_of
from ...tasks.arrays import agreement_of
from ...tasks.data import check_data, check_taken, data_of, data_of_all
from ...tasks.held_back import held_back, held_back_of
from ...tasks.memory import give_back
from ...tasks.optimizers import check_optimizer
from ...tasks.own_scale import WARNING, own_scale
from ...tasks.persons import limit_per_person, names_of
from ...tasks.protocol import Task, own_training
from .run_rows import TrainedRows

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ...personal.choice import Choice
    from ...personal.training import OwnTraining
    from .personal_choice import PersonalChoice

    Arrays = Mapping[str, NDArray[np.generic]]

logger = logging.getLogger("fedveil.client")


class TorchTask:
    """Owner's task with torch. A linear model has the same methods without torch: `linear.LinearTask`.

    Args:
      settings: of the device; they name the task and its options.
      client: number of the device among the task's clients, from 0.

    Raises:
      Refusal: the task cannot be loaded, does not have this client, or cannot train on its data.
    """

    can_protect_records = True  # by DP-SGD

    def __init__(self, settings: ClientSettings, client: int) -> None:
        self._settings, self._client, self._own_bench = settings, client, Workbench(settings)
        # A run has one scaling and one share of held-out records; a question before its rounds has others.
        self._ordered_bench = lru_cache(maxsize=2)(self._new_ordered_bench)
        self._bench = lru_cache(maxsize=2)(self._new_bench)
        self._agreement = lru_cache(maxsize=2)(self._new_agreement)
        num_clients = self._own_bench.task.num_clients
        if not 0 <= client < num_clients:
            raise Refusal("task.client", client, f"the task has clients 0 to {num_clients - 1}")
        self._own_bench.require_base()  # creates the model, or refuses it now
        check_owners_data(self._own_bench.task, client)

    def _new_ordered_bench(self, ordered: str) -> Workbench:
        """Return the workbench whose task has the options of an order, as of `_ordered_in`."""
        if not ordered:
            return self._own_bench
        options = {**self._settings.task_options, **json.loads(ordered)}
        return Workbench(replace(self._settings, task_options=options))

    def _new_agreement(self, ordered: str) -> str | None:
        return agreement_of(self._ordered_bench(ordered).task)

    def _new_bench(
        self, held_out: float | None, alone: bool, group_equal_rows: bool, ordered: str
    ) -> Workbench:
        """Return a workbench for a run, arguments as of `tasks.held_back`; a share of None holds no record out."""
        bench = self._ordered_bench(ordered)
        if held_out is None:
            return bench
        return Workbench(bench.settings, held_back(bench.task, held_out, alone, group_equal_rows))

    def train(self, message: Message, settings: ClientSettings) -> Message:
        """Return the reply with the model trained on the owner's data; arguments as of `client.app.train_round`."""
        ordered = _ordered_in(settings.task_options)
        bench = self._bench(settings.held_out, settings.hides_records, settings.group_equal_rows, ordered)
        reply = train_round(message, self._client, bench, settings)
        give_back()  # frees the gradients before the vector is computed
        return reply

    def count(self, max_per_person: int | None, held_out: float | None = None) -> int:
        """Return the number of the owner's records that train under record-level privacy.

        Args:
          max_per_person: most records of one person; None limits nothing.
          held_out: share of the records that are held out; None holds none out.
        """
        task = self._bench(held_out, True, False, "").task
        return len(limit_per_person(data_of(task, self._client), max_per_person))

    def check_order(self, order: TrainingOrder, released: bytes | None) -> None:
        """Refuse an order, or a question about a model, that the task cannot follow.

        Args:
          order: of the server.
          released: file of the model that a question is about; None without one.
        """
        task, record = self._own_bench.task, order.record
        if order.agreement != self._agreement(_ordered_in(order.task_options)):
            remedy = "the server has another schema, model or base; take them from the same fedveil provision"
            options = self._settings.task_options
            if "schema" in options:
                raise Refusal("schema", Path(str(options["schema"])).name, remedy)
            raise Refusal("task", self._settings.task, remedy)
        if record and record.per_person is not None:
            names_of(data_of(task, self._client), f"client {self._client}")  # or refuses
        check_optimizer(task, order.training, record and 1.0)  # with noise on records, however much
        if released is not None:
            from ...tasks.model_columns import read_released  # tables, not needed for training

            read_released(self._own_bench.model, released)

    def columns(self, content: RecordDict, inquiry: Inquiry) -> Table:
        """Return the owner's columns, and those of a question's model; arguments as of `questions.client.table_of`."""
        return table_of(self._own_bench, self._client, content, inquiry)

    def evaluate(self, message: Message, order: TrainingOrder, evaluation: Evaluation) -> Measured | None:
        """Return the measurement of a model on held-out records, None without any.

        Args:
          message: with the model.
          order: of the server, in the same message.
          evaluation: what is measured.
        """
        is_of_records, ordered = evaluation.unit is Unit.RECORD, _ordered_in(order.task_options)
        bench = self._bench(evaluation.share, is_of_records, order.group_equal_rows, ordered)
        return measured_at(bench, self._client, message.content, evaluation)

    def own_model(
        self, shared: Arrays, rows: TrainedRows, personal: PersonalChoice, scaling: str, key: int
    ) -> tuple[Arrays, Choice]:
        """Return the owner's own model and its choice, trained beside the model of the rounds.

        Args:
          shared: arrays of the final model, by name.
          rows: split of the owner's rows in the run, and the training of its rounds.
          personal: the owner's choice.
          scaling: moments by which the run scales inputs, as JSON; empty without scaling.
          key: of the training's draws.

        Raises:
          Refusal: as of `personal.own_model.own_model`.
        """
        from ...personal.own_model import Evaluation as Arithmetic
        from ...personal.own_model import Rows, own_model

        ordered = _ordered_in({"moments": json.loads(scaling or "null")})
        task = self._bench(rows.share, rows.alone, rows.group_equal_rows, ordered).task
        bench, held_out = Workbench(self._settings, task), held_back_of(task, self._client)
        assert held_out is not None  # `_bench` holds a share out
        parts = Rows(data_of(task, self._client), held_out)
        own = _own_training(personal, rows, task)
        arithmetic = Arithmetic(bench.precision, self._settings.examples_at_once)
        return own_model(task, bench.model, parts, shared, own, key, arithmetic)


def _own_training(personal: PersonalChoice, rows: TrainedRows, task: Task) -> OwnTraining:
    """Return the parameters of the owner's own training; arguments as of `TorchTask.own_model`."""
    from ...personal.training import OwnTraining, usual_rate, without_noise

    training = rows.training
    return OwnTraining(
        steps=personal.steps,
        learning_rate=personal.learning_rate or usual_rate(training.learning_rate, task, rows.alone),
        batch_size=personal.batch_size or training.batch_size,
        pull=personal.pull_or_none,
        layers=personal.layers,
        optimizer=without_noise(training.optimizer),
    )


def _ordered_in(task_options: Mapping[str, object]) -> str:
    """Return the options that an order has added to a task's as JSON, which can be a key; empty where there are none."""
    ordered = {name: task_options[name] for name in OF_ORDERS if task_options.get(name)}
    return json.dumps(ordered, sort_keys=True) if ordered else ""


def check_owners_data(task: Task, client: int) -> None:
    """Refuse data that the task cannot train on, before any charge; warn of columns that the data scaled themselves."""
    data, client_name = data_of(task, client), f"client {client}"
    check_data(data, client_name)
    if scale := own_scale(lambda: [data_of_all(task, client)]):  # in the device's own log alone
        logger.warning("columns of this device's data %s", WARNING.format(scale))
    if own_training(task) is None:
        check_taken(data, client_name, task.model().eval(), task.loss)
