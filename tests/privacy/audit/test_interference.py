"""Ceiling of canaries under other clients' updates."""

import math

import numpy as np
import pytest

from fedveil.privacy.audit.canary_clients import (
    directions,
    round_scores,
)
from fedveil.privacy.audit.interference import Interference
from fedveil.privacy.audit.normality import separation
from fedveil.privacy.mechanisms.randomness import Randomness

DELTA, DIMENSION = 1e-5, 20_000


def ceiling_mu(released: np.ndarray, rounds: int, noise: float) -> float:
    """Return the ceiling of canaries in the sum of so many rounds, in one block."""
    gram = np.array([[released @ released / released.size]])
    return Interference(gram, np.array([rounds * noise**2]), np.array([rounds]), released.size).ceiling_mu()


@pytest.mark.parametrize("noise", [1e-6, 0.3])
def test_ceiling_foretells_a_run_without_noise(noise: float) -> None:
    """Updates that persist over rounds mask the canaries, whatever noise is claimed and added."""
    rng, rounds, dimension = np.random.default_rng(0), 8, 5000
    axes = directions(Randomness(9).stream("canaries"), 400, dimension, dimension)
    coins = rng.random(400) < 0.5
    persistent = 60 * rng.standard_normal(dimension) / math.sqrt(dimension)
    signal = axes.values[coins].sum(axis=0) + persistent
    silent = np.array([axes.along(signal)] * rounds)
    scores = round_scores(silent, np.full(rounds, np.linalg.norm(signal)), dimension)
    measured = separation(scores[coins], scores[~coins]).mu * 1  # the mask is the same in every round
    released = rounds * signal + math.sqrt(rounds) * noise * rng.standard_normal(dimension)
    ceiling = ceiling_mu(released, rounds, noise)
    assert 0.6 * measured < ceiling < 1.25 * measured


def test_ceiling_of_a_run_of_noise_is_far_above_its_claim() -> None:
    released = np.random.default_rng(0).standard_normal(DIMENSION)
    assert ceiling_mu(released, 1, 1.0) > 3
