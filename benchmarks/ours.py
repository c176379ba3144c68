"""Package under measurement: its own ClientApp, strategy, private sum and ledger, on a grid of choice."""

from __future__ import annotations

import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from ..client.app import make_client_app, workbench
from ..client.device.device import ACCELERATOR
from ..client.private_update import private_update
from ..client.training.cohort_training import can_vectorise, sum_cohort
from ..client.training.in_place import begin
from ..configs.local_training import LocalTraining
from ..privacy.budget import Adjacency, Budget, Unit
from ..privacy.ledger.ledger import Ledger
from ..privacy.mechanisms.randomness import Randomness
from ..privacy.mechanisms.sum_spec import Segment
from ..privacy.plan import Plan
from ..server.participants import Participants
from ..server.private_grid import PrivateGrid
from ..server.round_terms import Round, SumPrivacy
from ..server.rounds import Loop, State, run_rounds
from ..simulations.in_process import InProcessGrid
from ..strategies.client_settings import TRAIN_LOSS, ClientSettings
from ..strategies.cohorts import Fixed
from ..strategies.flower_adapter import quiet_flower, records_of
from ..strategies.registry import make_strategy
from ..strategies.wire import memory_arrays, view
from ..tasks.arrays import read_arrays
from .stopwatch import Stopwatch
from .workload import BATCH_SIZE, CLIPPING_NORM, IDLE, IDLE_STEP, LEARNING_RATE, NOISE_MULTIPLIER, Size, build

_MODULE = "fedveil.benchmarks.made_task"
_SEED = 5
_LOSS_BOUND = 5.0
_METRICS_SHARE = 0.01
_WITHOUT_LIMIT = 1e9  # target epsilon: the ledger counts and never refuses


def settings_of(workload: str, size: Size) -> str:
    """Return what clients are told, as JSON."""
    options = {"workload": workload, "num_clients": size.clients}
    settings = ClientSettings(
        f"{_MODULE}:Made",
        LocalTraining(LEARNING_RATE, 1, BATCH_SIZE),
        options,
        seed=_SEED,
        allow_modules=(_MODULE,),
        accelerator=os.environ.get(ACCELERATOR, "cpu"),
    )
    return settings.to_json()


def app_of(workload: str, size: Size) -> ClientApp:
    """Return the package's ClientApp; for an idle workload, one that adds a constant to what it received."""
    if not workload in IDLE:
        return make_client_app(partial(_told, settings_of(workload, size)))
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
    together: Any = None
    in_place: Any = None
    if not workload in IDLE:
        bench = workbench(settings_of(workload, size))
        together = partial(sum_cohort, bench) if can_vectorise(bench) else None
        in_place = partial(begin, bench)
    grid = InProcessGrid(
        app_of(workload, size),
        size.clients,
        {},
        workers=workers,
        cohort_function=together,
        in_place=in_place,
    )
    try:
        play(grid, workload, size, watch)
    finally:
        grid.close()


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

    def after_round(state: State, done: Round, metrics: dict[str, float]) -> None:
        del state, metrics
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
            segments=(Segment(TRAIN_LOSS, _LOSS_BOUND),),
            randomness=Randomness(_SEED),
        )
        loop = Loop(strategy, size.rounds + 1, _unmeasured, after_round, {})
        run_rounds(private, loop, State(0, read_arrays(build(workload)), {}))


def _unmeasured(arrays: dict[str, np.ndarray], number: int) -> dict[str, float]:
    del arrays, number
    return {}
