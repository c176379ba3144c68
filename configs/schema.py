"""What a simulation is told: frozen values, typed and in range once ``settings`` has made them.

The YAML files beside this module hold the defaults and the words that explain each key. Nothing here has a
default, so that a key can never be forgotten in silence. These classes are not handed to Hydra as its schema
on purpose: OmegaConf turns "8" into 8.0 and ``true`` into 1.0 for a float field, and a budget must not be
read by guesswork.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..privacy.budget import Adjacency
from .local_training import LocalTraining

Parameter = float | int | str | bool


@dataclass(frozen=True)
class TaskSettings:
    name: str
    target: str | None
    """``module:Class`` of the user's own task; None for the shipped tasks."""
    num_clients: int | None
    """None: as many as the task itself has."""
    options: Mapping[str, Parameter]
    """What this task takes beside them."""


@dataclass(frozen=True)
class PartitionSettings:
    """How examples are spread over clients: ``natural``, ``iid``, ``dirichlet`` or ``shards``."""

    name: str
    alpha: float | None = None


@dataclass(frozen=True)
class CohortSettings:
    """Who takes part in a round: ``poisson`` (rate), ``fixed`` (size), ``min_separation`` (size and what follows it) or
    ``all``."""

    name: str
    rate: float | None = None
    over_selection: float | None = None
    """Of ``poisson`` and ``fixed``: how many times the planned cohort is invited; None: as its privacy makes usual."""
    size: int | None = None
    separation: int | None = None
    """None: as many rounds as it takes until all clients were drawn."""
    max_participations: int | None = None
    """None: as few as the rounds need."""

    @property
    def by_turns(self) -> bool:
        """Whether clients come by turns, so that the whole run is one release."""
        return self.name == "min_separation"

    @property
    def secret(self) -> bool:
        """Whether the accounting may rest on nobody seeing who is drawn: each client by a coin of its own."""
        return self.rate is not None


@dataclass(frozen=True)
class StrategySettings:
    name: str
    target: str | None
    """``module:Class`` of the user's own strategy; None for Flower's."""
    parameters: Mapping[str, Parameter]
    """Keyword arguments of the strategy's constructor, under its own names."""


@dataclass(frozen=True)
class EngineSettings:
    name: str
    deadline: float
    """Seconds that one client may take for its reply."""
    workers: int = 1
    address: str | None = None
    num_cpus: float | None = None


@dataclass(frozen=True)
class FaultSettings:
    """Faults that a simulation injects, each with a probability in [0, 1] per client and round; at most 1 in sum.

    Attributes:
      dropout: the client vanishes before it trains.
      failure: the client raises after it trained.
      straggler: the client answers only after its deadline.
      corrupt: the client answers with NaN, a wrong shape, a wrong type, or far too long a vector, in turn.
    """

    dropout: float
    failure: float
    straggler: float
    corrupt: float

    @property
    def any(self) -> bool:
        """Whether a fault can happen at all."""
        return max(self.dropout, self.failure, self.straggler, self.corrupt) > 0


@dataclass(frozen=True)
class ClientCentral:
    """Hides all that one client ever contributes from ``clients`` and ``model``; the server is trusted.

    With ``target_epsilon`` alone the noise is planned. With ``noise_multiplier`` as well the run stops when
    the budget is spent; with ``noise_multiplier`` and no target it never stops for the budget's sake.
    """

    target_epsilon: float | None
    target_delta: float
    noise_multiplier: float | None
    adjacency: Adjacency
    allow_large_delta: bool
    clipping_norm: float
    metrics_share: float | None
    """Share in [0, 1) of the squared clipping norm that loss and count take; None: the least that tells something."""
    clipping: str = "fixed"
    """``fixed``, or ``adaptive``: the norm follows a quantile of the clients' norms, and clipping_norm is its start."""
    clipping_quantile: float = 0.5
    clipping_learning_rate: float = 0.2
    noise_schedule: str = "fixed"
    """``fixed``, or ``adaptive``: chosen from the rounds' noised losses, and counted by an RDP filter."""
    noise: str = "independent"
    """``independent`` from round to round, or ``correlated``, so that later rounds take back a part of it."""
    bands: int | None = None
    """Of correlated noise; None: as many as err least."""


@dataclass(frozen=True)
class ClientDistributed(ClientCentral):
    """Hides the same from the server as well: each client adds its share of the noise, and only sums are opened."""


