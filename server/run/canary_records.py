"""Canary records of an audit: how many stand among the records of each simulated client."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...configs.schema import ClientLevel, NoPrivacy

if TYPE_CHECKING:
    from .federation import Federation

MOST = 1000  # canaries of all clients together; more cost time and say little more
SHARE = 0.25  # of the smallest client's records, at most: what trains beside them is not to drown


def canary_records_of_each(federation: Federation) -> int:
    """Return how many canaries each client has; 0 on real data, where only the client may see what they show."""
    audit, task, privacy = federation.settings.audit, federation.task, federation.settings.privacy
    of_records = not isinstance(privacy, ClientLevel | NoPrivacy)
    if audit is None or not audit.full or not of_records or not federation.simulated:
        return 0
    return max(1, min(-(-MOST // task.num_clients), int(SHARE * federation.sizes[0])))
