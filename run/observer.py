"""Observer of a run's released sums: what it sees of a round, and what it demands of the loop; by default nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..base.extensions import extension
from ..modes.federation import Federation
from ..privacy.mechanisms.released_sum import ReleasedSum
from ..server.checkpoint import State
from ..server.rounds import Ending
from .callbacks import ObserverLine
from .prepared_run import Run

Memory = Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True)
class Demand:
    """Demand of an observer on the round loop.

    Attributes:
      ending: how the run is to end; None lets it continue.
      noise: factor on the planned noise of later rounds.
    """

    ending: Ending | None = None
    noise: float = 1.0


NO_DEMAND = Demand()


class Observer(Protocol):
    """Observer of one run. It is asked to `resume`, after each round to `observe`, show and `demand`, and to `end`.

    What it does by default suits a run that nobody observes.
    """

    @property
    def line(self) -> ObserverLine | None:
        """The displayed state so far; None where nothing is displayed."""
        return None

    @property
    def memory(self) -> Memory:
        """Arrays that a checkpoint stores, for the observer of a resumed run."""
        return {}

    def resume(self, state: State, /) -> Demand:
        """Begin at the start, or after the rounds of an earlier process; return what is still demanded of later rounds."""
        return NO_DEMAND

    def observe(self, state: State, released: ReleasedSum | None, /) -> None:
        """Look at the round that has just ended: the state after it, and its sum if it released one with a claim."""

    def columns(self, number: int, /) -> dict[str, Any]:
        """Return the observer's columns in the metrics line of round `number`, which it has just observed."""
        return {}

    def demand(self, state: State, /) -> Demand:
        """Return what the round that ended in this state demands; it has been recorded before."""
        return NO_DEMAND

    def end(self, ending: Ending, title: str, /) -> dict[str, Any] | None:
        """Write the observer's files, and return its part of the result.

        Raises:
          OSError: the folder cannot be written.
        """
        return None


class Unobserved(Observer):
    """Observer that looks at nothing."""


class Observation(Protocol):
    """Module of an extension that observes runs; functions as below."""

    def check(self, federation: Federation, /) -> None: ...
    def begin(self, run: Run, fresh: bool, /) -> tuple[Run, Observer]: ...


def check(federation: Federation) -> None:
    """Refuse a federation that its observer cannot work with, or whose observer is not installed."""
    if name := federation.settings.observer:
        _observation(name).check(federation)


def begin(run: Run) -> tuple[Run, Observer]:
    """Return the run with settings for its observer's canaries, and the observer; folder and ledger must be open."""
    name = run.federation.settings.observer
    return _observation(name).begin(run, not run.resumed) if name else (run, Unobserved())


def _observation(name: str) -> Observation:
    return extension("audit", "Observation", "audit", name)
