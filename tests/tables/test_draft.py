"""Draft of a schema: types, categories, codes for missing values, and words that differ between files."""

import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shared.tables import refusal_of

from fedveil.base.refusal import Refusal
from fedveil.tables.draft import draft_schema
from fedveil.tables.durations import Since
from fedveil.tasks.tables import load


def test_a_schema_is_inferred_of_tables_that_are_public(hospitals: Path) -> None:
    (hospitals / "schema.yaml").unlink()
    (hospitals / "south.csv").write_text("diagnosis,sex,age,name\nhealthy,male,31.5,b\nVery Ill,male,62,c\n")
    schema, left_out, _ = draft_schema([hospitals], "diagnosis")
    assert [each.name for each in schema.inputs] == ["age", "sex"] and schema.target.width == 2
    assert left_out == {"name": "north.csv has no such column"}
    with pytest.raises(
        Refusal, match=r"end with different columns \('\w+' in north.csv, 'name' in south.csv\)"
    ):
        draft_schema([hospitals])
    assert (schema.inputs[0].low, schema.inputs[0].high) == (20, 100)
    task = load(str(hospitals), "diagnosis", simulated=True, held_out_share=0.5)
    assert task.simulated and 0 < len(task.held_out()) < 5


def test_draft_leaves_out_names_of_rows(hospitals: Path) -> None:
    rows = [
        f'{row},p{row},{row % 2},{row % 3 + 0.5},same,"{row % 9},5",2024-01-0{row % 9 + 1},{row % 9} %,'
        for row in range(60)
    ]
    (hospitals / "north.csv").write_text("\n".join([",id,ill,size,place,dose,day,share,", *rows]))
    schema, left_out, _ = draft_schema([hospitals / "north.csv"], "ill")
    assert schema.target.words == ("0", "1") and [each.name for each in schema.inputs] == ["size", "day"]
    assert re.match("it holds words such as '0,5': .*; a decimal comma goes with ", left_out.pop("dose"))
    plain = "it holds words such as {!r}: write plain numbers, of a date an age"
    assert left_out == {
        "id": "it holds more than 50 different words",
        "place": "it holds one value",
        "share": plain.format("0 %"),
    }
    (hospitals / "east.ods").write_bytes(b"PK")
    with pytest.raises(Refusal, match=r"east.ods': is a spreadsheet, which is not read; save it as CSV"):
        draft_schema([hospitals])


