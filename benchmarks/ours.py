"""Package under measurement: its own ClientApp, strategy, private sum and ledger, on a grid of choice."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from ..client.app import make_client_app
from ..client.private_update import private_update
from ..configs.engine_settings import InProcess
from ..configs.schema import FaultSettings
from ..deployment.device.device import ACCELERATOR
from ..engines.ray import ray_grid
from ..engines.settings import Ray
from ..messages.client_settings import TRAIN_LOSS, ClientSettings
from ..messages.flower_adapter import quiet_flower, records_of
from ..messages.local_training import LocalTraining
from ..messages.wire import memory_arrays, view
from ..privacy.budget import Adjacency, Budget, Unit
from ..privacy.ledger.ledger import Ledger
from ..privacy.mechanisms.randomness import Randomness
from ..privacy.mechanisms.sum_spec import Segment
from ..privacy.plan import Plan
from ..server.checkpoint import State
from ..server.participants import Participants
from ..server.private_grid import PrivateGrid
from ..server.round_terms import Round, SumPrivacy, SumTerms
from ..server.rounds import Loop, run_rounds
from ..simulations.clients import Clients
from ..simulations.in_process import InProcessGrid
from ..strategies.cohorts import Fixed
from ..strategies.registry import make_strategy
from ..tasks.arrays import read_arrays
from .stopwatch import Stopwatch
from .workload import BATCH_SIZE, CLIPPING_NORM, IDLE, IDLE_STEP, LEARNING_RATE, NOISE_MULTIPLIER, Size, build

_MODULE = "fedveil.benchmarks.made_task"
_SEED = 5
_LOSS_BOUND = 5.0
_METRICS_SHARE = 0.01
_WITHOUT_LIMIT = 1e9  # target epsilon: the ledger counts and never refuses


def settings_of(workload: str, size: Size) -> ClientSettings:
    """Return what clients are told."""
    options = {"workload": workload, "num_clients": size.clients}
    return ClientSettings(
        f"{_MODULE}:Made",
        LocalTraining(LEARNING_RATE, 1, BATCH_SIZE),
        options,
        seed=_SEED,
        allow_modules=(_MODULE,),
        accelerator=os.environ.get(ACCELERATOR, "cpu"),
    )


def app_of(workload: str, size: Size) -> ClientApp:
    """Return the package's ClientApp; for an idle workload, one that adds a constant to what it received."""
    if not workload in IDLE:
        return make_client_app(partial(_told, settings_of(workload, size).to_json()))
    app = ClientApp()

    @app.train(mods=[private_update])
    def train(message: Message, context: Context) -> Message:
        received = next(iter(records_of(message.content, ArrayRecord).values()))
        arrays = memory_arrays({name: np.add(view(a), np.float32(IDLE_STEP)) for name, a in received.items()})
        metrics = MetricRecord({"num-examples": 1, TRAIN_LOSS: 0.0})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    assert train is not None
    return app


def _told(text: str, context: Context) -> str:
    del context
    return text


def run_ours(workload: str, size: Size, watch: Stopwatch, workers: int) -> None:
    """Run the rounds on the in-process engine.

    Args:
      workload: a key of `workload.MODELS`, or an idle one.
      size: how many clients and rounds.
      watch: notes when rounds end.
      workers: processes.
    """
    quiet_flower()
    torch.set_num_threads(1)
    if workload in IDLE:
        grid = InProcessGrid(app_of(workload, size), size.clients, {}, workers=workers)
    else:
        grid = _clients(workload, size).grid(workers=workers)
    with closing(grid):
        play(grid, workload, size, watch)


def run_on_ray(workload: str, size: Size, watch: Stopwatch, actors: int) -> None:
    """Run the rounds in Ray's actors.

    Args:
      workload: a key of `workload.MODELS`.
      size: how many clients and rounds.
      watch: notes when rounds end.
      actors: how many.
    """
    quiet_flower()
    with ray_grid(_clients(workload, size), Ray(num_cpus=actors)) as grid:
        play(grid, workload, size, watch)


def _clients(workload: str, size: Size) -> Clients:
    return Clients(
        settings_of(workload, size),
        size.clients,
        size.cohort,
        InProcess().deadline,
        FaultSettings(),
        Randomness(_SEED),
        at_once=True,
    )


def play(grid: Grid, workload: str, size: Size, watch: Stopwatch) -> None:
    """Run the rounds on any grid: Flower's FedAvg behind the private sum, with a ledger on this machine's disk.

    Idle clients are summed without privacy, so that what is measured is the engine.

    Args:
      grid: reaches the clients.
      workload: a key of `workload.MODELS`, or an idle one.
      size: how many clients and rounds.
      watch: notes when rounds end.
    """
    cohort = Fixed(size.cohort)
    budget = Budget(Unit.CLIENT, _WITHOUT_LIMIT, 1e-5)
    plan = Plan(Unit.CLIENT, Adjacency.ZERO_OUT, cohort, CLIPPING_NORM, size.rounds + 1, NOISE_MULTIPLIER)
    strategy = make_strategy("fedavg", {})

    def after_round(state: State, done: Round, measure: Callable[[], dict[str, float]]) -> None:
        del state, measure
        if done.replies != size.cohort:
            raise RuntimeError(f"{size.cohort - done.replies} clients failed: {done.dropped}")
        watch.lap()

    with (
        tempfile.TemporaryDirectory() as folder,
        Ledger.open(Path(folder) / "ledger", budget, owner="made", simulated=True) as ledger,
    ):
        private = PrivateGrid(
            Participants(grid, cohort, size.clients),
            privacy=None if workload in IDLE else SumPrivacy(plan, ledger, _METRICS_SHARE),
            terms=SumTerms((Segment(TRAIN_LOSS, _LOSS_BOUND),)),
            randomness=Randomness(_SEED),
        )
        loop = Loop([strategy], size.rounds + 1, _unmeasured, after_round, lambda _: {})
        run_rounds(private, loop, State(0, read_arrays(build(workload)), {}))


def _unmeasured(arrays: dict[str, np.ndarray], number: int) -> dict[str, float]:
    del arrays, number
    return {}
