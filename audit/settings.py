"""Settings of the audit: the group audit, and what it conflicts with."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from ..configs.group import Group, remedy
from ..configs.privacy_settings import (
    ClientDistributed,
    ClientLevel,
    RecordDistributed,
    SumLevel,
    sum_level,
)
from ..configs.task_settings import CyclicCohort
from ..configs.values import By

if TYPE_CHECKING:
    from ..configs.schema import FederationSettings


class NoAudit(Group):
    """No audit."""

    name: Literal["off"] = "off"


class _Audit(Group):
    """Settings of every audit."""

    on_alarm: Annotated[
        Literal["stop", "pause", "raise_noise", "rollback", "note"],
        remedy("no check of a sum names a client to drop"),
    ] = "stop"
    """Effect of an alarm; note: record it and continue."""
    alpha: Annotated[float, Field(gt=0, le=0.2)] = 0.01
    """Probability that a correct run raises any alarm."""

    def conflicts(self, whole: "FederationSettings") -> Iterator[tuple[str, str]]:
        """Refuse an action on an alarm that this run cannot take."""
        if self.on_alarm == "raise_noise" and sum_level(whole.privacy) is None:
            yield "audit.on_alarm", "no noise is added to this sum; use stop, pause or rollback"
        elif self.on_alarm == "raise_noise" and whole.cohort.by_turns:
            text = "rounds are one release together, whose noise is fixed; use stop, pause or rollback"
            yield "audit.on_alarm", text
        if self.on_alarm == "rollback" and whole.tried:
            text = "each arm has its own model, and none can be rolled back; use stop or pause"
            yield "audit.on_alarm", text


class LightAudit(_Audit):
    """Free checks in every round: whether the released sum has the claimed noise, and whether the noise is new."""

    name: Literal["light"] = "light"


class FullAudit(_Audit):
    """The light checks, and canary clients in the cohort, which compare the measured leakage with the claim."""

    name: Literal["full"] = "full"
    canaries: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    """Canary clients; null: one for 4 parameters, at most 1000, or with encrypted sums half of what secagg.collusion allows."""
    looks: Annotated[int, Field(ge=1, le=1_000)] = 10
    """Rounds, spread over the run, after which canaries and planted secrets are scored."""
    support: Annotated[int, Field(ge=2, le=1_000_000_000)] | None = None
    """Most coordinates of one canary; null: 20 000 or all."""
    loss_traces: bool = False
    """Whether each client keeps the losses of its own records locally; see docs/audits.md."""

    def conflicts(self, whole: "FederationSettings") -> Iterator[tuple[str, str]]:
        """Refuse canaries that this mode, cohort or search cannot score."""
        yield from super().conflicts(whole)
        client = sum_level(whole.privacy)
        if not whole.simulates_clients:
            yield from _conflicts_with_real_clients(client)
        if isinstance(whole.cohort, CyclicCohort):
            text = "its canary clients cannot be scored for turns in some rounds only; use light"
            yield "audit.name", text
        if whole.cohort.by_arrival:
            yield "audit.name", "its canary clients would have to arrive among the first; use light"
        if whole.tried:
            text = "its canaries are in no arm, but test the promise to all clients; use light"
            yield "audit.name", text
        if self.canaries and not isinstance(client, ClientLevel):
            text = "test the claim of client-level privacy, and there is none; leave it null"
            yield "audit.canaries", text
        if self.canaries != 0 and client and client.clipping == "adaptive":
            text = "canaries exceed every norm and would raise an adaptive one; use "
            yield "audit.canaries", text + "privacy.clipping=fixed, or 0"


def _conflicts_with_real_clients(level: SumLevel | None) -> Iterator[tuple[str, str]]:
    """Refuse canaries among real clients, unless they test a claim about clients whose single vectors the server sees."""
    if level is None:
        yield "audit.name", "its canary clients test a client-level claim, and there is none; use light"
    elif isinstance(level, RecordDistributed):
        text = "the server opens the sum in which canary records are scored, but only their owners may know which took part; use "
        yield "audit.name", text + "light, and full in a simulation"
    elif isinstance(level, ClientDistributed):
        text = "a canary client needs keys in the roster, and the operator would know its share of the noise; use "
        yield "audit.name", text + "light"


AuditSettings = LightAudit | FullAudit
AUDIT = Annotated[NoAudit | AuditSettings, By]


def audit_of(settings: "FederationSettings") -> AuditSettings:
    """Return the settings of the audit of a run that is audited."""
    assert isinstance(settings.audit_group, AuditSettings)
    return settings.audit_group
