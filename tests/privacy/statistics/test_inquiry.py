"""Statistics of questions: NumPy without noise, the stated errors with it, and what is refused or cannot be said."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from fedveil.base.refusal import Refusal
from fedveil.privacy.mechanisms.private_sum import add_noise, decode_counts, encode
from fedveil.privacy.mechanisms.randomness import Randomness
from fedveil.privacy.mechanisms.sum_spec import SumSpec
from fedveil.privacy.statistics.figure import ratio_of
from fedveil.privacy.statistics.inquiry import Inquiry, from_json, read_inquiry

ROWS, CLIENTS, CELLS = 40, 60, 1 << 28
DRAWS, TOLERANCE = 1000, 0.05
WORDS = ("calm", "mild", "bad")
AGES = {"of": "age", "low": 20, "high": 100}
ASK = [
    {"kind": "count", "name": "rows"},
    {"kind": "mean", "name": "mean age", **AGES},
    {"kind": "variance", "name": "spread", **AGES},
    {"kind": "histogram", "name": "decades", "of": "age", "edges": [20, 40, 60, 80, 100]},
    {"kind": "quantiles", "name": "quartiles", **AGES},
    {
        "kind": "crosstable",
        "name": "pain by age",
        "of": "pain",
        "categories": list(WORDS),
        "by": "age",
        "by_edges": [20, 60, 100],
    },
    {"kind": "correlation", "name": "together", "of": {"age": [20, 100], "weight": [40, 140]}},
]


def inquiry(*asked: dict[str, Any], **keys: object) -> Inquiry:
    return read_inquiry({"name": "intake", "records": ROWS, "ask": list(asked or ASK), **keys})


def table(number: int) -> dict[str, np.ndarray]:
    draws = np.random.default_rng([3, number])
    age = draws.normal(60, 12, ROWS).clip(20, 100)
    weight = (80 + 0.8 * (age - 60) + draws.normal(0, 8, ROWS)).clip(40, 140)
    return {"age": age, "weight": weight, "pain": draws.choice(WORDS, ROWS, p=(0.5, 0.3, 0.2))}


@pytest.fixture(scope="module")
def pooled() -> dict[str, np.ndarray]:
    tables = [table(number) for number in range(CLIENTS)]
    return {name: np.concatenate([each[name] for each in tables]) for name in tables[0]}


def summed(asked: Inquiry) -> tuple[Any, SumSpec]:
    spec = SumSpec(1.0, asked.segments, cells=CELLS)
    return sum(encode({}, asked.contribution(table(n)), spec)[0].astype(float) for n in range(CLIENTS)), spec


def figures(asked: Inquiry, noise: float, seed: int = 0, sums: tuple[np.ndarray, SumSpec] | None = None):
    total, spec = sums or summed(asked)
    if noise:
        total, _ = add_noise(total.copy(), noise, spec, Randomness(seed).stream("noise", 1))
    counts = decode_counts(total, 0, spec)
    return {
        (each.name, figure.name): figure
        for each in asked.questions
        for figure in each.statistic.answer(counts[each.name], asked.sigma(each, noise))
    }


def truths(pooled: dict[str, np.ndarray]) -> dict[tuple[str, str], float]:
    age, pain = pooled["age"], pooled["pain"]
    found = {("rows", "rows"): float(len(age)), ("mean age", "mean"): age.mean()}
    found |= {("spread", "variance"): age.var(), ("spread", "standard deviation"): age.std()}
    counts, _ = np.histogram(age, [20, 40, 60, 80, 100])
    found |= {
        ("decades", f"{low} to {low + 20}"): float(c) for low, c in zip((20, 40, 60, 80), counts, strict=True)
    }
    for word in WORDS:
        found["pain by age", f"{word}, 20 to 60"] = float(((pain == word) & (age < 60)).sum())
    found["together", "age, weight"] = float(np.corrcoef(age, pooled["weight"])[0, 1])
    return found


def test_without_noise_answers_are_numpys(pooled: dict[str, np.ndarray]) -> None:
    found = figures(inquiry(), 0.0)
    for key, truth in truths(pooled).items():
        assert found[key].value == pytest.approx(truth, rel=1e-7, abs=1e-7), key
    bin_width = 80 / 256
    for wanted in (0.25, 0.5, 0.75):
        figure = found["quartiles", f"quantile {wanted:g}"]
        truth = np.quantile(pooled["age"], wanted)
        assert abs(figure.value - truth) <= bin_width and figure.low <= truth <= figure.high


def test_errors_are_those_of_the_formula(pooled: dict[str, np.ndarray]) -> None:
    asked, noise = inquiry(), 0.02
    sums, errors = summed(asked), {}
    for seed in range(DRAWS):
        for key, figure in figures(asked, noise, seed, sums).items():
            errors.setdefault(key, []).append((figure.value, figure.low, figure.high))
    over: dict[str, list[float]] = {}  # of each question, squared errors over what is stated
    for key, truth in truths(pooled).items():
        value, low, high = np.array(errors[key]).T
        stated = np.mean((high - low) / 2) / 1.959963984540054
        over.setdefault(key[0], []).append(np.mean((value - truth) ** 2) / stated**2)
        assert 0.93 <= np.mean((low <= truth) & (truth <= high)) <= 0.97, key
    for name, ratios in over.items():
        assert math.sqrt(np.mean(ratios)) == pytest.approx(1, abs=TOLERANCE), name
    for wanted in (0.25, 0.5, 0.75):
        value, low, high = np.array(errors["quartiles", f"quantile {wanted:g}"]).T
        truth = np.quantile(pooled["age"], wanted)
        assert np.mean((low <= truth) & (truth <= high)) >= 0.95


def test_the_spread_of_quantiles_is_that_of_their_least_squares() -> None:
    asked: Any = inquiry({"kind": "quantiles", "branches": 4, **AGES}).questions[0].statistic
    draws = np.random.default_rng(0).normal(size=(20_000, *asked.shape))
    leaves = np.array([asked.consistent(each) for each in draws])
    below = np.concatenate([np.zeros((len(leaves), 1)), leaves.cumsum(1)], axis=1)
    excess = below - 0.3 * below[:, -1:]
    np.testing.assert_allclose(excess.std(0), asked._spread(0.3), rtol=0.03, atol=1e-9)
    tree = np.concatenate([np.kron(np.eye(4), np.ones(4)), np.eye(16)])
    best, *_ = np.linalg.lstsq(tree, draws[0], rcond=None)
    np.testing.assert_allclose(leaves[0], best, atol=1e-9)


def test_a_row_adds_no_more_than_its_norm() -> None:
    asked = inquiry()
    for number in range(20):
        one = {name: values[:1] for name, values in table(number).items()}
        for each in asked.questions:
            cells, _ = each.statistic.count(one)
            assert np.linalg.norm(cells) <= each.statistic.row_norm * (1 + 1e-12), each.name


def test_values_out_of_bounds_are_clipped_and_their_share_reported() -> None:
    rows = {"age": np.array([10.0, 50.0, math.nan, 200.0]), "pain": np.array(["calm", "odd", "", "bad"])}
    asked = inquiry(
        {"kind": "mean", "name": "m", **AGES},
        {"kind": "histogram", "name": "h", "of": "pain", "categories": list(WORDS)},
    )
    values = asked.contribution(rows)
    np.testing.assert_allclose(values["m"], [3, -1 - 0.25 + 1])
    assert values["m: clipped"] == 0.5 and values["h: clipped"] == 0.25
    np.testing.assert_allclose(values["h"], [1, 0, 1])


def test_client_with_more_rows_than_count_is_reported_as_clipped() -> None:
    asked = inquiry({"kind": "count", "name": "c"}, records=10)
    values = asked.contribution({"age": np.zeros(40)})
    assert values["c: clipped"] == 0.75
    spec = SumSpec(1.0, asked.segments, cells=CELLS)
    total = encode({}, values, spec)[0].astype(float)
    assert decode_counts(total, 0, spec)["c"][0] == pytest.approx(10)


def test_a_client_without_rows_or_with_none_that_count_answers_zeros() -> None:
    asked = inquiry()
    empty = {name: values[:0] for name, values in table(0).items()}
    for name, value in asked.contribution(empty).items():
        assert not np.any(value), name


def test_ratio_with_rows_lost_in_noise_has_no_figure() -> None:
    assert not ratio_of("mean", 1.0, 2.0, 5.0).has_value
    assert not figures(inquiry(), 500.0)["spread", "variance"].has_value
    found = ratio_of("mean", 30.0, 100.0, 1e-9)
    assert found.low == pytest.approx(0.3) == found.high


def test_an_inquiry_travels_as_it_was_read() -> None:
    asked = inquiry(why="How ill are they?", purpose="triage")
    again = from_json(asked.text)
    assert again == asked and again.segments == asked.segments
    assert {each.purpose for each in again.segments} == {"triage"}
    assert math.fsum(each.share or 0.0 for each in again.segments) == pytest.approx(1)


def test_columns_are_read_in_one_order_on_both_sides() -> None:
    asked = inquiry({"kind": "correlation", "of": {"weight": [40, 140], "age": [20, 100]}})
    again = from_json(asked.text)
    statistic: Any = again.questions[0].statistic
    assert again == asked and [each.name for each in statistic.of] == ["age", "weight"]
    figure = figures(again, 0.0, sums=summed(asked))["correlation age, weight", "age, weight"]
    other = figures(inquiry(ASK[-1]), 0.0)["together", "age, weight"]
    assert figure.value == pytest.approx(other.value)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"ask": []}, "ask"),
        ({"ask": [{"kind": "median"}]}, "kind"),
        ({"ask": [{"kind": "mean", "of": "age"}]}, "low"),
        ({"ask": [{"kind": "mean", "of": "age", "low": 5, "high": 5}]}, "age.low"),
        ({"ask": [{"kind": "mean", "of": "age", "low": math.nan, "high": 5}]}, "age.low"),
        ({"ask": [{"kind": "histogram", "of": "age"}]}, "age"),
        ({"ask": [{"kind": "histogram", "of": "age", "edges": [1, 1]}]}, "age.edges"),
        ({"ask": [{"kind": "histogram", "of": "age", "edges": [1, 2], "more": 1}]}, "histogram"),
        ({"ask": [{"kind": "count", "resolution": 0}]}, "resolution"),
        ({"ask": [{"kind": "correlation", "of": {"age": [0, 1]}}]}, "of"),
        ({"ask": [{"kind": "quantiles", **AGES, "quantiles": [1.5]}]}, "quantiles"),
        ({"ask": [{"kind": "histogram", "of": "a", "edges": list(range(5000))}]}, "histogram a"),
        ({"ask": [{"kind": "count"}, {"kind": "count"}]}, "ask"),
        ({"records": 0}, "records"),
        ({"records": None}, "records"),
        ({"name": ""}, "name"),
        ({"why": "a\nb"}, "why"),
        ({"wy": "a"}, "question"),
    ],
)
def test_a_mistake_is_refused_by_name(changed: dict[str, Any], named: str) -> None:
    with pytest.raises(Refusal) as refused:
        read_inquiry({"name": "intake", "records": 4, "ask": [{"kind": "count"}], **changed})
    assert refused.value.field == named
    if None in changed.values():
        assert "say how many rows of a client count in full" in refused.value.remedy


def test_json_of_no_client_is_refused() -> None:
    for text in ("{", "[" * 100, "x" * (1 << 17), json.dumps({"name": "a"})):
        with pytest.raises(Refusal):
            from_json(text)


def test_a_column_that_is_missing_is_named() -> None:
    with pytest.raises(Refusal, match="age"):
        inquiry().contribution({"weight": np.zeros(3)})
