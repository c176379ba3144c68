"""Simulation of a federation on one machine, from settings to a run folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from flwr.serverapp import Grid

from ..configs.schema import SimulationSettings
from ..server.run.build import build
from ..server.run.run import Environment, RunResult, run_federation
from .engines import on_engine


def simulate(
    settings: SimulationSettings, folder: Path, quiet: bool = False, grid: Grid | None = None
) -> RunResult:
    """Run the federation that the settings describe and leave its results in `folder`.

    Args:
      settings: validated.
      folder: the run folder; with `settings.resume` the run goes on in the resumed one.
      quiet: show nothing.
      grid: reaches the clients; None starts the engine that the settings name.
    Raises:
      Refusal: before anything is spent.
    """
    torch.set_num_threads(1)  # a thread pool would not survive the fork of the workers
    return run_federation(build(settings), folder, Environment(partial(on_engine, grid=grid)), quiet)
