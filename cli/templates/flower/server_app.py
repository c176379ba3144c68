"""Server half of a Flower app: FedAvg on a grid that keeps every round within a budget for each client."""

import torch
from client_app import customers, model
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from fedveil.privacy import Budget
from fedveil.adapters.protect import protect
from fedveil.strategies.cohorts import Poisson

CLIENTS, ROUNDS = 200, 10
DATA_ID = "shops-2026"  # every run with this name spends the same budget
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train, and save the model."""
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
    private = protect(
        grid,
        data_id=DATA_ID,
        population=CLIENTS,
        cohort=Poisson(0.25),
        budget=Budget("client", target_epsilon=8.0, target_delta=1e-4),
        clipping_norm=1.0,
        num_rounds=ROUNDS,
    )
    with private as protected:
        result = strategy.start(
            grid=protected, initial_arrays=ArrayRecord(model().state_dict()), num_rounds=ROUNDS
        )
    torch.save(result.arrays.to_torch_state_dict(), "model.pt")


def accuracy(file: str) -> float:
    """Return the share of held-out customers that a saved model gets right."""
    net = model()
    net.load_state_dict(torch.load(file))
    inputs, targets = customers(1_000_000, 2_000)
    return (net(inputs).argmax(1) == targets).float().mean().item()
