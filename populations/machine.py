"""Population on this machine, whose clients' data it reads, and that of a declared simulation."""

from __future__ import annotations

import hmac
import json
import uuid
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self

from ..configs.schema import SimulationSettings
from ..privacy.ledger.ledger_state import RESERVE, read_entries
from ..privacy.ledger.store import ledger_exists, ledgers_in
from ..server.round_terms import ALL_ANSWERS, Answers
from ..tasks.data import MOST_LOOKED_AT, Data, data_of
from ..tasks.fingerprint import fingerprint
from .population import SIMULATION, Population, Words

if TYPE_CHECKING:
    from ..messages.record_settings import RecordPrivacy
    from ..privacy.secagg.roster import Roster
    from ..tasks.protocol import Task


@dataclass(frozen=True)
class OnThisMachine(Population):
    """Clients whose data this machine reads, simulated or real.

    Attributes:
      settings: settings of the user.
      task: loaded.
      unscaled: fingerprints of the clients' data before the run scaled them, which name their ledgers; empty if it did not.
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

    def max_examples(self, bound: int, count: Callable[[], int]) -> float:
        """Return the most examples of one client, which are counted."""
        return float(count())

    def max_clients(self, requested: int | None) -> int | None:
        """Return the largest number of clients that train on one person: the requested one, or that of all clients."""
        return requested and min(requested, self.num_clients)

    def answers(self, invited: float) -> Answers:
        """Return the answers that a round needs: all of them."""
        return ALL_ANSWERS

    def sample_examples(self, task: Task) -> Data:
        """Return the examples of the first client that has any."""
        examples = (data_of(task, client) for client in range(task.num_clients))
        return next(each for each in examples if len(each))

    def scaled(self, settings: SimulationSettings, task: Task, keep_names: bool) -> Self:
        """Return the population with scaled inputs. Arguments as of `Population`."""
        unscaled = tuple(self.fingerprints) if keep_names else ()
        return replace(self, settings=settings, task=task, unscaled=unscaled)

    def fingerprint_of(self, client: int) -> str:
        """Return the fingerprint of a client's data before a run scales them."""
        return self.unscaled[client] if self.unscaled else fingerprint(data_of(self.task, client))

    @cached_property
    def fingerprints(self) -> list[str]:
        """The fingerprint of each client's data."""
        return [self.fingerprint_of(client) for client in range(self.task.num_clients)]

    def position_digest(self, key: bytes | None) -> str | None:
        """Return a keyed digest of the clients' data in their order; None without a key."""
        return hmac.digest(key, "".join(self.fingerprints).encode(), "sha256").hex() if key else None


class Simulated(OnThisMachine):
    """Clients of a declared simulation, whose data are public or synthetic; their ledgers lie in the run's folder."""

    @property
    def words(self) -> Words:
        """The words that describe a run of these clients."""
        return Words(SIMULATION, "simulation", ledgers="hydra.run.dir")

    simulated = needs_held_out = True

    @property
    def owner(self) -> str:
        """Identity of the clients on the population's ledger."""
        return f"simulated {self.settings.task.option}"

    @property
    def client_ledger_names(self) -> Sequence[str]:
        """Name of the ledger of each client's records."""
        return self.fingerprints

    def ledger_path(self, prefix: str, folder: Path) -> Path:
        """Return the path of the population's ledger in a run's folder; the prefix is not used, as there is only one."""
        return folder / "ledger"

    def client_ledger_home(self, folder: Path) -> Path:
        """Return the folder of the clients' own ledgers, of a run in a folder."""
        return folder / "client_ledgers"

    @property
    def ledger_names(self) -> tuple[str, ...]:
        """Names of the clients' ledgers, only if the run scaled their data and so changed the fingerprints."""
        return self.unscaled

    def client_ledger_files(self, folder: Path) -> list[Path]:
        """Return the clients' own ledgers in a folder, which holds no others."""
        return ledgers_in(folder)

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
                with suppress(Exception):  # a client without data was dropped, and has no ledger
                    names[number] = self.fingerprint_of(number)
            if set(paths) <= set(map(record.ledger_path, names.values())):
                return names.items()
        return enumerate(self.client_ledger_names)

    def charged(self, record: RecordPrivacy, run: str, number: int, clients: Sequence[int]) -> list[int]:
        """Return those of the clients whose ledgers hold a round. Arguments as of `Population`."""
        charged_clients: list[int] = []
        for client in clients:
            path: Path | None = None
            with suppress(Exception):  # a client without data has no ledger
                path = record.ledger_path(self.fingerprint_of(client))
            entries = read_entries(path) if path and ledger_exists(path) else []
            if [run, number] in [json.loads(each.key)[:2] for each in entries if each.kind == RESERVE]:
                charged_clients.append(client)
        return charged_clients

    def clients_to_check(self, task: Task, all_clients: bool) -> range:
        """Return all clients, or at most `MOST_LOOKED_AT` that are spread evenly. Arguments as of `Population`."""
        return range(0, task.num_clients, 1 if all_clients else -(-task.num_clients // MOST_LOOKED_AT))
