"""Engine that a simulation's clients run on: in this process and its workers, or Flower's Ray runtime."""

from __future__ import annotations

from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from functools import partial

from flwr.app import Context
from flwr.clientapp.typing import Mod
from flwr.serverapp import Grid

from ..client.app import SETTINGS_KEY, Workbench, make_client_app
from ..configs.schema import InProcess, Ray
from ..server.run.federation import Federation, Run
from ..strategies.client_settings import ClientSettings
from ..strategies.cohorts import invited_size
from ..tasks.hardware import units
from .deadline import within
from .faults import inject
from .in_process import InProcessGrid


def on_engine(run: Run, grid: Grid | None = None) -> AbstractContextManager[Grid]:
    """Open what reaches the clients: the grid that is given, or the engine that the settings name.

    Args:
      run: about to begin its rounds.
      grid: to be used instead of an engine; it is not closed.
    """
    if grid is not None:
        return nullcontext(grid)
    engine = run.federation.settings.engine
    if isinstance(engine, Ray):
        from .ray import ray_grid

        app = make_client_app(partial(_settings_text, run.client.to_json()), client_mods(run.federation))
        return ray_grid(app, run.federation.num_nodes, engine)
    return closing(_in_process(run, engine))


def asking_engine(federation: Federation, told: ClientSettings) -> AbstractContextManager[Grid]:
    """Open the engine that the settings name for a question: every client is called by itself, and none trains.

    Args:
      federation: whose clients this machine has.
      told: to the clients.
    """
    engine, text = federation.settings.engine, told.to_json()
    if isinstance(engine, Ray):
        from .ray import ray_grid

        app = make_client_app(partial(_settings_text, text), client_mods(federation))
        return ray_grid(app, federation.num_clients, engine)
    bench = Workbench(told, federation.task)
    grid = InProcessGrid(
        client_app=make_client_app(partial(_settings_text, text), _faults(federation), bench),
        num_clients=federation.num_clients,
        run_config={SETTINGS_KEY: text},
        workers=engine.workers or 1,
        deadline=engine.deadline,
    )
    return closing(grid)


def _in_process(run: Run, engine: InProcess) -> InProcessGrid:
    from ..client.training.cohort_training import can_vectorise, sum_cohort
    from ..client.training.in_place import begin

    federation, text = run.federation, run.client.to_json()
    bench = Workbench(run.client, federation.task)
    undisturbed = federation.masking is None and not federation.settings.faults.any
    plain = undisturbed and not (run.client.record or run.client.step or run.client.loss_traces)
    # On the processor, whatever the device: a process that has touched a GPU cannot be forked for its workers.
    on_cpu = bench.settings.accelerator == "cpu"
    probed = bench if on_cpu else Workbench(replace(run.client, accelerator="cpu"), federation.task)
    at_once = None
    if plain and can_vectorise(probed):
        at_once = partial(sum_cohort, bench)
    elif run.client.step is not None and undisturbed:
        from ..client.dp_sgd.union import sum_of_union, union_of

        at_once = partial(sum_of_union, bench, union_of(bench))
    return InProcessGrid(
        client_app=make_client_app(partial(_settings_text, text), _faults(federation), bench),
        num_clients=federation.num_nodes,
        run_config={SETTINGS_KEY: text},
        workers=engine.workers or _workers(federation, stacked=at_once is not None),
        deadline=engine.deadline,
        cohort_function=at_once,
        in_place=partial(begin, bench) if plain else None,
    )


def _workers(federation: Federation, stacked: bool) -> int:
    """Return how many processes train a cohort: one for each core or GPU, and one in all where clients are stacked."""
    if stacked:  # small steps, of which one process's are mostly Python's
        return 1
    invited = invited_size(federation.cohort, federation.num_clients)
    return max(1, min(units(federation.settings.engine.device), round(invited)))


def _settings_text(text: str, context: Context) -> str:
    del context
    return text


def client_mods(federation: Federation) -> tuple[Mod, ...]:
    """Return what surrounds a client where Flower's runtime calls it: its deadline, and the faults to inject."""
    return (within(federation.settings.engine.deadline), *_faults(federation))


def _faults(federation: Federation) -> tuple[Mod, ...]:
    faults, deadline = federation.settings.faults, federation.settings.engine.deadline
    return (inject(faults, federation.randomness, deadline),) if faults.any else ()
