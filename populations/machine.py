"""Populations on this machine, whose clients' data it reads: of a declared simulation, and of real data."""

from __future__ import annotations

import hmac
import json
import re
import secrets
import uuid
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self

from ..base.durable_files import make_folder
from ..base.refusal import Refusal
from ..configs.schema import SimulationSettings
from ..messages.client_settings import RecordPrivacy
from ..privacy.budget import Budget, Unit
from ..privacy.ledger import data_sets
from ..privacy.ledger.book import RESERVE, read_entries
from ..privacy.ledger.caps import DATA_ID, NAMED, NO_DATA_ID, Cap, capped, caps_on, ledger_folder
from ..privacy.ledger.client_sums import charge_records
from ..privacy.ledger.data_sets import Owed
from ..privacy.ledger.ledger import Ledger
from ..server.round_terms import ALL_ANSWERS, Answers
from ..tasks.data import MOST_LOOKED_AT, Data, data_of
from ..tasks.fingerprint import content_of, fingerprint
from ..tasks.protocol import Task
from .population import ESTIMATED, REAL, SIMULATION, Population, Words

if TYPE_CHECKING:
    from ..privacy.secagg.roster import Roster

ONE_MACHINE = "simulated: this machine holds every key"
MOVED = (
    "task.data_id={}: the clients' data are not those of the last run; as nobody knows at which client a person is now, each "
    "client's ledger goes on from the most that any of them held"
)


@dataclass(frozen=True)
class OnThisMachine(Population):
    """What both populations share.

    Attributes:
      settings: of the user.
      task: loaded.
      unscaled: fingerprints of the clients' data before a run scales them, which name their ledgers; empty where it
        does not.
    """

    settings: SimulationSettings
    task: Task
    unscaled: tuple[str, ...] = ()

    reads_data = True

    @property
    def num_clients(self) -> int:
        """Number of clients."""
        return self.task.num_clients

    def run_name(self, folder: Path) -> str:
        """Return the display name of the run in a folder."""
        return folder.name

    def new_name(self) -> str:
        """Return a name of a run that is new to every ledger."""
        return uuid.uuid4().hex

    def resumption(self, folder: Path) -> str:
        """Return what resumes the run in a folder."""
        return f"resume={folder}"

    def sign(self, identities: str, nodes: int, doubly: bool) -> tuple[Roster, bytes]:
        """Return a simulated roster for encrypted sums, which no authority signed. Arguments as of `Population`."""
        from ..strategies.identity import simulated_roster  # sums in the clear need no keys

        return simulated_roster(identities, nodes, doubly)[0], b""

    def most_examples(self, bound: int, counted: Callable[[], int]) -> float:
        """Return the most examples of one client, which are counted."""
        return float(counted())

    def most_clients(self, asked: int | None) -> int | None:
        """Return the largest number of clients that train on one person, of so many asked for; None without a bound."""
        return asked and min(asked, self.num_clients)

    def answers(self, invited: float) -> Answers:
        """Return the answers that a round needs: all of them."""
        return ALL_ANSWERS

    def some_examples(self, task: Task) -> Data:
        """Return a client's examples."""
        every = (data_of(task, client) for client in range(task.num_clients))
        return next(each for each in every if len(each))

    def scaled(self, settings: SimulationSettings, task: Task, keeps_names: bool) -> Self:
        """Return the population with scaled inputs. Arguments as of `Population`."""
        unscaled = tuple(self.fingerprints) if keeps_names else ()
        return replace(self, settings=settings, task=task, unscaled=unscaled)

    def fingerprint_of(self, client: int) -> str:
        """Return the fingerprint of a client's data before a run scales them."""
        return self.unscaled[client] if self.unscaled else fingerprint(data_of(self.task, client))

    @cached_property
    def fingerprints(self) -> list[str]:
        """The fingerprint of each client's data."""
        return [self.fingerprint_of(client) for client in range(self.task.num_clients)]

    def places_under(self, key: bytes | None) -> str | None:
        """Return what shows, to who has a secret key, whether clients are where they were; None without one."""
        return hmac.digest(key, "".join(self.fingerprints).encode(), "sha256").hex() if key else None