@dataclass(frozen=True)
class SecaggSettings:
    """How a cohort's vectors are masked, so that the server sees their sum alone."""

    profile: str
    """``malicious``: nothing is believed of the server; ``semi_honest``: that it follows the protocol."""
    bits: int | None
    """Of a coordinate, 16 or 32; None: 16 where that is fine enough."""
    dropout: float
    """Share of a cohort that may fail to answer before a round is given up."""
    collusion: float
    """Share of a cohort that may work for the server."""
    clipping_norm: float
    """Of a client's update where no client-level privacy clips it: the range of what a sum holds."""
    suite: int
    """Of primitives, by number: 1, 2 with ML-KEM-768 beside X25519, or 4 with ChaCha20."""


@dataclass(frozen=True)
class Record:
    """Hides one example of one client from everybody else, the server included (DP-SGD at the client)."""

    target_epsilon: float | None
    target_delta: float
    noise_multiplier: float | None
    adjacency: Adjacency
    allow_large_delta: bool
    max_grad_norm: float
    gradients: str
    """How clipped sums are computed: ``auto``, ``hooks``, ``ghost`` or ``book_keeping``; only speed differs."""


@dataclass(frozen=True)
class RecordAndClient:
    """Both units, each under its own budget; the two epsilons are never mixed."""

    record: Record
    client: ClientCentral


@dataclass(frozen=True)
class AuditSettings:
    """How a run is audited while it goes on: ``light`` is what is free, ``full`` has canary clients as well."""

    name: str
    on_alarm: str
    """What an alarm does: ``stop``, ``pause``, ``raise_noise``, ``rollback``, or ``note``, which is nothing more."""
    alpha: float
    """The chance that a correct run raises any alarm at all."""
    canaries: int | None = None
    """Of ``full``; None: as many as the run bears."""
    looks: int = 0
    """Rounds at which canaries are weighed."""
    support: int | None = None
    """Coordinates that one canary may use; None: as many as memory bears."""
    loss_traces: bool = False
    """Whether each client keeps the losses of its records; in a simulation, for whoever owns them to look at."""

    @property
    def full(self) -> bool:
        """Whether canary clients and probes look as well."""
        return self.name == "full"


@dataclass(frozen=True)
class NoPrivacy:
    """Hides nothing: every reported epsilon is infinite."""


PrivacySettings = ClientCentral | Record | RecordAndClient | NoPrivacy


def client_level(privacy: PrivacySettings) -> ClientCentral | None:
    """The part that hides whole clients, if there is one."""
    level = privacy.client if isinstance(privacy, RecordAndClient) else privacy
    return level if isinstance(level, ClientCentral) else None


@dataclass(frozen=True)
class LinkSettings:
    """What reaches real clients, and how rounds go there."""

    name: str
    """``grpc`` or ``flower``."""
    deadline: float
    """Seconds that an exchange waits for answers."""
    quorum: float
    """Share of the planned cohort below whose answers a round is abandoned; an encrypted sum has its own."""
    enough: float | None
    """Share of the planned cohort whose answers end an exchange; None waits for all who were invited."""
    clients: float
    """Share of the federation that must be connected before a round begins."""
    wait: float
    """Seconds to wait for them."""
    patience: int
    """Rounds abandoned in a row after which the run has failed."""

    @property
    def goes_by_answers(self) -> bool:
        """Whether anybody can tell from how a round ends how many answered."""
        return self.quorum > 0 or self.enough is not None


@dataclass(frozen=True)
class ServerSettings:
    """All that ``fedveil server`` is told."""

    run: str
    """What people call the run."""
    federation: "SimulationSettings"
    """With nothing that only a simulation has."""
    link: LinkSettings
    metrics_port: int | None
    """On the loopback address, for Prometheus; None: nowhere."""


@dataclass(frozen=True)
class SimulationSettings:
    """All that ``fedveil simulate`` and ``fedveil plan`` are told; of a server's settings all that is no link's."""

    task: TaskSettings
    partition: PartitionSettings
    cohort: CohortSettings
    strategy: StrategySettings
    engine: EngineSettings
    privacy: PrivacySettings
    secagg: SecaggSettings | None
    """None: vectors travel in the clear."""
    faults: FaultSettings
    audit: AuditSettings | None
    """None: nothing is measured."""
    num_rounds: int
    seed: int | None
    """None: 0 in a declared simulation, the system's generator on real data (where a seed is refused)."""
    training: LocalTraining
    """As the clients train; ``learning_rate`` and its other keys stand at the root of the configuration."""
    checkpoint_every: int
    resume: str | None
    """The folder of an earlier run that this one continues."""
    ledger_dir: str | None
    allow_modules: tuple[str, ...]
    """Modules whose classes ``task.target`` and ``strategy.target`` may name."""
    source: str = field(compare=False, repr=False)
    """The composed configuration as YAML, interpolations unresolved, so that saving it saves no secret."""
