"""Settings of a client, by which it trains and answers: plain data that travels as JSON."""

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
    """Record-level privacy at the client.

    Attributes:
      terms: of the budget of each client's own ledger, and of the gradients.
      noise_by_records: pairs (records, noise_multiplier), ascending; a client takes the last pair whose number of
        records it reaches. A client with more records needs no more noise, so that this is safe between the pairs.
      ledger_dir: folder of the ledgers, one file for each data set, named by its fingerprint.
      allow_large_delta: train even if delta is above one over the client's number of records.
      canaries: number of an audit's records among each client's, see `client.extra`.
      ledgers: name of each client's ledger, in the clients' order; empty if fingerprints of the data name them.
      noise_by_ledger: pairs (name of a ledger, noise_multiplier) for ledgers with entries before the run.
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
        """Return the number of a client, and those of all, by which a person's clients are chosen."""
        return client, range(clients)

    def of_ledger(self, name: str) -> RecordPrivacy:
        """Return the level with the noise of the client whose ledger has this name."""
        noise = dict(self.noise_by_ledger).get(name)
        return self if noise is None else replace(self, noise_by_records=((0, noise),))

    def noise_multiplier(self, records: int) -> float:
        """Return the noise for a client with this many records."""
        fitting = [noise for min_records, noise in self.noise_by_records if min_records <= records]
        return fitting[-1] if fitting else max(noise for _, noise in self.noise_by_records)

    def ledger_path(self, fingerprint: str) -> Path:
        """Return the file of the ledger of the data set with this fingerprint."""
        return Path(self.ledger_dir) / f"{fingerprint[:32]}.ledger"


@dataclass(frozen=True)
class CanaryRecords:
    """Canary records of an audit at each simulated client; see `client.extra`.

    Attributes:
      each: number of them at a client.
      clients: number of clients.
      seed: 32 bytes in hexadecimal, from which their coins are drawn.
      replaced: whether a canary that is out has the opposite gradient instead of none.
    """

    each: int
    clients: int
    seed: str = field(repr=False)
    replaced: bool

    @property
    def count(self) -> int:
        """Number of them at all clients."""
        return self.each * self.clients


NO_CANARY_RECORDS = CanaryRecords(0, 0, "", replaced=False)


@dataclass(frozen=True)
class StepTerms:
    """Parameters of one step of DP-SGD on all clients' records, for a client.

    Attributes:
      terms: with the rate of sampling.
      node, nodes: of this client and of all clients in the attempt's roster, from which a person's clients are chosen;
        None and empty in a simulation, which numbers clients by the task.
      canaries: of an audit, among the clients' records.
      sketch: compression of each gradient before clipping; specific to a round, so it is not set here.
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
        """Return the number of a client, and those of all, by which a person's clients are chosen."""
        return (client, range(clients)) if self.node is None else (self.node, self.nodes)


@dataclass(frozen=True)
class Encryption:
    """Secure aggregation at a simulated client: its identity, and its owner's conditions for every attempt.

    Attributes:
      identities: 32 bytes in hexadecimal, from which all identities are made.
      clients: number of identities.
      minimum_cohort, collusion, dropout, maximum_clipping_norm, minimum_noise_multiplier, profile: as in
        `privacy.secagg.policy.Policy`.
      doubly: whether identities sign doubly, as in suite 3.
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
      first: number of the first canary as a client.
      count: number of canaries.
      seed: 32 bytes in hexadecimal, from which directions and coins are drawn.
      support: number of coordinates that one canary may use.
      norm: L2 norm of a canary's update.
      replaced: whether a canary that is out sends the opposite direction instead of nothing.
      metrics: that a canary reports.
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
    """Task, training and record privacy of a client.

    Attributes:
      task: a name of `tasks.TASKS`, or "module:Class" with the module in allow_modules.
      task_options: arguments of the task.
      training: parameters, unless the strategy overrides them.
      record: record-level privacy; None trains without it.
      step: of DP-SGD on all clients' records together, whose noise the sum has; None trains otherwise.
      seed: of a declared simulation; None draws from the operating system.
      allow_modules: modules that may be imported for the task.
      encryption: of masked sums, with which sums in the clear are refused; None answers sums in the clear.
      device: name of a deployed client on its own ledgers, 64 hexadecimal digits; None in a simulation. A device's data
        are real whatever the task declares, and its ledger of records has this name, so that new records make no new
        ledger.
      canaries: canary clients of an audit; None if there are none.
      loss_traces: the owner's folder of the losses of each record; empty if they are not kept.
      accelerator: device that models train on, as `tasks.hardware.device_of` reads it.
      dtype: precision that models run in, `float32` or `bfloat16`.
      held_out: share of its records that a device holds out of training, from its order; in a simulation the task holds
        them out.
      group_equal_rows: whether equal records of those are held out together, as by the rule of earlier releases.
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
        """Canary clients; none without an audit."""
        return self.canaries or NO_CANARY_CLIENTS

    @property
    def canaries_of_step(self) -> CanaryRecords:
        """Canary records in the sum of all clients' records; none without a joint step or an audit."""
        return NO_CANARY_RECORDS if self.step is None else self.step.canaries

    def to_json(self) -> str:
        """Return the settings as JSON."""
        return json.dumps(plain_of(self))

    @classmethod
    def from_json(cls, text: str) -> ClientSettings:
        """Return the settings that `to_json` wrote."""
        return build(cls, read_json(text))


def training_settings(content: RecordDict, settings: ClientSettings) -> LocalTraining:
    """Return the training parameters of a round: the client's settings, changed by its schedule and by the strategy.

    A simulated client follows an order if there is one; a device's settings contain the order that its owner accepted.
    """
    from .flower_adapter import values_under  # Flower is slow to import, and plans use these settings
    from .wire import read_round

    order = None if settings.device is not None else read_order(content)
    ordered = settings.training if order is None else order.training
    mu = values_under(content, "proximal-mu")
    training = ordered.in_round(read_round(content)[1])
    return replace(training, proximal_mu=float(str(mu[0]))) if mu else training
