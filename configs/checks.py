"""Checks that need more than the configuration: the population and the kind of data. Pure functions."""

from ..privacy.refusal import Refusal
from .schema import ClientCentral, Record, RecordAndClient, SimulationSettings


def check_cohort(settings: SimulationSettings, num_clients: int) -> None:
    """Refuse a fixed cohort larger than the population."""
    size = settings.cohort.size
    if size is not None and size > num_clients:
        raise Refusal("cohort.size", size, f"the task has {num_clients} clients; take at most that many")


def check_delta(settings: SimulationSettings, num_clients: int) -> str | None:
    """Refuse a client-level delta above 1/num_clients unless it is asked for in so many words.

    Publishing one client at random in full satisfies (0, 1/n)-DP, so such a delta can mean no protection.

    Returns:
        The warning to show where it was asked for, or None.
    """
    match settings.privacy:
        case ClientCentral() as client:
            return _check_delta("privacy", client, num_clients, "clients")
        case RecordAndClient(client=client):
            return _check_delta("privacy.client", client, num_clients, "clients")
        case _:
            return None


def check_record_delta(privacy: Record, num_records: int, path: str = "privacy") -> str | None:
    """The same for one client's records; ``num_records`` is private, so only the client itself may ask."""
    return _check_delta(path, privacy, num_records, "records")


def _check_delta(path: str, unit: ClientCentral | Record, population: int, what: str) -> str | None:
    if population < 1 or unit.target_delta <= 1 / population:
        return None
    if not unit.allow_large_delta:
        raise Refusal(
            f"{path}.target_delta",
            unit.target_delta,
            f"with {population} {what} it permits to publish one of them in full; lower it below "
            f"{1 / population:.2g} or set {path}.allow_large_delta=true",
        )
    return (
        f"{path}.target_delta={unit.target_delta:g} permits to publish one of the {population} {what} in full"
    )


def check_seed(settings: SimulationSettings, simulated: bool) -> None:
    """Refuse a seed on real data: noise that can be repeated can be subtracted."""
    if settings.seed is not None and not simulated:
        raise Refusal(
            "seed",
            settings.seed,
            "on real data noise and draws come from the system's generator; use seed=null",
        )
