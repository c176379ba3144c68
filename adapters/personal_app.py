"""Own models of a user's Flower app: after the last round each client trains on, and chooses, with the app's own functions."""

from __future__ import annotations

import logging
import math
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable
from flwr.serverapp import Grid
from numpy.typing import NDArray

from ..base.refusal import Refusal, refusing
from ..client.private_update import values_of, without_error
from ..messages.flower_adapter import delivered_message, records_of
from ..messages.model_difference import hash_of
from ..messages.wire import WEIGHT
from ..personal.choice import POINTS, Arrays, Choice, Evidence, between
from ..personal.state import OwnModel, read_own, write_own
from ..questions.private_evaluation import LOSSES

logger = logging.getLogger("flwr.fedveil")  # below Flower's logger, whose output users read

ACTION = "personal"  # of Flower's messages that ask; no other function of the app gets them
RELEASED, INITIAL, CONFIG = (
    "arrays",
    "initial",
    "config",
)  # records of the message; the first and last as of strategies
LOCAL_CALLS = 5  # of a model from scratch, over those from the released model


@dataclass(frozen=True)
class PersonalApp:
    """Own models of a client app.

    Attributes:
      train, evaluate: the app's functions, without mods.
      folder: of the own models, one file for each client of this machine.
      calls: of the train function, from the released model.
    """

    train: ClientAppCallable
    evaluate: ClientAppCallable
    folder: Path
    calls: int

    def path(self, context: Context) -> Path:
        """Return the file of a node's own model, by its partition if it has one."""
        return self.folder / f"client-{context.node_config.get('partition-id', context.node_id)}.safetensors"

    def arrays(self, context: Context) -> ArrayRecord | None:
        """Return a node's own model, for the app's own use; None before it is made.

        Raises:
          Refusal: its file is damaged.
        """
        own = read_own(self.path(context))
        return None if own is None else _record(own.arrays)

    def answer(self, message: Message, context: Context) -> Message:
        """Make the node's own model, and reply with nothing, whether or not that fails: it may hang on the data."""
        try:
            self._make(message, context)
        except Exception:
            logger.exception("the own model is not made")
        return Message(RecordDict(), reply_to=message)

    def _make(self, message: Message, context: Context) -> None:
        """Train, choose and store the node's own model, unless it is stored for this released model."""
        models = {name: _arrays(each) for name, each in records_of(message.content, ArrayRecord).items()}
        shared, path = models[RELEASED], self.path(context)
        keys: dict[str, Any] = {"calls": self.calls, "local": INITIAL in models}
        before, digest = read_own(path), hash_of({name: shared[name] for name in sorted(shared)})
        if before is not None and (before.shared, before.keys) == (digest, keys):
            return
        client = _Client(self, message, context)
        trained = client.trained(shared, self.calls)
        alone = client.trained(models[INITIAL], LOCAL_CALLS * self.calls) if INITIAL in models else {}
        measured = [client.measured(between(shared, trained, point)) for point in POINTS]
        rows = measured[0].rows
        losses = [each.loss for each in measured]
        losses.append(client.measured(alone).loss if alone and rows else math.nan)
        decision = Evidence(np.reshape(losses, (len(losses), 1, 1)), np.array([float(rows)])).decide()
        arrays = alone if decision.is_local else between(shared, trained, decision.share)
        with refusing("folder", self.folder, "cannot be made"):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        choice = Choice(decision.name, 0.0 if decision.is_local else decision.share, rows, {})
        write_own(path, OwnModel("", digest, choice, keys, arrays))


class _Measured(NamedTuple):
    """Mean loss that an app reports, and the number of its examples."""

    loss: float
    rows: int


