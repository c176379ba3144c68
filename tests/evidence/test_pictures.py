"""Pictures of a report: shapes of additive models."""

import re
from pathlib import Path
from typing import Any

from shared.reports import edited, texts_of, validated

from fedveil.evidence.content import report_of
from fedveil.evidence.page import page_of
from fedveil.evidence.page_text import differences
from fedveil.evidence.pictures import MAX_SHAPES, exposed
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


def test_exposure_of_secrets_is_drawn_with_its_control(kept: Path) -> None:
    def with_secrets(fields: dict[str, Any]) -> None:
        figures = {"unplanted": 1.31, "limit": 9.966}
        bits = {16: 7.25, 1: 1.5}
        fields["audit"]["memorisation"] = [
            {"name": f"exposure_x{copies}", "p_value": 0.01, "shown": {"bits": each, **figures}}
            for copies, each in bits.items()
        ]

    plain = page_of(report_of(read_run(kept)))
    edited(kept, "result.json", with_secrets)
    report = validated(report_of(read_run(kept)))
    assert [(row.copies, row.bits) for row in exposed(report)] == [(1, 1.5), (16, 7.25)]
    page = page_of(report)
    assert 'id="chart-exposure-title"' in page and "chart-exposure" not in plain
    shown = texts_of(page)
    assert shown["/audit/by_heart/0/shown/bits"] == "7.25"
    text = re.sub(r"<[^>]*>", "", page)
    assert "Secrets that 16 clients hold: exposure 7.25 of 9.97 bits" in text
    assert "p-value 0.01, bits 7.25, unplanted 1.31, limit 9.966." in text
    assert differences(page, report) == []
