"""Gaussian mechanism, sampled or not: dp_accounting's formulas, vectorised over the grid or the orders.

dp_accounting computes one grid point and one order at a time, which takes most of the time of a plan. The formulas and
the public functions used are its own; tests compare the two, and `fedveil ledger verify` uses only its accountants.
Rates are in (0, 1); noise is the standard deviation over the sensitivity, above 0.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
from dp_accounting.pld.pld_pmf import DensePLDPmf, PLDPmf, create_pmf_pessimistic_connect_dots_fixed_gap
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
from numpy.typing import NDArray
from scipy.special import gammaln, log_ndtr, ndtr, ndtri

Vector = NDArray[np.float64]

# Outputs below it, in standard deviations, count as an infinite loss: the mass that dp_accounting truncates.
LAST_DEVIATION = float(ndtri(0.5 * math.exp(-50)))
# Size up to which dp_accounting keeps a distribution as a dictionary (`_MAX_PMF_SPARSE_SIZE`).
MAX_SPARSE = 1000
SIDES = (1.0, -1.0)  # signs: a unit removed, and one added
BLOCK = 1 << 16  # points of a grid that are computed at once
# Increase of a divergence that dp_accounting takes for rounding (`_DELTA_DIFF_TOLERANCE`).
ROUNDING = 1e-12
# Terms of a fractional order's series: most orders need few; an order that needs more than the most is left out.
FEW_TERMS, MAX_TERMS = 64, 1000
NEGLIGIBLE = 30  # the series ends where the remaining terms are below e to minus this of the whole


def distribution(rate: float, noise: float, interval: float) -> PrivacyLossDistribution:
    """Return the PLD for a unit added, removed or zeroed, by connect-the-dots.

    Args:
      rate: sampling rate, in (0, 1).
      noise: standard deviation over the sensitivity, above 0.
      interval: step of the grid, in nats.
    """
    return PrivacyLossDistribution(*(side(sign, rate, noise, interval) for sign in SIDES))


def unsampled(mu: float, interval: float) -> PrivacyLossDistribution:
    """Return the PLD of a Gaussian without sampling, by connect-the-dots; `mu` is the distance of the means over the std."""
    last = math.ceil(mu * (mu / 2 - LAST_DEVIATION) / interval)
    sizes = interval * np.arange(-last, last + 1, dtype=np.float64)
    with np.errstate(over="ignore"):  # far out, where the divergence is clipped
        deltas = ndtr(mu / 2 - sizes / mu) - np.exp(sizes + log_ndtr(-mu / 2 - sizes / mu))
    return PrivacyLossDistribution(connected(interval, -last, np.clip(deltas, 0.0, 1.0)))


def connected(interval: float, first: int, deltas: Vector) -> PLDPmf:
    """Return the PMF that connects the dots, bit for bit as dp_accounting's function for equal gaps returns it.

    That function passes each mass through a dictionary and two lists.

    Args:
      interval: step of the grid, in nats.
      first: least epsilon, in steps.
      deltas: hockey-stick divergence at each point of the grid from there on, (points,), in [0, 1].

    Raises:
      ValueError: the divergence rises by more than rounding.
    """
    if len(deltas) <= MAX_SPARSE:
        last = first + len(deltas) - 1
        return create_pmf_pessimistic_connect_dots_fixed_gap(interval, first, last, deltas)
    if np.any(np.diff(deltas) > ROUNDING):
        raise ValueError(f"a divergence rises on a grid of {interval} from {first} on")
    deltas = np.minimum.accumulate(deltas)
    masses = _masses(deltas, interval)
    masses[0] += 1 - deltas[0]
    return DensePLDPmf(interval, first, np.maximum(masses, 0.0, out=masses), float(deltas[-1]), True)


def _masses(deltas: Vector, interval: float) -> Vector:
    """Return the mass at each point, without that for the divergence at the first one; block by block, to save memory.

    With d the divergences and h the interval, mass i is (d[i+1] - d[i] - e^h (d[i] - d[i-1])) / (e^h - 1).
    """
    masses, growth = np.empty_like(deltas), math.expm1(interval)
    masses[0] = (deltas[1] - deltas[0]) / growth
    masses[-1] = (deltas[-1] - deltas[-2]) / math.expm1(-interval)
    for start in range(1, len(deltas) - 1, BLOCK):
        inside = masses[start : min(start + BLOCK, len(deltas) - 1)]
        falls = np.diff(deltas[start - 1 : start + len(inside) + 1])
        np.multiply(falls[:-1], math.exp(interval), out=inside)
        np.subtract(falls[1:], inside, out=inside)
        inside /= growth
    return masses


def grid_range(sign: float, rate: float, noise: float, interval: float) -> tuple[int, int]:
    """Return the first and the last point of a side's losses on the grid, in steps. Arguments as of `side`."""
    reach = (0.5 - noise * LAST_DEVIATION) / noise**2
    ends = sorted(sign * float(np.logaddexp(math.log1p(-rate), math.log(rate) + x)) for x in (-reach, reach))
    return math.floor(ends[0] / interval), math.ceil(ends[1] / interval)


def side(sign: float, rate: float, noise: float, interval: float) -> PLDPmf:
    """Return the PMF of the losses of one of `SIDES`, by its sign. Arguments as of `distribution`."""
    first, last = grid_range(sign, rate, noise, interval)
    if sign < 0 and last - first >= MAX_SPARSE:
        return _added(rate, noise, interval, first, last)
    return connected(interval, first, _on_grid(partial(_deltas, sign, rate, noise), interval, first, last))


