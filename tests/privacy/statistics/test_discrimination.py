"""Discrimination from one cross table: values of scikit-learn without noise, coverage with it, and refusals."""

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, roc_auc_score

from fedveil.base.refusal import Refusal
from fedveil.privacy.statistics.columns import Bins
from fedveil.privacy.statistics.discrimination import Discrimination
from fedveil.privacy.statistics.inquiry import read_inquiry

EDGES = tuple(number / 10 for number in range(11))
QUESTION = Discrimination(Bins("ill", words=("no", "yes")), Bins("score", EDGES))


def table(rows: int, stream: np.random.Generator) -> dict[str, np.ndarray]:
    score = stream.beta(2, 2, rows)
    return {"score": score, "ill": np.array(["no", "yes"])[(stream.random(rows) < score).astype(int)]}


def test_without_noise_the_figures_are_those_of_scikit_learn() -> None:
    rows = table(500, np.random.default_rng(0))
    cells, outside = QUESTION.count(rows)
    by_name = {each.name: each for each in QUESTION.answer(cells, 0.0)}
    true, called = rows["ill"] == "yes", rows["score"] >= 0.5
    (right_no, wrong_no), (wrong_yes, right_yes) = confusion_matrix(true, called)
    assert outside == 0
    assert by_name["auc"].value == pytest.approx(roc_auc_score(true, np.floor(10 * rows["score"])))
    assert by_name["sensitivity"].value == pytest.approx(right_yes / (right_yes + wrong_yes))
    assert by_name["specificity"].value == pytest.approx(right_no / (right_no + wrong_no))
    assert by_name["rows of yes called no"].value == wrong_yes
    assert by_name["observed at 0.5 to 0.6"].value == pytest.approx(
        np.mean(true[np.floor(10 * rows["score"]) == 5])
    )


def test_intervals_cover_the_population_with_noise() -> None:
    stream, sigma = np.random.default_rng(1), 4.0
    wide = {each.name: each.value for each in QUESTION.answer(QUESTION.count(table(400_000, stream))[0], 0.0)}
    names, hits = ("auc", "sensitivity", "specificity", "accuracy"), []
    for _ in range(400):
        cells, _ = QUESTION.count(table(800, stream))
        figures = {
            each.name: each
            for each in QUESTION.answer(cells + sigma * stream.standard_normal((2, 10)), sigma)
        }
        hits.append([figures[name].low <= wide[name] <= figures[name].high for name in names])
    coverage = np.mean(hits, axis=0)
    assert coverage.min() > 0.92 and coverage.max() < 0.985


def test_noise_that_drowns_a_class_leaves_no_value() -> None:
    cells = np.ones((2, 10))
    assert [each.has_value for each in QUESTION.answer(cells, 5.0)[:3]] == [False, False, False]


def test_label_has_two_words_and_the_threshold_is_an_edge() -> None:
    with pytest.raises(Refusal, match=r"categories=.*give two categories"):
        Discrimination(Bins("ill", words=("a", "b", "c")), Bins("score", EDGES))
    with pytest.raises(Refusal, match=r"threshold=0\.55: is none of the inner score_edges"):
        Discrimination(Bins("ill", words=("no", "yes")), Bins("score", EDGES), 0.55)


def test_a_question_has_tenths_of_the_models_score_by_default() -> None:
    plain = {"kind": "discrimination", "of": "ill", "categories": ["no", "yes"]}
    (question,) = read_inquiry({"name": "d", "records": 10, "ask": [plain]}).questions
    assert question.statistic == QUESTION
