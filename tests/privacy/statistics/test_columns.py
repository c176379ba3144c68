"""Columns as questions read them: cells of other types, and cells that are no numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fedveil.privacy.statistics.inquiry import read_inquiry


@pytest.mark.parametrize(
    "cells",
    [
        np.array(["1", "2", ""]),
        np.array(["1", "2", "unknown"]),
        np.array([1.0, "2", None], object),
        np.array([1, 2, 10**400], object),
    ],
)
@pytest.mark.parametrize(
    "asked", [{"kind": "mean", "low": 0, "high": 3}, {"kind": "histogram", "edges": [0, 1.5, 3]}]
)
def test_no_cell_that_is_no_number_makes_an_answer_fail(cells: np.ndarray, asked: dict[str, Any]) -> None:
    """Whether a client fails is seen by all and charged to nobody: it would tell of one row exactly."""
    question = read_inquiry({"name": "pain", "records": 3, "ask": [{"of": "pain", **asked}]})
    numbers = {"pain": np.array([1.0, 2.0, np.nan])}
    read, expected = (question.contribution(each) for each in ({"pain": cells}, numbers))
    assert {name: np.array(each).tolist() for name, each in read.items()} == {
        name: np.array(each).tolist() for name, each in expected.items()
    }


@pytest.mark.parametrize(
    ("cells", "one_is_other"),
    [
        (np.array([1, 2, 2]), np.array([1.0, 2.0, np.nan])),  # pandas' whole numbers once one is missing
        (np.array([1, 2, 2]), np.array(["1", "2", "x"])),
        (np.array([1.0, 2.0, 2.0]), np.array(["1.0", "2.0", ""])),
        (np.array([1, 2, 2]), np.array([1, 2, None], object)),
        (np.array([1.0, 2.0, 2.0], np.float32), np.array([1, 2, math.nan], object)),
    ],
)
@pytest.mark.parametrize(
    "asked",
    [
        {"kind": "histogram", "categories": [1, 2]},
        {"kind": "histogram", "categories": ["1.0", "2"]},
        {"kind": "top", "alphabet": "12", "longest": 1},
    ],
)
def test_a_row_that_is_another_type_leaves_the_others_in_their_bins(
    cells: np.ndarray, one_is_other: np.ndarray, asked: dict[str, Any]
) -> None:
    question = read_inquiry(
        {"name": "code", "unit": "record", "records": 3, "ask": [{"of": "code", **asked}]}
    )
    both = [question.contribution_of_records({"code": each}, 1.0) for each in (cells, one_is_other)]
    moved = math.sqrt(
        sum(float(((one - other) ** 2).sum()) for one, other in zip(*map(dict.values, both), strict=True))
    )
    assert moved <= math.sqrt(1 + 2 * 0.02)  # one row left a bin, and one became clipped
