"""From settings to a federation, or a refusal before anything is written."""

from __future__ import annotations

from dataclasses import replace

from ..client.tasks import load_task
from ..configs.checks import check_cohort, check_delta, check_seed, least_participations
from ..configs.schema import (
    ClientDistributed,
    CohortSettings,
    NoPrivacy,
    Record,
    RecordAndClient,
    SimulationSettings,
)
from ..privacy.budget import Adjacency
from ..privacy.refusal import Refusal
from ..strategies.cohorts import All, Cohort, Fixed, MinSeparation, Poisson
from .display import warn
from .federation import Federation, task_options

SEEN_DRAW = "none: the server sees who takes part"


def build(settings: SimulationSettings) -> Federation:
    """Return the federation that the settings describe, or refuse before anything is written.

    Raises:
      Refusal: naming the setting.
    """
    seed = 0 if settings.seed is None else settings.seed
    task = load_task(
        settings.task.target or settings.task.name, task_options(settings, seed), settings.allow_modules
    )
    check_cohort(settings, task.num_clients)
    cohort = _cohort(settings.cohort, task.num_clients, settings.num_rounds)
    if isinstance(cohort, Poisson) and isinstance(settings.privacy, ClientDistributed):
        cohort = replace(cohort, name=SEEN_DRAW, secret=False)
    _check_adjacency(settings)
    private = not isinstance(settings.privacy, NoPrivacy)
    if private:
        check_seed(settings, task.simulated)
    warning = check_delta(settings, task.num_clients)
    if warning:
        warn(warning)
    return Federation(settings, task, cohort, seed if task.simulated or not private else None)


def _check_adjacency(settings: SimulationSettings) -> None:
    """Refuse what would make a public number depend on how many units there are, where that is the secret."""
    privacy = settings.privacy
    levels = (privacy.record, privacy.client) if isinstance(privacy, RecordAndClient) else (privacy,)
    for level in levels:
        if isinstance(level, NoPrivacy) or level.adjacency is not Adjacency.ADD_OR_REMOVE_ONE:
            continue
        if isinstance(level, Record):
            remedy = "a client's sampling rate tells how many records it has; use zero-out"
            raise Refusal("privacy.adjacency", str(level.adjacency), remedy)
        if settings.cohort.name in ("fixed", "min_separation"):
            remedy = "such a cohort replaces whoever leaves; use cohort=poisson, or zero-out"
            raise Refusal("privacy.adjacency", str(level.adjacency), remedy)


def _cohort(settings: CohortSettings, num_clients: int, num_rounds: int) -> Cohort:
    if settings.name == "poisson":
        assert settings.rate is not None
        return Poisson(settings.rate)
    if settings.name == "all":
        return All()
    assert settings.size is not None
    if settings.name == "fixed":
        return Fixed(settings.size)
    return MinSeparation(
        settings.size,
        settings.separation or num_clients // settings.size,
        settings.max_participations or least_participations(settings.size, num_clients, num_rounds),
    )
