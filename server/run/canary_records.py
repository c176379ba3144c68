"""Canary records of an audit: how many stand among the records of each simulated client."""

from ...configs.schema import ClientLevel, FederationSettings, NoPrivacy

MOST = 1000  # canaries of all clients together; more cost time and say little more
SHARE = 0.25  # of the smallest client's records, at most: what trains beside them is not to drown


def canary_records_of_each(settings: FederationSettings, num_clients: int, fewest: int) -> int:
    """Return how many canaries each simulated client has.

    Args:
      settings: of the run.
      num_clients: of the task.
      fewest: records that a client has.
    """
    audit = settings.audit
    of_records = not isinstance(settings.privacy, ClientLevel | NoPrivacy)
    if audit is None or not audit.full or not of_records:
        return 0
    return max(1, min(-(-MOST // num_clients), int(SHARE * fewest)))
