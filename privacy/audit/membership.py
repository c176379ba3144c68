"""Membership inference on a model: scores of records, higher for those more likely to be members.

Yeom et al. 2018 (arXiv:1709.01604) is the loss itself, negated. RMIA: Zarifzadeh et al. 2024
(arXiv:2312.03262). LiRA: Carlini et al. 2022 (arXiv:2112.03570). Loss traces: arXiv:2411.05743.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...base.refusal import Refusal
from .one_run import Scores
from .rates import rate_above, rate_below

# RMIA's value for images of a in P_in = a P_out + 1 - a, how a member's likelihood follows from a non-member's.
OFFLINE_A = 0.3
ALPHA = 0.05  # probability that an interval misses
_TINY = 1e-12


@dataclass(frozen=True)
class Likelihoods:
    """Likelihoods of records in [0, 1] under the target, and under one reference model that saw none, (n,) each."""

    target: Scores
    reference: Scores

    def ratios(self, a: float) -> Scores:
        """Return the likelihood ratio of each record under the target; `a` as of `OFFLINE_A`."""
        return self.target / np.maximum(((1 + a) * self.reference + 1 - a) / 2, _TINY)


def rmia(records: Likelihoods, population: Likelihoods, a: float = OFFLINE_A) -> Scores:
    """Return the share of the population below each record's likelihood ratio (gamma 1), (records,).

    Args:
      records: attacked records.
      population: other records.
      a: as of `OFFLINE_A`.
    """
    ratios = np.sort(population.ratios(a))
    return np.searchsorted(ratios, records.ratios(a)) / len(ratios)


def logit(likelihoods: Scores) -> Scores:
    """Return log(p / (1 - p)) of likelihoods in [0, 1]; close to Gaussian over models."""
    return np.log(likelihoods + _TINY) - np.log1p(-likelihoods + _TINY)


def lira(target: Scores, shadows: Scores, inside: NDArray[np.bool_]) -> Scores:
    """Return log likelihood ratios of in to out, (records,), under a Gaussian for either.

    Because there are few shadow models, all records share the variance of the logits in, and that out.

    Args:
      target: logits under the attacked model, (records,).
      shadows: logits under shadow models, (models, records).
      inside: whether a shadow model was trained on the record, (models, records).

    Raises:
      Refusal: a record is in no shadow model, or in all of them.
    """
    count_in, count_out = inside.sum(axis=0), (~inside).sum(axis=0)
    if min(count_in.min(), count_out.min()) < 1:
        remedy = "train more, so that each record is inside one and outside another"
        raise Refusal("shadows", len(shadows), remedy)
    scores = np.zeros(len(target))
    for sign, members, count in ((1, inside, count_in), (-1, ~inside, count_out)):
        mean = np.where(members, shadows, 0.0).sum(axis=0) / count
        squares = np.where(members, shadows - mean, 0.0) ** 2
        variance = max(float(squares.sum()) / max(int(members.sum()) - len(target), 1), _TINY)
        scores += sign * (-((target - mean) ** 2) / (2 * variance) - np.log(variance) / 2)
    return scores


def late_fall(losses: Scores) -> Scores:
    """Return how far each record's last loss lies below its mean over training, (records,).

    It is high if the model memorised a record late, and 0 or less if it never did. Under privacy it measures nothing: noise
    moves the loss of a record that was not learnt by as much. `losses` is (rounds, records).
    """
    return losses.mean(axis=0) - losses[-1]


@dataclass(frozen=True)
class Interval:
    """Measured value, and limits that miss the true value with a given probability."""

    value: float
    low: float
    high: float


def auc(members: Scores, others: Scores) -> Interval:
    """Return the probability that a member scores above a non-member, with DeLong's interval (1988).

    Without any spread, as under perfect separation, the interval is as wide as Clopper and Pearson's for as many successes
    in a row as the smaller group has members.

    Args:
      members: scores of at least two.
      others: scores of at least two.
    """
    from scipy.special import ndtri

    above, below = _placements(members, others), _placements(others, members)
    value = float(above.mean())
    variance = float(above.var(ddof=1)) / len(members) + float(below.var(ddof=1)) / len(others)
    fewest = min(len(members), len(others))
    margin = -float(ndtri(ALPHA / 2)) * variance**0.5 or 1 - rate_below(fewest, fewest, ALPHA / 2)
    return Interval(value, max(0.0, value - margin), min(1.0, value + margin))


def _placements(scores: Scores, against: Scores) -> Scores:
    """Return for each score the share of `against` below it, ties half."""
    ordered = np.sort(against)
    sides = (np.searchsorted(ordered, scores, side=side) for side in ("left", "right"))
    return sum(sides, np.zeros(len(scores))) / (2 * len(against))


def tpr_at(fpr: float, members: Scores, others: Scores) -> Interval:
    """Return the true positive rate at a false positive rate, with limits.

    The threshold is uncertain as well: its own false positive rate is a Beta variable, for any distribution of the
    scores. Half of `ALPHA` is used for it, and half for Clopper and Pearson's limits. With too few non-members the
    limits are 0 and 1.

    Args:
      fpr: share of non-members that is taken for members, in (0, 1).
      members: scores, (n,).
      others: scores, (m,).
    """
    from scipy.special import betainc

    thresholds = -np.sort(-others)
    ranks = np.arange(1, len(others) + 1)
    # The false positive rate above the k-th highest of n scores is Beta(k, n - k + 1).
    certainty = betainc(ranks, len(others) - ranks + 1, fpr)  # that the threshold's own rate is at most fpr
    strict = int((certainty >= 1 - ALPHA / 4).sum())  # last rank whose rate is almost surely at most fpr
    loose = int((certainty > ALPHA / 4).sum())  # ranks after it have almost surely a rate of at least fpr

    def caught(rank: int) -> int:
        return int((members > thresholds[rank - 1]).sum())

    value = caught(int(fpr * len(others)) + 1) / len(members)
    low = rate_below(caught(strict), len(members), ALPHA / 4) if strict else 0.0
    high = 1.0
    if loose < len(others):
        high = rate_above(int((members >= thresholds[loose]).sum()), len(members), ALPHA / 4)
    return Interval(value, low, high)
