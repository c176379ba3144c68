"""Pairs by their cross tables: exact tests of statsmodels' form without noise, calibration with it, norms and refusals."""

import shlex
from itertools import combinations

import numpy as np
import pytest
from scipy.stats import chi2
from sklearn.linear_model import LinearRegression, LogisticRegression

from fedveil.base.refusal import Refusal
from fedveil.configs.settings import settings_from_overrides
from fedveil.privacy.statistics.columns import Bins, Numbers
from fedveil.privacy.statistics.inquiry import read_inquiry
from fedveil.privacy.statistics.pairs import Amount, Event, Levels, PairStrengths

COLUMNS = (
    Levels(Bins("age", edges=(0.0, 1.0, 2.0, 3.0))),
    Levels(Bins("ward", words=("a", "b", "c")), (0, 1, 1)),
    Levels(Bins("dose", edges=(0.0, 0.5, 1.0))),
)
EVENT = Event(Levels(Bins("ill", words=("no", "yes"))))
AMOUNT = Amount(Numbers("pain", -2.0, 2.0))
ALL = tuple(combinations(range(3), 2))


def table(rows: int, stream: np.random.Generator, strength: float = 0.0) -> dict[str, np.ndarray]:
    """Return rows whose label has an interaction of age and dose of this strength."""
    age, ward, dose = stream.uniform(0, 3, rows), stream.integers(0, 3, rows), stream.random(rows)
    score = (age > 1) + 0.7 * (dose > 0.5) - 0.6 * (ward == 0) - 0.5
    score = score + strength * np.where((age > 2) ^ (dose > 0.5), 1, -1)
    return {
        "age": age,
        "ward": np.array(list("abc"))[ward],
        "dose": dose,
        "ill": np.where(stream.random(rows) < 1 / (1 + np.exp(-score)), "yes", "no"),
        "pain": np.clip(0.3 * score + 0.3 * stream.standard_normal(rows), -2, 2),
    }


def dummies(rows: dict[str, np.ndarray]) -> np.ndarray:
    age, dose = rows["age"].astype(int), (rows["dose"] > 0.5).astype(int)
    return np.hstack([np.eye(3)[age], np.eye(2)[dose]])


def test_a_number_without_noise_has_the_sum_of_squares_of_fast() -> None:
    rows = table(3000, np.random.default_rng(0), 0.4)
    statistic = PairStrengths(AMOUNT, COLUMNS, ((0, 2),))
    ((chi_square, freedom, count),) = statistic.interactions(statistic.count(rows)[0], 0.0)
    fit = LinearRegression().fit(dummies(rows), rows["pain"])
    rest, cells = (
        rows["pain"] - fit.predict(dummies(rows)),
        rows["age"].astype(int) * 2 + (rows["dose"] > 0.5),
    )
    reduction = np.bincount(cells, rest) ** 2 / np.bincount(
        cells
    )  # of FAST: what means by cell explain of the rest
    assert freedom == 2 and count == pytest.approx(3000)
    assert chi_square == pytest.approx(reduction.sum() / np.mean(rest**2), rel=1e-6)


def test_an_event_without_noise_has_the_score_test_of_its_odds() -> None:
    rows = table(3000, np.random.default_rng(1), 0.3)
    statistic = PairStrengths(EVENT, COLUMNS, ((0, 2),))
    ((chi_square, freedom, _),) = statistic.interactions(statistic.count(rows)[0], 0.0)
    ill = rows["ill"] == "yes"
    chances = (
        LogisticRegression(C=1e6, tol=1e-10, max_iter=1000)
        .fit(dummies(rows), ill)
        .predict_proba(dummies(rows))[:, 1]
    )
    cells = rows["age"].astype(int) * 2 + (rows["dose"] > 0.5)
    design = np.hstack([dummies(rows), np.eye(6)[cells]])
    score, information = design.T @ (ill - chances), design.T @ ((chances * (1 - chances))[:, None] * design)
    assert freedom == 2
    assert chi_square == pytest.approx(score @ np.linalg.pinv(information, rcond=1e-9) @ score, rel=1e-4)


def test_steep_effects_alone_are_no_interaction() -> None:
    chances = 1 / (1 + np.exp(-(np.array([[-6.0], [0.0], [4.0]]) + np.array([-2.0, 4.0]))))
    cells = 1e5 * np.concatenate([chances.ravel(), 1 - chances.ravel()])
    ((chi_square, freedom, _),) = PairStrengths(EVENT, COLUMNS, ((0, 2),)).interactions(cells, 0.0)
    assert freedom == 2 and chi_square < 0.01


@pytest.mark.parametrize("label", [EVENT, AMOUNT], ids=["event", "number"])
@pytest.mark.parametrize("sigma", [0.0, 25.0], ids=["exact", "noisy"])
def test_no_pair_without_interaction_is_above_the_noise(label: Event | Amount, sigma: float) -> None:
    stream = np.random.default_rng(2)
    statistic, tests = PairStrengths(label, COLUMNS, ALL), []
    for _ in range(300):
        cells, _ = statistic.count(table(4000, stream))
        tests += statistic.interactions(cells + sigma * stream.standard_normal(cells.shape), sigma)
    rejected = np.mean([each.chi_square > chi2.ppf(0.95, each.freedom) for each in tests])
    assert 0.03 < rejected < 0.075


def test_intervals_of_a_clear_pair_cover_its_share() -> None:
    stream, sigma = np.random.default_rng(3), 15.0
    statistic = PairStrengths(EVENT, COLUMNS, ((0, 2),))
    (many,) = statistic.interactions(statistic.count(table(500_000, stream, 0.4))[0], 0.0)
    true, hits = many.excess / many.rows, []
    for _ in range(400):
        cells, _ = statistic.count(table(4000, stream, 0.4))
        figure, _ = statistic.answer(cells + sigma * stream.standard_normal(cells.shape), sigma)
        hits.append(figure.low <= true <= figure.high)
    assert 0.92 < np.mean(hits) < 0.98


