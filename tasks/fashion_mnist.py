"""Fashion-MNIST: 70 000 pictures of clothes, from Debian's package or by torchvision's download.

The network is the one of Opacus' MNIST example (26 010 parameters, no BatchNorm), with tanh in place of
ReLU because bounded activations train better under clipping (Papernot et al., 2007.14191).
"""

from __future__ import annotations

import gzip
import importlib
import os
import struct
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..privacy.refusal import Refusal
from .classification import Classification, classification
from .data import Examples
from .partition import Partition

NUM_CLASSES = 10
SIDE = 28
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
# The first bytes of an IDX file of unsigned bytes; the last of them counts the dimensions.
IDX_MAGIC = {1: 0x00000801, 3: 0x00000803}


def load(
    num_clients: int = 1000, partition: str = "iid", alpha: float = 0.5, seed: int = 0
) -> Classification:
    """Return the task: 60 000 pictures for training and 10 000 held out, as published.

    Args:
      num_clients: 1 to 60 000.
      partition: iid, dirichlet or shards.
      alpha: concentration of a dirichlet partition, above 0.
      seed: of the partition and of the model's start.

    Raises:
      Refusal: the files are not there and cannot be downloaded, or are damaged.
    """
    how = Partition(partition, num_clients, alpha, seed)
    folder = find_folder((DEBIAN_FOLDER, cache_folder() / "FashionMNIST" / "raw"))
    return classification(
        read_examples(folder, "train"),
        read_examples(folder, "t10k"),
        NUM_CLASSES,
        how,
        partial(network, seed),
    )


def network(seed: int) -> nn.Module:
    """Return the convolutional network, its start drawn from `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 16, 8, stride=2, padding=3),
            nn.Tanh(),
            nn.MaxPool2d(2, stride=1),
            nn.Conv2d(16, 32, 4, stride=2),
            nn.Tanh(),
            nn.MaxPool2d(2, stride=1),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 32),
            nn.Tanh(),
            nn.Linear(32, NUM_CLASSES),
        )


def cache_folder() -> Path:
    """Return the folder of downloads: $XDG_CACHE_HOME/fedveil, by default ~/.cache/fedveil."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedveil"


def find_folder(folders: Sequence[Path]) -> Path:
    """Return the first folder that holds the files; if none does, download them into the last one.

    Raises:
      Refusal: there are no files, and torchvision is missing or cannot download them.
    """
    for folder in folders:
        if (folder / "train-images-idx3-ubyte.gz").is_file():
            return folder
    remedy = (
        f"install Debian's dataset-fashion-mnist (files in {folders[0]}) or torchvision, which downloads it"
    )
    try:
        datasets = importlib.import_module("torchvision.datasets")
        datasets.FashionMNIST(str(folders[-1].parents[1]), download=True)
    except (ImportError, OSError, RuntimeError) as error:
        raise Refusal("task", "fashion_mnist", remedy) from error
    return folders[-1]


def read_examples(folder: Path, part: str) -> Examples:
    """Return pictures, shape (n, 1, SIDE, SIDE), pixels scaled to -1 .. 1, and their labels.

    Args:
      folder: of the four IDX files.
      part: train or t10k.

    Raises:
      Refusal: as `read_idx` does.
    """
    pixels = read_idx(folder / f"{part}-images-idx3-ubyte.gz", dimensions=3)
    labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz", dimensions=1)
    inputs = torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1).unsqueeze(1)
    return Examples(inputs, torch.from_numpy(labels.astype(np.int64)))


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Return the array of one gzipped IDX file (yann.lecun.com/exdb/mnist: big-endian header, then the bytes).

    Args:
      path: of the file.
      dimensions: of the array, 1 or 3.

    Raises:
      Refusal: the file is missing, cut short, too long, or of another kind.
    """
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise Refusal("task", str(path), "the file cannot be read; install the data set again") from error
    header = 4 * (1 + dimensions)
    magic, *shape = struct.unpack_from(f">{1 + dimensions}I", raw.ljust(header, b"\0"))
    if magic != IDX_MAGIC[dimensions] or (dimensions == 3 and shape[1:] != [SIDE, SIDE]):
        raise Refusal("task", str(path), f"this is no IDX file of {dimensions} dimensions; install it again")
    if len(raw) - header != int(np.prod(shape)):
        raise Refusal("task", str(path), "the file is cut short or too long; install the data set again")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)
