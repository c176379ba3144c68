"""Canaries of an audit: the number of clients, and of records at each simulated client, and the clients' settings."""

from __future__ import annotations

from collections.abc import Callable

from ..base.refusal import Refusal
from ..configs.privacy_settings import ClientLevel, NoPrivacy, SumLevel, sum_level
from ..configs.schema import SimulationSettings
from ..messages.client_settings import CanaryClients
from ..privacy.budget import Adjacency
from ..privacy.mechanisms.sum_spec import Segment
from ..tasks.protocol import Task
from .settings import FullAudit

MAX_CANARIES = 1000  # by default: epsilon 4 against half its noise is then refuted at 0.001 with certainty
COORDINATES_FOR_ONE = 4  # with fewer, canaries interfere with each other
SUPPORT = 20_000  # coordinates of one canary by default: 80 MB for a thousand, with the power of dense ones
TOO_LONG = 10.0  # clipping norms that a canary sends, to test the clip
MAX_CANARY_RECORDS = 1000  # canary records of all clients together; more cost time and add little power
SHARE = 0.25  # of the smallest client's records, at most, so that its own records still train the model


def is_full(settings: SimulationSettings) -> bool:
    """Return whether a simulation is audited in full: by canary clients, records and planted examples."""
    return isinstance(settings.audit_group, FullAudit)


def canary_audit(settings: SimulationSettings) -> FullAudit | None:
    """Return the audit's settings if it tests a client-level claim with canaries, else None."""
    audit = settings.audit_group
    if isinstance(audit, FullAudit) and isinstance(sum_level(settings.privacy), ClientLevel):
        return audit
    return None


def extra_clients(settings: SimulationSettings, task: Task) -> int:
    """Return the number of canary clients; refuse more than an encrypted sum with these clients allows."""
    audit = canary_audit(settings)
    if audit is None:
        return 0
    from ..tasks.arrays import dimension_of

    canaries = audit.canaries
    default = min(MAX_CANARIES, dimension_of(task) // COORDINATES_FOR_ONE)
    if settings.secagg is None:
        return default if canaries is None else canaries
    # The party that runs canaries knows their shares of the noise and masks, so canaries count as colluders.
    maximum = int(settings.secagg.collusion * task.num_clients)
    if canaries is None:
        return min(default, maximum // 2)
    if canaries > maximum:
        remedy = f"canaries count as colluding: use at most {maximum} with {task.num_clients} clients, or raise secagg.collusion"
        raise Refusal("audit.canaries", canaries, remedy)
    return canaries


def extra_records(settings: SimulationSettings, num_clients: int, fewest: Callable[[], int]) -> int:
    """Return how many canary records each simulated client has; 0 unless a full audit tests a claim about records.

    Args:
      settings: of the simulation.
      num_clients: of the task.
      fewest: returns the number of records of the client that has the fewest.
    """
    if not is_full(settings) or isinstance(settings.privacy, ClientLevel | NoPrivacy):
        return 0
    return max(1, min(-(-MAX_CANARY_RECORDS // num_clients), int(SHARE * fewest())))


def plants_examples(settings: SimulationSettings) -> bool:
    """Return whether odd examples are planted: if records are audited, or without any guarantee."""
    return is_full(settings) and not isinstance(settings.privacy, SumLevel)


def keeps_losses(settings: SimulationSettings) -> bool:
    """Return whether each client keeps the losses of its own records locally."""
    return isinstance(settings.audit_group, FullAudit) and settings.audit_group.loss_traces


def support_of(settings: FullAudit, dimension: int) -> int:
    """Return how many of the model's `dimension` coordinates one canary uses."""
    return min(dimension, settings.support or SUPPORT)


def canary_clients(
    audit: FullAudit, client: ClientLevel, task: Task, count: int, seed: bytes, segments: tuple[Segment, ...]
) -> CanaryClients:
    """Return the settings of canary clients, whose metrics are the middle of each range, which adds 0 to the sum.

    Args:
      audit: its settings.
      client: the client level, whose clip the canaries test.
      task: whose model they change.
      count: of canaries.
      seed: secret, of their coins and directions.
      segments: scalars that travel with an update.
    """
    from ..tasks.arrays import dimension_of

    return CanaryClients(
        first=task.num_clients,
        count=count,
        seed=seed.hex(),
        support=support_of(audit, dimension_of(task)),
        norm=TOO_LONG * client.clipping_norm,
        replaced=client.adjacency is Adjacency.REPLACE_ONE,
        metrics={each.name: each.bound / 2 for each in segments},
    )
