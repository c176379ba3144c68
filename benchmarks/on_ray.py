"""Flower's Ray runtime: with the package's apps on it, and with a stock Flower app written as its documents say."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg
from flwr.simulation import run_simulation
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ..messages.flower_adapter import quiet_flower
from .ours import app_of, play
from .stopwatch import Stopwatch
from .workload import (
    BATCH_SIZE,
    CLIPPING_NORM,
    IDLE,
    IDLE_STEP,
    LEARNING_RATE,
    NOISE_MULTIPLIER,
    Size,
    build,
    examples_of,
)

_ACTORS = 2
_BACKEND: dict[str, Any] = {
    "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
    "init_args": {
        "num_cpus": _ACTORS,
        "include_dashboard": False,
        "logging_level": "ERROR",
        "log_to_driver": False,
    },
}


def run_same_apps(workload: str, size: Size, watch: Stopwatch) -> None:
    """Run the package's ClientApp, strategy and private sum on Flower's runtime."""
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        del context
        play(grid, workload, size, watch)

    assert main is not None
    _simulate(server, app_of(workload, size), size)


def run_stock(workload: str, size: Size, watch: Stopwatch) -> None:
    """Run a stock Flower app under Flower's own clipping and noise at the server; idle clients under FedAvg alone."""
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        del context
        fedavg = FedAvg(
            fraction_train=size.cohort / size.clients,
            fraction_evaluate=0.0,
            min_train_nodes=size.cohort,
            min_evaluate_nodes=0,
            min_available_nodes=size.clients,
        )
        strategy = DifferentialPrivacyServerSideFixedClipping(
            fedavg, NOISE_MULTIPLIER, CLIPPING_NORM, size.cohort
        )

        def evaluate(number: int, arrays: ArrayRecord) -> None:
            del arrays
            if number > 0:
                watch.lap()

        initial = ArrayRecord(build(workload).state_dict())
        strategy.start(
            grid,
            initial,
            size.rounds + 1,
            train_config=ConfigRecord({"lr": LEARNING_RATE}),
            evaluate_fn=evaluate,
        )

    assert main is not None
    _simulate(server, _stock_app(workload), size)


def _stock_app(workload: str) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client = int(str(context.node_config["partition-id"]))
        arrays = message.content.array_records["arrays"]
        inputs, targets = examples_of(workload, client)
        loss = 0.0
        if workload in IDLE:
            arrays = ArrayRecord(
                {name: Array(np.add(a.numpy(), np.float32(IDLE_STEP))) for name, a in arrays.items()}
            )
        else:
            model = build(workload)
            model.load_state_dict(arrays.to_torch_state_dict())
            loader = DataLoader(TensorDataset(inputs, targets), batch_size=BATCH_SIZE, shuffle=True)
            loss = _fit(model, loader, float(str(message.content.config_records["config"]["lr"])))
            arrays = ArrayRecord(model.state_dict())
        metrics = MetricRecord({"train_loss": loss, "num-examples": len(inputs)})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    assert train is not None
    return app


def _fit(model: nn.Module, loader: DataLoader[Any], learning_rate: float) -> float:
    torch.set_num_threads(1)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    model.train()
    running = 0.0
    for inputs, targets in loader:
        optimizer.zero_grad()
        loss = criterion(model(inputs), targets)
        loss.backward()
        optimizer.step()
        running += loss.item()
    return running / len(loader)


def _simulate(server: ServerApp, client: ClientApp, size: Size) -> None:
    quiet_flower()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_simulation(server, client, size.clients, backend_config=_BACKEND)