def test_a_draft_takes_switches_of_parquet_for_classes(tmp_path: Path) -> None:
    columns = {"x": [row / 2 for row in range(20)], "ill": [row % 2 == 0 for row in range(20)]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    schema, *_ = draft_schema([tmp_path])
    assert schema.target.words == ("False", "True") and schema.inputs[0].name == "x"


def sites(folder: Path, **words: str) -> Path:
    folder.mkdir()
    for name, each in words.items():
        rows = [f"{row},{word}" for row in range(30) for word in each.split()]
        (folder / f"{name}.csv").write_text("\n".join(["x,diagnosis", *rows]) + "\n")
    return folder


def test_other_label_words_at_sites_are_no_further_classes(
    tmp_path: Path,
) -> None:
    folder = sites(tmp_path / "sites", east="M B", north="b", south="malignant benign", west="1 0")
    schema, _, others = draft_schema([folder])
    other = others["diagnosis"]
    assert schema.target.width == 6 and other.doubtful and other.guess is not None
    assert str(other) == "east.csv, north.csv: B, M; south.csv: benign, malignant; west.csv: 0, 1"
    assert other.guess.categories == (("benign", "B", "0"), ("malignant", "M", "1"))
    message = refusal_of(folder, label="diagnosis", simulated=True)
    assert "has other words in other tables (east.csv, north.csv: B, M; " in message


def test_a_draft_counts_dates_from_a_year(tmp_path: Path) -> None:
    rows = [f"{1930 + row}-05-0{row % 9 + 1},1{row % 10}.{row % 9 + 1}.2024,{row % 2}" for row in range(60)]
    (tmp_path / "a.csv").write_text("\n".join(["birth;seen;ill", *rows]).replace(",", ";"))
    schema, left_out, _ = draft_schema([tmp_path])
    birth, seen = schema.inputs
    assert (birth.since, birth.low, birth.high) == (Since("1930-01-01", "years"), 0, 60)
    assert (seen.since, seen.high) == (Since("2024-01-01", "days", "%d.%m.%Y"), 300) and not left_out
    (tmp_path / "schema.yaml").write_text(schema.text())
    assert load(str(tmp_path)).client_data(0).inputs.shape == (60, 2)
    (tmp_path / "a.csv").write_text(
        "day,ill\n2024-01-01,0\n01.02.2024,1\n2024-01-02,1\n2024-01-03,1\n2024-01-04,1\n"
    )
    with pytest.raises(Refusal, match="has no other column"):
        draft_schema([tmp_path / "a.csv"])


@pytest.mark.parametrize(
    ("words", "mapping"),
    [
        (("M B", "malignant benign", "1 0"), "B, 0 -> benign; M, 1 -> malignant"),
        (("control case", "0 1"), "1 -> case; 0 -> control"),
        (("female male", "m w", "0 1"), "w, 0 -> female; m, 1 -> male"),
        (("female male", "f", "m"), "f -> female; m -> male"),
        (("female male f",), "f -> female"),
        (("yes no", "j"), ""),
        (("a ab b",), ""),
        (("no none n",), ""),
        (("yes no",), ""),
    ],
)
def test_one_mapping_is_proposed_for_spellings(words: tuple[str, ...], mapping: str, tmp_path: Path) -> None:
    folder = sites(tmp_path / "sites", **{f"site{number}": each for number, each in enumerate(words)})
    other = draft_schema([folder])[2].get("diagnosis")
    assert ("" if other is None else other.mapping) == mapping
    if other is None or other.guess is None:
        return
    spelled = {word for spellings in other.guess.categories for word in spellings}
    assert spelled == {*" ".join(words).split()}


def test_sites_with_tables_of_one_name_are_distinguished(tmp_path: Path) -> None:
    for site, words in (("east", "no yes"), ("west", "nein ja")):
        sites(tmp_path / site, data=words)
    other = draft_schema([tmp_path])[2]["diagnosis"]
    assert str(other) == f"{Path('east', 'data.csv')}: no, yes; {Path('west', 'data.csv')}: ja, nein"


@pytest.mark.parametrize(
    ("words", "has_other_words"),
    [(("M B", "B X"), False), (("a b c", "d"), True), (("a", "b"), True), (("1 2", "2 3"), False)],
)
def test_sites_that_lack_classes_are_trained_on(
    tmp_path: Path, words: tuple[str, str], has_other_words: bool
) -> None:
    folder = sites(tmp_path / "sites", east=words[0], west=words[1])
    assert bool(draft_schema([folder])[2]) is has_other_words
    assert load(str(folder), "diagnosis", simulated=True).classes == len({*" ".join(words).split()})


def test_a_draft_takes_odd_words_and_codes_for_missing_values(tmp_path: Path) -> None:
    rows = [f"{20 + 3 * row},{100 + row},{row % 3},{row % 2}" for row in range(20)]
    rows += ["unknown,-9,-9,0", "-99,999,not known,1", "-,110,1,1"]
    (tmp_path / "a.csv").write_text("\n".join(["age,chol,grade,y", *rows]))
    schema, *_ = draft_schema([tmp_path])
    age, chol, grade, y = schema.columns
    assert (age.low, age.high, age.absent) == (20, 80, ("-", "unknown", "-99"))
    assert (chol.low, chol.high, chol.absent) == (100, 120, ("-9", "999"))
    assert set(grade.words) == {"-9", "0", "1", "2", "not known"} and not grade.absent
    assert y.words == ("0", "1")
    (tmp_path / "schema.yaml").write_text(schema.text())
    assert load(str(tmp_path)).client_data(0).inputs.shape == (23, 7)


def test_a_draft_takes_no_code_that_lies_among_the_values(tmp_path: Path) -> None:
    cells = "\n".join(f"{value},{value % 2}" for value in (*range(-20, 20), *range(900, 1010, 7), 999))
    (tmp_path / "a.csv").write_text("x,y\n" + cells)
    column = draft_schema([tmp_path])[0].columns[0]
    assert column.absent == () and column.low <= -20 and column.high >= 1005
