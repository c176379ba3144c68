"""Models of the groups privacy and secagg: the promises, and the masks."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from ..messages.local_training import LocalTraining
from ..privacy.budget import Adjacency, Unit
from ..privacy.mechanisms.mechanism import NoiseWord
from ..privacy.secagg.suite import SUITES
from .group import Group, remedy
from .values import Adjacent, FixedOrAdaptive, GradNorm, Positive, Records, Share

if TYPE_CHECKING:
    from .schema import FederationSettings

USUAL_CLIP = 0.5  # of the steps on the records of all clients; found on the shipped task digits
MAX_METRICS_SHARE = 0.9  # with an adaptive clip, whose bit takes at most a tenth


class PrivacyLevel(Group):
    """Budget of one unit. A target alone plans the noise; a noise_multiplier alone sets no limit."""

    target_epsilon: Positive | None = 3.0
    """Budget; null: no limit, which requires noise_multiplier."""
    target_delta: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    """Delta of the guarantee; it should be below one over the number of units."""
    noise_multiplier: Annotated[Positive | None, remedy("without noise it is privacy=none")] = None
    """Noise over clipping norm. Null: planned from the budget. A value: the run stops when the budget is spent."""
    adjacency: Adjacent = Adjacency.ZERO_OUT
    """Which two data sets are neighbours."""
    allow_large_delta: bool = False
    """Accept a delta above one over the number of units, with a warning."""

    def rules(self) -> Iterator[tuple[str, str]]:
        """Refuse neither a budget nor noise."""
        if self.target_epsilon is None and self.noise_multiplier is None:
            yield "target_epsilon", "give a budget or a noise_multiplier, or say privacy=none"


class _ClientLevel(PrivacyLevel):
    """Budget of one client, whose contribution is clipped as a whole."""

    unit: ClassVar[Unit] = Unit.CLIENT
    clipping_norm: Positive = 1.0
    """L2 norm of one client's whole contribution; the command line takes the task's."""
    metrics_share: Share | None = None
    """Share of the squared norm for loss and count; null: planned; 0: no metrics leave a client."""


class ClientCentral(_ClientLevel):
    """Hides everything that one client contributes from ``clients`` and ``model``; the server is trusted.

    Example:
        >>> import fedveil as fv
        >>> fv.ClientCentral(target_epsilon=1.0).target_delta
        0.0001
    """

    name: Literal["client_central"] = "client_central"
    noise: NoiseWord = "independent"
    """correlated: later rounds cancel a part of it; needs cohort=cyclic_poisson or min_separation."""
    bands: Annotated[int, Field(ge=1, le=128)] | None = None
    """Rounds over which noise is correlated; null: the number with the least error."""
    clipping: FixedOrAdaptive = "fixed"
    """adaptive: clipping_norm is the first value, and it follows a quantile of the clients' norms."""
    clipping_quantile: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the updates that an adaptive norm does not clip."""
    clipping_learning_rate: Positive = 0.2
    """Largest relative change of an adaptive norm in a round, about."""
    noise_schedule: FixedOrAdaptive = "fixed"
    """adaptive: more noise while the loss falls, less once it stalls; accounted by an RDP filter."""

    def rules(self) -> Iterator[tuple[str, str]]:
        """Yield settings that an adaptive clip or noise lacks."""
        yield from super().rules()
        if self.bands is not None and self.noise != "correlated":
            yield "bands", "belongs to privacy.noise=correlated; leave it null"
        if self.clipping == "adaptive" and (self.metrics_share or 0) >= MAX_METRICS_SHARE:
            yield "metrics_share", f"must be below {MAX_METRICS_SHARE:g} beside privacy.clipping=adaptive"
        if self.noise_schedule != "adaptive":
            return
        if self.target_epsilon is None:
            yield "target_epsilon", "is what privacy.noise_schedule=adaptive promises; give one"
        if self.noise_multiplier is not None:
            yield "noise_multiplier", "leave it null: privacy.noise_schedule=adaptive chooses the noise"
        if self.metrics_share == 0:
            yield "metrics_share", "give some: privacy.noise_schedule=adaptive goes by the clients' loss"


class ClientDistributed(_ClientLevel):
    """Hides the same from the server as well: each client adds its share of the noise, and only sums are opened.

    Example:
        >>> import fedveil as fv
        >>> fv.ClientDistributed(target_epsilon=1.0).name
        'client_distributed'
    """

    name: Literal["client_distributed"] = "client_distributed"
    noise: ClassVar[Literal["independent"]] = "independent"
    bands: ClassVar[None] = None
    clipping: ClassVar[Literal["fixed"]] = "fixed"
    noise_schedule: ClassVar[Literal["fixed"]] = "fixed"

    def rules(self) -> Iterator[tuple[str, str]]:
        """Refuse an adjacency that hides the number of clients, which the server sees."""
        yield from super().rules()
        if self.adjacency is Adjacency.ADD_OR_REMOVE_ONE:
            yield "adjacency", "the server sees how many clients there are; use zero-out or replace-one"


class RecordLevel(PrivacyLevel):
    """Budget of one record, whose gradients are clipped."""

    gradients: Literal["auto", "hooks", "ghost", "book_keeping", "vmap", "one_by_one"] = "auto"
    """Engine that computes clipped sums; only speed differs."""
    per_person: Annotated[int, Field(ge=1, le=100)] | None = None
    """Most examples of one person that a client trains on; the promise is then per person. Null: per example."""
    clients_per_person: Annotated[int, Field(ge=1, le=100)] | None = None
    """Most clients that train on one person; the person is then one unit. Null: one unit at each client."""

    @property
    def unit(self) -> Unit:
        """Unit of privacy: a person if examples identify persons, else one example."""
        return Unit.RECORD if self.per_person is None else Unit.PERSON

    def rules(self) -> Iterator[tuple[str, str]]:
        """Refuse settings without an accountant."""
        yield from super().rules()
        if self.clients_per_person is not None and self.per_person is None:
            yield "clients_per_person", "bounds persons; give per_person as well"
        if (self.per_person or 1) > 1 and self.adjacency is Adjacency.REPLACE_ONE:
            yield "per_person", "no accountant supports several replaced examples; use zero-out, or 1"


class Record(RecordLevel):
    """Hides one example of one client from everyone else, including the server (DP-SGD at the client).

    Example:
        >>> import fedveil as fv
        >>> fv.Record(target_epsilon=1.0, max_grad_norm=0.5).target_delta
        1e-05
    """

    name: Literal["record"] = "record"
    target_delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    max_grad_norm: GradNorm = 1.0
    """L2 norm of one example's gradient."""

    @property
    def clip(self) -> float:
        """L2 norm to which a gradient is clipped."""
        return self.max_grad_norm


