"""Multinomial logistic regression by SGD in NumPy, for devices too small for torch.

The arrays have the names of torch's `nn.Linear`. Batches and their order are those of `sgd.train`, and the results
agree up to float32 rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from ...base.refusal import Refusal
from ...base.tensor_file import read_npz
from ...client.training.batches import shuffled_batches
from ...messages.client_settings import TRAIN_LOSS, ClientSettings, training_settings
from ...messages.local_training import LocalTraining
from ...messages.training_order import TrainingOrder
from ...messages.wire import WEIGHT, memory_arrays, only_arrays, read_round, view
from ...privacy.mechanisms.randomness import Randomness
from ...privacy.statistics.columns import LABEL
from ...privacy.statistics.columns import Table as Columns
from ...privacy.statistics.evaluation import Evaluation, HeldOutMeans
from ...privacy.statistics.holdout import hashes_of_rows, holdout_mask
from ...privacy.statistics.inquiry import Inquiry
from .linear_model import Matrix, Table, gradients_of, log_softmax

if TYPE_CHECKING:
    from ...personal.choice import Choice
    from .personal_choice import PersonalChoice
    from .run_rows import TrainedRows

Arrays = Mapping[str, NDArray[np.generic]]


def read_table(path: Path) -> Table:
    """Return the arrays `inputs` and `targets` of an .npz file.

    Raises:
      Refusal: the file cannot be read, or its arrays cannot be trained on.
    """
    try:
        with path.open("rb") as file:
            arrays = read_npz(file)
            inputs, targets = arrays["inputs"], arrays["targets"]
    except (OSError, ValueError, KeyError) as error:
        raise Refusal("data", str(path), f"give an .npz with inputs and targets ({error})") from error
    if inputs.ndim != 2 or inputs.dtype != np.float32 or targets.shape != inputs.shape[:1] or not len(inputs):
        raise Refusal("data", str(path), "give inputs (n, d) float32 and targets (n,), n at least 1")
    if targets.dtype.kind not in "iu" or targets.min() < 0:
        raise Refusal("data", str(path), "targets must be whole numbers of at least 0")
    if not np.isfinite(inputs).all():
        raise Refusal("data", str(path), "impute or remove NaN and infinite values before training")
    return Table(inputs, targets.astype(np.int64))


@dataclass
class LinearTask:
    """Owner's linear model, with the methods of `torch_task.TorchTask`.

    Attributes:
      table: the owner's examples.
      client: number of the device, which decides the order of its examples.
    """

    table: Table
    client: int

    can_protect_records: ClassVar[bool] = False  # there is no DP-SGD here

    def train(self, message: Message, settings: ClientSettings) -> Message:
        """Return the reply with the model trained on the owner's data; arguments as of `app.train_round`."""
        rows, _ = parts_of(self.table, settings.held_out, settings.group_equal_rows)
        return train_round(message, self.client, rows, settings)

    def count(self, max_per_person: int | None, held_out: float | None = None) -> int:
        """Return the number of the owner's records: none names a person, and no order hides single ones."""
        return len(self.table)

    def check_order(self, order: TrainingOrder, released: bytes | None) -> None:
        """Refuse what needs torch: other optimisers than plain SGD, scaling, questions about a model.

        Arguments as of `TorchTask.check_order`.
        """
        if released is not None:
            remedy = "a linear device without torch has no columns of a model; ask for columns of its data"
            raise Refusal("model", f"{len(released)} bytes", remedy)
        if order.moments:
            remedy = "scale the columns of tables; this device has no schema"
            raise Refusal("moments", list(order.moments), remedy)
        if order.own_layers:
            remedy = "a linear device sends its only layer; use a task with torch"
            raise Refusal("own_layers", list(order.own_layers.patterns), remedy)
        if not order.training.optimizer.plain:
            remedy = "a linear device trains by plain SGD; use optimizer=sgd, or a task with torch"
            raise Refusal("optimizer", order.training.optimizer.name, remedy)

    def columns(self, content: RecordDict, inquiry: Inquiry) -> Columns:
        """Return the owner's only column, the targets; arguments as of `TorchTask.columns`."""
        return {LABEL: self.table.targets}

    def evaluate(self, message: Message, order: TrainingOrder, evaluation: Evaluation) -> HeldOutMeans | None:
        """Return the measurement of the message's model on held-out records; None if there are none.

        Arguments as of `TorchTask.evaluate`.

        Raises:
          Refusal: a metric other than accuracy is requested.
        """
        if evaluation.metric != "accuracy":
            remedy = "a linear device without torch measures only accuracy"
            raise Refusal("evaluate.metric", evaluation.metric, remedy)
        _, held_out = parts_of(self.table, evaluation.share, order.group_equal_rows)
        if not len(held_out):
            return None
        weight, bias = _weight_and_bias(only_arrays(message.content))
        log_probabilities = log_softmax(held_out.inputs @ weight.T + bias)
        accuracy = (log_probabilities.argmax(1) == held_out.targets).mean()
        loss = -log_probabilities[np.arange(len(held_out)), held_out.targets].mean()
        return HeldOutMeans(float(accuracy), float(loss))

    def own_model(
        self, shared: Arrays, rows: TrainedRows, personal: PersonalChoice, scaling: str, key: int
    ) -> tuple[Arrays, Choice]:
        """Return the owner's own model; arguments as of `TorchTask.own_model`. Refuse what needs torch."""
        from .linear_own import own_model

        return own_model(
            *parts_of(self.table, rows.share, rows.group_equal_rows), shared, personal, rows.training, key
        )


