"""Free checks of every round: size and freshness of the noise, and the sampling of clients.

The checks of noise hold for any updates: any sum plus independent Gaussian noise has, along every fixed subspace, at
least the noise's energy (a noncentral chi-square stochastically dominates a central one). They detect neither a skipped
clip, nor a wrong weight, nor memorisation; canaries do.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .rates import binomial_tail

# Tests of noise that share the level of `Check.NORM`: `norm_p` of a round; all rounds together, whole, by layer, and by
# the layers' means (`sum_audit.noise_p`).
NORM_TESTS = 4
MIN_VARIANCE = 9.0  # of a count, for a chi-square to be close enough


def norm_p(layers: Sequence[NDArray[np.floating]], noise: float, step: float = 0.0) -> float:
    """Return a bound on the probability of so small a norm of a layer, or of the whole, under the claimed noise.

    Bonferroni over the layers and the whole. On a lattice a value counts as the farthest point of the cell around it: a
    layer of few coordinates may be exactly zero, which continuous noise never is.

    Args:
      layers: released arrays of one round.
      noise: claimed standard deviation of a coordinate, above 0, in the layers' unit.
      step: step of the lattice of the values, in the layers' unit; 0 without a lattice.
    """
    from scipy.special import chdtr

    energies = [float(np.vdot(layer, layer)) for layer in layers]
    sizes = [layer.size for layer in layers]
    tests = [*zip(sizes, energies, strict=True), (sum(sizes), sum(energies))]
    max_norms = [(size, (energy**0.5 + size**0.5 * step / 2) / noise) for size, energy in tests]
    return min(1.0, len(tests) * min(float(chdtr(size, norm**2)) for size, norm in max_norms))


def outside(released: NDArray[np.floating], before: NDArray[np.floating]) -> tuple[float, int]:
    """Return the energy of a sum orthogonal to earlier rounds, and the number of dimensions that it is spread over.

    Updates persist and noise does not, so most of the clients' signal lies along the sum of earlier rounds, and the
    remainder is nearly pure noise.

    Args:
      released: sum of a round, (size,).
      before: any function of earlier rounds, here their sum, (size,); with shape (0,), or for a single number, all
        of the energy is returned.
    """
    energy, old = float(np.vdot(released, released)), float(np.vdot(before, before))
    if not old or released.size == 1:
        return energy, released.size
    return max(0.0, energy - float(np.vdot(released, before)) ** 2 / old), released.size - 1


def run_p(energies: NDArray[np.float64], dimensions: NDArray[np.int64]) -> float:
    """Return a bound on the probability of so little energy in all rounds together under the claimed noise.

    Given all earlier rounds, each energy is noncentral for any updates, so their sum also dominates a central
    chi-square. For layers it is the smallest p-value, with Bonferroni.

    Args:
      energies: (rounds,) or (rounds, layers), as `outside` returns them, over the claimed variance of a coordinate's new
        noise.
      dimensions: as `outside` returns them, of the same shape; layers with 0 are left out.
    """
    from scipy.special import chdtr

    sizes, sums = np.atleast_1d(dimensions.sum(axis=0)), np.atleast_1d(energies.sum(axis=0))
    p_values = chdtr(sizes[sizes > 0], sums[sizes > 0])
    return min(1.0, p_values.size * float(p_values.min(initial=1.0))) if p_values.size else 1.0


def visible_shortfall(energies: NDArray[Any], dimensions: NDArray[Any], level: float) -> float:
    """Return the relative shortfall of the noise's std that `run_p` would detect with a power of one half.

    It assumes the same updates. It is 1 if they would hide even the absence of noise.

    Args:
      energies: (rounds,), as in `run_p`.
      dimensions: (rounds,), as in `run_p`.
      level: significance level.
    """
    from scipy.special import gammaincinv

    size = int(dimensions.sum())
    if not size:
        return 1.0
    threshold = 2 * float(gammaincinv(size / 2, level))
    return 1 - math.sqrt(min(1.0, max(0.0, 1 - (float(energies.sum()) - threshold) / size)))


def reuse_p(released: NDArray[np.floating], before: NDArray[np.floating], noise: float) -> float:
    """Return the probability of so little energy orthogonal to earlier releases, if the noise is new.

    It is close to 0 if only old noise was released, for any updates.

    Args:
      released: sum of a round, (size,).
      before: any function of earlier rounds, (size,).
      noise: std of a coordinate's new noise, above 0: of noise that is correlated over rounds, the part that no earlier
        round has.
    """
    from scipy.special import chdtr

    energy, _ = outside(released, before)
    return float(chdtr(released.size - 1, energy / noise**2))


def cosine(released: NDArray[np.floating], before: NDArray[np.floating]) -> float:
    """Return the cosine of two released vectors: about 1/sqrt(size) for new noise, 1 for the same again."""
    lengths = float(np.linalg.norm(released)) * float(np.linalg.norm(before))
    return float(np.vdot(released, before)) / lengths if lengths else 0.0


def draw_sums(
    counts: NDArray[np.int64], population: int | NDArray[np.int64], rate: float
) -> NDArray[np.float64]:
    """Return sums over rounds for `draw_p`, (5,): counts, clients, 1, whether the variance is too small, and evenness.

    Args:
      counts: numbers of drawn real clients, (rounds,), or of one round.
      population: number of all real clients, of all rounds or of each, (rounds,).
      rate: accounted sampling rate, in (0, 1).
    """
    clients = np.broadcast_to(population, counts.shape)
    mean, variance = clients * rate, clients * rate * (1 - rate)
    # Half a count is added for continuity: counts are whole numbers.
    even = (np.abs(counts - mean) + 0.5) ** 2 / np.maximum(variance, MIN_VARIANCE)
    parts = (counts, clients, np.ones_like(counts), variance < MIN_VARIANCE, even)
    return np.array([part.sum(dtype=np.float64) for part in parts])


def draw_p(sums: NDArray[np.float64], rate: float) -> float:
    """Return the probability of counts this large or this even in a Poisson draw, by their `draw_sums`: twice the smaller.

    The count of a Poisson draw is binomial. A rate above the accounted one makes counts too large; a draw of fixed
    size, which the Poisson accountant does not cover (Lebeda et al. 2024, arXiv:2405.20769), makes them too even. Only
    the auditor may see the draw: it is secret from the adversary of the claim.
    """
    from scipy.special import chdtr

    count, clients, rounds, small, even = sums.tolist()
    large_p = binomial_tail(int(count), int(clients), rate)
    return min(1.0, 2 * large_p if small else 2 * min(large_p, float(chdtr(rounds, even))))
