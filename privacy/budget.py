"""Terms of a guarantee: unit, adjacency, adversary, and the budget and the releases that they describe."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from ..base.refusal import Refusal, positive, real, word

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

    from .accounting.events import Gaussian
    from .arms import Arm

UNLIMITED_EPSILON = 1e9  # the target where releases are only counted, as of a run that was given noise alone


OF_RECORDS, OF_CLIENT = "records", "client"  # sources of a release


class Unit(StrEnum):
    """Contribution that is hidden: one example of one client, all of one person's there, or all that a client contributes.

    `PERSON_EVERYWHERE` is all of a person's examples at all clients together; the clients agree which of them may train
    on the person.

    Example:
      >>> import fedveil as fv
      >>> fv.Unit("record") is fv.Unit.RECORD
      True
    """

    RECORD = "record"
    PERSON = "person"
    PERSON_EVERYWHERE = "person_everywhere"
    CLIENT = "client"


class Adjacency(StrEnum):
    """Relation of two data sets that must be hard to tell apart.

    Attributes:
      ZERO_OUT: one unit is blanked; the number of units is public.
      ADD_OR_REMOVE_ONE: one unit is there or not; the number of units is hidden.
      REPLACE_ONE: one unit is exchanged for another, which doubles the sensitivity of a clipped sum.

    Example:
      >>> import fedveil as fv
      >>> [str(each) for each in fv.Adjacency]
      ['zero-out', 'add-or-remove-one', 'replace-one']
    """

    ZERO_OUT = "zero-out"
    ADD_OR_REMOVE_ONE = "add-or-remove-one"
    REPLACE_ONE = "replace-one"

    @property
    def distance(self) -> int:
        """How far one unit moves a clipped sum, in clipping norms."""
        return 2 if self is Adjacency.REPLACE_ONE else 1


class Adversary(StrEnum):
    """Adversary that sees a release: the server, the other clients, or any recipient of the released model.

    Example:
      >>> import fedveil as fv
      >>> [str(each) for each in fv.Adversary]
      ['server', 'clients', 'model']
    """

    SERVER = "server"
    CLIENTS = "clients"
    MODEL = "model"


@dataclass(frozen=True)
class Budget:
    """Epsilon and delta that one ledger may spend on one unit.

    Attributes:
      unit: of the contribution that is hidden.
      target_epsilon: above 0, in nats.
      target_delta: in (0, 1), sensibly below one over the number of units.
      adjacency: the relation that both hold under.

    Raises:
      Refusal: a value is out of range.

    Example:
      >>> import fedveil as fv
      >>> fv.Budget("client", target_epsilon=3.0, target_delta=1e-4).adjacency
      <Adjacency.ZERO_OUT: 'zero-out'>
    """

    unit: Unit
    target_epsilon: float
    target_delta: float
    adjacency: Adjacency = Adjacency.ZERO_OUT

    def __post_init__(self) -> None:
        object.__setattr__(self, "unit", word(Unit, "unit", self.unit))
        object.__setattr__(self, "adjacency", word(Adjacency, "adjacency", self.adjacency))
        object.__setattr__(self, "target_epsilon", positive("target_epsilon", self.target_epsilon))
        object.__setattr__(self, "target_delta", real("target_delta", self.target_delta))
        if not 0 < self.target_delta < 1:
            raise Refusal("target_delta", self.target_delta, "give a probability strictly between 0 and 1")


def check_delta(path: str, delta: float, population: int, units: str, allowed: bool) -> str | None:
    """Refuse a delta above 1/population unless it is allowed.

    Publishing one unit at random in full satisfies (0, 1/population)-DP, so such a delta can mean no protection.

    Args:
      path: the group of the configuration that the delta stands in; empty where it is an argument.
      delta: in (0, 1).
      population: number of units, at least 0.
      units: their name: clients or records.
      allowed: whether the user has allowed a large delta.

    Returns:
      The warning to show if it is allowed, or None.
    """
    if population < 1 or delta <= 1 / population:
        return None
    group = f"{path}." if path else ""
    if not allowed:
        remedy = f"with {population} {units} it permits to publish one of them in full; lower it below "
        remedy += f"{1 / population:.2g} or set {group}allow_large_delta=true"
        raise Refusal(f"{group}target_delta", delta, remedy)
    return f"{group}target_delta={delta:g} permits to publish one of the {population} {units} in full"


@dataclass(frozen=True)
class Release:
    """One release across its owner's trust boundary, and its cost against each adversary.

    Attributes:
      unit: of the contributions to it.
      run: the run's name.
      round: the round's number, from 1.
      mechanism: that computed it; with run and round the release's key.
      events: its cost against every adversary that sees it, at least one.
      rng: `system` if noise and draws come from the system's generator, `seeded` if a declared simulation derives them
        from its seed.
      filter_order: None if the events were fixed in advance; the order above 1 of the ledger's RDP filter (module
        `accounting.renyi_filter`) if they were chosen from earlier releases.
      cohort: the drawn clients, if later draws need them; public, and kept with the reservation.
      segments: names of the parts of the vector that leaves, each with its purpose; kept with the reservation.
      kind: None for a round of training; `question` for a sum that has no update.
      arm: of a deal, if only its clients take part; None if all do.
      source: what was computed on, if not the data of the unit: on a ledger of clients `records`, what their ledgers
        were charged for already; on a ledger of records `client`, the vector of a whole client.

    Raises:
      Refusal: a word is unknown, or no adversary is named.

    Example:
      >>> import fedveil as fv
      >>> from dp_accounting import GaussianDpEvent
      >>> fv.Release("record", "monday", 1, "mean age", {"model": GaussianDpEvent(5.0)}, rng="system").key
      ('monday', 1, 'mean age')
    """

    unit: Unit
    run: str
    round: int
    mechanism: str
    events: Mapping[Adversary, "DpEvent | Gaussian"]
    rng: str
    filter_order: float | None = None
    cohort: tuple[int, ...] | None = None
    segments: Mapping[str, str] | None = None
    kind: str | None = None
    arm: "Arm | None" = None
    source: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "unit", word(Unit, "unit", self.unit))
        events = {word(Adversary, "adversary", adversary): event for adversary, event in self.events.items()}
        object.__setattr__(self, "events", events)
        if not events:
            raise Refusal("events", self.events, "name what the release costs against at least one adversary")
        if self.rng not in ("system", "seeded"):
            raise Refusal("rng", self.rng, "choose system or seeded")

    @property
    def key(self) -> tuple[str, int, str]:
        """Run, round and mechanism: two releases with the same key are one."""
        return (self.run, self.round, self.mechanism)
