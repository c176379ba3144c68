"""Models of the group tune: values that are tried in arms of clients, and what cannot be tuned that way."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from ..messages.local_training import LocalTraining
from ..privacy.arms import MAX_ARMS
from .group import Group, remedy
from .privacy_settings import ClientLevel, NoPrivacy, RecordDistributed, sum_level
from .values import HIDDEN_CLIENTS, MAX_ROUNDS, Epochs, Positive, Rounds, Text

if TYPE_CHECKING:
    from .schema import FederationSettings

USUAL_FACTORS = (0.25, 1.0, 4.0)  # of a value that is tuned
TUNING_SHARE = 1 / 5  # of the rounds: docs/evidence/accuracy.md
_NOT_SEVERAL = f"must be a list of 2 to {MAX_ARMS} values, such as [5,20,80]"
SEVERAL = remedy(_NOT_SEVERAL, strict=False, min_length=2, max_length=MAX_ARMS)
NO_PRIVATE_SELECTION = (
    "the clients see the model of every round of every try, and private selection (RepeatAndSelect) may be claimed only "
    "against an adversary that sees only the winner: against clients whole runs compose, and arms cost as much as one run"
)


class _Tune(Group):
    """Group tune; its methods are those of a run without arms, unless an option overrides them."""

    def usual(self, whole: "FederationSettings") -> tuple[float, ...]:
        """Return the values of the arms if the configuration lists none."""
        return ()

    def rounds_of_arm(self, num_rounds: int) -> int:
        """Return the rounds of each arm, before the best value continues for the rest of `num_rounds`."""
        return 0

    def in_training(self, training: LocalTraining, value: float) -> LocalTraining:
        """Return `training` with `value` for the key that is tuned; unchanged if that key does not belong to training."""
        return training


class NoTuning(_Tune):
    """No tuning: each key has one value."""

    name: Literal["none"] = "none"
    values: ClassVar[None] = None
    metric: ClassVar[None] = None
    score: ClassVar[Literal["public"]] = "public"
    resolution: ClassVar[float] = 0.1


class _Tuning(_Tune):
    """Tuning of one key: each of its values is tried by an arm, and the best is used in the rest of the run."""

    rounds: Rounds | None = None
    """Rounds of each arm, before the best value continues with all clients; null: a fifth of num_rounds."""
    metric: Text | None = None
    """Metric that compares the values. Null: accuracy if the task has it, else loss; with score=clients evaluate.metric."""
    score: Literal["public", "clients"] = "public"
    """Where the arms' models are compared: on public held-out data, or by a charged evaluation at each arm's clients."""
    resolution: Positive = 0.1
    """With score=clients: least difference of two scores that the noise must resolve; more noise is refused."""
    by: Annotated[Literal["arms"], remedy(NO_PRIVATE_SELECTION)] = "arms"
    """Trials are separated by arms: disjoint sets of clients."""

    def rounds_of_arm(self, num_rounds: int) -> int:
        """Return the rounds of each arm, before the best value continues for the rest of `num_rounds`."""
        return self.rounds or max(1, round(num_rounds * TUNING_SHARE))

    def queries(self, whole: "FederationSettings") -> Mapping[str, tuple[str, object]]:
        """Return the evaluation of the arms' models at their clients, if that compares them."""
        return {"evaluation": ("tune.score", self.score)} if whole.scored_at_clients else {}

    def conflicts(self, whole: "FederationSettings") -> Iterator[tuple[str, str]]:
        """Refuse settings that need all clients, of which an arm has a part; rounds that do not fit; scores without a bound."""
        level, at_clients = sum_level(whole.privacy), self.score == "clients"
        if len(set(whole.tried)) < len(whole.tried):
            yield "tune.values", "try each value once"
        if whole.tuning_rounds >= whole.num_rounds:
            text = f"leaves none of num_rounds={whole.num_rounds} for the best value; give fewer"
            yield "tune.rounds", text
        if whole.steps > MAX_ROUNDS:
            text = f"the arms' rounds and the others are {whole.steps}; at most {MAX_ROUNDS} may be"
            yield "tune.rounds", text
        if whole.cohort.by_turns:
            yield "tune.name", "needs rounds that are a release each; choose another cohort, or tune=none"
        if level and "adaptive" in (level.clipping, level.noise_schedule):
            text = "an adaptive clip or noise depends on the releases of all clients; use fixed, or tune=none"
            yield "tune.name", text
        if isinstance(level, RecordDistributed) and level.clients_per_person:
            person = "clients of one person may be in several arms, whose charges then add up"
            yield "tune.name", f"{person}; leave privacy.clients_per_person null, or use tune=none"
        if at_clients and not isinstance(whole.privacy, ClientLevel):
            yield "tune.score", f"{HIDDEN_CLIENTS}, or public"
        if at_clients and self.metric == "loss":
            yield "tune.metric", "has no bound, which the noise needs; name a metric of the task"


class LearningRates(_Tuning):
    """Learning rates to try, one in each arm of clients; the best continues with all clients."""

    name: Literal["learning_rate"] = "learning_rate"
    values: Annotated[tuple[Positive, ...] | None, SEVERAL] = None
    """Values to try; null: a quarter of the configured value, that value, and four times it."""

    def usual(self, whole: "FederationSettings") -> tuple[float, ...]:
        """Return rates below, at and above the configured one."""
        return tuple(factor * whole.local_training.learning_rate for factor in USUAL_FACTORS)

    def in_training(self, training: LocalTraining, value: float) -> LocalTraining:
        """Return the training with this learning rate."""
        return replace(training, learning_rate=value)


class EpochCounts(_Tuning):
    """Numbers of local epochs to try, one in each arm of clients; the best continues with all clients."""

    name: Literal["local_epochs"] = "local_epochs"
    values: Annotated[tuple[Epochs, ...] | None, SEVERAL] = None
    """Values to try; null: a quarter of the configured value, that value, and four times it."""

    def usual(self, whole: "FederationSettings") -> tuple[float, ...]:
        """Return numbers around the configured one."""
        epochs = whole.training.local_epochs
        return tuple(sorted({max(1, epochs // 4), epochs, 4 * epochs}))

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

    def usual(self, whole: "FederationSettings") -> tuple[float, ...]:
        """Return norms around the configured one."""
        client = sum_level(whole.privacy)
        norm = client.clipping_norm if isinstance(client, ClientLevel) else 1.0
        return tuple(factor * norm for factor in USUAL_FACTORS)

    def conflicts(self, whole: "FederationSettings") -> Iterator[tuple[str, str]]:
        """Refuse a norm that nothing is clipped to."""
        yield from super().conflicts(whole)
        if not isinstance(sum_level(whole.privacy), ClientLevel):
            yield "tune.name", "no whole client is clipped here; tune learning_rate"


TuningSettings = NoTuning | LearningRates | EpochCounts | ClippingNorms
