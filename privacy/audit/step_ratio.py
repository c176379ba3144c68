"""Log likelihood ratio of a canary record that is in to one that is out, by one step's noised sum."""

import numpy as np

from .one_run import Scores


def step_ratio(moved: Scores, noise: float, rate: float, replaced: bool = False) -> Scores:
    """Return the log likelihood ratio of in to out of one step, for each canary, shape (canaries,).

    In: the sum is N(1, noise^2) with probability `rate`, else N(0, noise^2). Out: it is N(0, noise^2) or, if `replaced`,
    that of a record opposite to the canary.

    Args:
      moved: noised sums along the canaries, over the clipping norm, shape (canaries,).
      noise: noise std over the clipping norm, above 0.
      rate: sampling rate of a record, in (0, 1].
      replaced: whether a canary that is out has the opposite gradient instead of none.
    """

    def drawn(sums: Scores) -> Scores:  # against a record without a gradient
        there = (sums - 0.5) / noise**2
        return there if rate == 1 else np.logaddexp(np.log1p(-rate), np.log(rate) + there)

    return drawn(moved) - drawn(-moved) if replaced else drawn(moved)
