"""Script of a client of NVFLARE's simulator, written as its documents say: it trains the model that it receives, and sends it back."""

import sys

import nvflare.client as flare
import torch
from torch import nn

from fedveil.benchmarks.nvflare_simulator import Net
from fedveil.benchmarks.workload import BATCH_SIZE, LEARNING_RATE, examples_of


def main(workload: str) -> None:
    """Train one epoch by plain SGD in each round."""
    torch.set_num_threads(1)
    flare.init()
    client = int(flare.get_site_name().rpartition("-")[2])
    while flare.is_running():
        received = flare.receive()
        if received is None or received.params is None:
            break
        model = Net(workload)
        model.load_state_dict(received.params)
        inputs, targets = examples_of(workload, client)
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
        for rows in torch.randperm(len(inputs)).split(BATCH_SIZE):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[rows]), targets[rows]).backward()
            optimizer.step()
        flare.send(flare.FLModel(params=model.state_dict(), meta={"NUM_STEPS_CURRENT_ROUND": 1}))


if __name__ == "__main__":
    main(sys.argv[1])