class Simulated(OnThisMachine):
    """Clients of a declared simulation, whose data are public or synthetic; their ledgers lie in the run's folder."""

    @property
    def words(self) -> Words:
        """The words in which a run of these clients is told of."""
        return Words(SIMULATION, "simulation", ESTIMATED, "hydra.run.dir", "hydra.run.dir", ONE_MACHINE)

    simulated = needs_held_out = True

    @property
    def owner(self) -> str:
        """Identity of the clients on the population's ledger."""
        return f"simulated {self.settings.task.name}"

    @property
    def client_ledgers(self) -> Sequence[str]:
        """Name of the ledger of each client's records."""
        return self.fingerprints

    def ledger_path(self, prefix: str, folder: Path) -> Path:
        """Return the population's ledger, of a run in a folder."""
        return folder / "ledger"

    def client_ledger_home(self, folder: Path) -> Path:
        """Return the folder of the clients' own ledgers, of a run in a folder."""
        return folder / "client_ledgers"

    @property
    def ledger_names(self) -> tuple[str, ...]:
        """Names of ledgers that the clients' settings state: only if scaled data would give others."""
        return self.unscaled

    def client_ledger_files(self, folder: Path) -> list[Path]:
        """Return the clients' own ledgers in a folder, which holds no others."""
        return sorted(folder.glob("*.ledger"))

    def opened_ledgers(
        self, record: RecordPrivacy, took_part: Collection[int], paths: Collection[Path]
    ) -> Iterable[tuple[int, str]]:
        """Return numbers and ledgers' names of the clients that may have entries, in the clients' order.

        In a large population these are the participants, if every ledger is one of theirs: naming a ledger requires loading
        a client's data.
        """
        if self.num_clients > MOST_LOOKED_AT:
            names = dict[int, str]()
            for number in sorted(took_part):
                # Of a client that was dropped because its data cannot be generated, and that has no ledger.
                with suppress(Exception):
                    names[number] = self.fingerprint_of(number)
            if set(paths) <= set(map(record.ledger_path, names.values())):
                return names.items()
        return enumerate(self.client_ledgers)

    def charged(self, record: RecordPrivacy, run: str, number: int, clients: Sequence[int]) -> list[int]:
        """Return those of the clients whose ledgers hold a round. Arguments as of `Population`."""
        found: list[int] = []
        for client in clients:
            path = Path()
            with suppress(Exception):  # of a client whose data cannot be made, and that has no ledger
                path = record.ledger_path(self.fingerprint_of(client))
            entries = read_entries(path) if path.is_file() else []
            if [run, number] in [json.loads(each.key)[:2] for each in entries if each.kind == RESERVE]:
                found.append(client)
        return found

    def looked_at(self, task: Task, every: bool) -> range:
        """Return clients that are spread evenly. Arguments as of `Population`."""
        return range(0, task.num_clients, 1 if every else -(-task.num_clients // MOST_LOOKED_AT))


class Local(OnThisMachine):
    """Clients with real data on this machine; their ledgers lie with the data, and are named by the data's identity."""

    @property
    def words(self) -> Words:
        """The words in which a run of these clients is told of."""
        return Words(REAL, "real data", ESTIMATED, "hydra.run.dir", "ledger.dir", ONE_MACHINE)

    @cached_property
    def data_id(self) -> str:
        """The name of the data."""
        return self.require_name()

    def require_name(self) -> str:
        """Return the name of the data: the settings say it, else the task's attribute.

        Raises:
          Refusal: they have no name.
        """
        found = self.settings.task.data_id or getattr(self.task, "data_id", None)
        if found is None:
            remedy = "name these real data, the same in every run, since it identifies their budget, as in task.data_id=wards-2026"
            raise Refusal("task.data_id", None, remedy)
        if not re.fullmatch(DATA_ID, str(found)):
            raise Refusal("task.data_id", found, NO_DATA_ID)
        return str(found)

    @cached_property
    def fingerprints(self) -> list[str]:
        """The fingerprint of each client's data; of data whose content cannot be told, another one in each run."""
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
    def client_ledgers(self) -> Sequence[str]:
        """Name of the ledger of each client's records."""
        return self._client_ledgers

    @property
    def ledger_names(self) -> tuple[str, ...]:
        """Names of ledgers that the clients' settings state."""
        return tuple(self.client_ledgers)

    @property
    def home(self) -> Path:
        """Folder of all ledgers of real data.

        Raises:
          Refusal: the configured one is relative.
        """
        return ledger_folder("ledger.dir", self.settings.ledger_dir)

    def ledger_path(self, prefix: str, folder: Path) -> Path:
        """Return the population's ledger; the prefix says what it is of."""
        return self.home / f"{prefix}{self.owner[:NAMED]}.ledger"

    def client_ledger_home(self, folder: Path) -> Path:
        """Return the folder of the clients' own ledgers."""
        return self.home

    def owed(self) -> Owed:
        """Return earlier losses of the people that are not on the clients' ledgers yet."""
        return data_sets.owed_by_clients(self.home, self.data_id, self.fingerprints)

    def within_caps(self, path: Path, budget: Budget) -> Budget:
        """Return a ledger's budget within the owner's caps."""
        return capped(path, budget)

    def caps(self, path: Path) -> Sequence[Cap]:
        """Return the owner's caps on a ledger."""
        return caps_on(path)

    def check_identity(self, asked: str | None, spends: bool) -> None:
        """Refuse to spend on data without a name."""
        if spends:
            self.require_name()

    @contextmanager
    def alone(self) -> Generator[None]:
        """Prevent other runs and questions from charging the ledgers of these data meanwhile. Arguments as of `Population`."""
        make_folder("ledger.dir", self.home)
        with data_sets.alone_on(self.home, self.data_id):
            yield

    def check_mode(self, mode: str) -> None:
        """Refuse records that the other record-level mode charges, on ledgers that this mode does not use.

        On one machine `record` charges each client's ledger and `record_distributed` one of all records; two budgets for the
        same people would be spent one after the other. A device has one ledger of records for both.
        """
        known = data_sets.read_data_sets(self.home).get(self.data_id, data_sets.DataSet())
        data_sets.require_records(known, mode)

    def claim_mode(self, mode: str) -> None:
        """Record which mode charges the records on this machine; of two that begin at the same time one is refused."""
        make_folder("ledger.dir", self.home)
        data_sets.claim_records(self.home, self.data_id, mode)

    def settle(self, record: RecordPrivacy) -> str:
        """Charge the clients' ledgers with earlier losses of their people, and return a warning; it may be empty."""
        owed, folder, budget = self.owed(), Path(record.ledger_dir), record.terms.budget
        data_sets.settle(folder, self.data_id, owed, budget)
        clients = data_sets.population_path(folder, self.data_id)
        for name in dict.fromkeys(self.client_ledgers):
            data_sets.charge_client_sums(record.ledger_path(name), name, clients, budget)
        return MOVED.format(self.data_id) if owed.changed else ""

    def settle_sums(self, path: Path, budget: Budget) -> None:
        """Charge the population's ledger, before it is opened, with earlier losses of its people."""
        prefix = path.stem.removesuffix(self.owner[:NAMED])
        owed = data_sets.owed_by_population(path.parent, self.data_id, prefix)
        data_sets.settle(path.parent, self.data_id, owed, budget, prefix)

    def share(self, ledger: Ledger, budget: Budget) -> None:
        """Let the open ledger of clients know the budgets of their records, and charge that of records with clients' sums."""
        folder = ledger.path.parent
        if budget.unit is Unit.CLIENT:
            ledger.shared = data_sets.budgets_of_records(folder, self.data_id, ledger.book)
        else:
            charge_records(ledger, data_sets.population_path(folder, self.data_id), budget)

    def keep_head(self, ledger: Ledger) -> None:
        """Store the head of a closed ledger, to hold a later one to it."""
        with suppress(Refusal):  # of a full disk: the head before stays
            data_sets.keep_head(ledger, self.data_id)

    def client_ledger_files(self, folder: Path) -> list[Path]:
        """Return the clients' own ledgers in a folder, which holds others as well."""
        names = {f"{name[:NAMED]}.ledger" for name in self.client_ledgers}
        return sorted(path for name in names if (path := folder / name).exists())

    def opened_ledgers(
        self, record: RecordPrivacy, took_part: Collection[int], paths: Collection[Path]
    ) -> Iterable[tuple[int, str]]:
        """Return numbers and ledgers' names of all clients, in their order."""
        return enumerate(self.client_ledgers)

    def looked_at(self, task: Task, every: bool) -> range:
        """Return all clients."""
        return range(task.num_clients)

    def own_clients(self, task: Task) -> range:
        """Return all clients."""
        return range(task.num_clients)

    def to_measure(self, task: Task) -> Iterable[Data]:
        """Return the examples of each client."""
        from ..tasks.independence import batches_of_all  # torch, which a plan does without

        return batches_of_all(data_of(task, client) for client in range(task.num_clients))
