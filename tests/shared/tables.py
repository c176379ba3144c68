"""Tables of a hospital and their schema, which tests of tables change."""

from pathlib import Path
from typing import Any

import pytest

from fedveil.base.refusal import Refusal
from fedveil.tasks.tables import load

SCHEMA = """
label: diagnosis
columns:
  age: {low: 20, high: 100, missing: 40}
  sex: {categories: {female: [f, "0"], male: [m, "1"]}}
  diagnosis: {categories: [healthy, Very Ill]}
"""
NORTH = "age,sex,diagnosis\n20,female,healthy\n100,M,very  ill\n,?,HEALTHY\n"


def write_hospitals(folder: Path) -> Path:
    """Return a new folder in `folder` with the table `north.csv` and its schema."""
    hospitals = folder / "hospitals"
    hospitals.mkdir()
    (hospitals / "schema.yaml").write_text(SCHEMA)
    (hospitals / "north.csv").write_text(NORTH)
    return hospitals


def refusal_of(folder: Path, **options: Any) -> str:
    """Return the refusal of the task on the tables of a folder, which is one line."""
    with pytest.raises(Refusal) as refusal:
        load(str(folder), **options)
    text = str(refusal.value)
    assert "\n" not in text
    return text
