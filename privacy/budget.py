"""Terms of a privacy guarantee: unit, adjacency, adversary, budget and release."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from ..base.refusal import Refusal, positive, real, word

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

    from .accounting.events import Gaussian
    from .arms import Arm

UNLIMITED_EPSILON = 1e9  # target of a ledger that counts releases without a limit, as with fixed noise
OF_RECORDS, OF_CLIENT = "records", "client"  # values of `Release.source`


class Unit(StrEnum):
    """Unit of privacy: the contribution that the guarantee hides.

    Attributes:
      RECORD: one example of one client.
      PERSON: all examples of one person at one client.
      PERSON_EVERYWHERE: all examples of one person at all clients; the clients agree which of them train on the person.
      CLIENT: everything that one client contributes.

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
    """Relation of neighbouring data sets, which the guarantee makes hard to distinguish.

    Attributes:
      ZERO_OUT: the contribution of one unit is replaced by zeros; the number of units is public.
      ADD_OR_REMOVE_ONE: one unit is present or absent; the number of units is hidden.
      REPLACE_ONE: one unit is replaced by another, which doubles the sensitivity of a clipped sum.

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
        """Sensitivity of a sum of clipped vectors, in clipping norms: 2 under replace-one, else 1."""
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
    """Budget of one ledger: the largest epsilon, at a fixed delta, that all its releases together may cost a unit.

    Attributes:
      unit: unit of privacy.
      target_epsilon: largest epsilon in nats, above 0.
      target_delta: delta in (0, 1); choose it below 1 / number of units.
      adjacency: relation of neighbouring data sets under which the guarantee holds.

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
      path: configuration group of the delta, such as `privacy`; empty if the delta is an argument.
      delta: in (0, 1).
      population: number of units, at least 0.
      units: plural name of the unit: clients or records.
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
    """One noised result that leaves its owner's trust boundary, and its privacy cost against each adversary.

    Attributes:
      unit: unit of privacy of the ledger that pays.
      run: name of the run.
      round: number of the round, from 1.
      mechanism: name of the mechanism; the release's key is (run, round, mechanism).
      events: privacy event (`dp_accounting.DpEvent`) for each adversary that sees the result, at least one.
      rng: `system` if noise and sampling use the operating system's generator, `seeded` if a declared simulation
        derives them from its seed.
      filter_order: None if the events are fixed in advance; if they depend on earlier releases, the order, above 1, of
        the ledger's RDP filter (module `accounting.renyi_filter`).
      cohort: numbers of the sampled clients, if later sampling depends on them, else None; public, on the ledger.
      segments: purpose of each segment of the released vector, by name; stored on the ledger.
      kind: None for a training round; `question` for a sum that answers a question and updates no model.
      arm: arm of a tuning run, if only clients of this arm take part; None if all clients do.
      source: None if the result is computed from data of the ledger's own unit; on a ledger of clients `records`, if
        the clients' ledgers of records paid already; on a ledger of records `client`, for a whole client's vector.

    Raises:
      Refusal: the unit, an adversary or `rng` is unknown, or there are no events.

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
        """Key on the ledger, (run, round, mechanism); two releases with the same key are charged once."""
        return (self.run, self.round, self.mechanism)
