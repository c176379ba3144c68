"""Contender of pfl-research: the same rounds, run by a Python that has it: ``python pfl_contender.py WORKLOAD CLIENTS COHORT ROUNDS``.

With two processes, torchrun starts this file twice. It stands outside the package: it imports its neighbours by
their file names, since that Python need not have the package installed.
"""
# pyright: basic, reportMissingImports=false

from __future__ import annotations

import sys

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import MinimizeReuseUserSampler
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.internal.ops import pytorch_ops
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from pfl.privacy import CentrallyAppliedPrivacyMechanism, GaussianMechanism
from stopwatch import Stopwatch
from torch import nn
from workload import BATCH_SIZE, CLIPPING_NORM, EXAMPLES, LEARNING_RATE, NOISE_MULTIPLIER, build, examples_of


class Net(nn.Module):
    """The workload's model with the two methods that pfl asks of a model."""

    def __init__(self, workload: str) -> None:
        super().__init__()
        self.net = build(workload)

    def forward(self, inputs):
        return self.net(inputs)

    def loss(self, inputs, targets, eval=False):
        self.eval() if eval else self.train()
        return nn.functional.cross_entropy(self(inputs), targets)

    def metrics(self, inputs, targets, eval=True):
        return {}


class Laps(TrainingProcessCallback):
    """Notes the end of every round."""

    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        self.watch.lap()
        return False, Metrics()


def main(workload: str, clients: int, cohort: int, rounds: int) -> None:
    torch.set_num_threads(1)
    np.random.seed(1)
    watch = Stopwatch()
    sampler = MinimizeReuseUserSampler(list(range(clients)))
    data = FederatedDataset(
        lambda client: Dataset(examples_of(workload, client), user_id=str(client)), sampler
    )
    net = Net(workload)
    central = torch.optim.SGD(net.parameters(), lr=1.0)
    model = PyTorchModel(net, torch.optim.SGD, central)
    noise = CentrallyAppliedPrivacyMechanism(GaussianMechanism(CLIPPING_NORM, NOISE_MULTIPLIER))
    backend = SimulatedBackend(training_data=data, val_data=data, postprocessors=[noise])
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=rounds + 1,
            evaluation_frequency=10**9,
            train_cohort_size=cohort,
            val_cohort_size=0,
        ),
        backend=backend,
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=LEARNING_RATE, local_batch_size=BATCH_SIZE
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=EXAMPLES),
        callbacks=[Laps(watch)],
    )
    if pytorch_ops.distributed.global_rank == 0:
        print("\n" + watch.to_json(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]))
