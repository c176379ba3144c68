"""ClientApp that answers a server's instructions from its owner's data.

| instruction | answered by | charged before the answer leaves |
|---|---|---|
| to an extra client of an audit | `canary_answer` | nothing: no data are read |
| that asks | `answer` of the query's extension | the client's own ledger, where the client adds the noise |
| to train, with one step on all clients' records | `step_round` | the population's ledger, at the server |
| to train, with record-level privacy | `train_on_ledger` | the ledger of the client's own records |
| to train otherwise | `train` | the population's ledger, at the server, where it has one |

An answer leaves as the private sum's vector, which `private_update` or `secure_update` makes of it.

| raised meanwhile | sent instead; the owner's log has the text |
|---|---|
| `BudgetExhausted`, `Refusal` of the ledger, `Mixing` | the error `BUDGET_SPENT`, `NOT_READY`, `MIXES` |
| any error of the task, in an encrypted sum with noise | a zero update: who answers would tell of the data |
| any other | the error `FAILED` |
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable, Mod

from ..base.extensions import extension
from ..base.refusal import Refusal
from ..messages import wire
from ..messages.client_settings import TRAIN_LOSS, ClientSettings, training_settings
from ..privacy.ledger.ledger import BudgetExhausted
from ..privacy.mechanisms.randomness import Randomness
from ..tasks.hardware import placed
from ..tasks.independence import Mixing
from .extra import extra_clients
from .private_update import or_unchanged, private_update, unchanged
from .training.sgd import key_of_round, seed_layers, train
from .workbench import Workbench, workbench

if TYPE_CHECKING:
    from .secure_update import NodeMemory

logger = logging.getLogger("fedveil.client")

SETTINGS_KEY = "fedveil-client"  # key of the run's configuration; its value is JSON
# Returns a client's reply to an instruction to train; arguments as of `train_round`.
TrainRound = Callable[[Message, int, Workbench, ClientSettings], Message]


def import_parts(settings: ClientSettings) -> None:
    """Import what training with these settings needs beside this module, before workers are forked or a client is timed."""
    if settings.record or settings.step:
        from .dp_sgd import rounds as _
    if settings.encryption is not None:
        from . import secure_update as _  # noqa: F401


def make_client_app(
    settings: Callable[[Context], str],
    extra_mods: tuple[Mod, ...] = (),
    bench: Workbench | None = None,
    memory: NodeMemory | None = None,
    training: TrainRound | None = None,
) -> ClientApp:
    """Return a ClientApp that trains with the settings.

    Args:
      settings: returns the client's settings, as JSON, from a node's context.
      extra_mods: around the private update, the outermost first.
      bench: an existing one for these settings.
      memory: of nodes in secure aggregation; None seals it in their contexts.
      training: answers instructions to train; None is `train_round`.
    """
    app = ClientApp()

    def bench_of(context: Context) -> Workbench:
        return bench or workbench(settings(context))

    def protected(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        settings_of_client = bench_of(context).settings
        if settings_of_client.encryption is None:
            return private_update(message, context, call_next)
        from ..strategies.identity import simulated_identity  # needed only by encrypted sums
        from .secure_update import SEALED_MEMORY, secure_update

        identity = simulated_identity(settings_of_client.encryption, _number(context))
        randomness = Randomness(settings_of_client.seed)
        return secure_update(
            identity, randomness, message, context, call_next, memory=memory or SEALED_MEMORY
        )

    @app.train(mods=[*extra_mods, protected])
    def on_train(message: Message, context: Context) -> Message:
        return answer(message, _number(context), bench_of(context), training)

    assert on_train is not None
    return app


def _number(context: Context) -> int:
    """Return the number of the client whose node this is, from 0."""
    return int(str(context.node_config["partition-id"]))


def answer(message: Message, client: int, bench: Workbench, training: TrainRound | None = None) -> Message:
    """Return a client's answer to an instruction of any kind, as the table of this module says.

    Args:
      message: the instruction.
      client: number of the client in the task, from 0.
      bench: task and model.
      training: answers an instruction to train; None is `train_round`.
    """
    settings = bench.settings
    if client in settings.canary_clients:
        return extra_clients().canary_answer(message, settings.canary_clients, client)
    encryption = settings.encryption
    has_noise = encryption is not None and encryption.minimum_noise_multiplier > 0

    def computed() -> Message:
        if wire.is_query(message.content):
            return extension("query", "answer", "question", client)(message, client, bench)
        return (training or train_round)(message, client, bench, settings)

    try:
        return or_unchanged(message, computed, must_hide=has_noise)
    except Mixing:
        logger.exception("this client trains no more")
        return _error(message, wire.MIXES, "the task mixes examples")


def train_round(message: Message, client: int, bench: Workbench, settings: ClientSettings) -> Message:
    """Return a client's reply to an instruction to train, or an error if its ledger does not allow it.

    Args:
      message: the instruction of a private sum, with the global model.
      client: number of the client in the task, from 0.
      bench: task and model.
      settings: of this round.
    """
    try:
        if settings.step is None:
            return _trained(message, client, bench, settings)
        from .dp_sgd.rounds import step_round

        return step_round(message, client, bench, settings)
    except BudgetExhausted:
        return _error(message, wire.BUDGET_SPENT, "this client's budget is spent")
    except Refusal as refusal:
        if refusal.field != "ledger":
            raise
        logger.exception("the ledger cannot be used")
        return _error(message, wire.NOT_READY, "this client's ledger cannot be used")


def _error(message: Message, code: int, text: str) -> Message:
    return Message(Error(code, text), reply_to=message)


def _trained(message: Message, client: int, bench: Workbench, settings: ClientSettings) -> Message:
    """Train the bench's model on a client's data, and return the reply with it, of which the caller makes a vector.

    A ledger of records is charged before the first step that they influence.
    """
    content = message.content
    data = bench.data_of(client, settings)
    if not len(data):
        if wire.sum_spec_of(content).clipping_norm is None:  # without a clip, an absent client may be noticed
            return _error(message, wire.NO_EXAMPLES, "this client has no examples")
        return unchanged(message)
    training = training_settings(content, settings)
    run, number = wire.read_round(content)
    if settings.record:
        bench.private_model(data)  # refuses one that DP-SGD cannot train
    bench.receive(wire.views(wire.only_arrays(content)))
    bench.load_own(client, run, number)
    key = key_of_round(settings.seed, number)
    seed_layers(key, client, data, bench.device)
    examples = placed(data, bench.device)
    metrics: dict[str, float] = {wire.WEIGHT: len(data)}
    if settings.loss_traces:
        from ..tasks.mislabelled import keep_losses, losses_of

        losses = losses_of(bench.task, bench.model, examples, settings.examples_at_once)
        keep_losses(Path(settings.loss_traces), client, number, losses)
    if settings.record:
        from .dp_sgd.rounds import train_on_ledger

        train_on_ledger(content, client, bench, settings, examples, training)
    else:
        loss = train(bench.model, bench.task, examples, training, client, key, bench.precision)
        metrics |= {} if loss is None else {TRAIN_LOSS: loss}
    bench.require_base()  # that of `receive`
    bench.store_own(client, run, number)
    reply = RecordDict({"arrays": bench.lend(), "metrics": MetricRecord(dict(metrics))})
    return Message(reply, reply_to=message)
