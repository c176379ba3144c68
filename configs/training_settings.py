"""Models of the groups strategy, optimizer, schedule, compress and tune: how a model is learned."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, get_args

from pydantic import ConfigDict, Field

from ..base.refusal import Refusal
from ..messages.local_training import OPTIMIZERS, LocalTraining, Optimizer, Option
from ..privacy.arms import MAX_ARMS
from .group import Group, remedy
from .privacy_settings import ClientLevel, NoPrivacy, Record, RecordAndClient, RecordDistributed, sum_level
from .values import (
    HIDDEN_CLIENTS,
    MAX_ROUNDS,
    Epochs,
    Parameter,
    Positive,
    Probability,
    Rounds,
    Share,
    Target,
    Text,
)

if TYPE_CHECKING:
    from .schema import FederationSettings

USUAL_FACTORS = (0.25, 1.0, 4.0)  # of a value that is tuned
TUNING_SHARE = 1 / 5  # of the rounds: docs/evidence/accuracy.md
SEVERAL = Field(
    strict=False,
    min_length=2,
    max_length=MAX_ARMS,
    json_schema_extra=remedy(f"must be a list of 2 to {MAX_ARMS} values, such as [5,20,80]"),
)
NO_PRIVATE_SELECTION = (
    "the clients see the model of every round of every try, and private selection (RepeatAndSelect) may be claimed only "
    "against an adversary that sees only the winner: against clients whole runs compose, and arms cost as much as one run"
)

if TYPE_CHECKING:
    OptimizerName = str
else:  # pydantic tells options apart by literals, which a type checker cannot read from the table
    OptimizerName = Literal[tuple(name for name in OPTIMIZERS if name != "auto")]


class _FlowerStrategy(Group):
    target: ClassVar[None] = None

    @property
    def parameters(self) -> dict[str, Parameter]:
        """Keyword arguments of the strategy's constructor, under its own names."""
        return self.model_dump(exclude={"name"})


class AutoStrategy(_FlowerStrategy):
    """FedAvgM if a round is one step on all rows (with momentum that suits num_rounds); else FedAvg."""

    name: Literal["auto"] = "auto"


class FedAvg(_FlowerStrategy):
    """Mean of the updates (McMahan et al. 2017)."""

    name: Literal["fedavg"] = "fedavg"


class FedAvgM(_FlowerStrategy):
    """Momentum at the server (Hsu et al. 2019)."""

    name: Literal["fedavgm"] = "fedavgm"
    server_learning_rate: Positive = 1.0
    """Factor of the mean update."""
    server_momentum: Share = 0.9
    """Share of the previous step that is kept."""


class _Adaptive(_FlowerStrategy):
    eta: Positive = 0.1
    """The server's learning rate."""
    eta_l: Positive = 0.1
    """The client's learning rate, as Flower names it."""
    tau: Positive = 0.001
    """Degree of adaptivity."""


class FedAdagrad(_Adaptive):
    """Adagrad at the server (Reddi et al. 2021)."""

    name: Literal["fedadagrad"] = "fedadagrad"


class _Moments(_Adaptive):
    beta_1: Share = 0.9
    """Decay of the running mean of updates."""
    beta_2: Share = 0.99
    """Decay of the running mean of their squares."""


class FedAdam(_Moments):
    """Adam at the server (Reddi et al. 2021)."""

    name: Literal["fedadam"] = "fedadam"


class FedYogi(_Moments):
    """Yogi at the server (Reddi et al. 2021)."""

    name: Literal["fedyogi"] = "fedyogi"
    eta: Positive = 0.01
    eta_l: Positive = 0.0316


class FedProx(_FlowerStrategy):
    """Penalty at the client on the distance from the global model (Li et al. 2020)."""

    name: Literal["fedprox"] = "fedprox"
    proximal_mu: Annotated[float, Field(ge=0)] = 0.01
    """Weight of that penalty."""


class CustomStrategy(Group):
    """Your own subclass of Flower's Strategy."""

    name: Literal["custom"] = "custom"
    target: Target
    """``module:Class``; the module must stand in allow_modules."""
    parameters: dict[str, Parameter] = Field(
        {}, json_schema_extra=remedy("must be a finite number, a word, true or false")
    )
    """Keyword arguments of its constructor: strategy.parameters.eta=0.1."""


