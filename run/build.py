"""Construction of a federation from its settings, or a refusal before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.notice import warn
from ..base.refusal import Refusal
from ..configs.privacy_settings import RecordAndClient, sum_level
from ..configs.schema import SimulationSettings
from ..configs.task_settings import CyclicCohort, FirstCohort, FolderTask, SeparatedCohort
from ..modes.federation import Federation, mode_of
from ..modes.mode import Mode
from ..populations.machine import OnThisMachine, Simulated
from ..privacy import budget
from ..privacy.preconditions import check_cohort_size
from ..privacy.sampling import min_participations
from ..strategies.cohorts import Cohort, cohort_of, over_select, with_label
from ..tasks import DEALT, TASKS, AnnouncedTask, PooledTask, Task, as_run, load_task
from .client_instructions import task_options
from .files import SAVED, SINGLY
from .learning_rate import suited
from .run_files import read_object
from .sum_plan import best_groups
from .table_model import with_suitable_model

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy

    from ..populations.deployed import Deployed

OBJECT = "object"  # placeholder in settings for the name of a task or strategy given as an object


@dataclass(frozen=True)
class RunObjects:
    """Objects in place of names in the settings; None where the settings name the part."""

    task: Task | PooledTask | None = None
    strategy: Strategy | None = None


NO_OBJECTS = RunObjects()


def build(
    settings: SimulationSettings,
    deployed: Deployed | None = None,
    objects: RunObjects = NO_OBJECTS,
    *,
    announced: bool = False,
) -> Federation:
    """Return the federation that the settings describe, or refuse before anything is written.

    Args:
      settings: validated.
      deployed: real clients, if any. Then only the task's model and held-out examples are used.
      objects: objects in place of the settings' names, in a simulation.
      announced: load a shipped task's data only on use, if the settings give its number of clients, and read no client's.

    Raises:
      Refusal: naming the setting.
    """
    seed = 0 if settings.seed is None else settings.seed
    settings = with_suitable_model(_with_rule_of_resumed_run(settings), on_devices=bool(deployed))
    options = task_options(settings, seed)
    if deployed:
        options = {**settings.task.options, **settings.options_of_groups}
    task = _announced(settings, options) if announced and objects is NO_OBJECTS else None
    task = task or _task(settings, options, objects.task)
    num_clients, mode = (deployed or task).num_clients, mode_of(settings)
    check_cohort(settings, num_clients)
    settings = suited(settings, task, num_clients)
    population = deployed or _on_this_machine(settings, task)
    cohort = population.visible(_cohort(settings, mode, num_clients))
    cohort = over_select(cohort, settings.cohort.over_selection or mode.usual_over_selection, num_clients)
    # Noise may be repeated only where it protects nobody.
    is_seeded = population.simulated or (population.reads_data and not mode.spends)
    strategy = _strategy(settings, objects.strategy)
    if settings.cohort.by_arrival and population.reads_data and not population.simulated:
        remedy = "real data on one machine have no clients that are late; use cohort=min_separation"
        raise Refusal("cohort", settings.cohort.name, remedy)
    federation = Federation(settings, task, cohort, seed if is_seeded else None, population, strategy)
    federation.mode.check_adjacencies()
    if mode.spends and not announced and population.local_clients(task) and settings.task.own:
        from ..tasks.reading_order import check_order  # torch, which a plan does without

        check_order(task)
    if mode.spends:
        check_seed(settings, population.simulated)
    _check_training(settings, mode, task, getattr(strategy or settings.strategy, "proximal_mu", 0.0))
    check_delta(settings, federation.mode.num_units)
    return federation


def _with_rule_of_resumed_run(settings: SimulationSettings) -> SimulationSettings:
    """Return the settings; those of a resumed run hold out equal records as it began, together or one by one."""
    if settings.resume is not None:
        with suppress(Refusal):  # of a damaged file, which is refused where all of it is read
            group_equal_rows = not read_object(Path(settings.resume) / SAVED).get(SINGLY)
            return settings.model_copy(update={"group_equal_rows": group_equal_rows})
    return settings


def _on_this_machine(settings: SimulationSettings, task: Task) -> OnThisMachine:
    """Return the population of the task's clients, whose data this machine reads."""
    if task.simulated:
        return Simulated(settings, task)
    from ..populations.local import Local  # whose ledgers lie with the data

    return Local(settings, task)


