"""Pictures of an additive model on a report's page: shapes, heat maps of pairs and survival curves."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from shared.reports import texts_of, validated

from fedveil.evidence.content import report_of
from fedveil.evidence.model_pictures import LETTER, MAX_SHAPES, model_pictures
from fedveil.evidence.page import page_of
from fedveil.evidence.page_text import active_parts, differences
from fedveil.run.run_files import read_run

SHAPES: dict[str, Any] = {
    "scores": ["ill", "well"],
    "intercept": [0.1, -0.1],
    "shapes": [
        {"column": "age", "range": 2.0, "edges": [18, 40, 100], "values": [[-1.0, 1.0], [0.5, -0.5]]},
        {
            "column": "sex",
            "range": 0.2,
            "words": ["f", "m"],
            "values": [[0.1, -0.1], [0, 0]],
            "missing": [0.3, 0],
        },
    ],
}


def test_additive_model_is_drawn_as_its_shapes(kept: Path) -> None:
    report = validated(report_of(read_run(kept), shapes=SHAPES))
    columns = [(each["column"], each["score"]) for each in report["shapes"]["shapes"]]
    assert columns == [("age", "ill"), ("age", "well"), ("sex", "ill"), ("sex", "well")]  # the furthest first
    page = page_of(report)
    assert all(f'id="shape-{place}-title"' in page for place in range(4))
    shown = texts_of(page)
    assert (shown["/shapes/shapes/0/lowest"], shown["/shapes/shapes/0/highest"]) == ("-1", "1")
    assert shown["/shapes/shapes/2/missing"] == "0.3" and "/shapes/shapes/0/missing" not in shown
    assert differences(page, report) == []


def test_many_shapes_are_left_to_the_json(kept: Path) -> None:
    many = {**SHAPES, "shapes": [{**SHAPES["shapes"][0], "column": f"column {at}"} for at in range(40)]}
    report = report_of(read_run(kept), shapes=many)
    page = page_of(report)
    assert len(report["shapes"]["shapes"]) == 80 and page.count('id="shape-') == MAX_SHAPES
    assert "has all of them" in page and len(page.encode()) < 300_000
    flat = {**SHAPES, "shapes": [{**each, "values": [[0, 0], [0, 0]]} for each in SHAPES["shapes"]]}
    assert "shape-0" in page_of(report_of(read_run(kept), shapes=flat))


def pair(levels: list[dict[str, Any]], values: list[list[float]]) -> dict[str, Any]:
    names = " x ".join(each["column"] for each in levels)
    return {"column": names, "range": 2.0, "levels": levels, "values": [values], "missing": [0.0]}


AGES, WARDS = (
    {"column": "age", "edges": [18, 40, 100]},
    {"column": "ward", "words": ["a", "a long word", "c"]},
)


def test_a_pair_is_drawn_as_a_grid_with_its_numbers(kept: Path) -> None:
    values = [[0.5, -0.25, -0.25], [-0.5, 0.25, 0.25]]
    model = {"scores": ["ill"], "intercept": [0.0], "shapes": [pair([AGES, WARDS], values)]}
    report = validated(report_of(read_run(kept), shapes=model))
    page = page_of(report)
    assert differences(page, report) == [] and active_parts(page) == []
    drawn = model_pictures(report)["shape-0"]
    cells = re.findall(r'<rect class="cell (\w+)" x="([\d.]+)" y="([\d.]+)".*?fill-opacity:([\d.]+)', drawn)
    assert [look for look, *_ in cells] == ["gain", "loss", "loss", "loss", "gain", "gain"]
    places = [(float(x), float(y)) for _, x, y, _ in cells]
    assert places[0][0] == places[3][0] < places[1][0] and places[0][1] > places[3][1]  # ages ascend upwards
    assert [opacity for *_, opacity in cells] == ["0.55", "0.28", "0.28"] * 2
    assert ">-0.25</text>" in drawn and ">40</text>" in drawn and ">a long word</text>" in drawn
    assert "most 0.5 at 18 to 40, a</title>" in drawn


def test_a_large_pair_is_drawn_without_numbers(kept: Path) -> None:
    words = {"column": "ward", "words": [f"ward {number}" for number in range(20)]}
    model = {"scores": ["ill"], "intercept": [0.0], "shapes": [pair([words, AGES], [[0.1, -0.1]] * 20)]}
    wide = {**model, "shapes": [pair([AGES, words], [[0.1] * 20, [-0.1] * 20])]}
    for each, numbers in ((model, 40), (wide, 0)):
        drawn = model_pictures(report_of(read_run(kept), shapes=each))["shape-0"]
        assert drawn.count("<rect") == 40 and len(re.findall(r"0\.10</text>", drawn)) == numbers


@pytest.mark.parametrize(("count", "length"), [(8, 9), (60, 1), (60, 9), (400, 9)], ids=str)
def test_words_below_a_wide_pair_do_not_overlap(count: int, length: int, kept: Path) -> None:
    words = {"column": "ward", "words": [f"{at % 10}" * length for at in range(count)]}
    wide = pair([AGES, words], [[0.1] * count, [-0.1] * count])
    model = {"scores": ["ill"], "intercept": [0.0], "shapes": [wide]}
    drawn = model_pictures(report_of(read_run(kept), shapes=model))["shape-0"]
    below = re.findall(r'class="tick middle" x="([\d.]+)" y="[\d.]+">([^<]+)<', drawn)
    spans = [(float(x), len(word) * LETTER / 2) for x, word in below]
    assert len(spans) > 5 and below[0][1][0] == "0"
    assert all(one + half + other + LETTER <= two + 0.2 for (one, half), (two, other) in pairwise(spans))


def test_curves_of_survival_have_a_key_and_their_ends(kept: Path) -> None:
    curves = [{"of": "no", "survival": [1.0, 0.5]}, {"of": "yes", "survival": [1.0, 0.75]}]
    names, columns = {"time": "weeks", "event": "relapse 1"}, [{"column": "treated", "curves": curves}]
    survival = {**names, "times": [0.0, 30.0], "baseline": [1.0, 0.625], "columns": columns}
    report = validated(report_of(read_run(kept), shapes={**SHAPES, "survival": survival}))
    page, drawn = page_of(report), model_pictures(report)["survival-0"]
    assert differences(page, report) == [] and active_parts(page) == []
    assert drawn.count('class="line') == 3 and "no: 50% at 30, 50% at 30; yes: 75% at 30" in drawn
    shown = texts_of(page)
    assert shown["/survival/columns/0/curves/1/of"] == "yes"
    assert shown["/survival/columns/0/curves/1/survival/1"] == "75 %"
    band = {"time": 30.0, "value": 0.6, "low": 0.5, "high": 0.7}
    table = {"confidence": 0.95, "rows": 9, "clipped": 0.5, "information": 1.0, "coefficients": []}
    with_band = validated({**report, "coefficients": {**table, "baseline": [band]}})
    assert model_pictures(with_band)["survival-0"].count('class="interval') == 1
    assert "intervals of the dashed curve" in page_of(with_band)
    assert shown["/survival/baseline/1"] == "62.5 %" and '<i class="key epsilon"></i>' in page
