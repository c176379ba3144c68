"""Workbench of the clients of one process: their task, the only model, their data and their ledgers of records."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from flwr.app import ArrayRecord
from numpy.typing import NDArray
from torch import nn

from ..base.extensions import extension
from ..messages import wire
from ..messages.client_settings import ClientSettings
from ..messages.record_settings import RecordPrivacy
from ..privacy.budget import Budget
from ..privacy.ledger.ledger import Ledger
from ..privacy.ledger.store import Store
from ..privacy.plan import Plan
from ..strategies.record_plan import record_plan
from ..tasks import load_task
from ..tasks.arrays import base_check, lent_arrays, load_arrays, memory_of, own_names
from ..tasks.data import Data, Examples, data_of, drawn_data_of
from ..tasks.fingerprint import fingerprint
from ..tasks.hardware import check_made_here, device_of, placed, precision
from ..tasks.independence import check_evaluated_apart, check_independence
from ..tasks.memory import keep_freed
from ..tasks.persons import Owners, limit_per_person
from ..tasks.protocol import Objective, Task, check_trainable
from .extra import extra_records
from .training.sgd import with_fast_kernels

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

LEDGER_WAIT_SECONDS = 10.0  # for another process that holds the ledger
# Simulated clients' ledgers that stay read in memory, and their releases: about half a kilobyte each.
MAX_LEDGERS, MAX_RELEASES = 2048, 1 << 20
LedgerKey = tuple[int, str, str, Budget, str]  # process, folder, name, budget and origin


@dataclass(eq=False)
class Workbench:
    """Task and model that one process keeps between clients; the model's arrays are loaded in place.

    Attributes:
      settings: of the clients.
      loaded_task: the task, if it is loaded already; None loads it from the settings.
      measured: whether the model's independence was checked, with either result.
      independent: whether it passed: the model keeps examples independent in training.
      evaluated: whether it passed in evaluation mode.
    """

    settings: ClientSettings
    loaded_task: Task | None = None
    measured: bool = False
    independent: bool = False
    evaluated: bool = False
    # Of data by client, but not of real data in memory.
    _fingerprints: dict[int, str] = field(default_factory=dict[int, str])
    # Data within the bounds per person, by client, most examples of a person, and owners.
    _bounded: dict[tuple[int, int, Owners | None], Data] = field(
        default_factory=dict[tuple[int, int, "Owners | None"], Data]
    )
    # Of simulated clients. A forked process keeps its parent's store, unused: see `Store`.
    _stores: dict[tuple[int, Path], Store] = field(default_factory=dict[tuple[int, Path], Store])
    _ledgers: dict[LedgerKey, Ledger] = field(default_factory=dict["LedgerKey", Ledger])
    # Plan and event of a round on own records, by noise of the ledger alone and number of records.
    _plans: dict[tuple[float | None, int], tuple[Plan, DpEvent]] = field(
        default_factory=dict[tuple[float | None, int], "tuple[Plan, DpEvent]"]
    )

    @cached_property
    def task(self) -> Task:
        """The task, loaded once."""
        settings = self.settings
        return self.loaded_task or load_task(settings.task, settings.task_options, settings.allow_modules)

    @cached_property
    def device(self) -> torch.device:
        """Device on which this process trains."""
        return device_of(self.settings.accelerator)

    @cached_property
    def model(self) -> nn.Module:
        """The only model of this process."""
        keep_freed()
        model = self.task.model()
        check_made_here(model)
        return with_fast_kernels(model).to(self.device)

    @cached_property
    def convolves(self) -> bool:
        """Whether the model has convolutions of images, whose weights have four dimensions."""
        return any(p.dim() == 4 for p in self.model.parameters())

    def precision(self) -> AbstractContextManager[Any]:
        """Return the context in which the model runs."""
        return precision(self.device, self.settings.dtype)

    @cached_property
    def forget(self) -> Callable[[], None]:
        """Function that resets the model's state besides its arrays, so that nothing of a client reaches the next one."""
        restore, require = memory_of(self.model), self.require_base

        def forget() -> None:
            require()
            restore()

        return forget

    @cached_property
    def require_base(self) -> Callable[[], None]:
        """Function that checks that training left the model's base, which no sum and no release covers, as it was."""
        return base_check(self.model)

    def receive(self, arrays: Mapping[str, NDArray[np.generic]]) -> None:
        """Reset what the client before left in the model, and load an instruction's arrays into it."""
        self.forget()
        load_arrays(self.model, arrays)

    def load_own(self, client: int, run: str, number: int) -> None:
        """Load what a client's layers that stay there were before round `number`, into a model that was just reset."""
        if own_names(self.model):
            _own_layers().load_own(self.model, self.settings, client, run, number)

    def store_own(self, client: int, run: str, number: int) -> None:
        """Store the layers that stay at a client, as it trained them in round `number`."""
        if own_names(self.model):
            _own_layers().store_own(self.model, self.settings, client, run, number)

    def lend(self) -> ArrayRecord:
        """Return the trained arrays to a caller that overwrites them with the update; the model must be loaded again."""
        return wire.memory_arrays(lent_arrays(self.model), lent=True)

    def private_model(self, data: Data, evaluated: bool = False) -> nn.Module:
        """Return the model after checking that DP-SGD can train it and that it keeps examples independent.

        Args:
          data: of the first client that trains in this process; independence is measured on them once.
          evaluated: also check evaluation mode and the metrics.

        Raises:
          Refusal: the check failed; the sentence names the layer, the loss or the attribute.
        """
        if len(data) and not self.independent:
            check_trainable(self.model)
            check_independence(self.task.model(), self.task, data)  # not with a server's values
            self.measured = self.independent = True
        if evaluated and len(data) and not self.evaluated:
            check_evaluated_apart(self.task.model(), self.task, data)
            self.evaluated = True
        return self.model

    def isolates_examples(self, data: Callable[[], Data]) -> bool:
        """Return whether model and loss keep examples independent; measured once, on these data, where an error counts as no."""
        if not self.measured:
            try:
                self.private_model(data())
            except Exception:  # noqa: BLE001 (a refusal, or any error of the task's code)
                self.measured = True
        return self.independent

    def data_of(self, client: int, settings: ClientSettings) -> Data:
        """Return a client's training data, without the examples that exceed the settings' bounds per person."""
        data, private = drawn_data_of(self.task, client), settings.record or settings.step
        per_person = private and private.terms.per_person
        if private is None or per_person is None:
            return data
        owners = None
        if private.clients_per_person is not None:
            number, numbers = private.numbers(client, self.task.num_clients)
            owners = Owners(number, numbers, private.clients_per_person)
        key = client, per_person, owners
        if key not in self._bounded:
            self._bounded[key] = limit_per_person(data, per_person, owners)
        return self._bounded[key]

    def records_of(self, client: int, settings: ClientSettings) -> Data:
        """Return the records that a step samples from: a client's data and, in an audit, its canary records."""
        data, extra = self.data_of(client, settings), settings.canaries_of_step
        return extra_records().with_canaries(data, extra, client) if extra.count else data

    @cached_property
    def _observed_step(self) -> tuple[nn.Module, Objective]:
        """Model and loss of a step with an audit's canary records."""
        step = self.settings.step
        assert step is not None
        clients = (self.data_of(client, self.settings) for client in range(self.task.num_clients))
        sample = placed(next(data for data in clients if len(data)), self.device)
        canaries, norm = step.canaries, step.terms.max_grad_norm
        return extra_records().watch(self.model, self.task, sample, canaries.count, canaries.replaced, norm)

    def model_of_step(self, settings: ClientSettings) -> tuple[nn.Module, Objective]:
        """Return model and loss of a step on all clients' records; with canary records, the model has their block."""
        return self._observed_step if settings.canaries_of_step.count else (self.model, self.task)

    def ledger_name(self, client: int, settings: ClientSettings, record: RecordPrivacy) -> str:
        """Return the name of the ledger of a client's records: the device's, a listed one, or the data's fingerprint."""
        listed = record.ledgers[client] if record.ledgers else ""
        if settings.device or listed:
            return settings.device or listed
        if client not in self._fingerprints:
            data = data_of(self.task, client)
            if isinstance(data, Examples) and not self.task.simulated:
                return fingerprint(data)  # real data in memory may change from round to round
            self._fingerprints[client] = fingerprint(data)
        return self._fingerprints[client]

    def plan_of(
        self, ledger: str, records: int, settings: ClientSettings, record: RecordPrivacy
    ) -> tuple[Plan, DpEvent]:
        """Return plan and event of a round on a client's own records; of equal rounds, the same objects.

        Args:
          ledger: name of the ledger, some of which have noise of their own.
          records: number of the client's records, at least 1, without canary records.
          settings: of the client.
          record: record-level privacy of these settings.
        """
        plans = self._plans
        if settings is not self.settings:
            plans = {}
        key = self._noise_by_ledger.get(ledger), records
        if key not in plans:
            plan = record_plan(record.of_ledger(ledger), records + record.canaries, settings)
            plans[key] = plan, plan.event()
        return plans[key]

    @cached_property
    def _noise_by_ledger(self) -> dict[str, float]:
        record = self.settings.record
        return dict(record.noise_by_ledger) if record else {}

    def open_ledger(self, name: str, settings: ClientSettings, record: RecordPrivacy) -> Ledger:
        """Return the ledger with the name that `ledger_name` gave it, open for writing; its folder is created if missing.

        A simulated client's is in the store of its folder, unless it has a file of its own from an earlier release of fedveil,
        or is to have one.

        Args:
          name: of the ledger.
          settings: of the client.
          record: folder, budget and origin of the ledger.
        """
        budget, simulated = record.terms.budget, self.task.simulated and settings.device is None
        key = os.getpid(), record.ledger_dir, name, budget, record.origin
        is_stored = simulated and not record.own_files
        if is_stored and (ledger := self._ledgers.get(key)) and not self._has_too_many(ledger):
            return ledger
        path = record.ledger_path(name)
        if is_stored and (key in self._ledgers or not path.exists()):
            ledger = self._stored_ledger(key, path)
        else:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            options: Any = {"simulated": simulated, "durable": not simulated, "wait": LEDGER_WAIT_SECONDS}
            ledger = Ledger.open(path, budget, owner=name, **options)
        origin = json.loads(record.origin)
        ledger.purpose, ledger.origin = origin.pop("purpose", None), origin
        return ledger

    def _has_too_many(self, ledger: Ledger) -> bool:
        """Return whether too many releases are in memory, if each ledger has as many as this one."""
        # To sum the releases of all would take longer than a charge, in each round of each.
        return len(ledger.book.releases) * len(self._ledgers) > MAX_RELEASES

    def _stored_ledger(self, key: LedgerKey, path: Path) -> Ledger:
        """Return a simulated client's ledger in the store of its folder, which this process opens once."""
        self._forget_ledgers()
        if key not in self._ledgers:
            _, _, owner, budget, _ = key
            self._ledgers[key] = Ledger.stored(self._store(path.parent), path, budget, owner=owner)
        return self._ledgers[key]

    def _forget_ledgers(self) -> None:
        """Forget the ledgers read first until there is room for one more, but the last; their entries are in the store."""
        releases = sum(len(ledger.book.releases) for ledger in self._ledgers.values())
        while len(self._ledgers) > 1 and (len(self._ledgers) >= MAX_LEDGERS or releases > MAX_RELEASES):
            ledger = self._ledgers.pop(next(iter(self._ledgers)))
            releases -= len(ledger.book.releases)

    def _store(self, folder: Path) -> Store:
        """Return the store of a folder, which this process opens once."""
        process = os.getpid(), folder
        if process not in self._stores:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._stores[process] = Store.for_writing(folder)
        return self._stores[process]

    @contextmanager
    def writing_at_once(self) -> Generator[None]:
        """Write what the block writes to simulated clients' ledgers when it ends: all of it, or none if the block fails.

        Ledgers that have files of their own are written one by one.
        """
        record = self.settings.record
        if not record or record.own_files:
            yield
            return
        try:
            with self._store(Path(record.ledger_dir)).transaction():
                yield
        except BaseException:
            self.close()  # ledgers in memory have entries that are not in the file
            raise

    def close(self) -> None:
        """Close the store of simulated clients' ledgers that this process opened; the next charge opens it again."""
        self._ledgers.clear()
        for process in [each for each in self._stores if each[0] == os.getpid()]:
            self._stores.pop(process).close()


def _own_layers() -> Any:
    """Return the module that stores layers that stay at their client."""
    return extension("personal", "own_layers", "personal", "layers")


@lru_cache(maxsize=4)
def workbench(settings_json: str) -> Workbench:
    """Return this process's workbench for these settings."""
    return Workbench(ClientSettings.from_json(settings_json))


def check_engine(gradients: str, task: Task, examples: Callable[[], Data]) -> None:
    """Check that an engine that was selected by name can train the task's model.

    Args:
      gradients: name of the engine, or `auto`, which is not checked.
      task: makes the model.
      examples: returns examples of the model's input shape.

    Raises:
      Refusal: it cannot; the sentence names the engine.
    """
    if gradients != "auto":
        from .dp_sgd.train import chosen_engine

        chosen_engine(gradients, task.model(), examples())
