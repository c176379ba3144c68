"""Bound on the norm of an encrypted sum of vectors that follow the protocol.

A sum of n vectors is s + N, both on the lattice. After rounding, s has a norm of at most n L. N is the sum of
independent discrete Gaussians, so it is sub-Gaussian with V, the sum of their sigma^2, in every direction (module
`sizing`). With t = log(2 / FALSE_ALARM), each of these fails with a probability of at most exp(-t):

- |N|^2 <= V (d + 2 sqrt(d t) + 2 t): Hsu, Kakade and Zhang 2012, "A tail inequality for quadratic forms of subgaussian
  random vectors", theorem 2.1 (arXiv:1110.2842). It is at most V (sqrt(d) + sqrt(2 t))^2, the bound from the
  concentration of Lipschitz functions of Gaussians.
- <s, N> <= |s| sqrt(2 V t), as N is sub-Gaussian in the direction of s.

So |s + N|^2 <= (n L)^2 + 2 n L sqrt(2 V t) + V (d + 2 sqrt(d t) + 2 t), except in one round of 10^6.

V counts the noise in the sum: the shares, the layers that stay closed, those that their owners did not open, and the
noise that owners with pinned peers claim to have added (`add_grid_noise`). A claim counts up to the amount of an owner
that trusts no other member, so a false claim extends the bound by at most that much, once. If V is so large that one
coordinate in fifty overflows, the norm carries no information, and the sum is useless: `is_too_noisy`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .private_sum import squared_norm
from .rounding import moved_squared
from .sizing import ShareSpec
from .sum_spec import WEIGHT

FALSE_ALARM = 1e-6  # of a round whose members all follow the protocol
OVERFLOWS = 2.3263  # standard deviations that a normal number exceeds, on either side, once in fifty
_FLOAT_SLACK = 1e-9  # relative, of norms in float64


@dataclass(frozen=True)
class SummedNoise:
    """Noise of an opened sum, as far as the server knows it.

    Attributes:
      survivors: number of added vectors.
      unopened: number of survivors whose layers of noise all stay in the sum.
      further: parameters of the owners' own noise, as they claim, in grid units.
      noise_multiplier: promised to members; owners with pinned peers add noise of their own to reach it.
    """

    survivors: int
    unopened: int = 0
    further: tuple[int, ...] = ()
    noise_multiplier: float = 0.0

    def variance(self, spec: ShareSpec) -> float:
        """Return the variance of one coordinate of the sum, in grid units."""
        opened = (self.survivors - self.unopened) * spec.variance(self.survivors)
        unopened = self.unopened * spec.variance(0)
        return float(opened + unopened) + sum(self.own_noise_variances(spec))

    def own_noise_variances(self, spec: ShareSpec) -> list[float]:
        """Return the variance that counts for each owner's claim: at most that of an owner who trusts nobody else."""
        if not any(self.further):
            return []
        colluders = range(spec.attendance.most)
        max_sigma = max(spec.missing_sigma(each, self.noise_multiplier) for each in colluders)
        return [float(min(sigma, max(max_sigma, 0)) ** 2) for sigma in self.further]


def is_too_noisy(spec: ShareSpec, noise: SummedNoise) -> bool:
    """Return whether the noise alone overflows one coordinate in fifty, so that the sum is lost."""
    return noise.variance(spec) > ((2 ** (spec.bits - 1) - 1) / OVERFLOWS) ** 2


def longest_sum(spec: ShareSpec, noise: SummedNoise) -> float:
    """Return the L2 norm, in grid units, that a true sum exceeds with a probability of at most `FALSE_ALARM`."""
    t, size, variance = math.log(2 / FALSE_ALARM), spec.size, noise.variance(spec)
    signal = noise.survivors * _longest_vector(spec)
    tail = variance * (size + 2 * math.sqrt(size * t) + 2 * t)
    return math.sqrt(signal**2 + 2 * signal * math.sqrt(2 * variance * t) + tail) * (1 + _FLOAT_SLACK)


def _longest_vector(spec: ShareSpec) -> float:
    """Return the bound L on the norm of one rounded vector, in grid units."""
    if spec.sum.unit_norm is None:
        return math.sqrt(spec.limit)
    return math.sqrt(moved_squared(spec.sum.cells, spec.size))  # `round_once` does not bound the norm


def norm_of(total: NDArray[np.uint16 | np.uint32], spec: ShareSpec) -> float:
    """Return the L2 norm of a sum on the lattice, in grid units; a rotation does not change it.

    Arguments as of `decode_sum`.
    """
    signed = np.int16 if spec.bits == 16 else np.int32
    return math.sqrt(squared_norm(total.astype(spec.dtype, copy=False).view(signed)))


def is_mean_too_long(
    arrays: Mapping[str, NDArray[np.float64]], scalars: Mapping[str, float], spec: ShareSpec, survivors: int
) -> bool:
    """Return whether a mean by examples exceeds the norm bound of each update, which a valid mean cannot.

    A sum within its bound can have such a mean: a false count of examples makes the divisor small. Arguments as of
    `decode_sum`, and what it returned; without weights the answer is False.
    """
    if not spec.weighted:
        return False
    count = next(each for each in spec.sum.segments if each.name == WEIGHT)
    weights = scalars[WEIGHT] * survivors / count.bound
    length = math.sqrt(sum(squared_norm(np.ravel(each)) for each in arrays.values()))
    # Rounding moves each vector by at most sqrt(d) grid units, which a rotation may bring into any coordinate.
    moved = survivors * math.sqrt(spec.size) * spec.sum.step
    max_norm = (max(weights, 0.0) + moved / (2 * spec.sum.clip(count))) * spec.sum.update_norm + moved
    return length * max(weights, 1 / count.bound) > max_norm * (1 + _FLOAT_SLACK)
