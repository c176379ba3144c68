"""ClientApp that receives the global model, trains on the owner's data and answers with one vector."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable, Mod
from torch import nn

from ..base.extensions import extension
from ..base.refusal import Refusal
from ..messages import wire
from ..messages.client_settings import TRAIN_LOSS, ClientSettings, RecordPrivacy, training_settings
from ..messages.local_training import LocalTraining
from ..privacy.budget import Release, check_delta
from ..privacy.ledger.ledger import BudgetExhausted, Key, Ledger
from ..privacy.mechanisms.randomness import Randomness
from ..strategies.record_plan import record_plan
from ..tasks import load_task
from ..tasks.arrays import base_check, lent_arrays, load_arrays, memory_of
from ..tasks.data import Data, Examples, data_of, drawn_data_of, leaves, placeholder
from ..tasks.fingerprint import fingerprint
from ..tasks.hardware import check_made_here, device_of, placed, precision
from ..tasks.independence import Mixing, check_evaluated_apart, check_independence
from ..tasks.memory import keep_freed
from ..tasks.persons import Owners, kept
from ..tasks.protocol import Objective, Task, check_trainable
from .extra import OwnRound, extra_clients, extra_records
from .private_update import or_unchanged, private_update, record_sum_reply, unchanged
from .training.batches import seeds_of
from .training.sgd import train, with_fast_kernels

logger = logging.getLogger("fedveil.client")

MECHANISM = "dp_sgd"
SETTINGS_KEY = "fedveil-client"  # key of the run's configuration; its value is JSON
LEDGER_WAIT_SECONDS = 10.0


@dataclass(frozen=True, eq=False)
class Workbench:
    """Task and model that one process keeps between clients; the model's arrays are loaded in place.

    Attributes:
      settings: of the clients.
      loaded_task: the task, if it is loaded already; None loads it from the settings.
      measured: the result of the model's independence check, once it has run.
      evaluated: whether that check has run in evaluation mode, if it found something.
    """

    settings: ClientSettings
    loaded_task: Task | None = None
    measured: list[bool] = field(default_factory=list[bool])
    evaluated: list[bool] = field(default_factory=list[bool])
    _engines: dict[tuple[Any, ...], str] = field(default_factory=dict[tuple[Any, ...], str])
    _names: dict[int, str] = field(default_factory=dict[int, str])
    _data: dict[tuple[int, int, Owners | None], Data] = field(
        default_factory=dict[tuple[int, int, "Owners | None"], Data]
    )

    @cached_property
    def task(self) -> Task:
        """The task, loaded once."""
        return self.loaded_task or load_task(
            self.settings.task, self.settings.task_options, self.settings.allow_modules
        )

    @cached_property
    def device(self) -> torch.device:
        """Device on which this process trains."""
        return device_of(self.settings.accelerator)

    @cached_property
    def model(self) -> nn.Module:
        """The only model of this process."""
        keep_freed()
        made = self.task.model()
        check_made_here(made)
        return with_fast_kernels(made).to(self.device)

    @cached_property
    def forget(self) -> Callable[[], None]:
        """Reset of the model's state besides its arrays, so that no information of a client reaches the next one."""
        put_back, require = memory_of(self.model), self.require_base

        def forget() -> None:
            require()
            put_back()

        return forget

    @cached_property
    def require_base(self) -> Callable[[], None]:
        """Check that training left the model's base, which no sum and no release covers, as it was."""
        return base_check(self.model)

    def fingerprint_of(self, data: Data, client: int) -> str:
        """Return the fingerprint of a client's data; lazily read data are read for it once in this process."""
        if isinstance(data, Examples):
            return fingerprint(data)
        return self._names.get(client) or self._names.setdefault(client, fingerprint(data))

    def data_of(self, client: int, settings: ClientSettings) -> Data:
        """Return a client's training data, without the examples that exceed the bound per person.

        Args:
          client: its number in the task.
          settings: limit the examples of one person, and the clients that hold them.
        """
        data, level = drawn_data_of(self.task, client), settings.record or settings.step
        if level is None or level.terms.per_person is None:
            return data
        most, numbers = level.clients_per_person, level.numbers(client, self.task.num_clients)
        owners = None if most is None else Owners(*numbers, most)
        key = client, level.terms.per_person, owners
        if key not in self._data:
            self._data[key] = kept(data, level.terms.per_person, owners)
        return self._data[key]

    def records_of(self, client: int, settings: ClientSettings) -> Data:
        """Return the records that a step samples from: a client's data and, where they are observed, extra records.

        Args:
          client: its number in the task.
          settings: give the number of extra records.
        """
        data, asked = self.data_of(client, settings), settings.canaries_of_step
        return extra_records().with_canaries(data, asked, client) if asked.count else data

    @cached_property
    def watched(self) -> tuple[nn.Module, Objective]:
        """Model with the block of all extra records of a step, and the loss of both."""
        joint = self.settings.step
        assert joint is not None
        every = (self.data_of(client, self.settings) for client in range(self.task.num_clients))
        some = placed(next(data for data in every if len(data)), self.device)
        asked, norm = joint.canaries, joint.terms.max_grad_norm
        return extra_records().watch(self.model, self.task, some, asked.count, asked.replaced, norm)

    def stepped(self, settings: ClientSettings) -> tuple[nn.Module, Objective]:
        """Return model and loss of a step on all clients' records, with the block of its extra ones if it has some."""
        return self.watched if settings.canaries_of_step.count else (self.model, self.task)

    def precision(self) -> AbstractContextManager[Any]:
        """Return the context in which the model runs."""
        return precision(self.device, self.settings.dtype)

    def private_model(self, data: Data, evaluated: bool = False) -> nn.Module:
        """Return the model after checking that DP-SGD can train it and that it keeps examples independent.

        Args:
          data: of the first client that trains in this process; independence is measured on them once.
          evaluated: also check evaluation mode and the metrics.

        Raises:
          Refusal: the check failed; the sentence names the layer, the loss or the attribute.
        """
        if len(data) and not any(self.measured):
            check_trainable(self.model)
            check_independence(self.task.model(), self.task, data)  # not with a server's values
            self.measured.append(True)
        if evaluated and len(data) and not self.evaluated:
            check_evaluated_apart(self.task.model(), self.task, data)
            self.evaluated.append(True)
        return self.model

    def lend(self) -> ArrayRecord:
        """Return the trained arrays to a caller that overwrites them with the update; the model must be loaded again."""
        return wire.memory_arrays(lent_arrays(self.model), lent=True)

    def engine_of(self, gradients: str, data: Data) -> str:
        """Return the engine of DP-SGD; chosen once for each input shape.

        Args:
          gradients: as of `chosen_engine`.
          data: of a client.
        """
        from .dp_sgd.train import chosen_engine

        parts = leaves(placeholder(data, 1))
        shape = (gradients, bool(len(data)), *((tuple(each.shape), each.dtype) for each in parts))
        if shape not in self._engines:
            self._engines[shape] = chosen_engine(gradients, self.model, data)
        return self._engines[shape]

    def keeps_apart(self, data: Callable[[], Data]) -> bool:
        """Return whether model and loss keep examples independent; measured once in this process.

        Args:
          data: returns those of the first clients that ask; at least one example.
        """
        if not self.measured:
            try:
                self.private_model(data())
            except Exception:  # noqa: BLE001 (a refusal, or any error of the task's code)
                self.measured.append(False)
        return any(self.measured)


