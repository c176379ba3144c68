"""Digits of 8 x 8 pixels, the 1797 that come with scikit-learn, under a linear softmax."""

import gzip
from functools import partial

import numpy as np
import torch

from .classification import Classification, classification, softmax_regression
from .data import Examples, package_folders
from .partition import Partition

NUM_CLASSES = 10
PIXELS = 64
HELD_OUT = 360  # examples
SPLIT_SEED = 1797  # public: the same examples are held out in every run


# The import of scikit-learn would take as long as that of torch.
if not (FOLDERS := package_folders("sklearn")):
    raise ModuleNotFoundError("scikit-learn is not installed", name="sklearn")
TABLE = FOLDERS[0] / "datasets" / "data" / "digits.csv.gz"


def load(num_clients: int = 100, partition: str = "iid", alpha: float = 0.5, seed: int = 0) -> Classification:
    """Return the task: 1437 digits for training and 360 held out, each image scaled to length one.

    Args:
      num_clients: 1 to 1437.
      partition: iid, dirichlet or shards.
      alpha: concentration of a dirichlet partition, above 0.
      seed: seed of the partition.
    """
    dealer = Partition(partition, num_clients, alpha, seed)
    with gzip.open(TABLE, "rt") as file:
        rows = np.loadtxt(file, delimiter=",")
    pixels, labels = rows[:, :PIXELS], rows[:, PIXELS].astype(np.int64)
    pixels = pixels / np.linalg.norm(pixels, axis=1, keepdims=True)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
    test, train = (
        Examples(torch.from_numpy(pixels[part].astype(np.float32)), torch.from_numpy(labels[part]))
        for part in (order[:HELD_OUT], order[HELD_OUT:])
    )
    return classification(train, test, NUM_CLASSES, dealer, partial(softmax_regression, PIXELS, NUM_CLASSES))
