"""Missing values of tables as inputs of their own: of words, of bins and of numbers, in every model and export."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from shared.tables import NORTH, SCHEMA, refusal_of

import fedveil as fv
from fedveil.__main__ import run as fedveil
from fedveil.base.refusal import Refusal
from fedveil.export.export import Order, export
from fedveil.tasks.attribution import METHOD
from fedveil.tasks.exported import read_export
from fedveil.tasks.table_schema import read_schema
from fedveil.tasks.tables import load

COLUMNS = """
  dose: {low: 0, high: 10, missing: indicator}
  ward: {categories: [a, b], missing: {words: [unknown], value: category}}
  y: {categories: [no, yes]}
"""
MODELS = ("linear", "gam", "mlp")


def clinics(folder: Path, rows: int = 120) -> dict[str, object]:
    """Return a task of two clinics whose patients are ill exactly if their dose is missing."""
    draw, tables = np.random.default_rng(2), folder / "tables"
    tables.mkdir()
    (tables / "schema.yaml").write_text(f"label: y\ncolumns:{COLUMNS}")
    for name in "ab":
        lines = ["dose,ward,y"]
        for _ in range(rows):
            ill, ward = draw.random() < 0.5, draw.choice(["a", "b", "unknown"])
            lines.append(f"{'' if ill else f'{draw.uniform(0, 10):.1f}'},{ward},{'yes' if ill else 'no'}")
        (tables / f"{name}.csv").write_text("\n".join([*lines, ""]))
    return {"name": "csv", "folder": str(tables), "simulated": True}


@pytest.mark.parametrize("model", MODELS)
def test_missing_value_is_an_input_within_the_length_bound(model: str, tmp_path: Path) -> None:
    clinics(tmp_path)
    task = load(str(tmp_path / "tables"), model=model, bins=4, smoothing=0, simulated=True)
    (tmp_path / "new.csv").write_text("dose,ward\n,unknown\n10,b\n5,\n")
    rows = task.encode(tmp_path / "new.csv")
    dose = [[0, 1], [1, 0], [0, 0]] if model != "gam" else [[0, 0, 0, 0, 1], [0, 0, 0, 1, 0], [0, 0, 1, 0, 0]]
    ward = [[0, 0, 1], [0, 1, 0], [0, 0, 1]]
    assert rows.tolist() == [a + b for a, b in zip(dose, ward, strict=True)]
    assert all((data.inputs**2).sum(1).max() + 1 <= task.squared_length == 3 for data in task.clients)


@pytest.mark.parametrize("model", MODELS)
def test_model_learns_from_what_is_missing_and_is_explained(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = {**clinics(tmp_path), "model": model, "bins": 4}
    run = fv.simulate(task, privacy="none", num_rounds=20, folder=tmp_path / "run", quiet=True)
    assert run.metrics["accuracy"] == 1.0
    (tmp_path / "new.csv").write_text("dose,ward\n,unknown\n2,b\n")
    capsys.readouterr()
    assert fedveil(["predict", str(tmp_path / "run"), str(tmp_path / "new.csv"), "--explain", METHOD]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["y"] for row in rows] == ["yes", "no"]
    for row in rows:
        parts = [float(row[name]) for name in ("at_baseline", "dose", "ward")]
        assert sum(parts) == pytest.approx(float(row["score"]), abs=1e-4)
    folder, _ = export(tmp_path / "run", Order("int8", out=tmp_path / "small"))
    exported = read_export(folder)
    assert exported is not None and exported.predict(tmp_path / "new.csv")["y"].tolist() == ["yes", "no"]
    if model == "gam":
        shapes = {each["column"]: each for each in json.loads((folder / "shapes.json").read_text())["shapes"]}
        assert len(shapes["dose"]["values"][0]) == 4 and len(shapes["ward"]["values"][0]) == 2
        assert shapes["dose"]["missing"][0] > 1 > abs(shapes["ward"]["missing"][0])


def test_missing_inputs_survive_the_schemas_file(tmp_path: Path) -> None:
    clinics(tmp_path)
    schema = read_schema(tmp_path / "tables" / "schema.yaml")
    for each in (schema, schema.binned(3)):
        (tmp_path / "copy.yaml").write_text(each.text())
        assert read_schema(tmp_path / "copy.yaml") == each
    assert "missing: indicator" in schema.text() and "value: category" in schema.text()
    assert "missing: category" in schema.binned(3).text()


def test_dealt_rows_keep_the_words_of_missing_categories(tmp_path: Path) -> None:
    clinics(tmp_path)
    task = load(str(tmp_path / "tables"), simulated=True, partition="iid", num_clients=2)
    assert set(task.columns(0)["ward"]) == {"a", "b", ""}


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("missing: 40", "missing: category, required: true", "has no rows where missing values are refused"),
        ("Very Ill]", "Very Ill], missing: category", "missing is refused in a label"),
        ("missing: 40", "missing: {value: 40, word: [a]}", "did you mean 'words'?"),
    ],
)
def test_wrong_declaration_of_missing_values_is_refused(
    hospitals: Path, before: str, after: str, message: str
) -> None:
    (hospitals / "schema.yaml").write_text(SCHEMA.replace(before, after))
    assert message in refusal_of(hospitals).replace("='missing': is", "missing is")


def test_missing_input_of_a_group_is_refused(hospitals: Path) -> None:
    (hospitals / "schema.yaml").write_text(
        SCHEMA + "groups:\n  ward: {categories: [a, b], missing: category}\n"
    )
    (hospitals / "north.csv").write_text(NORTH)
    with pytest.raises(Refusal, match="groups are none; remove them"):
        load(str(hospitals))
