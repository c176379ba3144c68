"""Checks that need more than the configuration: the population and the kind of data. Pure functions."""

from ..base.refusal import Refusal
from ..privacy import budget
from ..privacy.preconditions import check_cohort_size
from ..privacy.sampling import min_participations
from .privacy_settings import RecordAndClient, sum_level
from .schema import SimulationSettings
from .task_settings import CyclicCohort, SeparatedCohort


def check_cohort(settings: SimulationSettings, num_clients: int) -> None:
    """Refuse a cohort that the population is too small for, or that does not go with the privacy asked for."""
    cohort, client = settings.cohort, sum_level(settings.privacy)
    check_cohort_size(cohort.size, num_clients)
    if settings.secagg is not None and cohort.by_turns:
        raise Refusal("cohort", cohort.name, "its rounds are one release; use another with encrypted sums")
    if cohort.by_turns:
        _check_turns(settings)
    elif client is not None and client.noise == "correlated":
        remedy = f"cohort={cohort.name} promises no separation; use cohort=cyclic_poisson or min_separation"
        raise Refusal("privacy.noise", "correlated", remedy)
    if isinstance(cohort, SeparatedCohort):
        _check_separation(settings, cohort, num_clients)


def _check_turns(settings: SimulationSettings) -> None:
    cohort, client = settings.cohort, sum_level(settings.privacy)
    if client is None:
        remedy = "its rounds are releases on the population's ledger; protect clients as well, or use another cohort"
        raise Refusal("cohort", cohort.name, remedy)
    for choice in ("clipping", "noise_schedule"):
        if getattr(client, choice) == "adaptive":
            remedy = f"with cohort={cohort.name} rounds are one release, fixed in advance; use fixed"
            raise Refusal(f"privacy.{choice}", "adaptive", remedy)
    if isinstance(cohort, CyclicCohort) and client.noise != "correlated":
        remedy = (
            "independent noise gains nothing by turns; add privacy.noise=correlated, or use cohort=poisson"
        )
        raise Refusal("cohort", cohort.name, remedy)


def _check_separation(settings: SimulationSettings, cohort: SeparatedCohort, num_clients: int) -> None:
    size = cohort.size
    if (cohort.separation or 1) * size > num_clients:
        remedy = f"with {size} of {num_clients} clients a round give at most {num_clients // size}"
        raise Refusal("cohort.separation", cohort.separation, remedy)
    needed = min_participations(size, num_clients, settings.num_rounds)
    if (cohort.max_participations or needed) < needed:
        remedy = f"{settings.num_rounds} rounds of {size} clients need at least {needed}"
        raise Refusal("cohort.max_participations", cohort.max_participations, remedy)


def check_delta(settings: SimulationSettings, units: int) -> str | None:
    """Refuse a delta above one over the units that a sum hides unless it is allowed; return the warning where it is."""
    level = sum_level(settings.privacy)
    if level is None:
        return None
    path = "privacy.client" if isinstance(settings.privacy, RecordAndClient) else "privacy"
    return budget.check_delta(path, level.target_delta, units, f"{level.unit}s", level.allow_large_delta)


def check_seed(settings: SimulationSettings, simulated: bool) -> None:
    """Refuse a seed on real data: noise that can be repeated can be subtracted."""
    if settings.seed is not None and not simulated:
        remedy = "on real data noise and draws come from the system's generator; use seed=null"
        raise Refusal("seed", settings.seed, remedy)
