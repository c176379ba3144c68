"""The engine that a simulation's clients run on: in this process and its workers, or Flower's Ray runtime."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from flwr.app import Context
from flwr.clientapp.typing import Mod
from flwr.serverapp import Grid

from ..client.app import SETTINGS_KEY, make_client_app, workbench
from ..server.run.federation import Federation
from ..server.run.run_folder import Run
from .deadline import within
from .faults import inject
from .in_process import InProcessGrid


def on_engine(run: Run, on_grid: Callable[[Grid], None], *, grid: Grid | None) -> None:
    """Call `on_grid` with what reaches the clients: the grid that is given, or the engine that the settings name."""
    if grid is not None:
        on_grid(grid)
    elif run.federation.settings.engine.name == "ray":
        _on_ray(run, on_grid)
    else:
        _in_process(run, on_grid)


def _in_process(run: Run, on_grid: Callable[[Grid], None]) -> None:
    from ..client.training.cohort_training import can_vectorise, sum_cohort
    from ..client.training.in_place import begin

    engine = run.federation.settings.engine
    text = run.client.to_json()
    bench = workbench(text)
    plain = (
        run.client.record is None
        and run.federation.masking is None
        and not run.federation.settings.faults.any
    )
    plain = plain and not run.client.loss_traces
    vectorised = plain and can_vectorise(bench)
    grid = InProcessGrid(
        client_app=_client_app(run),
        num_clients=run.federation.num_nodes,
        run_config={SETTINGS_KEY: text},
        workers=engine.workers,
        deadline=engine.deadline,
        cohort_function=partial(sum_cohort, bench) if vectorised else None,
        in_place=partial(begin, bench) if plain else None,
    )
    try:
        on_grid(grid)
    finally:
        grid.close()


def _on_ray(run: Run, on_grid: Callable[[Grid], None]) -> None:
    from .ray import ray_grid

    federation, text = run.federation, run.client.to_json()
    app = make_client_app(partial(_settings_text, text), client_mods(federation))
    with ray_grid(app, federation.num_nodes, federation.settings.engine) as grid:
        on_grid(grid)


def _client_app(run: Run) -> Any:
    return make_client_app(partial(_settings_text, run.client.to_json()), _faults(run.federation))


def _settings_text(text: str, context: Context) -> str:
    del context
    return text


def client_mods(federation: Federation) -> tuple[Mod, ...]:
    """Return what surrounds a client where Flower's runtime calls it: its deadline, and the faults to inject."""
    return (within(federation.settings.engine.deadline), *_faults(federation))


def _faults(federation: Federation) -> tuple[Mod, ...]:
    faults, deadline = federation.settings.faults, federation.settings.engine.deadline
    return (inject(faults, federation.randomness, deadline),) if faults.any else ()
