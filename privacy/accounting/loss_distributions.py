"""Privacy loss distributions of counted leaves, samples that are queried by a whole composition included.

A client that is drawn with probability p and then takes K noisy steps composes its K steps on *one* draw. Neither p
times the rate of a step nor p times epsilon is right. A pair (P, Q) of distributions that dominates the K steps gives a
pair that dominates the sampled ones (Zhu, Dong and Wang 2022, arXiv:2106.08567, theorem 11):

    remove: (p P + (1 - p) Q, Q)        add: (P, p Q + (1 - p) P), its own P being the side without the unit.

This holds for a unit whose removal has the same effect as not drawing it. It does not hold for a record at a sampled
client: an adversary that sees the client take part, or infers it from the changed model, knows the draw. Such a record
is accounted by `OpenlySampledDpEvent`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from dp_accounting.dp_event import GaussianDpEvent, LaplaceDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.pld.pld_pmf import DensePLDPmf, compose_pmfs
from dp_accounting.pld.privacy_loss_distribution import (
    PrivacyLossDistribution,
    from_gaussian_mechanism,
    identity,
)
from numpy.typing import NDArray
from scipy import fft

from . import gaussian_mixture, sampled_gaussian
from .events import Counts, Leaf, gaussian_scale, is_exchanged, is_mixture, is_openly_sampled, sample_leaves
from .sampled_gaussian import SIDES

if TYPE_CHECKING:
    from dp_accounting.privacy_accountant import NeighboringRelation

Floats = NDArray[np.float64]
MAX_GROWTH = 256  # largest order of Chernoff's bound, times the number of a PMF's points
MAX_CACHED = 1 << 18  # points of a grid whose transform is cached, in 2 MiB; finer grids are published
BLOCK = 1 << 16  # points of a grid that are added at once
# Rounding error of a composition for each event, counted as an infinite loss: up to 0.75 * 2^-53 of delta were measured, in
# either direction, against distributions that are tilted so that their far ends are large (tests).
ROUNDED = 2.0**-51
DROPPED = 1e-15  # mass that a composition with itself drops, and counts as an infinite loss
# Queries of one secret sample whose answer for a zeroed-out unit is that for an absent one.
SAMPLED_ALIKE = (GaussianDpEvent, LaplaceDpEvent, PoissonSampledDpEvent)


def has_distribution(leaf: Leaf, relation: "NeighboringRelation") -> bool:
    """Return whether `distribution` covers a leaf under this relation of neighbours."""
    from dp_accounting.privacy_accountant import NeighboringRelation

    parts = sample_leaves(leaf)
    if is_exchanged(leaf):
        return has_distribution(leaf.event, NeighboringRelation.REPLACE_ONE)
    if parts is None:
        return PLDAccountant(relation).supports(leaf)
    # Replacing a unit involves three answers, with either unit and with none: a pair cannot hold all three.
    alike = relation is not NeighboringRelation.REPLACE_ONE and all(
        isinstance(part, SAMPLED_ALIKE) or is_openly_sampled(part) for part, _ in parts
    )
    return (is_openly_sampled(leaf) or alike) and all(has_distribution(part, relation) for part, _ in parts)


def distribution(
    counts: Counts,
    relation: "NeighboringRelation",
    interval: float,
    before: PrivacyLossDistribution | None = None,
) -> PrivacyLossDistribution:
    """Return the PLD of counted leaves, an upper bound.

    Args:
      counts: each leaf with how often it happened.
      relation: relation of neighbours, in dp_accounting's words.
      interval: step of the grid, in nats.
      before: PLD of earlier events on the same grid; None if there are none.
    """
    total: Any = before
    for leaf, n in counts:
        if isinstance(leaf, GaussianDpEvent):
            losses: Any = _gaussian(GaussianDpEvent(leaf.noise_multiplier / math.sqrt(n)), relation, interval)
        else:
            losses = _several(leaf, n, relation, interval)
        total = losses if total is None else _composed(total, losses)
    return identity(interval) if total is None else total


# Privacy loss distributions and their PMFs of dp_accounting are typed as Any below, because most reads are of its private
# fields: `_pmf_remove` and `_pmf_add` are the losses of a unit removed and added; `_symmetric` says that they are equal.
# `_probs[i]` is the mass at the loss (_lower_loss + i) * _discretization, and `_infinity_mass` that at infinity.


def _composed(one: Any, other: Any) -> PrivacyLossDistribution:
    """Return `one.compose(other)` without `scipy.signal`, whose import takes longer than most compositions."""
    pmfs = [_composed_pmf(one._pmf_remove, other._pmf_remove)]
    if not (one._symmetric and other._symmetric):
        pmfs.append(_composed_pmf(one._pmf_add, other._pmf_add))
    return PrivacyLossDistribution(*pmfs)


def _composed_pmf(one: Any, other: Any) -> Any:
    """Return the PMF of the sum of two independent losses, by FFT."""
    if not (isinstance(one, DensePLDPmf) and isinstance(other, DensePLDPmf)):
        return _rounded(compose_pmfs(one, other, DROPPED), 1)
    first: Any = one
    second: Any = other
    first.validate_composable(second)
    size = first.size + second.size - 1
    length = fft.next_fast_len(size, real=True)
    spectra: list[Any] = [fft.rfft(each._probs, length) for each in (first, second)]
    masses: Any = fft.irfft(spectra[0] * spectra[1], length)[:size]
    low = _negligible(masses)
    high = max(size - _negligible(masses[::-1]), low + 1)
    kept_masses = masses[low:high].copy()
    kept_masses[0] += masses[:low].sum()  # small losses are counted as a larger one, large ones as infinite
    infinite = first._infinity_mass + second._infinity_mass - first._infinity_mass * second._infinity_mass
    infinite += ROUNDED
    lowest = first._lower_loss + second._lower_loss + low
    return DensePLDPmf(first._discretization, lowest, kept_masses, infinite + masses[high:].sum(), True)


def _rounded(pmf: Any, times: int) -> Any:
    """Return dp_accounting's composition of `times` distributions after adding a bound on its rounding errors."""
    pmf._infinity_mass += ROUNDED * times
    return pmf