class AutoOptimizer(Group):
    """Optimizer of a client from the task's own `optimizer`; plain SGD if the task has none."""

    name: Literal["auto"] = "auto"
    lr: Annotated[None, Field(json_schema_extra=remedy("give learning_rate, or name the optimizer"))] = None
    """Null: learning_rate holds."""
    options: ClassVar[Mapping[str, float]] = {}


class TorchOptimizer(Group):
    """Optimizer of a client by torch.optim's class of that name, with that class's keywords, created anew in every round."""

    model_config = ConfigDict(extra="allow")  # as torch's constructor takes them
    name: OptimizerName
    lr: Positive | None = None
    """Replaces learning_rate; the other keys are keywords of torch's class."""

    def rules(self) -> Iterator[tuple[str, str]]:
        """Refuse an option that is no number, those that torch refuses, and a null that no optimizer's key has."""
        for key, value in (self.model_extra or {}).items():
            if value is None and not names_with(
                "optimizer", key
            ):  # earlier releases wrote a null for each keyword
                yield key, f"{self.name} has no such keyword; leave it out"
        if not self.options:
            return
        from .optimizers import mistakes_of_options  # torch, of no use without options

        try:
            mistakes = [*mistakes_of_options(Optimizer(self.name, tuple(self.options.items())))]
        except Refusal as refusal:
            mistakes = [refusal]
        for each in mistakes:
            yield each.field.removeprefix("optimizer."), each.remedy

    def conflicts(self, whole: "FederationSettings") -> Iterator[tuple[str, str]]:
        """Refuse to take out noise that no client adds."""
        if self.name == "dp_adambc" and not isinstance(whole.privacy, Record | RecordAndClient):
            text = "takes the noise of DP-SGD out of its moments; use adam, or privacy=record"
            yield "optimizer.name", text

    @property
    def options(self) -> Mapping[str, Option]:
        """Keyword arguments of the class, without those that stay as torch has them."""
        return self.model_dump(exclude={"name", "lr"}, exclude_none=True)


class _Schedule(Group):
    warmup: Annotated[int, Field(ge=0, le=100_000)] = 0
    """Rounds in which the learning rate rises linearly."""

    def conflicts(self, whole: "FederationSettings") -> Iterator[tuple[str, str]]:
        """Refuse a rise that takes the whole run."""
        if self.warmup >= whole.num_rounds and self.warmup:
            yield "schedule.warmup", f"takes the whole run of {whole.num_rounds} rounds; give fewer"


class ConstantSchedule(_Schedule):
    """Schedule with a constant learning rate."""

    name: Literal["constant"] = "constant"


class FallingSchedule(_Schedule):
    """Schedule that lowers the learning rate over the rounds of the run, linearly or by half a cosine."""

    name: Literal["linear", "cosine"]
    floor: Probability = 0.0
    """Final learning rate as a share of the first."""


class StepSchedule(_Schedule):
    """Schedule that multiplies the learning rate by `gamma` after every `every` rounds."""

    name: Literal["step"] = "step"
    every: Rounds = 30
    """Rounds from one change to the next."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Factor."""


class _Compression(Group):
    down: Annotated[int, Field(ge=2, le=16)] | Literal["exact"] | None = None
    """Download of a client that has the model of an earlier round: the difference from it, of models rounded to this many bits a
    coordinate and round; exact: of unrounded models, if it is shorter than the model. Null: the whole model."""


class NoCompression(_Compression):
    """No compression: each client sends its whole update."""

    name: Literal["none"] = "none"


