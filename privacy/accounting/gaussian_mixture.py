"""Mixture of Gaussians: the effect of several records of one person on a noised sum of Poisson-sampled records.

Each of k records is sampled independently with probability q and clipped to 1, so that they move the sum by at most j
with j ~ Binomial(k, q). The pair of the mixture of N(j, noise^2) and N(0, noise^2) dominates every such step (Ganesh
2024, arXiv:2401.10294; Choquette-Choo et al. 2023, arXiv:2310.15526). The bound is exact for k records with equal
gradients; k times epsilon and general group privacy are much larger. dp_accounting supports the event, but its
accountant is slow; it checks ours in the tests and in `fedveil ledger verify`.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from dp_accounting.pld.pld_pmf import PLDPmf
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
from numpy.typing import NDArray
from scipy.special import gammaln, ndtr

from .sampled_gaussian import LAST_DEVIATION, connected

if TYPE_CHECKING:
    from dp_accounting.dp_event import DpEvent

Vector = NDArray[np.float64]

_POINTS = 1 << 12  # of the table of losses from which Newton's method begins
_NEWTON = 3  # its steps
# Orders of RDP beyond the largest are left out; the integral's step and reach are in standard deviations of the noise.
_LARGEST_ORDER, _STEP, _REACH = 64, 0.125, 14.0
_MIN_NOISE = 0.02  # noise over the largest sensitivity; with less, RDP counts as without sampling


def group_event(noise_multiplier: float, rate: float, records: int) -> "DpEvent":
    """Return the event of one noised sum for a unit of several records, each of which is sampled independently.

    Args:
      noise_multiplier: noise std over the clipping norm of one record.
      rate: sampling rate of each record, in (0, 1].
      records: number of the unit's records, at least 1.
    """
    from dp_accounting.dp_event import GaussianDpEvent, MixtureOfGaussiansDpEvent, PoissonSampledDpEvent

    noise, rate = float(noise_multiplier), float(rate)
    if rate == 1:
        return GaussianDpEvent(noise / records)
    if records == 1:
        return PoissonSampledDpEvent(rate, GaussianDpEvent(noise))
    drawn = np.arange(records + 1)
    log_binomial = gammaln(records + 1) - gammaln(drawn + 1) - gammaln(records - drawn + 1)
    probabilities = np.exp(log_binomial + drawn * math.log(rate) + (records - drawn) * math.log1p(-rate))
    probabilities /= probabilities.sum()
    # With tuples instead of lists, the event is hashable.
    shifts, shares = tuple(drawn.astype(np.float64).tolist()), tuple(probabilities.tolist())
    return MixtureOfGaussiansDpEvent(noise, shifts, shares)


def _log_sums(logs: Vector) -> Vector:
    """Return the log of the sum of exponentials of each row, (rows,)."""
    peaks = logs.max(axis=1)
    return peaks + np.log(np.exp(logs - peaks[:, None]).sum(axis=1))


class _Table(NamedTuple):
    """Increasing outputs of the mechanism, (points,), and the loss at each, in nats, (points,)."""

    outputs: Vector
    losses: Vector


class _Mixture:
    """Mixture of N(shift, noise^2). Its loss, the log density ratio to N(0, noise^2), is increasing and convex."""

    def __init__(self, noise: float, sensitivities: Sequence[float], probabilities: Sequence[float]) -> None:
        is_possible = np.array(probabilities) > 0
        self.noise = noise
        self.shifts = np.array(sensitivities, float)[is_possible]
        self.logs = np.log(np.array(probabilities, float)[is_possible])

    def _parts(self, outputs: Vector) -> Vector:
        """Return the log of each component's share of the density ratio, (outputs, shifts)."""
        return self.logs + (outputs[:, None] * self.shifts - self.shifts**2 / 2) / self.noise**2

    def losses(self, outputs: Vector) -> Vector:
        """Return the loss at each output, (outputs,)."""
        return _log_sums(self._parts(outputs))

    def mass(self, outputs: Vector, above: bool) -> Vector:
        """Return the mixture's mass above each output, or below it, (outputs,)."""
        scaled = (self.shifts - outputs[:, None]) / self.noise
        return ndtr(scaled if above else -scaled) @ np.exp(self.logs)

    def table(self) -> _Table:
        """Return outputs up to where the mixture's mass above them is negligible, and their losses."""
        end = -LAST_DEVIATION * self.noise
        outputs = np.linspace(-end, self.shifts.max() + end, _POINTS)
        beyond = self.mass(outputs, above=True) <= ndtr(LAST_DEVIATION)
        outputs = outputs[: int(beyond.argmax()) + 1 if beyond.any() else None]
        return _Table(outputs, self.losses(outputs))

    def outputs_at(self, losses: Vector, table: _Table) -> Vector:
        """Return the output at which each loss is reached, (losses,), by Newton's method within the table's steps."""
        outputs, table_losses = table
        after = np.clip(np.searchsorted(table_losses, losses), 1, len(table_losses) - 1)
        low, high = outputs[after - 1], outputs[after]
        low = np.where(losses < table_losses[0], low - 1e3 * self.noise, low)
        high = np.where(losses > table_losses[-1], high + 1e3 * self.noise, high)
        roots = np.clip(np.interp(losses, table_losses, outputs), low, high)
        for _ in range(_NEWTON):
            parts = self._parts(roots)
            here = _log_sums(parts)
            slope = np.exp(parts - here[:, None]) @ self.shifts / self.noise**2
            roots = np.clip(roots - (here - losses) / np.maximum(slope, 1e-300), low, high)
        return roots


