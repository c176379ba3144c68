"""What is protected, from whom, and how much may be spent: the words that every guarantee is stated in."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from .refusal import Refusal, real, word

if TYPE_CHECKING:
    from dp_accounting import DpEvent

    from .accounting.events import Gaussian


class Unit(StrEnum):
    """Whose contribution is hidden: one example of one client, or all that one client ever contributes."""

    RECORD = "record"
    CLIENT = "client"


class Adjacency(StrEnum):
    """Which two data sets must be hard to tell apart.

    ``zero-out`` blanks one unit and keeps the number of units public; ``replace-one`` exchanges one unit for
    another and so doubles the sensitivity of a clipped sum; ``add-or-remove-one`` hides the number of units.
    """

    ZERO_OUT = "zero-out"
    ADD_OR_REMOVE_ONE = "add-or-remove-one"
    REPLACE_ONE = "replace-one"


class Adversary(StrEnum):
    """Who sees a release: the server, the other clients, or whoever gets the released model."""

    SERVER = "server"
    CLIENTS = "clients"
    MODEL = "model"


@dataclass(frozen=True)
class Budget:
    """The (epsilon, delta) that one ledger may spend on one unit. Refusal when a value is out of range.

    ``target_epsilon`` > 0; 0 < ``target_delta`` < 1, sensibly below one over the number of units.
    """

    unit: Unit
    target_epsilon: float
    target_delta: float
    adjacency: Adjacency = Adjacency.ZERO_OUT

    def __post_init__(self) -> None:
        object.__setattr__(self, "unit", word(Unit, "unit", self.unit))
        object.__setattr__(self, "adjacency", word(Adjacency, "adjacency", self.adjacency))
        object.__setattr__(self, "target_epsilon", real("target_epsilon", self.target_epsilon))
        object.__setattr__(self, "target_delta", real("target_delta", self.target_delta))
        if self.target_epsilon <= 0:
            raise Refusal("target_epsilon", self.target_epsilon, "give a number above 0")
        if not 0 < self.target_delta < 1:
            raise Refusal("target_delta", self.target_delta, "give a probability strictly between 0 and 1")


@dataclass(frozen=True)
class Release:
    """One thing that leaves its owner's trust boundary, and what it costs against each who sees it.

    ``events`` names a cost for every adversary who sees the release; ``rng`` says where noise and draws come
    from: the system's generator (``system``) or, in a declared simulation, the run's seed (``seeded``).
    ``filter_order`` is None where the events were fixed in advance; where they were chosen from what earlier releases
    said, it is the order above 1 of the RDP filter that the ledger then goes by (module `filter`). ``cohort`` are the
    clients that were drawn, where later draws must know; it is public and kept with the reservation.
    """

    unit: Unit
    run: str
    round: int
    mechanism: str
    events: Mapping[Adversary, "DpEvent | Gaussian"]
    rng: str
    filter_order: float | None = None
    cohort: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "unit", word(Unit, "unit", self.unit))
        seen = {word(Adversary, "adversary", who): event for who, event in self.events.items()}
        object.__setattr__(self, "events", seen)
        if not seen:
            raise Refusal("events", self.events, "name what the release costs against at least one adversary")
        if self.rng not in ("system", "seeded"):
            raise Refusal("rng", self.rng, "choose system or seeded")

    @property
    def key(self) -> tuple[str, int, str]:
        """What makes a release one and the same: (run, round, mechanism)."""
        return (self.run, self.round, self.mechanism)
