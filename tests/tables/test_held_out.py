"""Figures on public held-out rows: published intervals, scikit-learn's values, and a run."""

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import r2_score, roc_auc_score

from fedveil.tables.held_out import (
    area_under_roc,
    calibration_error,
    of_classes,
    of_numbers,
    reliability,
    wilson,
)


@pytest.mark.parametrize(
    ("hits", "of", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_intervals_of_shares_are_those_of_newcombe(hits: int, of: int, low: float, high: float) -> None:
    figure = wilson("", hits, of)  # Newcombe 1998, table I, method 3
    assert (round(figure.low, 4), round(figure.high, 4)) == (low, high)


def test_area_has_the_published_interval_of_delong() -> None:
    # Hanley and McNeil 1982, table I: ratings of 109 CT images; Stata's manual of roctab prints 0.8932, 0.83295, 0.95339.
    scores = np.repeat([1, 2, 3, 4, 5, 1, 2, 3, 4, 5], [33, 6, 6, 11, 2, 3, 2, 2, 11, 33]).astype(float)
    figure = area_under_roc("auc", scores, np.arange(109) >= 58)
    assert round(figure.value, 4) == 0.8932
    assert (round(figure.low, 5), round(figure.high, 5)) == (0.83295, 0.95339)


def test_area_of_a_perfect_ranking_has_a_lower_end() -> None:
    figure = area_under_roc("auc", np.arange(40.0), np.arange(40) >= 20)
    assert figure.value == figure.high == 1 and 0.83 < figure.low < 0.85


def test_values_of_classes_equal_those_of_scikit_learn() -> None:
    stream = np.random.default_rng(0)
    logits = stream.standard_normal((400, 2))
    targets = (stream.random(400) < 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))).astype(int)
    fields = of_classes(logits, targets, ["no", "yes"])
    by_name = {each["name"]: each for each in fields["figures"]}
    chances = 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))
    assert by_name["auc"]["value"] == pytest.approx(roc_auc_score(targets, chances))
    assert by_name["sensitivity"]["value"] == pytest.approx(np.mean(chances[targets == 1] > 0.5))
    assert by_name["specificity"]["value"] == pytest.approx(np.mean(chances[targets == 0] < 0.5))
    observed, predicted = calibration_curve(targets, chances, n_bins=10)
    bins = fields["reliability"]["bins"]
    assert [each["observed"] for each in bins] == pytest.approx(observed.tolist())
    assert [each["predicted"] for each in bins] == pytest.approx(predicted.tolist())
    assert by_name["calibration error"]["low"] < 0.02  # these probabilities are true


def test_calibration_error_of_sure_wrong_answers_is_large() -> None:
    chances, hits = np.full(200, 0.95), np.arange(200) % 2 == 0
    figure = calibration_error(chances, hits)
    assert figure.value == pytest.approx(0.45) and 0.35 < figure.low < 0.45 < figure.high < 0.55
    (only,) = reliability(chances, hits)
    assert only["count"] == 200 and only["low"] < 0.5 < only["high"]


def test_several_classes_have_recalls_and_areas_by_name() -> None:
    logits = np.eye(3)[np.arange(60) % 3] * 4
    names = [each["name"] for each in of_classes(logits, np.arange(60) % 3, ["a", "b", "c"])["figures"]]
    assert names == [
        "accuracy",
        "recall of a",
        "recall of b",
        "recall of c",
        "auc of a",
        "auc of b",
        "auc of c",
        "calibration error",
    ]


def test_intervals_of_numbers_contain_their_values() -> None:
    stream = np.random.default_rng(1)
    targets = stream.standard_normal(300)
    outputs = 0.8 * targets + 0.5 * stream.standard_normal(300)
    error, share = of_numbers(outputs[:, None], targets, 10.0)["figures"]
    assert error["value"] == pytest.approx(10 * np.abs(outputs - targets).mean())
    assert share["value"] == pytest.approx(r2_score(targets, outputs))
    spread = 10 * np.abs(outputs - targets).std() / np.sqrt(300)
    assert error["high"] - error["low"] == pytest.approx(2 * 1.96 * spread, rel=0.15)
    assert share["low"] < share["value"] < share["high"] < 1
