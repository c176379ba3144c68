"""Coefficients of additive models as contrasts: each is a difference of what the model's shapes add."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedveil.tables.coefficients import INTERCEPT, contrasts_of, means_of
from fedveil.tasks.shapes import shapes
from fedveil.tasks.table_schema import read_schema

TEXT = """label: cost
columns:
  age: {low: 0, high: 80, edges: [20, 40, 60], missing: category}
  ward: {categories: [a, b, c], missing: category}
  dose: {low: 0, high: 10, missing: indicator}
  cost: {low: -1, high: 1}
smoothing: 0.5
"""
PAIRS = "pairs: [[age, ward]]\n"


def values_of(folder: Path, text: str) -> tuple[dict[tuple[str, str], float], dict[str, dict[str, Any]]]:
    """Return the contrasts of a random model with all bins and words in the public rows, and its shapes by column."""
    (folder / "schema.yaml").write_text(text)
    schema, draw = read_schema(folder / "schema.yaml"), np.random.default_rng(0)
    model, rows = draw.normal(size=schema.width + 1), np.zeros((64, schema.width + 1))
    start = 0
    for column in schema.inputs:
        inputs = schema.rows(column)
        rows[:, start : start + column.width] = inputs[np.arange(64) % len(inputs)]
        start += column.width
    contrasts = contrasts_of(schema, rows)
    picture = shapes(schema, model[None, :-1], model[-1:], lines=True)
    by_name = {(each.column, each.of): float(each.factors @ model) for each in contrasts}
    assert means_of(schema) @ model == pytest.approx(picture["intercept"][0], abs=1e-6)
    return by_name, {each["column"]: each for each in picture["shapes"]} | {"": picture}


def test_bins_and_words_have_the_differences_of_their_shapes(tmp_path: Path) -> None:
    found, shape = values_of(tmp_path, TEXT)
    age, ward, dose = (shape[name] for name in ("age", "ward", "dose"))
    for number, of in enumerate(("0 to 20", "20 to 40", "40 to 60", "60 to 80")):
        assert found["age", of] == pytest.approx(age["values"][0][number], abs=1e-6)
    assert found["age", "missing"] == pytest.approx(age["missing"][0], abs=1e-6)
    first = ward["values"][0][0]
    for number, word in ((1, "b"), (2, "c")):
        assert found["ward", word] == pytest.approx(ward["values"][0][number] - first, abs=1e-6)
    assert found["ward", "missing"] == pytest.approx(ward["missing"][0] - first, abs=1e-6)
    low, high = dose["values"][0]
    assert found["dose", ""] == pytest.approx((high - low) / 10, abs=1e-6)
    assert found["dose", "missing"] == pytest.approx(dose["missing"][0], abs=1e-6)
    whole = shape[""]["intercept"][0] + first + low
    assert found[INTERCEPT, ""] == pytest.approx(whole, abs=1e-6)


def test_each_combination_of_a_pair_has_what_it_adds(tmp_path: Path) -> None:
    found, shape = values_of(tmp_path, TEXT + PAIRS)
    values = shape["age x ward"]["values"][0]
    for row, age in enumerate(("0 to 20", "20 to 40", "40 to 60", "60 to 80")):
        for number, ward in enumerate("abc"):
            assert found["age x ward", f"{age}, {ward}"] == pytest.approx(values[row][number], abs=1e-6)
    assert np.ptp(values) > 0.5
