"""Membership inference on a model: scores per record, higher for who is more likely a member.

Yeom et al. 2018 (arXiv:1709.01604) is the loss itself, negated. RMIA: Zarifzadeh et al. 2024 (arXiv:2312.03262). LiRA:
Carlini et al. 2022 (arXiv:2112.03570). Loss traces: arXiv:2411.05743.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..refusal import Refusal
from .one_run import Scores
from .rates import rate_above, rate_below

# How a member's likelihood follows from a non-member's, P_in = a P_out + 1 - a: RMIA's value for images.
OFFLINE_A = 0.3
_TINY = 1e-12


def rmia(records: tuple[Scores, Scores], population: tuple[Scores, Scores], a: float = OFFLINE_A) -> Scores:
    """The share of the population against which a record's likelihood ratio is larger (gamma 1), (records,).

    Each pair holds likelihoods in [0, 1] under the target and under one reference model that saw neither, (n,) each.
    """

    def ratio(target: Scores, reference: Scores) -> Scores:
        return target / np.maximum(((1 + a) * reference + 1 - a) / 2, _TINY)

    return np.searchsorted(np.sort(ratio(*population)), ratio(*records)) / len(population[0])


def logit(likelihoods: Scores) -> Scores:
    """log(p / (1 - p)), close to Gaussian over models; likelihoods in [0, 1]."""
    return np.log(likelihoods + _TINY) - np.log1p(-likelihoods + _TINY)


def lira(target: Scores, shadows: Scores, inside: NDArray[np.bool_]) -> Scores:
    """Log likelihood ratio of in to out, (records,); Gaussians of one variance each, as few shadows allow no more.

    ``target``: (records,), logits under the model; ``shadows``: (models, records), under shadow models; ``inside``: the
    same shape, whether the record was in. Refusal for a record without a shadow of both kinds.
    """
    count_in, count_out = inside.sum(axis=0), (~inside).sum(axis=0)
    if min(count_in.min(), count_out.min()) < 1:
        raise Refusal(
            "shadows", len(shadows), "train more, so that each record is inside one and outside another"
        )
    scores = np.zeros(len(target))
    for sign, held, count in ((1, inside, count_in), (-1, ~inside, count_out)):
        mean = np.where(held, shadows, 0.0).sum(axis=0) / count
        squares = np.where(held, shadows - mean, 0.0) ** 2
        variance = max(float(squares.sum()) / max(int(held.sum()) - len(target), 1), _TINY)
        scores += sign * (-((target - mean) ** 2) / (2 * variance) - np.log(variance) / 2)
    return scores


def late_fall(losses: Scores) -> Scores:
    """How far each record's last loss lies below its mean over training, (records,), from (rounds, records).

    High where the model came to know a record late, which is by heart; 0 or less where it never did. How far a loss
    moves in training is as large where noise moves that of a record that is never learnt: no measure under privacy.
    """
    return losses.mean(axis=0) - losses[-1]


@dataclass(frozen=True)
class Interval:
    """A measured value, and limits that miss the true one with the probability that was asked."""

    value: float
    low: float
    high: float


def auc(members: Scores, others: Scores, alpha: float = 0.05) -> Interval:
    """The probability that a member scores above a non-member, with DeLong's interval (1988); at least two of each.

    Where there is no spread to estimate, as under perfect separation, it is as wide as for as many successes in a row
    as the smaller group has records.
    """
    from scipy.special import ndtri

    above, below = _placements(members, others), _placements(others, members)
    value = float(above.mean())
    variance = float(above.var(ddof=1)) / len(members) + float(below.var(ddof=1)) / len(others)
    fewest = min(len(members), len(others))
    margin = -float(ndtri(alpha / 2)) * variance**0.5 or 1 - rate_below(fewest, fewest, alpha / 2)
    return Interval(value, max(0.0, value - margin), min(1.0, value + margin))


def _placements(scores: Scores, against: Scores) -> Scores:
    """For each score the share of ``against`` below it, ties half."""
    ordered = np.sort(against)
    sides = (np.searchsorted(ordered, scores, side=side) for side in ("left", "right"))
    return sum(sides, np.zeros(len(scores))) / (2 * len(against))


def tpr_at(fpr: float, members: Scores, others: Scores, alpha: float = 0.05) -> Interval:
    """The true positive rate where a share ``fpr`` in (0, 1) of non-members is taken for members.

    The threshold is uncertain as well: its own false positive rate is a Beta variable, whatever the scores' law. Half
    of ``alpha`` goes there, and half into Clopper and Pearson's limits. Too few non-members leave 0 and 1.
    """
    from scipy.special import betainc

    ordered = -np.sort(-others)
    ranks = np.arange(1, len(others) + 1)
    # The true rate above the k-th highest of n is Beta(k, n - k + 1).
    certainty = betainc(ranks, len(others) - ranks + 1, fpr)
    strict = int((certainty >= 1 - alpha / 4).sum())  # ranks whose threshold lets at most fpr through
    loose = int((certainty > alpha / 4).sum())  # first rank past these lets at least fpr through

    def caught(rank: int) -> int:
        return int((members > ordered[rank - 1]).sum())

    value = caught(int(fpr * len(others)) + 1) / len(members)
    low = rate_below(caught(strict), len(members), alpha / 4) if strict else 0.0
    high = 1.0
    if loose < len(others):
        high = rate_above(int((members >= ordered[loose]).sum()), len(members), alpha / 4)
    return Interval(value, low, high)
