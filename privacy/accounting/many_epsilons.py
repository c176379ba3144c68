"""Epsilons of many compositions of the same few leaves, such as after each round of a long run.

`epsilon` composes by an inverse FFT over the whole grid. Here delta at one epsilon is a sum over frequencies: the transform
of a composition is a product of powers, and is negligible but at the lowest frequencies, however many rounds there are. The
bounds, the grids and the masses that are dropped are those of `epsilon`; rounding differs. An epsilon that this module does
not reach is NaN.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import fft

from ..budget import Adjacency
from .epsilon import (
    FINEST_INTERVAL,
    GATE_INTERVAL,
    MAX_STEPS,
    MIN_PLD_DELTA,
    MIN_STEPS,
    SETTLED,
    finer,
    first_interval,
    has_distribution,
    typical_loss,
)
from .events import Counts, Leaf, gaussian_scale
from .loss_distributions import DROPPED, ROUNDED, log_moments, losses_once
from .renyi import orders, relation_of, renyi_holds, renyi_vector

Floats = NDArray[np.float64]
MAX_KINDS = 8  # of leaves in all compositions together
NEGLIGIBLE = -50.0  # log of a size of a transform that is taken for zero
MAX_FREQUENCIES = 1 << 12
CHUNK = 1 << 19  # frequencies, of all compositions of a chunk together
STEPS = 8  # of Newton's method
PRECISION = 1e-9  # of an epsilon, in nats
UNIT = 2.0**-54  # error of a delta for each leaf
MAX_UNSURE = 3e-7  # error of an epsilon, relative to one above 1
MIN_ORDER = 1.01  # of RDP, from which its conversion is stable


def epsilons(compositions: Sequence[Counts], delta: float, adjacency: Adjacency, guesses: Floats) -> Floats:
    """Return the epsilon of each composition as `epsilon` does with `GATE_INTERVAL`, up to rounding; NaN where this module does not reach it.

    Args:
      compositions: see `epsilon.grouped`.
      delta: in (0, 1).
      adjacency: relation of neighbours.
      guesses: about the epsilons, where the search for each begins.
    """
    kinds = list(dict.fromkeys(leaf for each in compositions for leaf, _ in each))
    result = np.full(len(compositions), np.nan)
    is_covered = delta >= MIN_PLD_DELTA and all(_is_covered(each, adjacency) for each in kinds)
    if not is_covered or not 0 < len(kinds) <= MAX_KINDS:
        return result
    numbers = {leaf: number for number, leaf in enumerate(kinds)}
    counts = np.zeros((len(compositions), len(kinds)))
    for row, each in enumerate(compositions):
        for leaf, times in each:
            counts[row, numbers[leaf]] = times
    by_rdp = _by_rdp(counts, kinds, delta, adjacency)
    # A composition without one of the leaves may take another grid, and so may one of very large epsilon.
    is_usual = np.all(counts > 0, axis=1) & np.isfinite(guesses)
    is_usual &= (by_rdp < GATE_INTERVAL * MAX_STEPS) | np.isinf(by_rdp)
    fine_enough = first_interval(min(map(typical_loss, kinds)), GATE_INTERVAL, None)
    grid = max(fine_enough, GATE_INTERVAL)
    rows, last = np.flatnonzero(is_usual), np.full(len(compositions), np.inf)
    result[rows] = by_rdp[rows]
    while len(rows):
        sizes = _on_grid(kinds, counts[rows], delta, adjacency, grid, guesses[rows])
        result[rows] = np.minimum(result[rows], sizes)  # NaN stays
        ends = (grid <= fine_enough) & (sizes >= MIN_STEPS * grid)
        if fine_enough < GATE_INTERVAL and grid <= GATE_INTERVAL:
            ends |= last[rows] - sizes <= SETTLED * sizes
        last[rows] = sizes
        rows = rows[~ends & ~np.isnan(sizes)]
        if grid <= FINEST_INTERVAL:
            break
        grid = finer(grid)
    return result


def _is_covered(leaf: Leaf, adjacency: Adjacency) -> bool:
    """Return whether compositions of a leaf are powers of its own distribution; plain Gaussians are one other Gaussian."""
    rate, _ = gaussian_scale(leaf) or (0.0, 0.0)
    return rate < 1 and adjacency is not Adjacency.REPLACE_ONE and has_distribution(leaf, adjacency)


def _by_rdp(counts: Floats, kinds: Sequence[Leaf], delta: float, adjacency: Adjacency) -> Floats:
    """Return the epsilon by RDP of each composition; infinite where RDP does not cover a leaf. Arguments as of `_on_grid`."""
    holding = (renyi_vector(leaf, adjacency) for leaf in kinds if renyi_holds(leaf, adjacency))
    vectors = [each for each in holding if each is not None]
    if len(vectors) < len(kinds):
        return np.full(len(counts), np.inf)
    alpha = orders()
    stable = alpha > MIN_ORDER
    totals = (counts @ np.array(vectors))[:, stable]
    with np.errstate(over="ignore"):
        sizes = totals + np.log1p(-1 / alpha[stable]) - np.log(delta * alpha[stable]) / (alpha[stable] - 1)
    sizes[delta**2 + np.expm1(-totals) > 0] = 0.0
    return np.maximum(sizes.min(axis=1), 0.0)


def _on_grid(
    kinds: Sequence[Leaf], counts: Floats, delta: float, adjacency: Adjacency, grid: float, guesses: Floats
) -> Floats:
    """Return the epsilon by PLD of each composition on one grid; NaN where it is not reached.

    Args:
      kinds: the leaves.
      counts: how often each leaf happened, (compositions, leaves), above zero.
      delta: as of `epsilons`.
      adjacency: as of `epsilons`.
      grid: step of the grid, in nats.
      guesses: as of `epsilons`.
    """
    pairs: list[Any] = [losses_once(leaf, relation_of(adjacency), grid) for leaf in kinds]
    sides = [[pair._pmf_remove.to_dense_pmf() for pair in pairs]]
    if not all(pair._symmetric for pair in pairs):
        sides.append([pair._pmf_add.to_dense_pmf() for pair in pairs])
    results = np.full(len(counts), np.nan)
    octaves = np.floor(np.log2(counts.sum(axis=1)))
    for octave in np.unique(octaves):
        (rows,) = np.nonzero(octaves == octave)
        spectra = [each for side in sides if (each := _Spectrum.of(side, counts[rows], grid))]
        if len(spectra) < len(sides):
            continue
        for part in np.array_split(rows, math.ceil(len(rows) * spectra[0].size / CHUNK)):
            first, *others = (_Composed.of(spectrum, counts[part]) for spectrum in spectra)
            sizes = first.epsilons(delta, guesses[part])
            for other in others:  # whose epsilon is mostly less, and then needs no search
                above = np.flatnonzero(other.excess(delta, sizes)[0] > 0)
                if len(above):
                    sizes[above] = other.epsilons(delta, sizes)[above]
            results[part] = sizes
    return results


@dataclass(frozen=True)
class _Spectrum:
    """Transforms of the PMFs of one side, at the frequencies that its compositions keep.

    Attributes:
      pmfs: one PMF for each leaf.
      roots: roots of unity, one for each point of a window that holds all but `DROPPED` of each composition.
      means: steps by which each PMF is moved down, about its mean: powers of its transform would else turn often.
      logs: logarithms of the moved transforms, (leaves, frequencies).
    """

    pmfs: Sequence[Any]
    roots: NDArray[np.complex128]
    means: NDArray[np.int64]
    logs: NDArray[np.complex128]

    @classmethod
    def of(cls, pmfs: Sequence[Any], counts: Floats, grid: float) -> "_Spectrum | None":
        """Return the spectrum for compositions; None if too many of its frequencies matter. Arguments as of `_on_grid`."""
        size = max(int(_supports(pmfs, counts)[1].max()), *(pmf.size for pmf in pmfs), 2)
        length: Any = fft.next_fast_len(size, real=True)
        transforms = np.array([fft.rfft(pmf._probs, length) for pmf in pmfs])
        strengths = np.log(np.maximum(np.abs(transforms), np.finfo(float).tiny))
        last = int(np.flatnonzero(counts.min(axis=0) @ strengths > NEGLIGIBLE)[-1]) + 1
        if last > min(MAX_FREQUENCIES, (length - 1) // 2):
            return None
        means = np.array([round(float(np.arange(pmf.size) @ pmf._probs)) for pmf in pmfs], np.int64)
        roots = np.exp(2j * np.pi * np.arange(length) / length)
        turned = transforms[:, :last] * roots[np.outer(means, np.arange(last)) % length]
        return cls(pmfs, roots, means, np.log(turned))

    @property
    def size(self) -> int:
        """Number of the frequencies."""
        return self.logs.shape[1]


@dataclass(frozen=True)
class _Composed:
    """Compositions, each as its transform; its points are counted from an origin of its own.

    Attributes:
      transforms: transforms, (compositions, frequencies).
      roots: see `_Spectrum`.
      ends: point after the window of each.
      origins: loss of the origin of each, in steps.
      infinite: mass at an infinite loss.
      grid: step of the grid, in nats.
      total: number of leaves in each.
    """

    transforms: NDArray[np.complex128]
    roots: NDArray[np.complex128]
    ends: NDArray[np.int64]
    origins: NDArray[np.int64]
    infinite: Floats
    grid: float
    total: Floats

    @classmethod
    def of(cls, spectrum: _Spectrum, counts: Floats) -> "_Composed":
        """Return compositions of the leaves of a spectrum. Arguments as of `_on_grid`."""
        times = counts.astype(np.int64)
        moved, losses = times @ spectrum.means, times @ np.array([p._lower_loss for p in spectrum.pmfs])
        ends = _supports(spectrum.pmfs, counts)[0] + len(spectrum.roots) - moved
        escapes = np.log1p(-np.array([pmf._infinity_mass for pmf in spectrum.pmfs]))
        infinite = len(escapes) * DROPPED + ROUNDED * counts.sum(axis=1) - np.expm1(counts @ escapes)
        grid, transforms = spectrum.pmfs[0]._discretization, np.exp(counts @ spectrum.logs)
        return cls(transforms, spectrum.roots, ends, moved + losses, infinite, grid, counts.sum(axis=1))

    @np.errstate(all="ignore")  # far from an epsilon
    def epsilons(self, delta: float, guesses: Floats) -> Floats:
        """Return each epsilon at delta by Newton's method; NaN where it does not converge, or rounding is too coarse."""
        sizes, steps, slopes = guesses, np.full(len(guesses), np.inf), np.zeros(len(guesses))
        for _ in range(STEPS):
            if np.all(np.abs(steps) <= PRECISION):
                break
            excess, slopes = self.excess(delta, sizes)
            steps = np.log1p(excess / slopes)
            sizes = sizes + steps
        rests = self.ends - self._starts(sizes)
        is_inside = (rests > 0) & (
            rests <= len(self.roots)
        )  # elsewhere masses are counted twice, or negative
        is_sure = (DROPPED + UNIT * self.total) / slopes <= MAX_UNSURE * np.maximum(sizes, 1)
        is_sure &= is_inside & (np.abs(steps) <= PRECISION) & (sizes > 0)
        return np.where(is_sure, sizes, np.nan)

    @np.errstate(all="ignore")
    def excess(self, delta: float, sizes: Floats) -> tuple[Floats, Floats]:
        """Return by how much delta at each epsilon exceeds `delta`, and how fast it falls there."""
        frequencies, length = np.arange(self.transforms.shape[1]), len(self.roots)
        weights, turns = np.where(frequencies, 2.0, 1.0) / length, self.roots[frequencies]
        fall = math.exp(-self.grid)
        of_sum = np.where(frequencies, weights / (1 - turns), 0.0)
        sums = np.stack([of_sum, weights / (1 - turns * fall)], axis=1)
        starts = self._starts(sizes)
        above, beyond = (self._sums(first, frequencies, sums) for first in (starts, self.ends))
        rest = self.ends - starts
        upper = above[:, 0] - beyond[:, 0] + self.transforms[:, 0].real * rest / length
        lower = above[:, 1] - beyond[:, 1] * np.exp(-self.grid * np.maximum(rest, 0))
        slopes = np.exp(sizes - (starts + self.origins) * self.grid) * lower
        return self.infinite + upper - slopes - delta, slopes

    def _starts(self, sizes: Floats) -> NDArray[np.int64]:
        """Return the first point whose loss exceeds each epsilon."""
        steps = np.floor(np.clip(np.nan_to_num(sizes), 0.0, GATE_INTERVAL * MAX_STEPS) / self.grid)
        return steps.astype(np.int64) + 1 - self.origins

    def _sums(self, firsts: NDArray[np.int64], frequencies: NDArray[np.int64], sums: Any) -> Floats:
        """Return both sums over all points from each first one on, were they not cyclic: (compositions, 2)."""
        return ((self.transforms * self.roots[np.outer(firsts, frequencies) % len(self.roots)]) @ sums).real


def _supports(pmfs: Sequence[Any], counts: Floats) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the first point and the number of points of each composition, as `_Support` has them for each leaf.

    Args:
      pmfs: one PMF for each leaf.
      counts: how often each leaf happened, (compositions, leaves).
    """
    first = size = np.zeros(len(counts), np.int64)
    for pmf, times in zip(pmfs, counts.T, strict=True):
        alpha, moments = log_moments(pmf)
        ends = (np.outer(times, moments) - math.log(DROPPED / 2)) / alpha
        ends[:, ~np.isfinite(moments)] = np.nan
        low = np.maximum(np.floor(np.nanmax(ends[:, alpha < 0], axis=1)), 0).astype(np.int64)
        high = np.minimum(np.ceil(np.nanmin(ends[:, alpha > 0], axis=1)), (pmf.size - 1) * times).astype(
            np.int64
        )
        first, size = first + low, size + high - low + 1
    return first, size
