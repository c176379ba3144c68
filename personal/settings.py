"""Settings of personal models: the group personal, and what it conflicts with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from ..configs.group import Group, remedy
from ..configs.values import By, NotNegative, Positive, Text

if TYPE_CHECKING:
    from ..configs.schema import FederationSettings

QUERY = "personal"


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


PersonalSettings = After | Ditto
PERSONAL = Annotated[NoPersonal | PersonalSettings, By]


def personal_of(settings: FederationSettings) -> PersonalSettings:
    """Return the settings of a run with personal models."""
    assert isinstance(settings.personal, PersonalSettings)
    return settings.personal