def train_round(message: Message, client: int, table: Table, settings: ClientSettings) -> Message:
    """Return the reply with the trained model; arguments as of `app.train_round`, but for a table instead of a workbench.

    Raises:
      ValueError: the model does not fit the table.
    """
    arrays = only_arrays(message.content)
    weight, bias = _weight_and_bias(arrays)
    if len(arrays) != 2 or weight.shape != (len(bias), table.inputs.shape[1]) or bias.ndim != 1:
        raise ValueError(f"a model of shape {weight.shape} for inputs {table.inputs.shape}")
    if table.targets.max(initial=0) >= len(bias):
        raise ValueError("a target is outside the model's classes")
    _, number = read_round(message.content)
    key = int(Randomness(settings.seed).stream("training", number).uint64(1)[0])
    loss = train(weight, bias, table, training_settings(message.content, settings), client, key)
    metrics = MetricRecord({WEIGHT: len(table), TRAIN_LOSS: loss})
    content = RecordDict({"arrays": memory_arrays({"weight": weight, "bias": bias}), "metrics": metrics})
    return Message(content, reply_to=message)


@lru_cache(maxsize=2)  # a device has one table, and a run one share
def parts_of(table: Table, held_out: float | None, group_equal_rows: bool = False) -> tuple[Table, Table]:
    """Return the training part and the held-out part, chosen as by a task with torch.

    Args:
      table: the examples.
      held_out: share of all records; None holds none out.
      group_equal_rows: whether equal records are held out together, as by the rule of earlier releases.
    """
    if held_out is None:
        return table, Table(table.inputs[:0], table.targets[:0])
    mask = holdout_mask(
        hashes_of_rows([table.inputs, table.targets]), held_out, group_equal_rows=group_equal_rows
    )
    return table.only(~mask), table.only(mask)


def train(
    weight: Matrix, bias: Matrix, table: Table, training: LocalTraining, client: int, key: int
) -> float:
    """Train in place by SGD on the cross-entropy and return the mean loss of the steps, as `sgd.train` does.

    Args:
      weight: shape (classes, d).
      bias: shape (classes,).
      table: the examples.
      training: learning rate, epochs, batch size and weight of FedProx's pull.
      client: number of the client; with `key` it decides the order of the examples.
      key: of the round.
    """
    start_weight, start_bias = weight.copy(), bias.copy()
    rate, pull = np.float32(training.learning_rate), np.float32(training.proximal_mu)
    losses: list[np.float32] = []
    for batch in shuffled_batches(
        len(table), training.batch_size, training.local_epochs, client=client, key=key
    ):
        loss, of_weight, of_bias = gradients_of(weight, bias, table.only(batch))
        losses.append(loss)
        weight -= rate * (of_weight + pull * (weight - start_weight))
        bias -= rate * (of_bias + pull * (bias - start_bias))
    return float(np.mean(losses))


def _weight_and_bias(arrays: ArrayRecord) -> list[Matrix]:
    return [view(arrays[name]).astype(np.float32) for name in ("weight", "bias")]
