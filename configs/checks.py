"""Checks that need more than the configuration: the population and the kind of data. Pure functions."""

from typing import Protocol

from ..privacy.refusal import Refusal
from ..privacy.sampling import least_participations
from .schema import ClientCentral, RecordAndClient, SimulationSettings, client_level


def check_cohort(settings: SimulationSettings, num_clients: int) -> None:
    """Refuse a cohort that the population is too small for, or that does not go with the privacy asked for."""
    cohort, client = settings.cohort, client_level(settings.privacy)
    size = cohort.size
    if size is not None and size > num_clients:
        raise Refusal("cohort.size", size, f"the task has {num_clients} clients; take at most that many")
    if settings.secagg is not None and cohort.by_turns:
        raise Refusal("cohort", cohort.name, "its rounds are one release; use another with encrypted sums")
    if cohort.by_turns:
        _check_separation(settings, num_clients, client)
    elif client is not None and client.noise == "correlated":
        remedy = f"cohort={cohort.name} promises no separation; use cohort=min_separation"
        raise Refusal("privacy.noise", "correlated", remedy)


def _check_separation(settings: SimulationSettings, num_clients: int, client: ClientCentral | None) -> None:
    cohort = settings.cohort
    if client is None:
        remedy = (
            "who took part is kept on the population's ledger; protect clients as well, or use cohort=fixed"
        )
        raise Refusal("cohort", cohort.name, remedy)
    for choice in ("clipping", "noise_schedule"):
        if getattr(client, choice) == "adaptive":
            remedy = "with cohort=min_separation the whole run is one release, fixed in advance; use fixed"
            raise Refusal(f"privacy.{choice}", "adaptive", remedy)
    size = cohort.size or 1
    if (cohort.separation or 1) * size > num_clients:
        remedy = f"with {size} of {num_clients} clients a round give at most {num_clients // size}"
        raise Refusal("cohort.separation", cohort.separation, remedy)
    needed = least_participations(size, num_clients, settings.num_rounds)
    if (cohort.max_participations or needed) < needed:
        remedy = f"{settings.num_rounds} rounds of {size} clients need at least {needed}"
        raise Refusal("cohort.max_participations", cohort.max_participations, remedy)


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


class _Level(Protocol):
    @property
    def target_delta(self) -> float: ...

    @property
    def allow_large_delta(self) -> bool: ...


def check_record_delta(privacy: _Level, num_records: int, path: str = "privacy") -> str | None:
    """The same for one client's records; ``num_records`` is private, so only the client itself may ask."""
    return _check_delta(path, privacy, num_records, "records")


def _check_delta(path: str, unit: _Level, population: int, what: str) -> str | None:
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