def _check_training(settings: SimulationSettings, mode: type[Mode], task: Task, proximal_mu: float) -> None:
    """Refuse settings that cannot train the task's model; plain SGD on the CPU is always valid and needs no torch."""
    training = replace(settings.local_training, proximal_mu=proximal_mu)
    if settings.engine.device != "cpu":
        from ..tasks.hardware import check_device

        check_device(settings.engine.device)
    if settings.engine.dtype != "float32" and callable(getattr(task, "train", None)):
        remedy = "a task that trains by itself chooses its own precision; leave it out"
        raise Refusal("engine.dtype", settings.engine.dtype, remedy)
    if mode.sums_records and callable(getattr(task, "optimizer", None)):
        text = "the strategy takes the step, and the task brings an optimizer of its own; use privacy=record"
        raise Refusal("privacy", settings.privacy.name, text)
    custom_training = any(callable(getattr(task, name, None)) for name in ("optimizer", "train"))
    if training.optimizer.plain and not custom_training:
        return
    from ..tasks.optimizers import check_optimizer

    check_optimizer(task, training, 1.0 if mode.charges_records else None)


def _announced(settings: SimulationSettings, options: Mapping[str, Any]) -> Task | None:
    """Return a shipped task without loading its data; None if only the data give its number of clients."""
    public = settings.task.option in TASKS and not isinstance(settings.task, FolderTask)
    if settings.task.num_clients is None or not public:
        return None
    load = partial(load_task, settings.task.option, options)
    return AnnouncedTask(settings.task.num_clients, load)


def _task(settings: SimulationSettings, options: Mapping[str, Any], task: Task | PooledTask | None) -> Task:
    """Return the user's task object with its examples dealt to clients; without one, the task that the settings name."""
    name = settings.task.own or settings.task.option
    if task is None:
        _refuse_placeholder("task", name)
        return load_task(name, options, settings.allow_modules)
    if settings.engine.elsewhere:
        text = "its processes import a task by name; give module:Class and allow_modules, or engine=inprocess"
        raise Refusal("engine", "ray", text)
    from ..tasks.pool import dealt

    instance = dealt(task, options.get(DEALT))
    if settings.task.num_clients is not None and instance is task:
        remedy = "the task was given as an object and defines its number of clients; leave it null"
        raise Refusal("task.num_clients", settings.task.num_clients, remedy)
    assert isinstance(instance, Task)
    return as_run(instance, options)


def _strategy(settings: SimulationSettings, instance: Strategy | None) -> Strategy | None:
    """Return a copy of the user's strategy, which a run may change; None if the settings name the strategy."""
    if instance is None:
        _refuse_placeholder("strategy", settings.strategy.target or settings.strategy.name)
        return None
    from ..strategies.registry import check_averages

    check_averages(instance)
    return deepcopy(instance)


def _refuse_placeholder(field: str, label: str) -> None:
    """Refuse to resume a run without the object in whose place its settings have a label."""
    if label.startswith(f"{OBJECT}:"):
        remedy = f"the run was given an object; resume it by fedveil.simulate({field}=..., resume=folder)"
        raise Refusal(field, label, remedy)


def with_members(federation: Federation, deployed: Deployed) -> Federation:
    """Return a running federation with the clients of its newest roster; refuse a number that does not suit the settings.

    The plan of the run in progress stays valid, since it does not depend on the number of clients.
    """
    check_cohort(federation.settings, deployed.num_clients)
    changed = replace(federation, population=deployed)
    check_delta(federation.settings, changed.mode.num_units)
    changed.check_cohort()
    return changed


