"""Settings of DP-SGD at a client: on the ledger of its own records, or in one step on all clients' records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from ..base.bounded_decoding import RARE
from .training_order import RecordTerms


@dataclass(frozen=True)
class RecordPrivacy:
    """Settings of DP-SGD at a client with the ledger of its own records.

    Attributes:
      terms: terms of DP-SGD, with the budget of each client's ledger.
      noise_by_records: pairs (min_records, noise_multiplier), ascending; a client with n records uses the last pair with
        min_records <= n. More records never need more noise, so the noise suffices between two pairs.
      ledger_dir: folder of the ledgers, one file for each data set, with its fingerprint as the name.
      allow_large_delta: whether to train even if delta is above 1 / the client's number of records.
      canaries: number of an audit's canary records at each client, see `client.extra`.
      ledgers: name of each client's ledger, in the clients' order; () if the names are fingerprints of the data.
      noise_by_ledger: pairs (ledger name, noise_multiplier) for ledgers with entries before the run.
      clients_per_person: largest number of clients in a simulation that train on one person; None sets no limit.
      own_files: whether each simulated client's ledger is a file of its own, since several machines write to the folder.
      origin: of the run, for the ledgers, as JSON with the purpose.
    """

    terms: RecordTerms
    noise_by_records: tuple[tuple[int, float], ...]
    ledger_dir: str
    allow_large_delta: bool = False
    canaries: int = 0
    ledgers: tuple[str, ...] = ()
    noise_by_ledger: tuple[tuple[str, float], ...] = ()
    clients_per_person: int | None = None
    own_files: Annotated[bool, RARE] = False
    origin: Annotated[str, RARE] = "{}"

    def numbers(self, client: int, clients: int) -> tuple[int, Sequence[int]]:
        """Return the number of a client and the numbers of all clients, for the choice of each person's clients."""
        return client, range(clients)

    def of_ledger(self, name: str) -> RecordPrivacy:
        """Return these settings with the noise of the client whose ledger has this name."""
        noise = dict(self.noise_by_ledger).get(name)
        return self if noise is None else replace(self, noise_by_records=((0, noise),))

    def noise_multiplier(self, records: int) -> float:
        """Return the noise multiplier of a client with this number of records; with fewer than in any pair, the largest one."""
        fitting = [noise for min_records, noise in self.noise_by_records if min_records <= records]
        return fitting[-1] if fitting else max(noise for _, noise in self.noise_by_records)

    def ledger_path(self, fingerprint: str) -> Path:
        """Return the path of the ledger of the data set with this fingerprint."""
        return Path(self.ledger_dir) / f"{fingerprint[:32]}.ledger"


@dataclass(frozen=True)
class CanaryRecords:
    """Canary records of an audit at each simulated client; see `client.extra`.

    Attributes:
      each: number of canary records at each client.
      clients: number of clients.
      seed: secret seed of the canaries' coins, 32 bytes in hexadecimal.
      replaced: whether an excluded canary has the opposite gradient instead of none.
    """

    each: int
    clients: int
    seed: str = field(repr=False)
    replaced: bool

    @property
    def count(self) -> int:
        """Number of canary records at all clients."""
        return self.each * self.clients


NO_CANARY_RECORDS = CanaryRecords(0, 0, "", replaced=False)


@dataclass(frozen=True)
class StepTerms:
    """Settings of a client for one step of DP-SGD on all clients' records.

    Attributes:
      terms: terms of DP-SGD, with a sampling rate.
      node, nodes: node number of this client, and those of all clients in the attempt's roster, for the choice of each
        person's clients; None and () in a simulation, where the task numbers the clients.
      canaries: canary records of an audit.
    """

    terms: RecordTerms
    node: int | None = None
    nodes: tuple[int, ...] = ()
    canaries: CanaryRecords = NO_CANARY_RECORDS
    sketch: None = None  # a key in JSON of earlier releases

    @property
    def clients_per_person(self) -> int | None:
        """Largest number of clients that train on one person; None without a limit."""
        return self.terms.clients_per_person

    def numbers(self, client: int, clients: int) -> tuple[int, Sequence[int]]:
        """Return the number of a client and the numbers of all clients, for the choice of each person's clients."""
        return (client, range(clients)) if self.node is None else (self.node, self.nodes)