def _on_grid(divergence: Callable[[Vector], Vector], interval: float, first: int, last: int) -> Vector:
    """Return a divergence at each point of a grid, first and last included; block by block, to save memory."""
    values = np.empty(last - first + 1)
    for start in range(first, last + 1, BLOCK):
        stop = min(start + BLOCK, last + 1)
        values[start - first : stop - first] = divergence(interval * np.arange(start, stop, dtype=np.float64))
    return values


def _added(rate: float, noise: float, interval: float, first: int, last: int) -> PLDPmf:
    """Return the PMF for a unit added, as `connected` does, with small masses as exact as large ones.

    At a negative epsilon the divergence is 1 - e^epsilon plus a small remainder. The first term has mass 1 at 0 and
    none elsewhere, except for its rounding errors: they would fill a far tail of the composition.
    """

    def remainder(negative: Vector) -> Vector:
        """Return the divergence less 1 - e^epsilon at epsilons of at most 0."""
        outputs = -_outputs(-1.0, rate, noise, negative)
        below = np.logaddexp(
            math.log1p(-rate) + log_ndtr(outputs), math.log(rate) + log_ndtr(outputs + 1 / noise)
        )
        return np.exp(negative + below) - ndtr(outputs)

    above = _on_grid(partial(_deltas, -1.0, rate, noise), interval, 1, last)
    parts = np.concatenate((_on_grid(remainder, interval, first, 0), above))
    masses = _masses(parts, interval)
    masses[0] -= parts[0]
    masses[-first] += 1
    return DensePLDPmf(interval, first, np.maximum(masses, 0.0, out=masses), float(parts[-1]), True)


def _deltas(sign: float, rate: float, noise: float, epsilons: Vector) -> Vector:
    """Return the hockey-stick divergence at each epsilon, (epsilons,). Arguments as of `side`."""
    removed = sign > 0
    reached = sign * epsilons > math.log1p(-rate)  # for any other epsilon, all losses are on one side of it
    deltas = np.where(reached, 0.0, -np.expm1(np.minimum(epsilons, 0.0)) if removed else 0.0)
    outputs = _outputs(sign, rate, noise, epsilons[reached])
    other, log_rate, log_rest = outputs + sign / noise, math.log(rate), math.log1p(-rate)
    if removed:
        above, below = (1 - rate) * ndtr(outputs) + rate * ndtr(other), log_ndtr(outputs)
    else:
        above = ndtr(outputs)
        below = np.logaddexp(log_rest + log_ndtr(outputs), log_rate + log_ndtr(other))
    deltas[reached] = above - np.exp(epsilons[reached] + below)
    return np.clip(deltas, 0.0, 1.0)


def _outputs(sign: float, rate: float, noise: float, epsilons: Vector) -> Vector:
    """Return the output at which the loss is each epsilon, in standard deviations of the noise, (epsilons,)."""
    # `inside` is the loss without sampling, log(1 + (e^epsilon - 1) / rate).
    scaled = sign * epsilons - math.log(rate)
    with np.errstate(divide="ignore"):
        inside = sign * (scaled + np.log1p(-np.exp(np.minimum(math.log(1 / rate - 1) - scaled, 0.0))))
    return (-0.5 * sign - inside * noise**2) / noise


def renyi(rate: float, noise: float, orders: Vector) -> Vector:
    """Return RDP at each order above 1 (Mironov, Talwar and Zhang 2019, arXiv:1908.10530), (orders,).

    It is infinite at a fractional order whose series needs too many terms.
    """
    is_whole = orders == np.floor(orders)
    log_moments = np.empty(len(orders))
    log_moments[is_whole] = [_whole_moment(rate, noise, int(order)) for order in orders[is_whole]]
    fractional = orders[~is_whole]
    moments = _series(rate, noise, fractional, FEW_TERMS)
    unfinished = np.isinf(moments)
    moments[unfinished] = _series(rate, noise, fractional[unfinished], MAX_TERMS)
    log_moments[~is_whole] = moments
    return log_moments / (orders - 1)


def _whole_moment(rate: float, noise: float, order: int) -> float:
    """Return (order - 1) times RDP at a whole order above 1, the log of a moment: the sum of a binomial series."""
    i = np.arange(order + 1.0)
    terms = _log_binomial(order, i) + i * math.log(rate) + (order - i) * math.log1p(-rate)
    return float(np.logaddexp.reduce(terms + (i * i - i) / (2 * noise**2)))


def _series(rate: float, noise: float, orders: Vector, terms: int) -> Vector:
    """Return the log moment at fractional orders, (orders,): the sum of two series; infinity if it needs more terms."""
    i, order = np.arange(float(terms)), orders[:, None]
    j, middle = order - i, noise**2 * math.log(1 / rate - 1) + 0.5
    binomial, log_rate, log_rest = _log_binomial(order, i), math.log(rate), math.log1p(-rate)
    low = i * log_rate + j * log_rest + (i * i - i) / (2 * noise**2) + log_ndtr((middle - i) / noise)
    high = j * log_rate + i * log_rest + (j * j - j) / (2 * noise**2) + log_ndtr((j - middle) / noise)
    low, high = binomial + low, binomial + high
    total = np.logaddexp(*(np.logaddexp.accumulate(part, axis=1) for part in (low, high)))[:, 1:]
    falling = (np.diff(low) < 0) & (np.diff(high) < 0)
    ended = falling & (np.maximum(low, high)[:, 1:] < total - NEGLIGIBLE)
    moments = np.take_along_axis(total, ended.argmax(axis=1)[:, None], axis=1)[:, 0]
    return np.where(ended.any(axis=1), moments, math.inf)


def _log_binomial(order: float | Vector, i: Vector) -> Vector:
    return gammaln(order + 1) - gammaln(i + 1) - gammaln(order - i + 1)
