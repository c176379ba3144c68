"""Tests of ``record_plan``."""

import math

import numpy as np
import pytest

from fedveil.privacy.mechanisms.randomness import Randomness
from fedveil.strategies.record_plan import PoissonBatches, poisson_batches


def test_batches_are_poisson_draws_and_not_of_fixed_size() -> None:
    records, rate, steps = 200, 0.3, 4000
    stream = Randomness(5).stream("batches")
    drawn = [len(batch) for batch in PoissonBatches(rate, steps).draw(records, stream)]
    variance = records * rate * (1 - rate)
    assert np.mean(drawn) == pytest.approx(records * rate, abs=4 * math.sqrt(variance / steps))
    assert np.var(drawn) == pytest.approx(variance, rel=4 * math.sqrt(2 / steps))


def test_records_are_drawn_independently_and_none_is_preferred() -> None:
    records, steps = 20, 8000
    counts, pairs = np.zeros(records), 0
    for batch in PoissonBatches(0.25, steps).draw(records, Randomness(6).stream("batches")):
        assert np.all(np.diff(batch) > 0)
        counts[batch] += 1
        pairs += {0, 1} <= set(batch.tolist())
    spread = 5 * math.sqrt(steps * 0.25 * 0.75)
    assert np.all(np.abs(counts - steps * 0.25) < spread)
    assert abs(pairs - steps / 16) < 5 * math.sqrt(steps / 16)


@pytest.mark.parametrize(
    ("records", "batch_size", "epochs", "rate", "steps"),
    [
        (100, 10, 1, 0.1, 10),
        (100, 10, 3, 0.1, 30),
        (7, 10, 2, 1.0, 2),
        (25, 10, 1, 0.4, 3),
        (1, 1, 1, 1.0, 1),
    ],
)
def test_as_many_batches_as_the_epochs_need(
    records: int, batch_size: int, epochs: int, rate: float, steps: int
) -> None:
    batches = poisson_batches(records, batch_size, epochs)
    assert (batches.sample_rate, batches.steps) == (rate, steps)
