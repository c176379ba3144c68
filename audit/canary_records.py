"""Canary records of an audit: their number at each simulated client."""

from ..configs.schema import ClientLevel, FederationSettings, NoPrivacy

MOST = 1000  # canaries of all clients together; more cost time and add little power
SHARE = 0.25  # of the smallest client's records, at most, so that its own records still train the model


def records_are_audited(settings: FederationSettings) -> bool:
    """Return whether the audit of these settings asks for canaries among the records."""
    audit = settings.audit
    return audit is not None and audit.full and not isinstance(settings.privacy, ClientLevel | NoPrivacy)


def canary_records_of_each(num_clients: int, fewest: int) -> int:
    """Return how many canaries each simulated client has.

    Args:
      num_clients: of the task.
      fewest: records that a client has.
    """
    return max(1, min(-(-MOST // num_clients), int(SHARE * fewest)))
