"""The picture of a run: which charts it has, where their lines end, and that it is a document by itself."""

import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from fedveil.run.curve import curve

GUARANTEE = {
    "unit": "client",
    "adversary": "model",
    "delta": 1e-5,
    "epsilon": 1.2341,
    "curve": {"epsilon": [[1e-6, 1.5], [1e-5, 1.2341], [1e-4, 1.0]]},
}
NO_CURVE = GUARANTEE | {"adversary": "server", "curve": None}


def texts(history: list[dict[str, Any]], privacy: list[dict[str, Any]]) -> list[str]:
    """Return the titles, values and axis labels of the picture of a run."""
    picture = curve(history, privacy, "clinics & more")
    assert picture is not None
    shown = [
        each
        for each in ElementTree.fromstring(picture.svg).iter()
        if each.get("class", "").split(" ")[0] in ("label", "value")
    ]
    return [str(each.text) for each in shown]


def rows(**last: float | None) -> list[dict[str, Any]]:
    first = {"round": 1, "train/loss": 1.0, "invited": 9.0}
    return [first | dict.fromkeys(last, 0.25), first | {"round": 2} | last]


@pytest.mark.parametrize(
    ("history", "privacy", "shown"),
    [
        (rows(accuracy=0.9125), [], ["round", "held-out accuracy", "0.9125"]),
        (rows(accuracy=None), [], ["round", "held-out accuracy", "0.25"]),
        (rows(accuracy=math.nan), [], ["round", "held-out accuracy", "0.25"]),
        (rows(loss=math.inf), [], ["round", "held-out loss", "0.25"]),
        (rows(mae=37.5), [], ["round", "held-out mae", "37.5"]),
        ([rows()[0], rows()[1] | {"clients/accuracy": 0.5}], [], ["round", "clients/accuracy", "0.5"]),
        (rows(epsilon_client=0.5), [], ["round", "epsilon spent", "0.500 of one client"]),
        (
            rows(epsilon_client=0.50001, epsilon_record=math.inf),
            [],
            ["round", "epsilon spent", "0.501 of one client"],
        ),
        (
            rows(epsilon_client=2.0, epsilon_record=0.5),
            [],
            ["round", "epsilon spent", "2.000 of one client", "0.500 of one record"],
        ),
        (rows(accuracy=0.5)[1:], [], ["round", "held-out accuracy", "0.5"]),
        (
            rows(accuracy=0.5),
            [GUARANTEE, NO_CURVE],
            ["round", "held-out accuracy", "0.5", "delta", "epsilon", "1.235"],
        ),
    ],
)
def test_a_picture_has_a_chart_of_each_thing_that_a_run_has(
    history: list[dict[str, Any]], privacy: list[dict[str, Any]], shown: list[str]
) -> None:
    assert texts(history, privacy) == shown


def test_a_run_without_a_figure_has_no_picture() -> None:
    assert curve(rows(), [NO_CURVE], "clinics") is None
    assert curve([], [NO_CURVE], "clinics") is None


def test_a_picture_has_its_style_and_no_other_source(tmp_path: Path) -> None:
    picture = curve(rows(accuracy=0.5), [], "clinics & more")
    assert picture is not None
    picture.save(tmp_path / "curve.svg")
    text = (tmp_path / "curve.svg").read_text()
    assert "clinics &amp; more" in text and "<style>" in text
    assert "href" not in text and "url(" not in text and "<script" not in text