def _negligible(masses: Floats) -> int:
    """Return how many of the first masses add up to no more than half of `DROPPED`."""
    beyond = np.cumsum(masses) > DROPPED / 2
    return int(beyond.argmax()) if beyond.any() else len(masses)


def _several(
    leaf: Leaf, times: int, relation: "NeighboringRelation", interval: float
) -> PrivacyLossDistribution:
    """Return the PLD of a leaf repeated `times`; on a fine grid each side is computed by itself, uncached, to save memory."""
    from dp_accounting.privacy_accountant import NeighboringRelation

    rate, noise = gaussian_scale(leaf) or (1.0, 1.0)
    if times > 1 and rate < 1 and relation is not NeighboringRelation.REPLACE_ONE:
        first, last = sampled_gaussian.grid_range(1.0, rate, noise, interval)
        if last - first >= MAX_CACHED:
            return PrivacyLossDistribution(*(_fine(each, rate, noise, interval, times) for each in SIDES))
    once = losses_once(leaf, relation, interval)
    return once if times == 1 else _Repeated(once, times)


def _fine(sign: float, rate: float, noise: float, interval: float, times: int) -> DensePLDPmf:
    """Return a side of a sampled Gaussian repeated `times`, in little memory: each array replaces the one before."""
    pmf: Any = sampled_gaussian.side(sign, rate, noise, interval)
    support = _Support.of(pmf, times, *log_moments.__wrapped__(pmf))
    length: Any = fft.next_fast_len(max(support.size, pmf.size), real=True)
    buffer: Any = np.zeros(length)
    buffer[: pmf.size] = pmf._probs
    del pmf
    buffer = fft.rfft(buffer, length)
    buffer = _power(buffer, times, overwrite=True)
    return support.cut(fft.irfft(buffer, length))


class _Repeated(PrivacyLossDistribution):
    """PLD composed `times` with itself; the side of a unit added is composed when read, which `none_above` may spare."""

    def __init__(self, once: Any, times: int) -> None:
        super().__init__(_repeated_pmf(once._pmf_remove, times))
        self._symmetric, self._once, self._times = once._symmetric, once, times
        del self._pmf_add

    def __getattr__(self, name: str) -> Any:
        if name != "_pmf_add":
            raise AttributeError(name)
        self._pmf_add = _repeated_pmf(self._once._pmf_add, self._times)
        return self._pmf_add

    def none_above(self, size: float) -> bool:
        """Return whether the side that adds the unit cannot exceed `size`, the other side's epsilon, and need not be composed."""
        add = self._once._pmf_add.to_dense_pmf()
        largest = (add.size - 1 + add._lower_loss) * add._discretization
        return largest * self._times <= size and add._infinity_mass <= self._once._pmf_remove._infinity_mass