@pytest.mark.parametrize("label", [EVENT, AMOUNT], ids=["event", "number"])
def test_a_row_adds_at_most_the_norm(label: Event | Amount) -> None:
    statistic = PairStrengths(label, COLUMNS, ALL)
    rows = {"age": [0.1], "ward": ["c"], "dose": [0.9], "ill": ["yes"], "pain": [2.0]}
    cells, _ = statistic.count({name: np.array(cell) for name, cell in rows.items()})
    assert np.linalg.norm(cells) == pytest.approx(statistic.row_norm)


def test_pairs_above_the_noise_come_first_with_their_key() -> None:
    statistic = PairStrengths(EVENT, COLUMNS, ALL)
    cells, _ = statistic.count(table(20_000, np.random.default_rng(4), 0.5))
    first, *_, key = statistic.answer(
        cells + 10 * np.random.default_rng(5).standard_normal(cells.shape), 10.0
    )
    assert first.name == "age x dose" and first.words.startswith("above the noise")
    assert (key.value, key.words) == (1.0, '"task.pairs=[[age,dose]]"')


@pytest.mark.parametrize("name", ["a b", "x (mg)", "it's", "naïve", "a,b", "[0]"], ids=str)
def test_the_key_of_any_names_is_read_as_they_are(name: str) -> None:
    columns = (Levels(Bins(name, edges=COLUMNS[0].bins.edges)), *COLUMNS[1:])
    cells, _ = PairStrengths(EVENT, COLUMNS, ALL).count(table(20_000, np.random.default_rng(4), 0.5))
    *_, figure = PairStrengths(EVENT, columns, ALL).answer(cells, 0.0)
    (key,) = shlex.split(figure.words)
    settings = settings_from_overrides(["task=csv", "task.folder=wards", "task.simulated=true", key])
    assert settings.model_dump()["task"]["pairs"][0] == (name, "dose")


def test_noise_that_drowns_the_cells_leaves_no_value() -> None:
    statistic = PairStrengths(EVENT, COLUMNS, ALL)
    *figures, key = statistic.answer(np.full(statistic.shape, 2.0), 100.0)
    assert not any(each.has_value for each in figures)
    assert key.words.startswith("no pair is above the noise")


def test_a_missing_cell_counts_for_no_pair_of_its_column() -> None:
    statistic = PairStrengths(EVENT, COLUMNS, ALL)
    rows = {"age": [np.nan], "ward": ["c"], "dose": [0.9], "ill": ["yes"]}
    cells, _ = statistic.count({name: np.array(cell) for name, cell in rows.items()})
    assert cells.sum() == 1


def asked(**changes: object) -> dict[str, object]:
    question = {"kind": "pairs", "of": "ill", "categories": ["no", "yes"]}
    columns = {"age": [0, 1, 2], "ward": ["a", ["b", "c"]]}
    return {"name": "first", "records": 100, "ask": [{**question, "columns": columns, **changes}]}


def test_a_question_reads_bins_words_and_groups_of_words() -> None:
    (question,) = read_inquiry(asked()).questions
    assert question.statistic == PairStrengths(
        Event(Levels(Bins("ill", words=("no", "yes")), (0, 1))),
        (Levels(Bins("age", edges=(0, 1, 2))), Levels(Bins("ward", words=("a", "b", "c")), (0, 1, 1))),
        ((0, 1),),
    )


def test_numbers_are_words_of_a_label() -> None:
    for categories, groups in (([0, 1], (0, 1)), ([0, [1, 2]], (0, 1, 1))):
        (question,) = read_inquiry(asked(categories=categories)).questions
        assert isinstance(question.statistic, PairStrengths)
        words = tuple(map(str, range(len(groups))))
        assert question.statistic.label == Event(Levels(Bins("ill", words=words), groups))


def test_sixteen_numbers_have_few_enough_cells() -> None:
    columns = {f"c{number}": [0, 1, 2, 3, 4] for number in range(16)}
    (question,) = read_inquiry(asked(columns=columns)).questions
    assert question.statistic.shape == (120 * 32,)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"categories": ["a", "b", "c"]}, r"categories=.*give two categories"),
        ({"categories": [0, 1, 2]}, r"categories=.*give two categories"),
        ({"categories": None}, r"low=None: declare the bounds"),
        ({"columns": None}, r"columns=None: give each column its edges or categories"),
        ({"columns": {"age": [0, 1]}}, r"columns=\['age'\]: give at least two"),
        (
            {"columns": {"age": [0, 2, 4], "sex": [0, 1]}},
            r"columns\.sex=\['0 to 1'\]: is one level.*\[\[0\], \[1\]\]",
        ),
        ({"pairs": [["age", "age"]]}, r"pairs=\['age', 'age'\]: give pairs of two"),
        ({"pairs": [["age", "ward"], ["ward", "age"]]}, r"pairs=\['ward', 'age'\].*each once"),
        ({"pairs": [["age", "sex"]]}, r"pairs=\['age', 'sex'\]"),
        (
            {"columns": {f"c{n}": list(range(5)) for n in range(17)}},
            r"columns=17: their pairs have 4352 cells, and 4096 are the most; name fewer `columns`.*or few `pairs`",
        ),
    ],
    ids=["three", "numbers", "bounds", "columns", "one", "level", "twice", "again", "other", "cells"],
)
def test_a_question_that_has_no_answer_is_refused(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(Refusal, match=sentence):
        read_inquiry(asked(**changes))
