"""Interference of other clients' updates with canaries: weights of rounds that reduce it, and the detection limit.

Updates persist from round to round, and so do canaries; noise does not. Rounds are added up in a few blocks, and the
weights of the blocks minimise the energy of their sum at a constant response to a canary (Capon 1969, the minimum
variance beamformer). The weights depend only on releases, so the scores are post-processing.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .round_rows import BLOCKS, Rows

Vector = NDArray[np.float64]

DEVIATIONS = 3.0  # standard deviations of the gram's error that the ceiling allows for, so that it errs to the low side


def block_of(number: int, num_rounds: int) -> int:
    """Return the block of round `number`, from 1, of a run of `num_rounds`."""
    return min((number - 1) * BLOCKS // num_rounds, BLOCKS - 1)


@dataclass(frozen=True)
class Interference:
    """Energy of the released sums, in blocks.

    Attributes:
      gram: mean product of two blocks' sums over the coordinates, (blocks, blocks), in clipping norms squared.
      noise: claimed variance of the noise in a coordinate of each block's sum, (blocks,).
      rounds: number of rounds in each block, (blocks,), at least 1.
      coordinates: number of coordinates of the means.
    """

    gram: NDArray[np.float64]
    noise: Vector
    rounds: Vector
    coordinates: int

    @property
    def weights(self) -> Vector:
        """Factor of each block's sum, (blocks,): gram^-1 rounds, the minimum variance beamformer."""
        ridge = 1e-9 * np.trace(self.gram) / len(self.rounds)
        return np.linalg.solve(self.gram + ridge * np.eye(len(self.rounds)), self.rounds)

    def ceiling_mu(self) -> float:
        """Return the largest mu that a canary in every round could show, if these updates came without any noise."""
        scale = 1 / np.sqrt(self.noise)
        # In units of the noise, an eigenvalue of the gram is 1 for the noise plus the energy of the updates.
        energies, directions = np.linalg.eigh(scale[:, None] * self.gram * scale)
        signal = (directions.T @ (self.rounds * scale)) ** 2
        # Noise alone moves the eigenvalues of a gram of few coordinates by `chance`; less energy counts as that much.
        chance = 2 * math.sqrt(len(self.rounds) / self.coordinates)
        chance += DEVIATIONS * math.sqrt(2 / self.coordinates)
        return math.sqrt(float((signal / np.maximum(energies - 1, chance)).sum()))


def interference(rows: Rows, num_rounds: int, coordinates: int) -> Interference:
    """Return the energy of the sums of a run, by its rows, in the blocks that have rounds so far.

    Args:
      rows: rows of all rounds so far.
      num_rounds: number of planned rounds.
      coordinates: number of coordinates of the products in the rows.
    """
    blocks = np.array([block_of(int(number), num_rounds) for number in rows["round"]])
    used = np.unique(blocks)
    last = [int(np.flatnonzero(blocks == block)[-1]) for block in used]
    # A block's products with those before it are final with its last round.
    lower = np.tril(rows["gram"][last][:, used])
    gram = lower + np.tril(lower, -1).T
    noise = np.array([(rows["noise"][blocks == block] ** 2).sum() for block in used])
    rounds = np.array([float((blocks == block).sum()) for block in used])
    return Interference(gram / coordinates, noise, rounds, coordinates)


def weighted_products(rows: Rows, num_rounds: int, of_run: Interference) -> Vector:
    """Return each canary's product with the weighted sum of all rounds, (canaries,).

    Args:
      rows: rows of all rounds so far.
      num_rounds: number of planned rounds.
      of_run: `interference` of these rows.
    """
    blocks = np.array([block_of(int(number), num_rounds) for number in rows["round"]])
    _, indices = np.unique(blocks, return_inverse=True)
    return of_run.weights[indices] @ rows["along"].astype(np.float64)