def _repeated_pmf(pmf: Any, times: int) -> Any:
    """Return the PMF of the sum of `times` independent losses, as a power of its transform."""
    if not isinstance(pmf, DensePLDPmf) and pmf.size ** min(times, 10) <= sampled_gaussian.MAX_SPARSE:
        return _rounded(pmf.self_compose(times), times)
    dense = _dense(pmf)
    support = _Support.of(dense, times, *log_moments(dense))
    length: Any = fft.next_fast_len(max(support.size, dense.size), real=True)
    is_cached = length <= MAX_CACHED
    spectrum = _cached_spectrum(dense, length) if is_cached else fft.rfft(dense._probs, length)
    return support.cut(fft.irfft(_power(spectrum, times, overwrite=not is_cached), length))


@dataclass(frozen=True)
class _Support:
    """Points of the grid that hold all but `DROPPED` of the mass of a PMF composed with itself.

    Attributes:
      first: the first of these points, counted from the least loss of the composition.
      size: number of the points.
      lowest: loss at the first of the points, in steps.
      interval: step of the grid, in nats.
      infinite: mass of infinite losses, with `DROPPED` and the bound on rounding errors.
      pessimistic: whether losses were rounded up to the grid.
    """

    first: int
    size: int
    lowest: int
    interval: float
    infinite: float
    pessimistic: bool

    @classmethod
    def of(cls, pmf: Any, times: int, orders: Floats, growth: Floats) -> "_Support":
        """Return the support of a PMF composed `times`, by Chernoff's bound with what `log_moments` returns for it."""
        ends = (times * growth + math.log(2 / DROPPED)) / orders
        first = max(0, math.floor(np.max(ends, where=np.isfinite(ends) & (orders < 0), initial=0)))
        end = (pmf.size - 1) * times
        last = min(end, math.ceil(np.min(ends, where=np.isfinite(ends) & (orders > 0), initial=end)))
        infinite = DROPPED + ROUNDED * times - math.expm1(times * math.log1p(-pmf._infinity_mass))
        lowest = pmf._lower_loss * times + first
        pessimistic = pmf._pessimistic_estimate
        return cls(first, last - first + 1, lowest, pmf._discretization, infinite, pessimistic)

    def cut(self, masses: Any) -> DensePLDPmf:
        """Return the PMF on the support, of the masses of a cyclic convolution at least as long: at most `DROPPED` wraps into it."""
        start = self.first % len(masses)
        parts = masses[start : start + self.size], masses[: max(0, start + self.size - len(masses))]
        return DensePLDPmf(self.interval, self.lowest, np.concatenate(parts), self.infinite, self.pessimistic)


def forget() -> None:
    """Clear cached distributions, such as those of the noise multipliers that a plan has tried."""
    for cached in (losses_once, _gaussian, _dense, log_moments, _cached_spectrum):
        cached.cache_clear()


@lru_cache(maxsize=64)
def _dense(pmf: Any) -> Any:
    """Return a PMF as an array, always the same for `log_moments` and `_cached_spectrum`; dp_accounting keeps few points as a dictionary."""
    return pmf.to_dense_pmf()


@lru_cache(maxsize=4)  # two sides on two grids
def _cached_spectrum(pmf: Any, length: int) -> Any:
    """Return the cached transform of a round's masses; a run calls this every round, mostly with the same length."""
    return fft.rfft(pmf._probs, length)


def _power(square: Any, times: int, overwrite: bool) -> Any:
    """Return values to the power `times`, at least 1, by squaring: numpy's power takes a logarithm of each value.

    Overwriting the values halves the memory.
    """
    power = None
    while True:
        if times & 1:
            power = square.copy() if power is None else np.multiply(power, square, out=power)
        times >>= 1
        if not times:
            return power
        square, overwrite = np.multiply(square, square, out=square if overwrite else None), True


@lru_cache(maxsize=64)
def log_moments(pmf: Any) -> tuple[Floats, Floats]:
    """Return orders for Chernoff's bound, and at each the log of the moment, the sum of masses * e^(order * point).

    Points are counted from 0 at the least loss; orders of both signs go up to `MAX_GROWTH` over the number of points.
    """
    step = pmf.size if pmf.size <= MAX_CACHED else BLOCK
    powers: Floats = np.zeros(0)
    moments: Floats = np.zeros(1)
    for start in range(0, pmf.size, step):
        masses = pmf._probs[start : start + step]
        factor = np.arange(start, start + len(masses)) / pmf.size
        np.exp(factor, out=factor)
        falling = [*_moments(masses, 1 / factor)]
        rising = [*_moments(masses, factor)]
        powers = np.array([power for power, _ in rising])
        moments = moments + np.array([moment for _, moment in (*falling, *rising)])
    return np.concatenate((-powers, powers)) / pmf.size, np.log(moments)


