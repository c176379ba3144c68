"""Simulation of a federation on one machine, from settings to a run folder."""

from __future__ import annotations

import gc
import logging
import random
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from flwr.serverapp import Grid

from ..client.training.in_place import check_apart
from ..client.workbench import Workbench, check_engine
from ..configs.schema import SimulationSettings
from ..messages.client_settings import ClientSettings
from ..messages.flower_adapter import QUIET
from ..messages.local_training import LocalTraining
from ..messages.traffic import Tally
from ..modes.federation import Federation
from ..run.build import build
from ..run.callbacks import Callback
from ..run.run import Environment, RunResult, run_federation
from .engines import engine_with_tally, require_one_machine, require_virtual_time


def simulate(
    settings: SimulationSettings,
    folder: Path,
    quiet: bool = False,
    grid: Grid | None = None,
    callbacks: Sequence[Callback] = (),
) -> RunResult:
    """Run the federation that the settings describe and write its results to `folder`.

    Args:
      settings: validated.
      folder: the run folder; with `settings.resume` the run goes on in the resumed one.
      quiet: show nothing.
      grid: reaches the clients; None starts the engine that the settings name.
      callbacks: objects that watch the run, in addition to those that the settings name.

    Raises:
      Refusal: before anything is spent.
    """
    return run_simulation(build(settings), folder, quiet, grid, callbacks)


def run_simulation(
    federation: Federation,
    folder: Path,
    quiet: bool = False,
    grid: Grid | None = None,
    callbacks: Sequence[Callback] = (),
) -> RunResult:
    """Run an already built federation, as `simulate` does; this process's own state is restored.

    The clients' data must be on this machine. The other arguments are those of `simulate`.

    Raises:
      Refusal: before anything is spent.
    """
    with restoring_state():
        torch.set_num_threads(1)  # a thread pool would not survive the fork of the workers
        require_one_machine(federation)
        require_virtual_time(federation, grid)
        check_engine(
            federation.mode.gradients,
            federation.task,
            partial(federation.population.sample_examples, federation.task),
        )
        _check_clients_apart(federation)
        tally = Tally()
        engine = partial(engine_with_tally, tally=tally, grid=grid)
        around = Environment(engine, objects=callbacks, tally=tally)
        return run_federation(federation, folder, around, quiet)


def _check_clients_apart(federation: Federation) -> None:
    """Refuse a task through which one real client can affect the update of the next, where whole clients are hidden."""
    settings = federation.settings
    if federation.simulated or not federation.mode.hides_clients:
        return
    # On the processor: a process that has touched a GPU cannot be forked for its workers. The optimizer of
    # DP-SGD needs noise, and each client gets a new one, so plain SGD is checked instead.
    training = LocalTraining(batch_size=2) if federation.mode.hides_records else settings.local_training
    client = ClientSettings(federation.task_name, training, dtype=settings.engine.dtype)
    check_apart(Workbench(client, federation.task))


@contextmanager
def restoring_state() -> Generator[None]:
    """Restore after the block the process state that a simulation changes: threads, random states, logs, memory."""
    threads, frozen = torch.get_num_threads(), gc.get_freeze_count()
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    levels = {name: logging.getLogger(name).level for name in QUIET}
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if not frozen:
            gc.unfreeze()
