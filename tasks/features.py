"""Fixed image features that learn from no data: straightened digits, oriented Gabor energies, pooled.

Features chosen without the data cost no privacy, and under a small budget they beat learned ones (Tramèr,
Boneh, 2011.11660). Each image is treated by itself: no mean, covariance or scale of a data set enters.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ORIENTATIONS = 4
CELLS = 8
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
TINY = 1e-6


def oriented_energies(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(n, h, w) grey values 0 .. 255 to (n, FEATURES) features of length one.

    The logarithm of each orientation's energy in each of CELLS x CELLS places, less the mean over the
    orientations of that place: how strokes run, not how dark they are. A blank image gives zeros.
    """
    straight = torch.from_numpy(straightened(images.astype(np.float32) / np.float32(255)))
    waves = torch.nn.functional.conv2d(straight[:, None], gabor_filters(), stride=STRIDE, padding=RADIUS)
    energies = waves.unflatten(1, (ORIENTATIONS, 2)).square().sum(2).sqrt()
    down, across = (pooling_windows(energies.shape[axis]) for axis in (2, 3))
    logs = torch.log(down @ energies @ across.T + ENERGY_FLOOR)
    contrast = (logs - logs.mean(1, keepdim=True)).flatten(1)
    return (contrast / contrast.norm(dim=1, keepdim=True).clamp_min(TINY)).numpy()


def straightened(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n, h, w) images, each sheared along its rows until its vertical and horizontal moments do not correlate.

    LeCun et al. 1998, section III, deslant MNIST in this way. A row keeps its place; what is pushed over the
    edge is lost, and what comes in is black.
    """
    _, height, width = images.shape
    rows, columns = np.arange(height, dtype=np.float32), np.arange(width, dtype=np.float32)
    mass = np.maximum(images.sum((1, 2)), TINY)
    by_row, by_column = images.sum(2), images.sum(1)
    y = rows - (by_row @ rows / mass)[:, None]
    x = columns - (by_column @ columns / mass)[:, None]
    together = (np.einsum("nhw,nw->nh", images, x) * y).sum(1)
    slant = together / np.maximum((by_row * y**2).sum(1), TINY)
    shift = (slant[:, None] * y)[:, :, None]
    whole = np.floor(shift)
    source = (columns + whole).astype(np.int64)
    left, right = (_gather(images, source + step) for step in (0, 1))
    return left + (shift - whole) * (right - left)


def gabor_filters() -> Tensor:
    """(2 * ORIENTATIONS, 1, k, k): cosine and sine under a round Gaussian; each adds up to zero."""
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
    """(CELLS, pixels): Gaussian windows at equal distances; each adds up to one."""
    distance = pixels / CELLS
    centres = (torch.arange(CELLS) + 0.5) * distance - 0.5
    offset = (torch.arange(pixels) - centres[:, None]) / (POOLING_WIDTH * distance)
    return torch.softmax(-(offset**2) / 2, dim=1)


def _gather(images: NDArray[np.float32], columns: NDArray[np.int64]) -> NDArray[np.float32]:
    """Each row's pixels at `columns` (n, h, w); black outside."""
    width = images.shape[2]
    inside = (columns >= 0) & (columns < width)
    return np.take_along_axis(images, np.clip(columns, 0, width - 1), 2) * inside
