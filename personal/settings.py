"""Settings of personal models: the group personal, and what it conflicts with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from ..configs.group import Group, remedy
from ..configs.privacy_settings import RecordLevel, levels_of, sum_level
from ..configs.values import By, NotNegative, Positive, Text
from ..messages.training_order import HEAD, OWN_LAYERS

if TYPE_CHECKING:
    from ..configs.schema import FederationSettings

QUERY, LAYERS_QUERY = "personal", "layers"


class NoPersonal(Group):
    """No personal models: every client uses the released one."""

    name: Literal["none"] = "none"


class _AfterRelease(Group):
    """Training of each client on its own rows after the release, and its choice on rows that nobody trained on."""

    steps: Annotated[int, Field(ge=1, le=100_000)] = 20
    """Steps from the released model; a model of the client's own rows alone takes twice as many, of four times the rate."""
    learning_rate: Positive | None = None
    """Of each step; null: a quarter of that of local training without clipping."""
    batch_size: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Examples of a step; null: the run's batch_size."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of its records that each client holds out to choose on; with evaluate.clients that group's share is used."""
    layers: Annotated[
        tuple[Text, ...], remedy("must hold patterns of names, for instance [head.*]", strict=False)
    ] = ()
    """Patterns of the names of parameters that train, such as [head.*]; empty: all."""

    def queries(self, whole: FederationSettings) -> Mapping[str, tuple[str, object]]:
        """Return the query that holds rows out and trains after the release."""
        return {QUERY: ("personal", self.option)}


class After(_AfterRelease):
    """Each client trains the released model on with its own rows, and chooses how far."""

    name: Literal["after"] = "after"
    pull: ClassVar[float] = 0.0


class Ditto(_AfterRelease):
    """As after, with a pull to the released model (Li et al. 2021)."""

    name: Literal["ditto"] = "ditto"
    pull: NotNegative = 0.1
    """Weight of the pull: half of it times the squared distance to the released model is added to the loss."""


class Layers(Group):
    """Some layers stay at their client, which trains them in its rounds and stores them; the others are summed."""

    name: Literal["layers"] = "layers"
    layers: Annotated[
        tuple[Text, ...],
        remedy(
            "must hold patterns of names, for instance [head.*]", strict=False, min_length=1, max_length=100
        ),
    ]
    """Patterns of the names of parameters and buffers that never travel, such as [head.*, *.norm*]."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of its records that each client holds out; with evaluate.clients that group's share is used."""

    def queries(self, whole: FederationSettings) -> Mapping[str, tuple[str, object]]:
        """Return the query that holds rows out, on which each client's whole model is measured."""
        return {LAYERS_QUERY: ("personal", self.option)}

    def options_of_task(self, whole: FederationSettings) -> Mapping[str, Any]:
        """Return the option by which every task of the run marks the layers."""
        return {OWN_LAYERS: {"patterns": list(self.layers), "rounds": whole.checkpoint_every}}

    def conflicts(self, whole: FederationSettings) -> Iterator[tuple[str, str]]:
        """Refuse modes that protect records, arms, what looks at the released model, and machines without a common folder."""
        if any(isinstance(level, RecordLevel) for level in levels_of(whole.privacy)):
            yield "personal.name", f"hides whole clients alone: {HEAD}"
        level = sum_level(whole.privacy)
        if level and level.noise == "correlated" and whole.cohort.secret:
            text = "these layers depend on a client's earlier secret turns, for which correlated noise is not accounted; use "
            yield "personal.name", f"{text}privacy.noise=independent, or cohort=min_separation"
        if whole.tried:
            yield "personal.name", "arms would train these layers with different values; use tune=none"
        if whole.observer == "full":
            yield "personal.name", "its probes would score a model without these layers; use audit=light"
        if whole.task.held_out == "public":
            yield (
                "task.held_out",
                "the released model lacks the layers that stay, and has no metrics; leave it null",
            )
        if getattr(getattr(whole, "engine", None), "address", None):
            yield "personal.name", "each machine would store layers of its own; train on one machine"


PersonalSettings = After | Ditto
PERSONAL = Annotated[NoPersonal | PersonalSettings | Layers, By]


def personal_of(settings: FederationSettings) -> PersonalSettings:
    """Return the settings of a run with personal models."""
    assert isinstance(settings.personal, PersonalSettings)
    return settings.personal


def layers_of(settings: FederationSettings) -> Layers:
    """Return the settings of a run with layers that stay at their client."""
    assert isinstance(settings.personal, Layers)
    return settings.personal
