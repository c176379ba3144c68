"""Memorisation: the exposure of secrets, and the p-value of a look."""

import math

import numpy as np
import pytest
from scipy import stats

from fedveil.privacy.audit.memorisation import Exposure, MemorisationResult, exposure, fisher, pooled_p


def test_the_p_value_of_a_look_is_the_smallest_times_their_number() -> None:
    assert pooled_p([]) == 1.0
    assert pooled_p([MemorisationResult("exposure", 0.01), MemorisationResult("loss", 0.2)]) == 0.02
    assert pooled_p([MemorisationResult("exposure", 0.9), MemorisationResult("loss", 0.8)]) == 1.0


def test_missing_number_is_evidence() -> None:
    assert pooled_p([MemorisationResult("exposure", math.nan), MemorisationResult("loss", 0.2)]) == 0.0


def test_exposure_is_the_rank_in_bits() -> None:
    found = exposure(0.5, np.arange(1.0, 1024.0))
    assert found == Exposure(1, 1024)
    assert (found.bits, found.p_value) == (10.0, 1 / 1024)
    assert exposure(3.0, np.arange(1.0, 1024.0)) == Exposure(4, 1024)


def test_ties_and_losses_that_are_no_numbers_count_against_a_secret() -> None:
    assert exposure(1.0, np.ones(99)).p_value == 1
    assert exposure(math.nan, np.zeros(99)).p_value == 1
    assert exposure(1.0, np.full(99, math.nan)).p_value == 1


def test_a_secret_that_was_not_learnt_is_rarely_exposed() -> None:
    rng = np.random.default_rng(0)
    p_values = [exposure(losses[0], losses[1:]).p_value for losses in rng.standard_normal((2000, 200))]
    assert abs(np.mean(np.array(p_values) <= 0.05) - 0.05) < 3 * math.sqrt(0.05 * 0.95 / 2000)
    pooled = [fisher(p_values[i : i + 10]) for i in range(0, 2000, 10)]
    assert sum(p < 0.05 for p in pooled) <= 10 + 3 * math.sqrt(10)
    assert stats.kstest(pooled, "uniform").pvalue > 1e-3


def test_fisher_is_scipys() -> None:
    given_p = [0.02, 0.3, 1.0, 0.0007]
    assert fisher(given_p) == pytest.approx(stats.combine_pvalues(given_p, "fisher").pvalue, rel=1e-12)
    assert fisher([1e-4] * 6) < 1e-12
    assert fisher([0.5, 0.0]) == 0