class CompressionSettings(_Compression):
    """Coordinates of an update that a client sends, drawn anew in each round, the same at all clients.

    `mask` selects them from the update, `project` from a random rotation of it.
    """

    name: Literal["mask", "project"]
    ratio: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Share of the coordinates that a client sends."""
    cells: Annotated[int, Field(ge=256, le=65536)] | None = None
    """Grid units per clipping norm, for project in the clear: 256 are 10 bits a coordinate; null: 65536 or more, 18 bits."""

    def rules(self) -> Iterator[tuple[str, str]]:
        """Refuse a coarse grid for coordinates that may be small."""
        if self.cells is not None and self.name == "mask":
            text = "a coordinate that is small against a grid unit is rounded to zero; use project, which spreads them"
            yield "cells", text

    def conflicts(self, whole: "FederationSettings") -> Iterator[tuple[str, str]]:
        """Refuse what needs the same coordinates in every round, norms of whole gradients, or another grid."""
        level = sum_level(whole.privacy)
        if level and level.noise == "correlated":
            text = "later rounds cancel noise in the same coordinates, but compression draws new ones; use none, or privacy.noise=independent"
            yield "compress.name", text
        if isinstance(level, RecordDistributed) and level.gradients in ("ghost", "book_keeping"):
            text = "measures the norm of the whole gradient, which is compressed before it is clipped; use auto, hooks or one_by_one"
            yield "privacy.gradients", text
        if self.cells is None:
            return
        if whole.secagg is not None or isinstance(level, RecordDistributed):
            yield "compress.cells", "the grid of such a sum follows from secagg.bits; leave it null"
        elif level is None:
            yield "compress.cells", "without client-level privacy vectors are on no grid; leave it null"


class NoTuning(Group):
    """No tuning: each key has one value."""

    name: Literal["none"] = "none"
    metric: ClassVar[None] = None
    score: ClassVar[Literal["public"]] = "public"
    resolution: ClassVar[float] = 0.1

    def tried(self, whole: "FederationSettings") -> tuple[float, ...]:
        """Return no values: there are no arms."""
        del whole
        return ()

    def rounds_of_arm(self, num_rounds: int) -> int:
        """Return 0."""
        del num_rounds
        return 0

    def in_training(self, training: LocalTraining, value: float) -> LocalTraining:
        """Return the training itself."""
        del value
        return training


class _Tuning(Group):
    rounds: Rounds | None = None
    """Rounds of each arm, before the best value continues with all clients; null: a fifth of num_rounds."""
    metric: Text | None = None
    """Metric that compares the values. Null: accuracy if the task has it, else loss; with score=clients evaluate.metric."""
    score: Literal["public", "clients"] = "public"
    """Where the arms' models are compared: on public held-out data, or by a charged evaluation at each arm's clients."""
    resolution: Positive = 0.1
    """With score=clients: least difference of two scores that the noise must resolve; more noise is refused."""
    by: Annotated[Literal["arms"], Field(json_schema_extra=remedy(NO_PRIVATE_SELECTION))] = "arms"
    """Trials are separated by arms: disjoint sets of clients."""

    def tried(self, whole: "FederationSettings") -> tuple[float, ...]:
        """Return the values of the arms."""
        raise NotImplementedError

    def queries(self, whole: "FederationSettings") -> Mapping[str, tuple[str, object]]:
        """Return the evaluation of arms at their clients, if they compare them."""
        if not whole.scored_at_clients:
            return {}
        return {"evaluation": ("tune.score", self.score)}

    def rounds_of_arm(self, num_rounds: int) -> int:
        """Return the rounds of each arm, before the best value continues for the rest of `num_rounds`."""
        return self.rounds or max(1, round(num_rounds * TUNING_SHARE))

    def in_training(self, training: LocalTraining, value: float) -> LocalTraining:
        """Return how clients train under one of the values."""
        del value
        return training

    def conflicts(self, whole: "FederationSettings") -> Iterator[tuple[str, str]]:
        """Refuse settings that depend on all clients, and values that would change the charge."""
        client = sum_level(whole.privacy)
        if len(set(whole.tried)) < len(whole.tried):
            yield "tune.values", "try each value once"
        if whole.tuning_rounds >= whole.num_rounds:
            yield (
                "tune.rounds",
                f"leaves none of num_rounds={whole.num_rounds} for the best value; give fewer",
            )
        if whole.steps > MAX_ROUNDS:
            text = f"the arms' rounds and the others are {whole.steps}; at most {MAX_ROUNDS} may be"
            yield "tune.rounds", text
        if whole.cohort.by_turns:
            yield "tune.name", "needs rounds that are a release each; choose another cohort, or tune=none"
        if client and "adaptive" in (client.clipping, client.noise_schedule):
            text = "an adaptive clip or noise depends on the releases of all clients; use fixed, or tune=none"
            yield "tune.name", text
        if isinstance(whole.privacy, RecordDistributed) and whole.privacy.clients_per_person is not None:
            text = "clients of one person may be in several arms, whose charges then add up; leave "
            yield "tune.name", text + "privacy.clients_per_person null, or use tune=none"
        if self.score == "clients" and not isinstance(whole.privacy, ClientLevel):
            yield "tune.score", f"{HIDDEN_CLIENTS}, or public"
        if self.score == "clients" and self.metric == "loss":
            yield "tune.metric", "has no bound, which the noise needs; name a metric of the task"


class LearningRates(_Tuning):
    """Learning rates to try, one in each arm of clients; the best continues with all clients."""

    name: Literal["learning_rate"] = "learning_rate"
    values: Annotated[tuple[Positive, ...] | None, SEVERAL] = None
    """Values to try; null: a quarter of the configured value, that value, and four times it."""

    def tried(self, whole: "FederationSettings") -> tuple[float, ...]:
        """Return the values of the arms."""
        return self.values or tuple(factor * whole.local_training.learning_rate for factor in USUAL_FACTORS)

    def in_training(self, training: LocalTraining, value: float) -> LocalTraining:
        """Return how clients train at this rate."""
        return replace(training, learning_rate=value)


class EpochCounts(_Tuning):
    """Numbers of local epochs to try, one in each arm of clients; the best continues with all clients."""

    name: Literal["local_epochs"] = "local_epochs"
    values: Annotated[tuple[Epochs, ...] | None, SEVERAL] = None
    """Values to try; null: a quarter of the configured value, that value, and four times it."""

    def tried(self, whole: "FederationSettings") -> tuple[float, ...]:
        """Return the values of the arms."""
        epochs = whole.training.local_epochs
        return self.values or tuple(sorted({max(1, epochs // 4), epochs, 4 * epochs}))

    def in_training(self, training: LocalTraining, value: float) -> LocalTraining:
        """Return the training with this number of epochs."""
        return replace(training, local_epochs=int(value))

    def conflicts(self, whole: "FederationSettings") -> Iterator[tuple[str, str]]:
        """Refuse steps that records are charged for."""
        yield from super().conflicts(whole)
        if not isinstance(whole.privacy, ClientLevel | NoPrivacy):
            yield "tune.name", "a record is charged for each local step; tune learning_rate"


class ClippingNorms(_Tuning):
    """Clipping norms to try, one in each arm of clients; the best continues with all clients."""

    name: Literal["clipping_norm"] = "clipping_norm"
    values: Annotated[tuple[Positive, ...] | None, SEVERAL] = None
    """Values to try; null: a quarter of the configured value, that value, and four times it."""

    def tried(self, whole: "FederationSettings") -> tuple[float, ...]:
        """Return the values of the arms."""
        client = sum_level(whole.privacy)
        usual = client.clipping_norm if isinstance(client, ClientLevel) else 1.0
        return self.values or tuple(factor * usual for factor in USUAL_FACTORS)

    def conflicts(self, whole: "FederationSettings") -> Iterator[tuple[str, str]]:
        """Refuse a norm that nothing is clipped to."""
        yield from super().conflicts(whole)
        if not isinstance(sum_level(whole.privacy), ClientLevel):
            yield "tune.name", "no whole client is clipped here; tune learning_rate"


StrategySettings = AutoStrategy | FedAvg | FedAvgM | FedAdagrad | FedAdam | FedYogi | FedProx | CustomStrategy
STRATEGIES: Mapping[str, type[Group]] = {
    each.model_fields["name"].default: each for each in get_args(StrategySettings)
}
OptimizerSettings = AutoOptimizer | TorchOptimizer
ScheduleSettings = ConstantSchedule | FallingSchedule | StepSchedule
TuningSettings = NoTuning | LearningRates | EpochCounts | ClippingNorms


def names_with(group: str, key: str) -> list[str]:
    """Return the names of strategies or optimizers that have a key."""
    if group == "strategy":
        return sorted(name for name, each in STRATEGIES.items() if key in each.model_fields)
    from .optimizers import keywords_of

    return sorted(name for name in OPTIMIZERS if name != "auto" and key in keywords_of(name))