def _moments(masses: Floats, factor: Floats) -> Iterator[tuple[int, float]]:
    """Yield growing powers, closely spaced at first, and the sum of masses * factor^power; `factor` is overwritten."""
    masses, power, stride = np.abs(masses), 0, 1  # rounding errors below zero must not lower the bound
    while power < MAX_GROWTH:
        if power == 16 * stride:
            factor, stride = np.multiply(factor, factor, out=factor), 2 * stride
        masses *= factor
        power += stride
        yield power, float(masses.sum())


def epsilon(losses: PrivacyLossDistribution, delta: float) -> float:
    """Return the least epsilon at delta: `get_epsilon_for_delta`, which takes one loss at a time, vectorised."""
    pair: Any = losses
    removing = _epsilon(pair._pmf_remove, delta)
    if pair._symmetric or (isinstance(losses, _Repeated) and losses.none_above(removing)):
        return removing
    return max(removing, _epsilon(pair._pmf_add, delta))


def _epsilon(pmf: Any, delta: float) -> float:
    """Return the least epsilon at which delta(epsilon) = sum over larger losses of (1 - e^(epsilon - loss)) * mass is delta.

    Masses are added from the greatest loss down. With `upper` the sum of masses and `lower` that of e^-loss * masses,
    epsilon = log((upper - delta) / lower), as soon as this lies above the next loss.
    """
    dense = pmf.to_dense_pmf()
    if dense._infinity_mass > delta:
        return math.inf
    first = min(max(0, -dense._lower_loss), dense.size - 1)  # losses below zero need no epsilon
    stop, upper_sum, lower_sum = dense.size, 0.0, 0.0  # the sums are over losses from `stop` on
    while True:
        start = max(first, stop - BLOCK // 4)
        indices = np.arange(stop - 1, start - 1, -1) + dense._lower_loss
        losses, masses = indices * dense._discretization, dense._probs[start:stop][::-1]
        sums = np.cumsum(np.append(upper_sum, masses))[1:]
        lower = np.cumsum(np.append(lower_sum, np.exp(-losses) * masses))[1:]
        upper = dense._infinity_mass + sums
        if start == first or upper.max() >= delta:
            next_losses = (indices - 1) * dense._discretization
            next_losses[indices == first + dense._lower_loss] = -math.inf
            with np.errstate(all="ignore"):
                candidates = np.log((upper - delta) / lower)
            ends = (upper > delta) & (candidates >= next_losses) | (upper >= delta) & (lower == 0)
            if start == first or ends.any():
                break
        stop, upper_sum, lower_sum = start, float(sums[-1]), float(lower[-1])
    last = int(ends.argmax()) if ends.any() else -1
    if lower[last] == 0:
        return max(0.0, float(losses[last]))
    return float(candidates[last]) if upper[last] > lower[last] + delta else 0.0


def deltas(losses: PrivacyLossDistribution, epsilons: Floats) -> Floats:
    """Return the delta at each epsilon: `get_delta_for_epsilon`, which takes one epsilon at a time, vectorised.

    Args:
      losses: a PLD.
      epsilons: at least 0, shape (points,).
    """
    pair: Any = losses
    sides = [_deltas(pmf.to_dense_pmf(), epsilons) for pmf in (pair._pmf_remove, pair._pmf_add)]
    return np.max(sides, axis=0)


def _deltas(dense: Any, epsilons: Floats) -> Floats:
    """Return sum over larger losses of (1 - e^(epsilon - loss)) * mass at each epsilon, (points,)."""
    losses = _losses(dense)
    with np.errstate(over="ignore"):
        parts = dense._probs, np.exp(-losses) * dense._probs
    upper, lower = (np.append(np.cumsum(part[::-1])[::-1], 0.0) for part in parts)
    beyond = np.searchsorted(losses, epsilons, side="right")
    return np.clip(dense._infinity_mass + upper[beyond] - np.exp(epsilons) * lower[beyond], 0.0, 1.0)


@lru_cache(maxsize=256)
def losses_once(leaf: Leaf, relation: "NeighboringRelation", interval: float) -> PrivacyLossDistribution:
    """Return the PLD of a leaf that happens once. Arguments as of `distribution`."""
    from dp_accounting.privacy_accountant import NeighboringRelation

    if is_exchanged(leaf):
        return losses_once(leaf.event, NeighboringRelation.REPLACE_ONE, interval)
    parts, scale = sample_leaves(leaf), gaussian_scale(leaf)
    if scale is not None:
        rate, noise = scale
        replaced = relation is NeighboringRelation.REPLACE_ONE
        if rate == 1:
            return sampled_gaussian.unsampled((2 if replaced else 1) / noise, interval)
        if not replaced:
            return sampled_gaussian.distribution(rate, noise, interval)
        return from_gaussian_mechanism(
            noise, value_discretization_interval=interval, sampling_prob=rate, neighboring_relation=relation
        )
    if is_mixture(leaf):
        return gaussian_mixture.distribution(
            leaf.standard_deviation, leaf.sensitivities, leaf.sampling_probs, interval
        )
    if parts is None:
        accountant: Any = PLDAccountant(relation, interval)
        return accountant.compose(leaf)._pld
    inner: Any = distribution(parts, relation, interval)
    rate = leaf.sampling_probability
    if is_openly_sampled(leaf):
        return inner.compute_mixture(identity(interval), rate)
    return PrivacyLossDistribution(
        _removed(inner._pmf_remove, rate, interval), _added(inner._pmf_add, rate, interval)
    )


# The Gaussians of a run together are another Gaussian after each round, which is needed in that round alone.
_gaussian = lru_cache(maxsize=8)(losses_once.__wrapped__)


def _removed(pmf: Any, rate: float, interval: float) -> DensePLDPmf:
    """Return the PMF of the sampled loss of a unit removed: of (rate P + (1 - rate) Q, Q), if `pmf` is that of (P, Q)."""
    losses, upper, infinite = _atoms(pmf)
    # Q's mass at a loss is e^-loss times P's. Rounding errors are largest at the far left, so Q's total mass of 1 is
    # given to losses from the greatest down; the rest lies where P has no mass.
    with np.errstate(over="ignore"):
        lower = np.where(upper > 0, upper * np.exp(-losses), 0.0)
    cumulative = np.minimum(np.cumsum(lower[::-1]), 1.0)[::-1]
    lower = cumulative - np.append(cumulative[1:], 0.0)
    masses = rate * upper + (1 - rate) * lower
    rest, min_loss = (1 - rate) * (1 - cumulative[0]), math.log1p(-rate)
    sampled = np.logaddexp(min_loss, math.log(rate) + losses)
    return _on_grid(np.append(sampled, min_loss), np.append(masses, rest), rate * infinite, interval)


def _added(pmf: Any, rate: float, interval: float) -> DensePLDPmf:
    """Return the PMF of the sampled loss of a unit added, never infinite: of (P, rate Q + (1 - rate) P), `pmf` as above."""
    losses, masses, infinite = _atoms(pmf)
    sampled = -np.logaddexp(math.log1p(-rate), math.log(rate) - losses)
    return _on_grid(np.append(sampled, -math.log1p(-rate)), np.append(masses, infinite), 0.0, interval)


def _atoms(pmf: Any) -> tuple[Floats, Floats, float]:
    """Return a distribution's losses, the masses at them, and the mass at infinity."""
    dense = pmf.to_dense_pmf()
    return _losses(dense), np.maximum(dense._probs, 0.0), float(dense._infinity_mass)


def _losses(dense: Any) -> Floats:
    """Return the loss at each point of a PMF, in nats."""
    return (np.arange(dense.size) + dense._lower_loss) * dense._discretization


def _on_grid(losses: Floats, masses: Floats, infinite: float, interval: float) -> DensePLDPmf:
    """Return the PMF of losses of any size, each split between the two neighbouring points of the grid.

    The split preserves its mass under P and under Q. This can only increase every divergence (connect-the-dots; Doroshenko
    et al. 2022, arXiv:2207.04380).
    """
    below = np.floor(losses / interval).astype(np.int64)
    first = int(below.min())
    above = masses * np.clip(np.expm1(below * interval - losses) / math.expm1(-interval), 0.0, 1.0)
    size = int(below.max()) - first + 2
    probs = np.bincount(below - first, masses - above, size)
    probs += np.bincount(below - first + 1, above, size)
    return DensePLDPmf(interval, first, probs, infinite, True)
