"""Population of real data on this machine; its ledgers lie with the data, and are named by the data's identity."""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection, Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.durable_files import make_folder
from ..base.refusal import Refusal
from ..privacy.budget import Budget, Unit
from ..privacy.ledger import data_sets
from ..privacy.ledger.caps import DATA_ID, NAME_LENGTH, NO_DATA_ID, Cap, caps_on, ledger_file, ledger_folder
from ..privacy.ledger.client_sums import charge_records
from ..tasks.data import Data, data_of
from ..tasks.fingerprint import content_of
from ..tasks.protocol import Task
from .machine import OnThisMachine
from .population import REAL, Words

if TYPE_CHECKING:
    from ..messages.record_settings import RecordPrivacy
    from ..privacy.ledger.data_sets import PendingCharges
    from ..privacy.ledger.ledger import Ledger

MOVED = (  # warning, with the data set's name
    "task.data_id={}: the clients' data are not those of the last run; as nobody knows at which client a person is now, each "
    "client's ledger goes on from the most that any of them held"
)


class Local(OnThisMachine):
    """Clients with real data on this machine; their ledgers lie with the data, and are named by the data's identity."""

    @property
    def words(self) -> Words:
        """The words that describe a run of these clients."""
        return Words(REAL, "real data", ledgers="ledger.dir")

    @cached_property
    def data_id(self) -> str:
        """The declared name of the data."""
        return self.require_name()

    def require_name(self) -> str:
        """Return the name of the data: the setting `task.data_id`, else the attribute `data_id` of the task.

        Raises:
          Refusal: the data have no name.
        """
        data_id = self.settings.task.data_id or getattr(self.task, "data_id", None)
        if data_id is None:
            remedy = "name these real data, the same in every run, since it identifies their budget, as in task.data_id=wards-2026"
            raise Refusal("task.data_id", None, remedy)
        if not re.fullmatch(DATA_ID, str(data_id)):
            raise Refusal("task.data_id", data_id, NO_DATA_ID)
        return str(data_id)

    @cached_property
    def fingerprints(self) -> list[str]:
        """The fingerprint of each client's data; a random one for unreadable data, which then count as changed."""
        if self.unscaled:
            return list(self.unscaled)
        clients = range(self.task.num_clients)
        return [content_of(data_of(self.task, client)) or secrets.token_hex(32) for client in clients]

    @property
    def owner(self) -> str:
        """Identity of the clients on the population's ledger."""
        return data_sets.population_ledger(self.data_id)

    @cached_property
    def _client_ledgers(self) -> list[str]:
        return data_sets.client_ledgers(self.data_id, self.fingerprints)

    @property
    def client_ledger_names(self) -> Sequence[str]:
        """Name of the ledger of each client's records."""
        return self._client_ledgers

    @property
    def ledger_names(self) -> tuple[str, ...]:
        """Names of the clients' ledgers, for their settings."""
        return tuple(self.client_ledger_names)

    @property
    def home(self) -> Path:
        """Folder of all ledgers of real data.

        Raises:
          Refusal: the configured one is relative.
        """
        return ledger_folder("ledger.dir", self.settings.ledger.dir)

    def ledger_path(self, prefix: str, folder: Path) -> Path:
        """Return the path of the population's ledger. Arguments as of `Population`."""
        return ledger_file(self.home, self.owner, prefix)

    def client_ledger_home(self, folder: Path) -> Path:
        """Return the folder of the clients' own ledgers."""
        return self.home

    def pending_charges(self) -> PendingCharges:
        """Return earlier losses of the people that the clients' ledgers lack; `settle` charges them."""
        return data_sets.pending_for_clients(self.home, self.data_id, self.fingerprints)

    def caps(self, path: Path) -> Sequence[Cap]:
        """Return the owner's caps on a ledger."""
        return caps_on(path)

    def check_identity(self, data_id: str | None, spends: bool) -> None:
        """Refuse to spend on data without a name."""
        if spends:
            self.require_name()

    @contextmanager
    def exclusive_lock(self) -> Generator[None]:
        """Prevent other runs and questions from charging the ledgers of these data meanwhile."""
        make_folder("ledger.dir", self.home)
        with data_sets.exclusive_access(self.home, self.data_id):
            yield

    def check_mode(self, mode: str) -> None:
        """Refuse records that the other record-level mode charges, on ledgers that this mode does not use.

        On one machine `record` charges each client's ledger and `record_distributed` one of all records; two budgets for the
        same people would be spent one after the other. A device has one ledger of records for both.
        """
        data_sets.require_records(data_sets.data_set(self.home, self.data_id), mode)

    def claim_mode(self, mode: str) -> None:
        """Record which mode charges the records on this machine; of two that begin at the same time one is refused."""
        make_folder("ledger.dir", self.home)
        data_sets.claim_records(self.home, self.data_id, mode)

    def settle(self, record: RecordPrivacy) -> str:
        """Charge the clients' ledgers with earlier losses of their people, and return a warning; it may be empty."""
        pending, folder, budget = self.pending_charges(), Path(record.ledger_dir), record.terms.budget
        data_sets.settle(folder, self.data_id, pending, budget)
        clients = data_sets.population_path(folder, self.data_id)
        for name in dict.fromkeys(self.client_ledger_names):
            data_sets.charge_client_sums(record.ledger_path(name), name, clients, budget)
        return MOVED.format(self.data_id) if pending.changed else ""

    def settle_sums(self, path: Path, budget: Budget) -> None:
        """Charge the population's ledger, before it is opened, with earlier losses of its people."""
        prefix = path.stem.removesuffix(self.owner[:NAME_LENGTH])  # as `ledger_file` made the name
        pending = data_sets.pending_for_population(path.parent, self.data_id, prefix)
        data_sets.settle(path.parent, self.data_id, pending, budget, prefix)

    def share(self, ledger: Ledger, budget: Budget) -> None:
        """Connect an open ledger of the population with the other ledgers of the same people.

        A ledger of clients also spends the budgets of their records; a ledger of records is charged what the sums of whole
        clients cost a record.
        """
        folder = ledger.path.parent
        if budget.unit is Unit.CLIENT:
            ledger.shared = data_sets.budgets_of_records(folder, self.data_id, ledger.book)
        else:
            charge_records(ledger, data_sets.population_path(folder, self.data_id), budget)

    def keep_head(self, ledger: Ledger) -> None:
        """Store the head of a closed ledger; a later run refuses a ledger without it."""
        with suppress(Refusal):  # of a full disk: the earlier head stays
            data_sets.keep_head(ledger, self.data_id)

    def client_ledger_files(self, folder: Path) -> list[Path]:
        """Return the clients' own ledgers in a folder, which holds others as well."""
        paths = {ledger_file(folder, name) for name in self.client_ledger_names}
        return sorted(path for path in paths if path.exists())

    def opened_ledgers(
        self, record: RecordPrivacy, took_part: Collection[int], paths: Collection[Path]
    ) -> Iterable[tuple[int, str]]:
        """Return numbers and ledgers' names of all clients, in their order."""
        return enumerate(self.client_ledger_names)

    def clients_to_check(self, task: Task, all_clients: bool) -> range:
        """Return all clients."""
        return range(task.num_clients)

    def local_clients(self, task: Task) -> range:
        """Return all clients."""
        return range(task.num_clients)

    def to_measure(self, task: Task) -> Iterable[Data]:
        """Return examples of each client, or of a large model one selection of all clients' examples."""
        from ..tasks.probe import batches_of_all, is_large  # torch, which a plan does without

        clients = (data_of(task, client) for client in range(task.num_clients))
        return batches_of_all(clients, pooled=is_large(task.model()))