@dataclass(frozen=True)
class _Client:
    """One node's functions, called with other models than the message has."""

    app: PersonalApp
    message: Message
    context: Context

    def trained(self, arrays: Arrays, calls: int) -> Arrays:
        """Return a model after some calls of the app's train function."""
        for _ in range(calls):
            reply = self._call(self.app.train, MessageType.TRAIN, arrays)
            arrays = _arrays(records_of(reply.content, ArrayRecord)[RELEASED])
        return arrays

    def measured(self, arrays: Arrays) -> _Measured:
        """Return what the app's evaluate function reports of a model; refuse one that reports no loss."""
        values = values_of(self._call(self.app.evaluate, MessageType.EVALUATE, arrays))
        name = next((each for each in LOSSES if each in values), None)
        if name is None:
            remedy = f"reports no loss, by which clients choose their own model; let it report {LOSSES[-1]}"
            raise Refusal("evaluate", sorted(values), remedy)
        return _Measured(float(values[name]), int(values.get(WEIGHT, 1)))

    def _call(self, function: ClientAppCallable, kind: str, arrays: Arrays) -> Message:
        """Return the reply of an app's function to a message with these arrays."""
        others = {name: each for name, each in self.message.content.items() if name != INITIAL}
        content = RecordDict({**others, RELEASED: _record(arrays)})
        metadata = copy(self.message.metadata)
        metadata.message_type = kind
        called = delivered_message(content, metadata)
        return without_error(function(called, self.context))


def personal_app(
    app: ClientApp,
    train: ClientAppCallable,
    evaluate: ClientAppCallable,
    *,
    folder: Path | str,
    calls: int = 1,
) -> PersonalApp:
    """Let each client of a Flower app make a model of its own once `make_personal` sends the final one.

    It trains on with the app's own train function. Between the released model and the trained one, and a model of its
    own records alone, it chooses by the loss that the app's own evaluate function reports, whose records the train function
    must not use. Nothing of it leaves the client; epsilon of an own model is infinite for that client's data, to whoever gets
    it.

    Args:
      app: gets one more function, which answers `make_personal` alone.
      train: the function that the app registers with `app.train`.
      evaluate: the function that the app registers with `app.evaluate`; it reports `num-examples`, and `loss` or `eval_loss`.
      folder: of the own models, on the client's machine.
      calls: of the train function, at least 1.

    Returns:
      An object whose `arrays(context)` is the client's own model.

    Raises:
      Refusal: `calls` is less than 1.

    Example:
      >>> from flwr.clientapp import ClientApp
      >>> import fedveil as fv
      >>> app = ClientApp()
      >>> @app.train(mods=[fv.private_update])
      ... def train(message, context):
      ...     ...
      >>> @app.evaluate()
      ... def evaluate(message, context):
      ...     ...
      >>> own = fv.personal_app(app, train, evaluate, folder="own-models")
    """
    if calls < 1:
        raise Refusal("calls", calls, "give at least 1")
    own = PersonalApp(train, evaluate, Path(folder), calls)
    app.query(ACTION)(own.answer)
    return own


def make_personal(
    grid: Grid,
    arrays: ArrayRecord,
    *,
    initial: ArrayRecord | None = None,
    config: ConfigRecord | None = None,
    timeout: float | None = None,
) -> int:
    """Send a final model to all connected clients, so that each makes its own model from it.

    The model is released already, so that it costs nothing. Clients reply with nothing.

    Args:
      grid: reaches the clients: Flower's own, not the protected one.
      arrays: of the final model, such as `result.arrays` of a strategy.
      initial: of a model before any training; with it clients also try a model of their own records alone.
      config: as the strategy sends it to the train function; None sends an empty one.
      timeout: seconds for the replies; None waits for all.

    Returns:
      How many clients have replied. Whether one could make its model stays with it, in its log.

    Example:
      >>> import fedveil as fv
      >>> from flwr.app import ArrayRecord
      >>> class NoClients:
      ...     def get_node_ids(self): return []
      ...     def send_and_receive(self, messages, timeout=None): return []
      >>> fv.make_personal(NoClients(), ArrayRecord())
      0
    """
    content = RecordDict({RELEASED: arrays, CONFIG: ConfigRecord() if config is None else config})
    if initial is not None:
        content[INITIAL] = initial
    kind = f"{MessageType.QUERY}.{ACTION}"
    messages = [Message(content, node, kind) for node in grid.get_node_ids()]
    replies = [*grid.send_and_receive(messages, timeout=timeout)]
    count = sum(not reply.has_error() for reply in replies)
    logger.info("%d of %d clients have got the final model", count, len(messages))
    return count


def _arrays(record: ArrayRecord) -> dict[str, NDArray[np.generic]]:
    return {name: each.numpy() for name, each in record.items()}


def _record(arrays: Arrays) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(each)) for name, each in arrays.items()})
