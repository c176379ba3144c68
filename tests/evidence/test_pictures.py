"""Pictures of a report: shapes of additive models."""

from pathlib import Path

from shared.reports import texts_of, validated

from fedveil.evidence.content import report_of
from fedveil.evidence.page import page_of
from fedveil.evidence.page_text import differences
from fedveil.evidence.pictures import MAX_SHAPES
from fedveil.run.run_files import read_run

SHAPES = {
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