def distribution(
    noise: float, sensitivities: Sequence[float], probabilities: Sequence[float], interval: float
) -> PrivacyLossDistribution:
    """Return the PLD for a unit added, removed or zeroed, by connect-the-dots.

    Args:
      noise: standard deviation of the noise, above 0, in the unit of the sensitivities.
      sensitivities: how far the unit may move the sum, at least 0, one of them above 0.
      probabilities: probability of each sensitivity; their sum is 1.
      interval: step of the grid, in nats.
    """
    mixture = _Mixture(noise, sensitivities, probabilities)
    table = mixture.table()
    return PrivacyLossDistribution(*(_pmf(mixture, table, sign, interval) for sign in (1.0, -1.0)))


def _pmf(mixture: _Mixture, table: _Table, sign: float, interval: float) -> PLDPmf:
    """Return the distribution of losses for a unit removed (sign 1) or added (sign -1), on a grid."""
    ends = sorted((sign * table.losses[0], sign * table.losses[-1]))
    first, last = math.floor(ends[0] / interval), math.ceil(ends[1] / interval)
    deltas = _deltas(mixture, table, sign, interval * np.arange(first, last + 1, dtype=np.float64))
    return connected(interval, first, deltas)


def _deltas(mixture: _Mixture, table: _Table, sign: float, epsilons: Vector) -> Vector:
    """Return the hockey-stick divergence at each epsilon, (epsilons,). Arguments as of `_pmf`."""
    removed = sign > 0
    min_loss = float(mixture.logs[mixture.shifts == 0].max(initial=-math.inf))  # of any output
    reached = sign * epsilons > min_loss
    deltas = np.where(reached, 0.0, -np.expm1(np.minimum(epsilons, 0.0)) if removed else 0.0)
    outputs = mixture.outputs_at(sign * epsilons[reached], table)
    blank = ndtr(-sign * outputs / mixture.noise)
    mixed = mixture.mass(outputs, above=removed)
    above, below = (mixed, blank) if removed else (blank, mixed)
    with np.errstate(divide="ignore"):
        deltas[reached] = above - np.exp(epsilons[reached] + np.log(below))
    return np.maximum.accumulate(np.clip(deltas, 0.0, 1.0)[::-1])[::-1]


def renyi(
    noise: float, sensitivities: Sequence[float], probabilities: Sequence[float], orders: Vector
) -> Vector:
    """Return RDP at each order, the larger of both directions, by numerical integration, (orders,).

    Arguments as of `distribution`; orders are above 1, (orders,).

    Returns:
      Infinity at orders above `_LARGEST_ORDER`.
    """
    mixture = _Mixture(noise, sensitivities, probabilities)
    max_shift, divergences = float(mixture.shifts.max()), np.full(len(orders), math.inf)
    if noise < _MIN_NOISE * max_shift:
        return orders * max_shift**2 / (2 * noise**2)
    small = orders <= _LARGEST_ORDER
    step, end = _STEP * noise, _REACH * noise
    outputs = np.arange(-end, max_shift * _LARGEST_ORDER + end, step)
    losses = np.concatenate(
        [mixture.losses(part) for part in np.array_split(outputs, len(outputs) // _POINTS + 1)]
    )
    # The moments are means of e^(order * loss) and of e^(-(order - 1) * loss) over N(0, noise^2).
    density = -(outputs**2) / (2 * noise**2) - math.log(noise * math.sqrt(2 * math.pi)) + math.log(step)
    moments = [
        max(_log_sums(np.stack([density + order * losses, density - (order - 1) * losses])))
        for order in orders[small]
    ]
    divergences[small] = np.maximum(np.array(moments) / (orders[small] - 1), 0.0)
    return divergences