class RecordDistributed(RecordLevel):
    """Hides one example of one client from everyone else, by noise that all clients share.

    A round is one step of DP-SGD on the records of all clients: each client adds up the clipped gradients of those that
    its own coins draw, adds its share of the noise, and only the sum is opened.

    Example:
        >>> import fedveil as fv
        >>> fv.RecordDistributed(target_epsilon=1.0, sample_rate=0.2).clip
        0.5
    """

    name: Literal["record_distributed"] = "record_distributed"
    target_delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    sample_rate: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Probability that a record takes part in a step, by a secret coin at its client."""
    max_grad_norm: GradNorm | None = None
    """L2 norm of one example's gradient. Null: 0.5, and of tables whose learning_rate is null at least 1, by their size."""
    records: Records | None = None
    """Records of all clients, a public number that divides the sum; null: counted by a simulation."""
    most_records: Records | None = None
    """Public upper bound on the records of one client, the range of a vector; null: counted by a simulation."""
    noise: ClassVar[Literal["independent"]] = "independent"
    bands: ClassVar[None] = None
    clipping: ClassVar[Literal["fixed"]] = "fixed"
    noise_schedule: ClassVar[Literal["fixed"]] = "fixed"
    metrics_share: ClassVar[float] = 0.0

    @property
    def clip(self) -> float:
        """L2 norm to which a gradient is clipped."""
        return self.max_grad_norm or USUAL_CLIP

    @property
    def unit(self) -> Unit:
        """Unit of privacy: a person at all clients, a person at one client, or one example."""
        return super().unit if self.clients_per_person is None else Unit.PERSON_EVERYWHERE

    def rules(self) -> Iterator[tuple[str, str]]:
        """Refuse an adjacency that hides the number of records, which the divisor of the sum reveals."""
        yield from super().rules()
        if self.adjacency is Adjacency.ADD_OR_REMOVE_ONE:
            text = "the divisor of the sum reveals the number of records; use zero-out or replace-one"
            yield "adjacency", text

    def conflicts(self, whole: "FederationSettings") -> Iterator[tuple[str, str]]:
        """Refuse settings without meaning for a round that is one step on all records."""
        if whole.cohort.name != "all":
            text = "records of all clients take part in every step, each by its own coin; use all"
            yield "cohort.name", text
        if whole.training.local_epochs != 1:
            text = "a second local step would start from a client's own share of the noise, which is too little; use 1"
            yield "local_epochs", text
        if whole.training.batch_size != LocalTraining().batch_size:
            yield "batch_size", "privacy.sample_rate sets the records of a step; leave it out"
        if not whole.local_training.optimizer.plain:
            text = (
                "the strategy takes the step: strategy=fedavgm has momentum, fedadam is Adam; use sgd alone"
            )
            yield "optimizer.name", text
        if whole.schedule.name != "constant" or whole.schedule.warmup:
            text = "the noise is for one learning rate of all steps; use constant, without warmup"
            yield "schedule.name", text


