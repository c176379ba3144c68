"""Fashion-MNIST: 70 000 pictures of clothes, as fixed features under a linear softmax.

The files are those of Debian's package or of torchvision's download. The features are scattering coefficients,
normalised in groups within each picture: under a budget they beat networks that learn features (Tramèr and Boneh 2021,
arXiv:2011.11660). They are computed once, in about 1.5 minutes, and cached.
"""

import gzip
import hashlib
import importlib
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...base.cache import cache_folder
from ...base.refusal import Refusal
from ..classification import Classification, classification, softmax_regression
from ..data import Examples
from ..other_model import STUDENT
from ..partition import Partition
from .low_frequencies import LowFrequencies
from .scattering import CHANNELS, STRIDE, features

NUM_CLASSES = 10
SIDE = 28
FEATURES = CHANNELS * (SIDE // STRIDE) ** 2
STUDENT_ORDER = 3
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
# The first bytes of an IDX file of unsigned bytes; the last of them counts the dimensions.
IDX_MAGIC = {1: 0x00000801, 3: 0x00000803}


def load(
    num_clients: int = 1000,
    partition: str = "iid",
    alpha: float = 0.5,
    seed: int = 0,
    model: Literal["student"] | None = None,
) -> Classification:
    """Return the task: 60 000 pictures for at most 60 000 clients, and 10 000 held out, as published.

    The model `student` is a linear softmax over low frequencies, of an eighth of the parameters.
    Other arguments as of `digits.load`.
    """
    dealer = Partition(partition, num_clients, alpha, seed)
    folder = find_folder((DEBIAN_FOLDER, cache_folder() / "FashionMNIST" / "raw"))
    train, test = (read_examples(folder, part) for part in ("train", "t10k"))
    build = student if model == STUDENT else partial(softmax_regression, FEATURES, NUM_CLASSES)
    return classification(train, test, NUM_CLASSES, dealer, build)


def student() -> LowFrequencies:
    """Return a model of 4870 parameters: the six lowest frequencies of each channel."""
    return LowFrequencies(CHANNELS, SIDE // STRIDE, STUDENT_ORDER, NUM_CLASSES)


def find_folder(folders: Sequence[Path]) -> Path:
    """Return the first folder with the files, or download them into the last one; refuse if both fail."""
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
    """Return features, shape (n, FEATURES), and labels of a part, train or t10k, from the folder of the four IDX files."""
    pixels = read_idx(folder / f"{part}-images-idx3-ubyte.gz", dimensions=3)
    labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz", dimensions=1)
    name = f"scattering-{hashlib.sha256(pixels.tobytes()).hexdigest()[:16]}.safetensors"
    images = torch.from_numpy(pixels.astype(np.float32) / 255)
    cached = cached_tensors(cache_folder() / name, lambda: {"features": features(images)})
    return Examples(cached["features"].float(), torch.from_numpy(labels.astype(np.int64)))


def cached_tensors(path: Path, make: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """Return the tensors of a cache file; if it is missing, compute them by `make` and store them if possible."""
    if path.is_file():
        return load_file(path)
    tensors = dict(make())
    unfinished = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, unfinished)
        unfinished.replace(path)
    except OSError:  # a full or read-only disk only costs time
        unfinished.unlink(missing_ok=True)
    return tensors


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Return the array of a gzipped IDX file with 1 or 3 dimensions; refuse a damaged file.

    The format is that of yann.lecun.com/exdb/mnist: a big-endian header, then the bytes.
    """
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise Refusal("task", str(path), "the file cannot be read; install the data set again") from error
    header = 4 * (1 + dimensions)
    magic, *shape = struct.unpack_from(f">{1 + dimensions}I", raw.ljust(header, b"\0"))
    if magic != IDX_MAGIC[dimensions] or (dimensions == 3 and shape[1:] != [SIDE, SIDE]):
        raise Refusal("task", str(path), f"this is not an IDX file of {dimensions} dimensions; reinstall it")
    if len(raw) - header != int(np.prod(shape)):
        raise Refusal("task", str(path), "the file is truncated or too long; install the data set again")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)
