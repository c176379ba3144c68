"""Settings with which a client trains and answers: plain data that is sent as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.bounded_decoding import build, plain_of, read_json
from ..privacy.mechanisms.compression import Sketch
from .local_training import LocalTraining
from .training_order import RecordTerms, read_order

if TYPE_CHECKING:
    from flwr.app import RecordDict

TRAIN_LOSS = "train_loss"  # name of the training loss that a client reports


@dataclass(frozen=True)
class RecordPrivacy:
    """Settings of record-level privacy at each client.

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
    """

    terms: RecordTerms
    noise_by_records: tuple[tuple[int, float], ...]
    ledger_dir: str
    allow_large_delta: bool = False
    canaries: int = 0
    ledgers: tuple[str, ...] = ()
    noise_by_ledger: tuple[tuple[str, float], ...] = ()
    clients_per_person: int | None = None

    def numbers(self, client: int, clients: int) -> tuple[int, Sequence[int]]:
        """Return the number of a client and the numbers of all clients, for the choice of each person's clients."""
        return client, range(clients)

    def of_ledger(self, name: str) -> RecordPrivacy:
        """Return these settings with the noise of the client whose ledger has this name."""
        noise = dict(self.noise_by_ledger).get(name)
        return self if noise is None else replace(self, noise_by_records=((0, noise),))

    def noise_multiplier(self, records: int) -> float:
        """Return the noise multiplier of a client with this number of records."""
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
    """Parameters of one step of DP-SGD on all clients' records, for a client.

    Attributes:
      terms: terms of DP-SGD, with a sampling rate.
      node, nodes: node number of this client, and those of all clients in the attempt's roster, for the choice of each
        person's clients; None and () in a simulation, where the task numbers the clients.
      canaries: canary records of an audit.
      sketch: compression of each gradient before clipping; set anew in each round.
    """

    terms: RecordTerms
    node: int | None = None
    nodes: tuple[int, ...] = ()
    canaries: CanaryRecords = NO_CANARY_RECORDS
    sketch: Sketch | None = None

    @property
    def clients_per_person(self) -> int | None:
        """Largest number of clients that train on one person; None without a limit."""
        return self.terms.clients_per_person

    def numbers(self, client: int, clients: int) -> tuple[int, Sequence[int]]:
        """Return the number of a client and the numbers of all clients, for the choice of each person's clients."""
        return (client, range(clients)) if self.node is None else (self.node, self.nodes)


@dataclass(frozen=True)
class Encryption:
    """Secure aggregation at a simulated client: its identity, and its owner's conditions for every attempt.

    Attributes:
      identities: secret from which all identities are derived, 32 bytes in hexadecimal.
      clients: number of identities.
      minimum_cohort, collusion, dropout, maximum_clipping_norm, minimum_noise_multiplier, profile: as in
        `privacy.secagg.policy.Policy`.
      doubly: whether identities sign with ML-DSA in addition to Ed25519, as in suite 3.
    """

    identities: str = field(repr=False)
    clients: int
    minimum_cohort: int
    collusion: float
    dropout: float
    maximum_clipping_norm: float
    minimum_noise_multiplier: float
    profile: str
    doubly: bool = False


@dataclass(frozen=True)
class CanaryClients:
    """Canary clients of an audit, whose numbers follow those of the real clients; see `client.extra`.

    Attributes:
      first: client number of the first canary.
      count: number of canaries.
      seed: secret seed of directions and coins, 32 bytes in hexadecimal.
      support: number of coordinates that one canary may use.
      norm: L2 norm of a canary's update.
      replaced: whether an excluded canary sends the opposite direction instead of nothing.
      metrics: metrics that a canary reports, by name.
    """

    first: int
    count: int
    seed: str = field(repr=False)
    support: int
    norm: float
    replaced: bool
    metrics: Mapping[str, float]

    def __contains__(self, client: int) -> bool:
        return self.count > 0 and client >= self.first


NO_CANARY_CLIENTS = CanaryClients(0, 0, "", 0, 0.0, replaced=False, metrics={})


@dataclass(frozen=True)
class ClientSettings:
    """Settings of a client: task, training, record-level privacy and secure aggregation.

    Attributes:
      task: name in `tasks.TASKS`, or "module:Class" with the module in `allow_modules`.
      task_options: keyword arguments of the task.
      training: parameters of local training, which the strategy may override.
      record: record-level privacy; None trains without it.
      step: terms of DP-SGD on all clients' records together, with noise on the sum; None trains in another way.
      seed: seed of a declared simulation; None uses the operating system's generator.
      allow_modules: modules that may be imported for the task.
      encryption: secure aggregation, which refuses unencrypted sums; None answers only unencrypted ones.
      device: name of a deployed client on its ledgers, 64 hexadecimal digits; None in a simulation. A device's data are
        real whatever the task declares. Its ledger of records has this name, so that new records continue it.
      canaries: canary clients of an audit; None without them.
      loss_traces: folder in which the owner stores each record's losses; empty stores none.
      accelerator: device for models, in the format of `tasks.hardware.device_of`.
      dtype: precision of models, `float32` or `bfloat16`.
      held_out: share of a device's records that are held out of training; in a simulation the task holds them out.
      group_equal_rows: whether equal records are held out together, the rule of earlier releases.
    """

    task: str
    training: LocalTraining
    task_options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    record: RecordPrivacy | None = None
    step: StepTerms | None = None
    seed: int | None = None
    allow_modules: tuple[str, ...] = ()
    encryption: Encryption | None = None
    device: str | None = None
    canaries: CanaryClients | None = None
    loss_traces: str = ""
    accelerator: str = "cpu"
    dtype: str = "float32"
    held_out: float | None = None
    group_equal_rows: bool = False

    @property
    def canary_clients(self) -> CanaryClients:
        """Canary clients; their count is 0 without an audit."""
        return self.canaries or NO_CANARY_CLIENTS

    @property
    def canaries_of_step(self) -> CanaryRecords:
        """Canary records in a joint step on all clients' records; their count is 0 without a step or an audit."""
        return NO_CANARY_RECORDS if self.step is None else self.step.canaries

    def to_json(self) -> str:
        """Return the settings as JSON."""
        return json.dumps(plain_of(self))

    @classmethod
    def from_json(cls, text: str) -> ClientSettings:
        """Return the settings from the result of `to_json`."""
        return build(cls, read_json(text))


def training_settings(content: RecordDict, settings: ClientSettings) -> LocalTraining:
    """Return the training parameters of a round: the client's settings after its schedule and the strategy's changes.

    A simulated client uses the order in `content`, if any; a device's settings contain the order that its owner accepted.
    """
    from .flower_adapter import values_under  # Flower is slow to import, and plans use these settings
    from .wire import read_round

    order = None if settings.device is not None else read_order(content)
    ordered = settings.training if order is None else order.training
    mu = values_under(content, "proximal-mu")
    training = ordered.in_round(read_round(content)[1])
    return replace(training, proximal_mu=float(str(mu[0]))) if mu else training