class RecordAndClient(Group):
    """Both units, each under its own budget; the two epsilons are never mixed.

    Example:
        >>> import fedveil as fv
        >>> fv.RecordAndClient(record=fv.Record(target_epsilon=1.0)).client.target_epsilon
        3.0
    """

    name: Literal["record_and_client"] = "record_and_client"
    record: Record = Record()
    client: ClientCentral = ClientCentral()

    def rules(self) -> Iterator[tuple[str, str]]:
        """Refuse noise that adapts to a loss that clients do not send."""
        if self.client.noise_schedule == "adaptive":
            text = "depends on the clients' loss, which is not sent with record-level privacy; use fixed"
            yield "client.noise_schedule", text


class NoPrivacy(Group):
    """Hides nothing: every reported epsilon is infinite.

    Example:
        >>> import fedveil as fv
        >>> fv.NoPrivacy().name
        'none'
    """

    name: Literal["none"] = "none"


ClientLevel = ClientCentral | ClientDistributed
SumLevel = ClientLevel | RecordDistributed
PrivacySettings = SumLevel | NoPrivacy | Record | RecordAndClient


def levels_of(privacy: PrivacySettings) -> list[PrivacyLevel]:
    """Return the levels of a mode that have a budget: two, one, or none without privacy."""
    parts = (privacy.record, privacy.client) if isinstance(privacy, RecordAndClient) else (privacy,)
    return [part for part in parts if isinstance(part, PrivacyLevel)]


def sum_level(privacy: PrivacySettings) -> SumLevel | None:
    """Return the level whose noise is added to the cohort's sum; None if there is none, as in mode record."""
    level = privacy.client if isinstance(privacy, RecordAndClient) else privacy
    return level if isinstance(level, SumLevel) else None


def record_level(privacy: PrivacySettings) -> Record | RecordDistributed | None:
    """Return the level that hides records, alone or with clients; None if there is none."""
    level = privacy.record if isinstance(privacy, RecordAndClient) else privacy
    return level if isinstance(level, Record | RecordDistributed) else None


class NoSecagg(Group):
    """Vectors are sent in the clear: the server sees each."""

    name: Literal["none"] = "none"

    def conflicts(self, whole: "FederationSettings") -> Iterator[tuple[str, str]]:
        """Refuse a server that sees vectors with a share of the noise each."""
        if isinstance(whole.privacy, ClientDistributed | RecordDistributed):
            text = "a single vector has only one share of the noise; use masked, or client_central"
            yield "secagg.name", text


class SecaggSettings(Group):
    """Masks on a cohort's vectors, so that the server sees only their sum; `auto`: where the privacy mode needs it."""

    name: Literal["auto", "masked"] = "auto"
    profile: Literal["malicious", "semi_honest"] = "malicious"
    """Model of the server: semi_honest trusts it to follow the protocol and saves one exchange."""
    suite: Annotated[int, Field(ge=min(SUITES), le=max(SUITES))] = 1
    """Cryptographic suite: 2 adds ML-KEM-768 to X25519, 4 is for processors without AES."""
    bits: Literal[16, 32] | None = None
    """Bits of a coordinate; null: 16 if that adds little noise, else 32."""
    dropout: Share = 0.4
    """Share of a cohort that may drop out; with more dropouts the round is abandoned."""
    collusion: Share = 0.1
    """Share of a cohort that may collude with the server."""
    clipping_norm: Positive = 100.0
    """L2 norm of an update without client-level privacy, which sets the range of the sum. The command line takes the task's
    longest_update."""

    def rules(self) -> Iterator[tuple[str, str]]:
        """Refuse a number that names no suite."""
        if self.suite not in SUITES:
            yield "suite", f"choose from {', '.join(map(str, SUITES))}"

    def conflicts(self, whole: "FederationSettings") -> Iterator[tuple[str, str]]:
        """Refuse masks on a sum to which the server adds the noise."""
        if self.name == "masked" and isinstance(sum_level(whole.privacy), ClientCentral):
            text = "a server that adds the noise sees the exact sum and must be trusted; use none, or privacy=client_distributed"
            yield "secagg.name", text