def _cohort(settings: SimulationSettings, mode: type[Mode], num_clients: int) -> Cohort:
    """Return the cohort of the settings, whose draw is public where the mode says so."""
    options = settings.cohort.model_dump()
    if isinstance(settings.cohort, CyclicCohort) and settings.cohort.groups is None:
        options["groups"] = best_groups(settings, settings.cohort.rate)
    cohort = cohort_of(settings.cohort.name, options, num_clients, settings.num_rounds)
    return with_label(cohort, mode.public_draw) if mode.public_draw else cohort


def check_cohort(settings: SimulationSettings, num_clients: int) -> None:
    """Refuse a cohort that needs more clients than there are, or that does not suit the mode of privacy."""
    cohort, level = settings.cohort, sum_level(settings.privacy)
    check_cohort_size(cohort.size, num_clients)
    if cohort.by_turns:
        _check_turns(settings)
    elif level is not None and level.noise == "correlated":
        remedy = f"cohort={cohort.name} promises no separation; use cohort=cyclic_poisson or min_separation"
        raise Refusal("privacy.noise", "correlated", remedy)
    if isinstance(cohort, SeparatedCohort | FirstCohort):
        _check_separation(settings, cohort, num_clients)


def _check_turns(settings: SimulationSettings) -> None:
    """Refuse settings that do not suit a cohort whose clients take turns, so that its rounds are one release."""
    cohort, level = settings.cohort, sum_level(settings.privacy)
    if settings.secagg is not None and not cohort.by_arrival:
        raise Refusal("cohort", cohort.name, "its rounds are one release; use another with encrypted sums")
    if level is None:
        remedy = "its rounds are releases on the population's ledger; protect clients as well, or use another cohort"
        raise Refusal("cohort", cohort.name, remedy)
    if cohort.by_arrival and isinstance(settings.privacy, RecordAndClient):
        remedy = "its clients train more often than they take part, for which their records' noise is not planned; use another cohort"
        raise Refusal("cohort", cohort.name, remedy)
    for choice in ("clipping", "noise_schedule"):
        if getattr(level, choice) == "adaptive":
            remedy = f"with cohort={cohort.name} rounds are one release, fixed in advance; use fixed"
            raise Refusal(f"privacy.{choice}", "adaptive", remedy)
    if isinstance(cohort, CyclicCohort) and level.noise != "correlated":
        text = "independent noise gains nothing by turns; add privacy.noise=correlated, or use cohort=poisson"
        raise Refusal("cohort", cohort.name, text)


def _check_separation(
    settings: SimulationSettings, cohort: SeparatedCohort | FirstCohort, num_clients: int
) -> None:
    """Refuse a separation, or a bound on participations, with which the clients do not suffice for all rounds."""
    size = cohort.size
    if (cohort.separation or 1) * size > num_clients:
        remedy = f"with {size} of {num_clients} clients a round give at most {num_clients // size}"
        raise Refusal("cohort.separation", cohort.separation, remedy)
    needed = min_participations(size, num_clients, settings.num_rounds)
    if (cohort.max_participations or needed) < needed:
        remedy = f"{settings.num_rounds} rounds of {size} clients need at least {needed}"
        raise Refusal("cohort.max_participations", cohort.max_participations, remedy)


def check_delta(settings: SimulationSettings, num_units: int) -> None:
    """Refuse a delta above 1 / the number of units that a sum hides; if the settings allow it, warn."""
    level = sum_level(settings.privacy)
    if level is None:
        return
    path = "privacy.client" if isinstance(settings.privacy, RecordAndClient) else "privacy"
    units, allowed = f"{level.unit}s", level.allow_large_delta
    if warning := budget.check_delta(path, level.target_delta, num_units, units, allowed):
        warn(warning)


def check_seed(settings: SimulationSettings, simulated: bool) -> None:
    """Refuse a seed on real data: noise that can be repeated can be subtracted."""
    if settings.seed is not None and not simulated:
        remedy = "on real data noise and draws come from the system's generator; use seed=null"
        raise Refusal("seed", settings.seed, remedy)
