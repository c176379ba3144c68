"""The share that metrics take is the least with which they are known as promised."""

import numpy as np
import pytest

from fedveil.privacy.mechanisms.private_sum import CohortSum, add_noise, decode
from fedveil.privacy.mechanisms.randomness import Randomness
from fedveil.privacy.mechanisms.sum_spec import ERROR, MAX_SHARE, ROUNDS, Segment, SumSpec, metrics_share

METRICS = (Segment("loss", 5.0), Segment("num-examples", 100.0))


def test_mean_over_the_rounds_is_as_exact_as_promised() -> None:
    noise, expected = 3.0, 100.0
    spec = SumSpec(1.0, METRICS, metrics_share(noise, expected, len(METRICS)))
    middle = np.zeros(len(METRICS))  # every client reports half of the bound, that is 0 on the grid
    means = []
    for repeat in range(600):
        rounds = [
            decode(
                add_noise(
                    CohortSum(middle.copy()).total, noise, spec, Randomness(1).stream("noise", repeat, number)
                )[0],
                {},
                spec,
                expected,
            )[1]["loss"]
            for number in range(ROUNDS)
        ]
        means.append(np.mean(rounds))
    assert np.std(means) == pytest.approx(ERROR * 5.0, rel=0.1)
    assert np.mean(means) == pytest.approx(2.5, abs=0.05)


def test_small_cohorts_and_much_noise_do_not_take_the_norm_away() -> None:
    assert metrics_share(8.0, 4.0, 2) == MAX_SHARE
    assert 0 < metrics_share(1.0, 1000.0, 2) < 1e-3
    assert metrics_share(1.0, 1000.0, 0) == 0.0