def check_engine(gradients: str, task: Task, examples: Callable[[], Data]) -> None:
    """Refuse an engine that was selected by name and cannot train the task's model.

    Args:
      gradients: as of `chosen_engine`.
      task: makes the model.
      examples: returns examples of the model's input shape; called only for an engine selected by name.

    Raises:
      Refusal: it cannot; the sentence names the engine.
    """
    if gradients != "auto":
        from .dp_sgd.train import chosen_engine

        chosen_engine(gradients, task.model(), examples())


@lru_cache(maxsize=4)
def workbench(settings_json: str) -> Workbench:
    """Return this process's workbench for these settings."""
    return Workbench(ClientSettings.from_json(settings_json))


def import_parts(settings: ClientSettings) -> None:
    """Import what training with these settings needs beside this module: no client's clock runs meanwhile."""
    if settings.record is not None:
        from .dp_sgd import train as _
    if settings.step is not None:
        from .dp_sgd import together as _
    if settings.encryption is not None:
        from . import secure_update as _  # noqa: F401


def make_client_app(
    settings: Callable[[Context], str], extra_mods: tuple[Mod, ...] = (), bench: Workbench | None = None
) -> ClientApp:
    """Return a ClientApp that trains with the settings.

    Args:
      settings: returns the client's settings, as JSON, from a node's context.
      extra_mods: around the private update, the outermost first.
      bench: an existing one for these settings.
    """
    app = ClientApp()

    def found(context: Context) -> Workbench:
        return bench or workbench(settings(context))

    def protected(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        told = found(context).settings
        if told.encryption is None:
            return private_update(message, context, call_next)
        from ..strategies.identity import simulated_identity  # needed only by encrypted sums
        from .secure_update import secure_update

        identity = simulated_identity(told.encryption, int(str(context.node_config["partition-id"])))
        return secure_update(identity, Randomness(told.seed), message, context, call_next)

    @app.train(mods=[*extra_mods, protected])
    def on_train(message: Message, context: Context) -> Message:
        client, bench = int(str(context.node_config["partition-id"])), found(context)
        dummies = bench.settings.canary_clients
        if client in dummies:
            return extra_clients().canary_answer(message, dummies, client)
        masked = bench.settings.encryption
        hidden = masked is not None and masked.minimum_noise_multiplier > 0
        try:
            return or_unchanged(message, lambda: _answered(message, client, bench), hidden)
        except Mixing:
            logger.exception("this client trains no more")
            return Message(Error(wire.MIXES, "the task mixes examples"), reply_to=message)

    assert on_train is not None
    return app


def _answered(message: Message, client: int, bench: Workbench) -> Message:
    if wire.is_query(message.content):
        answer = extension("query", "answer", "question", client)
        return answer(message, client, bench)
    return train_round(message, client, bench, bench.settings)


def train_round(message: Message, client: int, bench: Workbench, settings: ClientSettings) -> Message:
    """Return the reply with one client's trained model, or an error if its ledger does not allow it.

    Args:
      message: the global model, in an instruction of a private sum.
      client: number of the client in the task, from 0.
      bench: task and model.
      settings: of this round.
    """
    if settings.step is not None:
        return _step_round(message, client, bench, settings)
    data = bench.data_of(client, settings)
    if not len(data):
        if wire.sum_spec_of(message.content).clipping_norm is None:
            return Message(Error(wire.NO_EXAMPLES, "this client has no examples"), reply_to=message)
        return unchanged(message)
    training = training_settings(message.content, settings)
    bench.forget()
    model = bench.model if settings.record is None else bench.private_model(data)
    load_arrays(model, wire.views(wire.only_arrays(message.content)))
    run, number = wire.read_round(message.content)
    randomness = Randomness(settings.seed)
    key = int(randomness.stream("training", number).uint64(1)[0])
    seed_layers(key, client, data, bench.device)
    metrics: dict[str, float] = {wire.WEIGHT: len(data)}
    if settings.loss_traces:
        from ..tasks.mislabelled import keep_losses

        keep_losses(Path(settings.loss_traces), client, number, bench.task, model, placed(data, bench.device))
    if settings.record is None:
        near = placed(data, bench.device)
        if (loss := train(model, bench.task, near, training, client, key, bench.precision)) is not None:
            metrics[TRAIN_LOSS] = loss
    else:
        # Clients with equal data share a ledger, and each is charged on it. In another attempt at a round seeded noise
        # repeats at no cost; the system's noise is fresh.
        attempt = wire.read_attempt(message.content) if settings.seed is None else 0
        mechanism = f"{MECHANISM} {client}" + (f" attempt {attempt}" if attempt else "")
        try:
            _train_on_ledger(
                bench, data, client, settings, settings.record, training, (run, number, mechanism)
            )
        except BudgetExhausted:
            return Message(Error(wire.BUDGET_SPENT, "this client's budget is spent"), reply_to=message)
        except Refusal as refusal:
            if refusal.field != "ledger":
                raise
            logger.exception("the ledger cannot be used")
            return Message(Error(wire.NOT_READY, "this client's ledger cannot be used"), reply_to=message)
    bench.require_base()
    content = RecordDict({"arrays": bench.lend(), "metrics": MetricRecord(dict(metrics))})
    return Message(content, reply_to=message)


def _step_round(message: Message, client: int, bench: Workbench, settings: ClientSettings) -> Message:
    """Return the reply with one client's contribution to a step on all clients' records, as `train_round` does.

    Raises:
      Refusal: the sum does not allow contributions of this norm.
    """
    from .dp_sgd.together import draw_records, step_of

    joint, (_, number) = settings.step, wire.read_round(message.content)
    assert joint is not None
    norm = joint.terms.max_grad_norm
    data = bench.data_of(client, settings)
    receive_model(bench, data, message.content)
    randomness = Randomness(settings.seed)
    seed_layers(int(randomness.stream("training", number).uint64(1)[0]), client, data, bench.device)
    rate, spec = training_settings(message.content, settings).learning_rate, wire.sum_spec_of(message.content)
    unit, factor = spec.unit_norm, 1.0 if spec.compression is None else spec.compression.clip_factor
    if unit is None or norm * rate * factor > unit:
        remedy = f"times the learning rate it exceeds the sum's norm of a record's part, {unit}"
        raise Refusal("privacy.max_grad_norm", norm, remedy)
    data = bench.records_of(client, settings)
    rows = draw_records(len(data), joint, randomness.stream("batches", number, client))
    update = step_of(*bench.stepped(settings), settings, message.content, placed(data, bench.device), rows)
    bench.require_base()
    return record_sum_reply(message, update)


def receive_model(bench: Workbench, data: Data, content: RecordDict) -> None:
    """Load the instruction's arrays into the model after checking that it keeps examples independent."""
    bench.forget()
    own = wire.views(wire.only_arrays(content))
    own.pop(wire.CANARY_RECORDS, None)
    load_arrays(bench.private_model(data), own)


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


def _train_on_ledger(
    bench: Workbench,
    data: Data,
    client: int,
    settings: ClientSettings,
    record: RecordPrivacy,
    training: LocalTraining,
    key: Key,
) -> None:
    from .dp_sgd.train import PrivateSteps, chosen_engine, train_privately

    check_delta("privacy", record.terms.target_delta, len(data), "records", record.allow_large_delta)
    name = _ledger_name(bench, client, settings, record)
    plan = record_plan(record.of_ledger(name), len(data) + record.canaries, settings)
    own = bench.model, bench.task, placed(data, bench.device)
    randomness, (_, number, _) = Randomness(settings.seed), key
    if record.canaries:
        path = record.ledger_path(name)
        observed = extra_records().begin_round(*own, plan, record.canaries, randomness, path)
        engine = chosen_engine(record.terms.gradients, observed.model, observed.examples)
    else:
        observed, engine = OwnRound(*own), bench.engine_of(record.terms.gradients, own[-1])
    batches = randomness.stream("batches", number, client)
    noise = randomness.stream("dp-sgd noise", number, client)
    steps = PrivateSteps(plan, batches, noise, observed.after_step)
    rng = "system" if settings.seed is None else "seeded"
    release = Release(record.terms.budget.unit, *key, dict.fromkeys(plan.adversaries, plan.event()), rng)
    with own_ledger(bench, client, settings, record) as ledger:
        ledger.reserve_new(release)
        train_privately(observed.model, observed.loss, observed.examples, training, steps, engine)
        observed.keep(number)
        ledger.commit(release.key)


def _ledger_name(bench: Workbench, client: int, settings: ClientSettings, record: RecordPrivacy) -> str:
    named = record.ledgers[client] if record.ledgers else ""
    return settings.device or named or bench.fingerprint_of(data_of(bench.task, client), client)


def own_ledger(bench: Workbench, client: int, settings: ClientSettings, record: RecordPrivacy) -> Ledger:
    """Return the ledger of a client's records, open for writing."""
    name = _ledger_name(bench, client, settings, record)
    simulated = bench.task.simulated and settings.device is None
    path = record.ledger_path(name)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return Ledger.open(
        path,
        record.terms.budget,
        owner=name,
        simulated=simulated,
        durable=not simulated,
        wait=LEDGER_WAIT_SECONDS,
    )
