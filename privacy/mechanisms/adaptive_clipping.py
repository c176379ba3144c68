"""Clipping norm that follows a quantile of the clients' norms (Andrew et al. 2021, arXiv:1905.03871, algorithm 1).

Client k reports b_k = 1 if its update was left as long as it was, 0 if it was scaled to the norm C. From the sum

    fraction = 1/2 + (sum_k (b_k - 1/2) + noise) / (qN),        C <- C exp(-learning_rate (fraction - quantile)),

so C falls if the fraction of unclipped updates is above the quantile, and rises if it is below. The round clips to C
and its noise is z C; C changes after the round. qN is the expected cohort, a fixed number: a dropout adds 0 to the sum
of b_k - 1/2.

Cost of the bit. It is one more scalar of the private sum. In a vector of norm C it has a coordinate of +-sqrt(s) C,
s its share of the squared norm, and the update is clipped to sqrt(1 - s) C; both get noise of standard deviation z C.
Counted in bits that is sigma_b = z / (2 sqrt(s)), and relative to the update's norm z_delta = z / sqrt(1 - s): the
paper's z_delta = (z^-2 - (2 sigma_b)^-2)^(-1/2), with s = (z / (2 sigma_b))^2. One Gaussian of z pays for both.

Accounting. The noise is z times the clipping norm. So for any earlier releases and any resulting C, a round is
dominated by the same pair of distributions, that of the (sampled) Gaussian mechanism with z: the events are fixed in
advance, only the mechanisms behind them are chosen adaptively. Ordinary composition covers this case (Dwork, Rothblum
and Vadhan 2010; for dominating pairs Zhu, Dong and Wang 2022, arXiv:2106.08567, theorem 10; Rogers et al. 2016,
arXiv:1605.08294, draw the line: filters are for privacy parameters that depend on outputs). The bounds of `accounting`
hold and are tighter than a filter's.
"""

import math
from dataclasses import dataclass

from .private_sum import UNCLIPPED
from .sum_spec import Segment

SIGMA_SHARE = 1 / 20  # sigma_b over the expected cohort, as the paper sets it
# Share of the squared norm: where the cohort is too small for sigma_b, the bit gets more noise and the update keeps its norm.
MAX_SHARE = 0.1
# A norm does not leave this range, however long every update is zero or not finite.
MIN_NORM, MAX_NORM = 1e-9, 1e9


@dataclass(frozen=True)
class AdaptiveClipping:
    """How the clipping norm moves; public.

    Attributes:
      quantile: the fraction of updates that the norm should leave as long as they are, in (0, 1).
      learning_rate: > 0; a round changes the norm's logarithm by at most this.
    """

    quantile: float = 0.5
    learning_rate: float = 0.2

    def bit(self, noise: float, expected_size: float) -> Segment:
        """Return the bit's segment of the sum.

        Args:
          noise: standard deviation of the sum's noise over the clipping norm.
          expected_size: of the cohort, the fixed denominator.
        """
        sigma_b = SIGMA_SHARE * expected_size
        return Segment(UNCLIPPED, 1.0, min((noise / (2 * sigma_b)) ** 2, MAX_SHARE))

    def next_norm(self, norm: float, fraction: float) -> float:
        """Return the norm of the next round.

        Args:
          norm: of this round.
          fraction: of updates that were left as long as they were, noised, in [0, 1].
        """
        moved = norm * math.exp(-self.learning_rate * (fraction - self.quantile))
        return min(max(moved, MIN_NORM), MAX_NORM)
