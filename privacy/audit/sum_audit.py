"""Audit of one released sum: the free checks of its noise, and its component along each canary's direction."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..mechanisms.compression import Sketch
from ..mechanisms.released_sum import ReleasedSum
from .canary_clients import Directions
from .free_checks import cosine, norm_p, outside, reuse_p, run_p
from .round_rows import BLOCKS, LAYERS, Rows, row_type

Vector = NDArray[np.float64]

# Number of coordinates that are stored from round to round, evenly spread; far fewer would show noise that is used twice.
WATCHED = 1 << 17
PARTS = (slice(1), slice(1, 1 + LAYERS), slice(1 + LAYERS, None))  # of `noise_sums`
BATCH = 64  # number of canaries that are compressed together, which bounds the memory


@dataclass(frozen=True)
class Memory:
    """Watched coordinates of earlier rounds, for the checks of the next one.

    Attributes:
      before: the last sum, (watched,); empty before the first round.
      total: the sum of all rounds, (watched,); empty before the first round.
      blocks: the sums of blocks of rounds, (blocks, watched), in an update's coordinates; empty without canaries.
    """

    before: Vector
    total: Vector
    blocks: NDArray[np.float64]


NO_MEMORY = Memory(np.empty(0), np.empty(0), np.empty((0, 0)))


def watched_coordinates(dimension: int) -> int:
    """Return how many coordinates of an update are watched."""
    return len(range(0, dimension, -(-dimension // WATCHED)))


def watch(
    released: ReleasedSum, memory: Memory, directions: Directions | None, canaries: int, block: int
) -> tuple[Rows, Memory]:
    """Return the round's row, shape (), which the auditor completes, and the memory for the next round.

    Args:
      released: sum of the round.
      memory: what this function returned for the round before; `NO_MEMORY` in the first round.
      directions: directions of the canaries; None without any.
      canaries: number of canaries.
      block: number of the round's block, from 0 (`interference.block_of`).
    """
    whole = join_layers(released.layers)
    watched = whole[:: -(-whole.size // WATCHED)].copy()
    row = empty_row(released.number, canaries)
    row["norm"], row["noise"] = np.linalg.norm(whole), released.noise
    row["rate"], row["charged"] = released.rate, released.charged
    row["clients"], row["population"] = released.cohort.clients, released.cohort.population
    row["norm_p"] = norm_p(released.layers, released.noise, released.step)
    energy, row["dimensions"] = outside(watched, memory.total)
    row["energy"] = energy / released.noise**2
    _add_layers(row, released, memory.total)
    total = memory.total + watched if memory.total.size else watched
    if memory.before.size:
        row["reuse_p"] = reuse_p(watched, memory.before, released.noise)
        row["cosine"] = cosine(watched, memory.before)
    if directions is None:
        return row, Memory(watched, total, memory.blocks)
    update, sketch = whole, released.sketch
    if sketch is not None:  # in the coordinates of an update, with the same noise in each on average
        update = sketch.back(whole) / sketch.compression.clip_factor
    coordinates = update[:: -(-update.size // WATCHED)]
    blocks = memory.blocks.copy() if memory.blocks.size else np.zeros((BLOCKS, coordinates.size))
    blocks[block] += coordinates
    row["gram"] = blocks @ blocks[block]
    row["norm"], row["along"] = np.linalg.norm(update), directions.along(update)
    if sketch is not None:
        row["along"] /= _lengths(directions, sketch)
    row["taken"][list(released.cohort.canaries)] = True
    return row, Memory(watched, total, blocks)


def join_layers(layers: Sequence[Vector]) -> Vector:
    """Return layers as one flat vector: the vector of which they are consecutive views, or else a copy."""
    size = sum(layer.size for layer in layers)
    base = layers[0].base
    if isinstance(base, np.ndarray) and base.dtype == np.float64 and base.strides == (8,):
        addresses = np.cumsum([0, *(layer.nbytes for layer in layers)]) + base.__array_interface__["data"][0]
        actual = [(layer.__array_interface__["data"][0], layer.flags.c_contiguous) for layer in layers]
        if base.size >= size and actual == [(address, True) for address in addresses[:-1]]:
            return base[:size]
    return np.concatenate([np.ravel(layer) for layer in layers])


def _lengths(directions: Directions, sketch: Sketch) -> Vector:
    """Return the norm of each canary's compressed direction, relative to the average, (canaries,), to divide `along` by.

    A canary is clipped after compression, so its part of the sum has the clipping norm again.
    """
    numbers, lengths = range(len(directions.starts)), np.empty(len(directions.starts))
    for start in range(0, len(numbers), BATCH):
        batch = numbers[start : start + BATCH]
        rows = sketch.of(directions.updates(batch, np.ones(len(batch))))
        lengths[start : start + len(batch)] = np.linalg.norm(rows, axis=1)
    lengths[lengths == 0] = 1.0  # of a direction that the compression drops: the sum has nothing along it
    return lengths / sketch.compression.clip_factor


def _add_layers(row: Rows, released: ReleasedSum, total: Vector) -> None:
    """Write the energy of the smallest layers, orthogonal to `total`, the earlier rounds' sum, and that of their means.

    If the sum has fewer coordinates than the layers, all of a layer's energy counts.
    """
    sizes = [layer.size for layer in released.layers]
    is_whole = total.size == sum(sizes)
    before = np.split(total, np.cumsum(sizes)[:-1]) if is_whole else [np.empty(0)] * len(sizes)
    smallest = sorted(range(len(sizes)), key=sizes.__getitem__)[:LAYERS]
    for index, number in enumerate(smallest):
        layer = np.ravel(released.layers[number])
        energy, row["layer_dimensions"][index] = outside(layer, before[number])
        row["layer_energies"][index] = energy / released.noise**2
        row["layer_means"][index] = layer.sum() ** 2 / layer.size / released.noise**2


def noise_p(sums: NDArray[np.float64]) -> float:
    """Return the smallest p-value of all rounds' noise: of the whole sum, of its layers, and of their means.

    A mean is a fixed direction. Gradients of the biases before a softmax sum to zero, so the mean of these is pure
    noise. `sums` are `noise_sums` of the rounds.
    """
    return min(run_p(*sums[:, None, part]) for part in PARTS)


def noise_sums(rows: Rows) -> NDArray[np.float64]:
    """Return sums over rows of energies and of their dimensions, (2, 1 + 2 layers): whole, by layer, and of the layers' means."""
    sizes = rows["layer_dimensions"]
    energies = (rows["energy"][:, None], rows["layer_energies"], rows["layer_means"])
    dimensions = (rows["dimensions"][:, None], sizes, np.minimum(sizes, 1))
    return np.stack(
        [np.concatenate(each, axis=1, dtype=np.float64).sum(axis=0) for each in (energies, dimensions)]
    )


def empty_row(number: int, canaries: int) -> Rows:
    """Return the row of a round without a claim, shape ()."""
    row = np.zeros((), row_type(canaries))
    row["round"] = number
    row["probe_p"] = row["losses_p"] = row["books_p"] = row["records"] = math.nan
    row["norm_p"] = row["reuse_p"] = row["draw_p"] = 1.0
    return row
