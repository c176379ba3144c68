"""Owner's choice of a device's own model: the table `personal` of client.toml, which a server cannot change."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from ...base.refusal import OneOf, Range
from ...configs.bundle_files import Lines

NONE, AFTER, DITTO = NAMES = ("none", "after", "ditto")
MAX_STEPS = 1_000_000
MAX_BATCH = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class PersonalChoice:
    """How the device trains a model of its own at the end of a run, from the run's final model.

    Attributes:
      name: `after` trains on from the final model, `ditto` also pulls towards it; `none` makes no own model.
      steps: number of steps of the longest training.
      learning_rate: of these steps; None for the default of `personal.training.OwnTraining`.
      batch_size: records in a step; None for that of the run's orders.
      layers: patterns of the names of the parameters that train, such as `head.*`; empty trains all.
      pull: weight of the pull towards the final model, for `ditto` alone.
      share: of the records that the device holds out to choose its model on, where the run's orders hold none out.
    """

    name: Annotated[str, OneOf(NAMES)] = NONE
    steps: Annotated[int, Range(ge=1, le=MAX_STEPS)] = 20
    learning_rate: Annotated[float, Range(gt=0)] | None = None
    batch_size: Annotated[int, Range(ge=1, le=MAX_BATCH)] | None = None
    layers: Lines = ()
    pull: Annotated[float, Range(gt=0)] = 0.1
    share: Annotated[float, Range(gt=0, lt=1)] = 0.2

    @property
    def trains(self) -> bool:
        """Whether the device makes a model of its own."""
        return self.name != NONE

    @property
    def held_out(self) -> float | None:
        """Share of the records that stays out of training where orders hold none out; None without an own model."""
        return self.share if self.trains else None

    @property
    def pull_or_none(self) -> float:
        """Weight of the pull towards the final model; 0 without `ditto`."""
        return self.pull if self.name == DITTO else 0.0

    def rules(self) -> Iterator[tuple[str, str]]:
        """Yield a key and a remedy for each rule between keys that is broken."""
        if not self.trains and self != PersonalChoice(share=self.share):
            yield "name", "makes no own model; choose after or ditto, or leave the other keys out"


NO_OWN_MODEL = PersonalChoice()
