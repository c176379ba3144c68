"""Models of the groups strategy, optimizer, schedule and compress: how a model is learned."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, get_args

from pydantic import ConfigDict, Field

from ..base.refusal import Refusal
from ..messages.local_training import OPTIMIZERS, Optimizer, Option
from .group import Group, remedy
from .privacy_settings import Record, RecordAndClient, RecordDistributed, sum_level
from .values import Parameter, Positive, Probability, Rounds, Share, Target

if TYPE_CHECKING:
    from .schema import FederationSettings

if TYPE_CHECKING:
    OptimizerName = str
else:  # pydantic distinguishes options by literals, which a type checker cannot read from a table
    OptimizerName = Literal[tuple(name for name in OPTIMIZERS if name != "auto")]


class _FlowerStrategy(Group):
    """Strategy of Flower, by name."""

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
    """Adaptive optimizer at the server."""

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
    """Adaptive optimizer with running means of the updates and of their squares."""

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
    parameters: Annotated[dict[str, Parameter], remedy("must be a finite number, a word, true or false")] = (
        Field({})
    )
    """Keyword arguments of its constructor: strategy.parameters.eta=0.1."""


class AutoOptimizer(Group):
    """Optimizer of a client from the task's own `optimizer`; plain SGD if the task has none."""

    name: Literal["auto"] = "auto"
    lr: Annotated[None, remedy("give learning_rate, or name the optimizer")] = None
    """Null: learning_rate holds."""
    options: ClassVar[Mapping[str, float]] = {}


class TorchOptimizer(Group):
    """Optimizer of a client by torch.optim's class of that name, with that class's keywords, created anew in every round."""

    model_config = ConfigDict(extra="allow")  # as torch's constructor takes them
    name: OptimizerName
    lr: Positive | None = None
    """Replaces learning_rate; the other keys are keywords of torch's class."""

    def rules(self) -> Iterator[tuple[str, str]]:
        """Yield the options that are no numbers or that torch refuses, and nulls of keys that no optimizer has."""
        nulls = [key for key, value in (self.model_extra or {}).items() if value is None]
        for key in nulls:  # earlier releases wrote one for each keyword of any optimizer
            if not names_with("optimizer", key):
                yield key, f"{self.name} has no such keyword; leave it out"
        if not self.options:
            return
        from .optimizers import mistakes_of_options  # imports torch

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
        """Keyword arguments of the class; those that are null keep torch's default."""
        return self.model_dump(exclude={"name", "lr"}, exclude_none=True)


class _Schedule(Group):
    """Learning rate by round."""

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
    """Compression of what a client receives."""

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
            text = "measures the norm of the whole gradient, which is compressed before it is clipped; use auto, hooks, vmap or one_by_one"
            yield "privacy.gradients", text
        if self.cells is None:
            return
        if whole.secagg is not None or isinstance(level, RecordDistributed):
            yield "compress.cells", "the grid of such a sum follows from secagg.bits; leave it null"
        elif level is None:
            yield "compress.cells", "without client-level privacy vectors are on no grid; leave it null"


StrategySettings = AutoStrategy | FedAvg | FedAvgM | FedAdagrad | FedAdam | FedYogi | FedProx | CustomStrategy
STRATEGIES: Mapping[str, type[Group]] = {
    each.model_fields["name"].default: each for each in get_args(StrategySettings)
}
OptimizerSettings = AutoOptimizer | TorchOptimizer
ScheduleSettings = ConstantSchedule | FallingSchedule | StepSchedule


def names_with(group: str, key: str) -> list[str]:
    """Return the names of strategies or optimizers that have a key."""
    if group == "strategy":
        return sorted(name for name, each in STRATEGIES.items() if key in each.model_fields)
    from .optimizers import keywords_of

    return sorted(name for name in OPTIMIZERS if name != "auto" and key in keywords_of(name))
