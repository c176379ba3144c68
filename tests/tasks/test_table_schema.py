"""Schema of tables: its file, its text, and refusals of mistakes in it."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shared.tables import SCHEMA, refusal_of

from fedveil.tasks.table_files import Cells
from fedveil.tasks.table_schema import MISSING, Column, read_schema
from fedveil.tasks.tables import load


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("low: 20", "low: 200", "low must be below high"),
        ("low: 20, ", "", "low is missing; give low and high, the plausible range (not the data's own)"),
        ("missing: 40", "missing: 400", "missing must lie between 20 and 100"),
        ("low: 20", "low: .inf", "low must be a number"),
        ("low: 20", "low: inf", "give a finite number"),
        ("low: 20", "lowest: 20", "there is no such key; did you mean 'low'?"),
        ('[m, "1"]', "[m, F]", "occurs twice in categories"),
        ("[healthy, Very Ill]", "[healthy]", "categories must hold at least two words"),
        ("[healthy, Very Ill]", "healthy", "categories must be a list of words"),
        ("  sex:", "  Age:", "names two columns"),
        (
            "label: diagnosis",
            "label: diagnosis\ngroups: {ward: {categories: [a, b]}, Ward: {categories: [c, d]}}",
            "names two columns",
        ),
        ("  sex:", "  age:", "line 5: duplicate key age"),
        ("label: diagnosis", "label: diagnosos", "name a column of"),
        ("columns:", "colums:", "there is no such key; did you mean 'columns'?"),
        ("label:", "label: [", "schema.yaml': line"),
        ("Very Ill]", "Very Ill], weights: {ill: 2}", "='ill': is no category for weights"),
        ("Very Ill]", "Very Ill], weights: {very ill: 0}", "weights must be above 0"),
        ("Very Ill]", "Very Ill], weights: {very ill: inf}", "diagnosis=inf: give a finite number"),
        ("Very Ill]", "Very Ill], weights: [1, 2]", "weights must be a mapping"),
        ('"1"]}}', '"1"]}, weights: {male: 2}}', "belong to the label, which is diagnosis"),
        ("missing: 40", "weights: {a: 1}", "belong to categories"),
        ('"1"]}}', '"1"]}, missing: 3}', "since this column has categories"),
        ('"1"]}}', '"1"]}, missing: [F]}', "='f': is in missing and in categories"),
        ("missing: 40", "missing: {word: [a]}", "did you mean 'words'?"),
    ],
)
def test_a_mistake_in_the_schema_is_one_sentence(
    hospitals: Path, before: str, after: str, message: str
) -> None:
    assert before in SCHEMA
    (hospitals / "schema.yaml").write_text(SCHEMA.replace(before, after))
    assert message in refusal_of(hospitals)


def test_a_schema_survives_its_file(hospitals: Path, tmp_path: Path) -> None:
    schema = read_schema(hospitals / "schema.yaml")
    copy = tmp_path / "copy.yaml"
    copy.write_text("# a comment\n" + schema.text())
    assert read_schema(copy) == schema and read_schema(copy).text() == schema.text()
    assert read_schema(copy, "SEX").label == "sex" and read_schema(copy, "sex").width == 3


def test_words_that_yaml_takes_for_switches_stay_words(hospitals: Path) -> None:
    (hospitals / "schema.yaml").write_text(
        "label: y\ncolumns:\n  x: {low: 0, high: 1}\n  y: {categories: [no, yes]}\n"
    )
    (hospitals / "north.csv").write_text("x,y\n1,Yes\n0,No\n")
    assert load(str(hospitals)).client_data(0).targets.tolist() == [1, 0]


def test_missing_words_are_compared_as_words_are() -> None:
    column = Column("x", 0, 10)
    values = pa.array([" NaN ", "n/A", "", "5", None])
    assert Cells(values, column, MISSING, Path("f")).scaled().tolist() == [0, 0, 0, 0, 0]


def test_a_column_has_missing_words_of_its_own(hospitals: Path) -> None:
    schema = SCHEMA.replace("missing: 40", "missing: {words: [Unknown, -9], value: 40}")
    schema = schema.replace('"1"]}}', '"1"]}, missing: ["9", refused]}')
    (hospitals / "schema.yaml").write_text(schema)
    rows = "age,sex,diagnosis\n unknown,9,healthy\n-9.0,Refused,healthy\n-9,?,healthy\n,f,healthy\n"
    (hospitals / "north.csv").write_text(rows)
    table = {"age": [-9.0, 20.0], "sex": [9, 1], "diagnosis": ["healthy", "very ill"]}
    pq.write_table(pa.table(table), hospitals / "south.parquet")
    task = load(str(hospitals))
    absent = [-0.5, 0, 0]
    assert task.client_data(0).inputs.tolist() == [absent, absent, absent, [-0.5, 1, 0]]
    assert task.client_data(1).inputs.tolist() == [absent, [-1, 0, 1]]
    again = hospitals / "again.yaml"
    again.write_text(task.schema.text())
    assert read_schema(again) == task.schema
