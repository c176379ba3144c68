"""Differences of clients' own models to others: exact without noise, within a norm of 1, and intervals that hold."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from fedveil.base.refusal import Refusal
from fedveil.privacy.statistics.evaluation import (
    FIGURES,
    GAIN_NAMES,
    GAINS,
    LOCAL_ONLY,
    PERSONAL,
    Evaluation,
    HeldOutMeans,
    evaluation_from_json,
)
from fedveil.privacy.statistics.gains import gain_cells

ASKED = Evaluation("run evaluation", 0.2, figures=(*FIGURES, *GAINS))
DIFFERENCES = (-0.2, -0.01, 0.0, 0.0, 0.02, 0.05, 0.3, 1.0)


def summed(asked: Evaluation, clients: list[HeldOutMeans | None]) -> dict[str, np.ndarray]:
    parts = [asked.contribution(each) for each in clients]
    return {each.name: np.sum([part[each.name] for part in parts], axis=0) for each in asked.segments}


def clients_with(differences: list[float]) -> list[HeldOutMeans | None]:
    return [HeldOutMeans(0.5, 1.0, {PERSONAL: each, LOCAL_ONLY: -each}) for each in differences]


@pytest.mark.parametrize("bound", [1.0, 4.0])
def test_sums_without_noise_give_the_exact_differences(bound: float) -> None:
    asked = replace(ASKED, bound=bound)
    clients = clients_with([each * bound for each in DIFFERENCES])
    some_without = [*clients, None, HeldOutMeans(0.5, 1.0)]
    answers = dict(asked.answers(summed(asked, some_without), 0.0, 10))
    mean, gains, losses, larger = answers[GAIN_NAMES[PERSONAL]]
    assert mean.name == "personal - shared" and mean.value == pytest.approx(bound * np.mean(DIFFERENCES))
    assert (gains.value, losses.value, larger.value) == pytest.approx((4 / 8, 2 / 8, 1 / 8))
    assert answers[GAIN_NAMES[LOCAL_ONLY]][0].value == pytest.approx(-bound * np.mean(DIFFERENCES))


def test_a_client_without_an_own_model_is_in_no_difference() -> None:
    sums = summed(ASKED, [HeldOutMeans(0.5, 1.0), HeldOutMeans(0.5, 1.0, {PERSONAL: math.nan})])
    assert not sums[GAIN_NAMES[PERSONAL]].any() and not sums[GAIN_NAMES[LOCAL_ONLY]].any()
    figures = dict(ASKED.answers(sums, 0.0, 2))[GAIN_NAMES[PERSONAL]]
    assert [each.has_value for each in figures] == [False] * 4


@pytest.mark.parametrize("difference", [*DIFFERENCES, -1.0, 7.0, -math.inf])
def test_a_difference_fits_the_norm_of_its_segment(difference: float) -> None:
    assert np.linalg.norm(gain_cells(difference, 1.0)) <= 1.0
    whole = ASKED.contribution(HeldOutMeans(1.0, 5.0, dict.fromkeys(GAINS, difference)))
    assert sum(float(np.sum(part**2)) for part in whole.values()) <= len(ASKED.figures) + 1e-9


def test_intervals_of_differences_hold_the_truth_in_95_of_100() -> None:
    draw, noise = np.random.default_rng(2), 3.0
    differences = draw.normal(0.05, 0.1, 800).clip(-1, 1)
    sums = summed(ASKED, clients_with(differences.tolist()))
    truths = [differences.mean(), (differences > 0).mean(), (differences < 0).mean()]
    within = np.zeros(3)
    for _ in range(500):
        noised = {
            name: cells + draw.normal(0, ASKED.sigma(noise), cells.shape) for name, cells in sums.items()
        }
        figures = dict(ASKED.answers(noised, noise, 800))[GAIN_NAMES[PERSONAL]]
        within += [each.low <= truth <= each.high for each, truth in zip(figures, truths, strict=False)]
    assert (within / 500 > 0.92).all() and (within / 500 < 0.98).all(), within / 500


def test_records_have_no_differences_of_own_models() -> None:
    with pytest.raises(Refusal, match="own model depends on all its records"):
        Evaluation("run evaluation", 0.2, figures=("metric", "clients", PERSONAL), records=4.0)
    assert evaluation_from_json(ASKED.text) == ASKED
