"""Settings with which a client trains and answers: plain data that is sent as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

from ..base.bounded_decoding import RARE, build, plain_of, read_json
from .local_training import LocalTraining
from .record_settings import NO_CANARY_RECORDS, CanaryRecords, RecordPrivacy, StepTerms
from .training_order import read_order

if TYPE_CHECKING:
    from flwr.app import RecordDict

TRAIN_LOSS = "train_loss"  # name of the training loss that a client reports


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
      device: name of the device on its ledgers, 64 hexadecimal digits; None in a simulation. A device's data are real
        whatever the task declares. Its ledger of records has this name, so that new records continue it.
      canaries: canary clients of an audit; None without them.
      loss_traces: folder in which the owner stores each record's losses; empty stores none.
      accelerator: device for models, in the format of `tasks.hardware.device_of`.
      dtype: precision of models, `float32` or `bfloat16`.
      held_out: share of a device's records that are held out of training; in a simulation the task holds them out.
      group_equal_rows: whether equal records are held out together, the rule of earlier releases.
      own_folder: folder of the layers that stay at their client, for models that have such layers.
      examples_at_once: examples in memory at a time, in the format of `tasks.batch_memory.check_at_once`.
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
    examples_at_once: Annotated[str, RARE] = "auto"
    own_folder: Annotated[str, RARE] = ""

    @property
    def canary_clients(self) -> CanaryClients:
        """Canary clients; their count is 0 without an audit."""
        return self.canaries or NO_CANARY_CLIENTS

    @property
    def hides_records(self) -> bool:
        """Whether each record is hidden, so that one is held out whatever the others are."""
        return bool(self.record or self.step)

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

    training, (_, number) = settings.training, read_round(content)
    if settings.device is None and (order := read_order(content)) is not None:
        training = order.training
    training = training.in_round(number)
    mu = values_under(content, "proximal-mu")  # Flower's key, which FedProx sends
    return replace(training, proximal_mu=float(str(mu[0]))) if mu else training
