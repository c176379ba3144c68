"""How much of the clipping norm the metrics take from the update: the least that tells something.

A metric in [0, bound] has a coordinate of +-sqrt(s) C in a vector of norm C, s its share of the squared norm. Noise of
standard deviation z C on the sum of n clients moves its mean by z / (2 sqrt(s) n) of its range, and the update, clipped
to sqrt(1 - k s) C beside k such metrics, pays for it: so s is no larger than the wanted error asks for.
"""

from __future__ import annotations

# A metric's mean over so many rounds is known to this part of its range (one standard deviation): enough to see a
# loss fall, and a hundredth of the update's norm on the default task.
ERROR, ROUNDS = 0.05, 10
MOST_SHARE = 0.1  # where the cohort is too small, metrics get more noise and the update keeps its norm


def least_share(noise_over_clip: float, expected_size: float, metrics: int) -> float:
    """Return the share of the squared norm that all metrics take together, in [0, MOST_SHARE].

    Args:
      noise_over_clip: standard deviation of a round's noise over the clipping norm.
      expected_size: of the cohort, the fixed denominator.
      metrics: how many there are.
    """
    return min(metrics * (noise_over_clip / (2 * ERROR * expected_size)) ** 2 / ROUNDS, MOST_SHARE)
