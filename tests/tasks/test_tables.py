"""`task=csv`: tables become examples of one schema; what does not fit is one sentence with file, column and row."""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fedveil.base.refusal import Refusal
from fedveil.tasks.table_draft import draft_schema
from fedveil.tasks.table_files import Cells, read_rows
from fedveil.tasks.table_schema import MISSING, Column, read_schema
from fedveil.tasks.tables import load, row_hashes

SCHEMA = """
label: diagnosis
columns:
  age: {low: 20, high: 100, missing: 40}
  sex: {categories: {female: [f, "0"], male: [m, "1"]}}
  diagnosis: {categories: [healthy, Very Ill]}
"""
NORTH = "age,sex,diagnosis\n20,female,healthy\n100,M,very  ill\n,?,HEALTHY\n"


@pytest.fixture
def hospitals(tmp_path: Path) -> Path:
    folder = tmp_path / "hospitals"
    folder.mkdir()
    (folder / "schema.yaml").write_text(SCHEMA)
    (folder / "north.csv").write_text(NORTH)
    return folder


def refused(folder: Path, **options: Any) -> str:
    with pytest.raises(Refusal) as caught:
        load(str(folder), **options)
    said = str(caught.value)
    assert "\n" not in said
    return said


def test_columns_are_scaled_by_declared_bounds_and_words_are_one_hot(hospitals: Path) -> None:
    task = load(str(hospitals))
    examples = task.client_data(0)
    assert examples.inputs.dtype == torch.float32 and examples.targets.dtype == torch.int64
    assert examples.inputs.tolist() == [[-1, 1, 0], [1, 0, 1], [-0.5, 0, 0]]
    assert examples.targets.tolist() == [0, 1, 0]
    assert task.num_clients == 1 and not task.simulated and len(task.held_out()) == 0


@pytest.mark.parametrize(
    "text",
    [
        "diagnosis;Sex ; AGE\nhealthy;f;20,0\nvery ill;1;100\nhealthy;na;\n",
        "\ufeffdiagnosis\tother\tsex\tage\nhealthy\tx\tf\t20\nvery ill\ty\tm\t1e2\nhealthy\tz\t\tN/A\n",
        'age|sex|"diag""|nosis"|diagnosis\n20|f|-|healthy\n100|m|-|very ill\n?|null|-|healthy\n',
        "age,sex,diagnosis\r\n20, female ,healthy\r\n500,male,very ill\r\n\r\nNaN,,healthy\r\n",
    ],
)
def test_separators_orders_and_spellings_give_the_same_rows(hospitals: Path, text: str) -> None:
    (hospitals / "south.csv").write_bytes(text.encode())
    task = load(str(hospitals))
    north, south = (task.client_data(client) for client in range(2))
    assert torch.equal(north.inputs, south.inputs) and torch.equal(north.targets, south.targets)


@pytest.mark.parametrize("as_dictionary", [False, True])
def test_parquet_and_folders_are_clients_too(hospitals: Path, as_dictionary: bool) -> None:
    words = pa.array(["f", "1", None])
    table = pa.table(
        {
            "diagnosis": pa.array(["healthy", "very ill", "healthy"]),
            "age": pa.array([20, 100, None], type=pa.int16()),
            "sex": words.dictionary_encode() if as_dictionary else words,
        }
    )
    (hospitals / "south").mkdir()
    pq.write_table(table, hospitals / "south" / "part-0.parquet")
    (hospitals / "south" / "part-1.csv").write_text(NORTH)
    task = load(str(hospitals))
    assert task.num_clients == 2
    north, south = (task.client_data(client) for client in range(2))
    assert torch.equal(south.inputs, torch.cat([north.inputs, north.inputs]))
    assert torch.equal(south.targets, torch.cat([north.targets, north.targets]))


def test_parquet_words_may_be_numbers_or_switches(hospitals: Path) -> None:
    schema = "label: y\ncolumns:\n  x: {categories: [true, false]}\n  y: {categories: ['0', '1']}\n"
    (hospitals / "schema.yaml").write_text(schema)
    (hospitals / "north.csv").unlink()
    pq.write_table(pa.table({"x": [True, False, None], "y": [0.0, 1.0, 0.0]}), hospitals / "a.parquet")
    examples = load(str(hospitals)).client_data(0)
    assert examples.inputs.tolist() == [[1, 0], [0, 1], [0, 0]] and examples.targets.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("age,sex,diagnosis\n20,f,healthy\nold,f,healthy\n", "column 'age', row 3='old': is not a number"),
        ("age,sex,diagnosis\n20,f,healthy\ninf,f,healthy\n", "column 'age', row 3='inf': is not finite"),
        (
            "age,sex,diagnosis\n20,x,healthy\n",
            "column 'sex', row 2='x': is not one of its categories (female, male)",
        ),
        (
            "age,sex,diagnosis\n20,f,cured\n",
            "column 'diagnosis', row 2='cured': is not one of its categories",
        ),
        (
            "age,sex,diagnosis\n20,f,\n",
            "column 'diagnosis', row 2=None: is the label and missing; remove the row",
        ),
        ("age,sex\n20,f\n", "column='diagnosis': is missing; known: age, sex"),
        ("age,sex,diagnosos\n20,f,ill\n", "column='diagnosis': is missing; did you mean 'diagnosos'?"),
        ("age,Age ,sex,diagnosis\n1,20,f,healthy\n", "column='age': occurs twice; rename one"),
        ("age,sex,diagnosis\n20,f,healthy\n20,f\n", "Row #3: Expected 3 columns, got 2: 20,f"),
        ("age,sex,diagnosis\n", "has no rows; remove the client, or add data"),
        ("", "is empty; its first line must name the columns"),
        ("age,sex,diagnosis\n20,f\xe9,healthy\n", "it is not UTF-8; save it as UTF-8"),
        ("age,sex,diagnosis\n1.234.5,f,healthy\n", "row 2='1.234.5': is not a number; correct it"),
        (
            "age,sex,diagnosis\n1960-02-28,f,healthy\n",
            "row 2='1960-02-28': is not a number; write a date as an age",
        ),
        (
            "age;sex;diagnosis\n1.234,5;f;healthy\n",
            "row 2='1.234,5': is not a number; a decimal comma goes with semi",
        ),
        (
            'age,sex,diagnosis\n"68,0",f,healthy\n',
            "row 2='68,0': is not a number; a decimal comma goes with semi",
        ),
    ],
)
def test_a_mismatch_is_one_sentence_that_says_where(hospitals: Path, text: str, said: str) -> None:
    (hospitals / "south.csv").write_bytes(text.encode("latin-1"))
    found = refused(hospitals)
    assert said in found and "south.csv" in found


def test_a_row_far_below_is_named(hospitals: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedveil.tasks.table_files.BLOCK_BYTES", 1 << 10)
    rows = ["20,f,healthy"] * 5000
    rows[4321] = "20,f,lost"
    (hospitals / "south.csv").write_text("\n".join(["age,sex,diagnosis", *rows]))
    assert "column 'diagnosis', row 4323='lost'" in refused(hospitals)
    rows[4321] = "20,f,healthy,more"
    (hospitals / "south.csv").write_text("\n".join(["age,sex,diagnosis", *rows]))
    assert "Row #4323: Expected 3 columns, got 4" in refused(hospitals)
    rows[4321] = '20,f,"very\nill"'
    (hospitals / "south.csv").write_text("\n".join(["age,sex,diagnosis", *rows]))
    assert load(str(hospitals)).client_data(1).targets.sum() == 1


def test_a_file_that_changes_while_it_is_read_is_refused(
    hospitals: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes = Cells.codes

    def written_to(self: Cells, is_label: bool = False) -> Any:
        with (hospitals / "north.csv").open("a") as file:
            file.write("30,f,healthy\n")
        return codes(self, is_label)

    monkeypatch.setattr(Cells, "codes", written_to)
    assert "north.csv': changed while it was read" in refused(hospitals)


def test_a_required_value_may_not_be_missing(hospitals: Path) -> None:
    text = SCHEMA.replace("missing: 40", "required: true")
    (hospitals / "schema.yaml").write_text(text)
    assert "column 'age', row 4=None: is missing, and the schema requires it" in refused(hospitals)


def test_a_class_that_a_client_lacks_is_still_a_class(hospitals: Path) -> None:
    (hospitals / "south.csv").write_text("age,sex,diagnosis\n20,f,healthy\n")
    task = load(str(hospitals))
    assert task.model().state_dict()["weight"].shape == (2, 3)


# --- the schema ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "said"),
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
def test_a_mistake_in_the_schema_is_one_sentence(hospitals: Path, before: str, after: str, said: str) -> None:
    assert before in SCHEMA
    (hospitals / "schema.yaml").write_text(SCHEMA.replace(before, after))
    assert said in refused(hospitals)


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


def test_real_tables_need_a_declared_schema_and_are_never_measured(hospitals: Path) -> None:
    (hospitals / "schema.yaml").unlink()
    said = refused(hospitals, label="diagnosis")
    assert f"fedveil new draft --from csv {hospitals} writes a first draft" in said
    assert "task.simulated=true" in said


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
    assert schema.target.words == ("0", "1") and [each.name for each in schema.inputs] == ["size"]
    assert re.match("it holds words such as '0,5': .*; a decimal comma goes with ", left_out.pop("dose"))
    plain = "it holds words such as {!r}: write plain numbers, of a date an age"
    assert left_out == {
        "id": "it holds more than 50 different words",
        "place": "it holds one value",
        "day": plain.format("2024-01-01"),
        "share": plain.format("0 %"),
    }
    (hospitals / "east.xlsx").write_bytes(b"PK")
    with pytest.raises(Refusal, match=r"east.xlsx': is a spreadsheet, which is not read; save it as CSV"):
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
    said = refused(folder, label="diagnosis", simulated=True)
    assert "has other words in other tables (east.csv, north.csv: B, M; " in said


def test_sites_with_tables_of_one_name_are_distinguished(tmp_path: Path) -> None:
    for site, words in (("east", "no yes"), ("west", "nein ja")):
        sites(tmp_path / site, data=words)
    other = draft_schema([tmp_path])[2]["diagnosis"]
    assert str(other) == f"{Path('east', 'data.csv')}: no, yes; {Path('west', 'data.csv')}: ja, nein"


@pytest.mark.parametrize(
    ("words", "told"),
    [(("M B", "B X"), False), (("a b c", "d"), True), (("a", "b"), True), (("1 2", "2 3"), False)],
)
def test_sites_that_lack_classes_are_trained_on(tmp_path: Path, words: tuple[str, str], told: bool) -> None:
    folder = sites(tmp_path / "sites", east=words[0], west=words[1])
    assert bool(draft_schema([folder])[2]) is told
    assert load(str(folder), "diagnosis", simulated=True).classes == len({*" ".join(words).split()})


def test_a_first_line_of_any_length_names_the_columns(tmp_path: Path) -> None:
    names = [f"{'gene' * 48}{number}" for number in range(700)]
    rows = [",".join(["1", "0"] * 350 + ["no"]), ",".join(["0", "1"] * 350 + ["yes"])]
    text = "\n".join([",".join([*names, "ill"]), *rows, *rows])
    assert len(text.splitlines()[0]) > 131_072
    (tmp_path / "one.csv").write_text(text + "\n")
    task = load(str(tmp_path), "ill", simulated=True, held_out_share=0.5)
    assert task.schema.width == 700
    assert len(refused(tmp_path, label="unknown", simulated=True)) < 14_000
    (tmp_path / "one.csv").write_text("x" * 200_000 + ",ill\n1,no\n")
    assert "its first line has a name of 200004 characters; it must name the columns" in refused(
        tmp_path, label="ill", simulated=True
    )


def test_cell_of_any_length_is_quoted_by_its_beginning(hospitals: Path) -> None:
    (hospitals / "north.csv").write_text(f"age,sex,diagnosis\n{'z' * 3_000_000},f,healthy\n30,m,healthy\n")
    said = refused(hospitals)
    assert len(said) < 600 and "zzz... (3000002 characters): is not a number" in said
    (hospitals / "north.csv").write_text(f"age,sex,diagnosis\n20,{'z' * 3_000_000},healthy\n")
    assert len(refused(hospitals)) < 600
    (hospitals / "north.csv").write_text(f"age,note,ill\n20,{'z' * 3_000_000},no\n30,m,yes\n20,m,no\n")
    assert draft_schema([hospitals / "north.csv"])[1] == {"note": "it holds a text of 3000000 characters"}


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("east.csv.gz", "is packed, which is not read; unpack it, or move it away"),
        ("east.zip", "is packed"),
        ("east.sav", "is not read; save it as Parquet or CSV"),
        ("fifo.csv", "is no file, or a link that leads to none"),
        ("loop.csv", "is no file, or a link that leads to none"),
        ("lost.parquet", "is no file, or a link that leads to none"),
    ],
)
@pytest.mark.parametrize("inner", ["", "clinic"])
def test_no_client_is_left_out_in_silence(hospitals: Path, name: str, why: str, inner: str) -> None:
    path = hospitals / inner / name
    path.parent.mkdir(exist_ok=True)
    if name == "fifo.csv":
        os.mkfifo(path)
    elif name in ("loop.csv", "lost.parquet"):
        path.symlink_to(path if name == "loop.csv" else hospitals / "nowhere")
    else:
        path.write_bytes(b"PK")
    assert f"{path}': {why}" in refused(hospitals)
    path.rename(hospitals / inner / f".{name}")
    assert load(str(hospitals)).num_clients == 1


# --- the task -----------------------------------------------------------------------------------------------------


def test_a_number_is_predicted_in_its_own_unit(hospitals: Path) -> None:
    (hospitals / "north.csv").write_text("age,sex,diagnosis\n20,f,healthy\n80,,healthy\n")
    task = load(str(hospitals), "age")
    examples = task.client_data(0)
    assert examples.targets.dtype == torch.float32 and examples.targets.tolist() == [-1, 0.5]
    (hospitals / "north.csv").write_text(NORTH)
    assert "column 'age', row 4=None: is the label and missing" in refused(hospitals, label="age")
    assert task.metrics(torch.zeros(2, 1), examples.targets)["mean_absolute_error"] == 30.0
    assert task.decode(torch.tensor([[-1.0], [0.0], [7.0]]))["age"].tolist() == [20, 60, 100]


def test_held_out_rows_go_by_their_content_and_not_by_their_place(tmp_path: Path) -> None:
    stream = np.random.default_rng(1)
    lines = [f"{x:.4f},{'ab'[int(x > 0)]}" for x in stream.permutation(np.arange(-1000, 1000) / 1000)]
    texts = ["\n".join(["x,y", *order]) for order in (lines, lines[::-1])]
    tasks = []
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.csv").write_text(text)
        tasks.append(load(str(tmp_path / f"{number}.csv"), "y", simulated=True))
    held = [sorted(task.held_out().inputs[:, 0].tolist()) for task in tasks]
    assert held[0] == held[1] and 340 < len(held[0]) < 460
    kept = tasks[0].client_data(0)
    assert set(held[0]).isdisjoint(kept.inputs[:, 0].tolist())
    hashes = row_hashes(kept) / 2.0**64
    assert abs(hashes.mean() - 0.6) < 0.02 and hashes.min() > 0.2


def test_public_table_measures_the_model(hospitals: Path) -> None:
    (hospitals / "public.csv").write_text(NORTH)
    task = load(str(hospitals), held_out_file=str(hospitals / "public.csv"))
    assert task.num_clients == 1 and len(task.held_out()) == 3


def test_rows_of_simulated_tables_are_dealt_anew_and_real_ones_never(hospitals: Path) -> None:
    task = load(
        str(hospitals),
        simulated=True,
        partition="iid",
        num_clients=3,
        held_out_file=str(hospitals / "north.csv"),
    )
    assert task.num_clients == 3
    assert "real rows stay with their owners" in refused(hospitals, partition="iid", num_clients=3)
    assert "gives 1, one per file or folder; leave it out" in refused(hospitals, num_clients=3)


def test_a_multilayer_model_is_the_same_at_every_call(hospitals: Path) -> None:
    task = load(str(hospitals), model="mlp", hidden=[5, 4])
    torch.manual_seed(1)
    first = task.model().state_dict()
    torch.manual_seed(2)
    second = task.model().state_dict()
    assert [tuple(each.shape) for each in first.values()] == [(5, 3), (5,), (4, 5), (4,), (2, 4), (2,)]
    assert all(torch.equal(first[name], second[name]) for name in first)


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


def test_the_largest_class_weight_is_one_and_weighs_after_the_mean(hospitals: Path) -> None:
    (hospitals / "schema.yaml").write_text(
        SCHEMA.replace("Very Ill]", "Very Ill, dead], weights: {very ill: 8, healthy: 2}")
    )
    task = load(str(hospitals))
    assert task.schema.target.weights == (0.25, 1, 0.125)
    outputs, targets = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    each = torch.nn.functional.cross_entropy(outputs, targets, reduction="none")
    expected = (torch.tensor([0.25, 1, 0.125, 1, 0.25]) * each).mean()
    assert torch.allclose(task.loss(outputs, targets), expected)
    assert torch.allclose(task.losses(outputs[None], targets[None]), expected[None])
    again = hospitals / "again.yaml"
    again.write_text(task.schema.text())
    assert read_schema(again) == task.schema


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


def test_a_million_cells_make_no_objects(tmp_path: Path) -> None:
    import tracemalloc

    file = tmp_path / "large.csv"
    rows = "\n".join("1.5,2.5,3.5,4.5,a" for _ in range(50_000))
    file.write_text("a,b,c,d,y\n" + rows)
    columns = "".join(f"  {name}: {{low: 0, high: 9}}\n" for name in "abcd")
    (tmp_path / "s.yaml").write_text(f"label: y\ncolumns:\n{columns}  y: {{categories: [a, b]}}\n")
    schema = read_schema(tmp_path / "s.yaml")
    read_rows(file, schema)
    tracemalloc.start()
    read_rows(file, schema)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50_000 * (16 + 8 + 40)  # inputs, targets, and some columns of one block in float64
    assert os.path.getsize(file) > 500_000


# --- whose a row is


def visits_of(folder, header="age,ill,patient", rows=("40,yes,7", "41,no,7.0", "60,yes,x", "61,no,X")):
    folder.mkdir(exist_ok=True)
    (folder / "one.csv").write_text("\n".join([header, *rows]) + "\n")
    schema = "label: ill\ncolumns:\n  age: {low: 0, high: 100}\n  ill: {categories: [no, yes]}\n"
    (folder / "schema.yaml").write_text(schema)
    return str(folder)


def test_column_outside_the_inputs_names_the_owner_of_a_row(tmp_path):
    folder = visits_of(tmp_path / "visits")
    tables = load(folder, person="patient", held_out_file=folder + "/one.csv")
    (data,) = tables.clients
    assert data.persons == ["7", "7", "x", "x"] and data.inputs.shape == (4, 1)
    assert load(folder, held_out_file=folder + "/one.csv").clients[0].persons is None
    rows = load(folder, person="patient", simulated=True, held_out_share=0.5)
    whole = [*rows.clients[0].persons, *rows.test.persons]
    assert sorted(whole) == ["7", "7", "x", "x"]


def test_no_person_stands_among_trained_and_held_out_rows(tmp_path):
    rows = [
        f"{20 + visit},{'yes' if visit % 2 else 'no'},p{person}" for person in range(40) for visit in range(5)
    ]
    folder = visits_of(tmp_path / "visits", rows=rows)
    (tmp_path / "visits" / "two.csv").write_text("\n".join(["age,ill,patient", *rows[:100][::-1]]) + "\n")
    tables = load(folder, person="patient", simulated=True, held_out_share=0.3)
    kept, held = {p for each in tables.clients for p in each.persons}, set(tables.test.persons)
    assert not kept & held and len(kept | held) == 40 and 4 < len(held) < 22
    again = load(folder, person="patient", simulated=True, held_out_share=0.6)
    assert held < set(again.test.persons)


@pytest.mark.parametrize(
    ("person", "rows", "said"),
    [
        ("age", ("40,yes,7",), "is a column of the schema"),
        ("ill", ("40,yes,7",), "is a column of the schema"),
        ("patiant", ("40,yes,7",), "is missing; did you mean .patient"),
        ("patient", ("40,yes,7", "41,no,"), "row 3.*identifies the person of the row"),
        ("patient", ("40,yes,7", "41,no,NA"), "row 3.*identifies the person of the row"),
    ],
)
def test_column_without_owners_of_rows_is_refused(tmp_path, person, rows, said):
    folder = visits_of(tmp_path / "visits", rows=rows)
    with pytest.raises(Refusal, match=said):
        load(folder, person=person)


# --- what is measured


def of_classes(tmp_path, words):
    columns = f"  x: {{low: 0, high: 9}}\n  y: {{categories: [{', '.join(words)}]}}\n"
    (tmp_path / "s.yaml").write_text(f"label: y\ncolumns:\n{columns}")
    return load(schema=str(tmp_path / "s.yaml"))


@pytest.mark.parametrize("words", [("no", "yes"), ("low", "middle", "high")])
def test_skewed_classes_are_measured_as_scikit_learn_does(tmp_path, words):
    learn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(3)
    targets = rng.choice(len(words), 400, p=[0.9, *[0.1 / (len(words) - 1)] * (len(words) - 1)])
    outputs = (rng.normal(size=(400, len(words))) + 2 * np.eye(len(words))[targets]).round(1)  # with ties
    found = of_classes(tmp_path, words).metrics(torch.tensor(outputs), torch.tensor(targets))
    likeliest = outputs.argmax(1)
    assert found["accuracy"] == pytest.approx(learn.accuracy_score(targets, likeliest))
    assert found["balanced_accuracy"] == pytest.approx(learn.balanced_accuracy_score(targets, likeliest))
    assert ("auc" in found) == (len(words) == 2)
    if "auc" in found:
        assert found["auc"] == pytest.approx(learn.roc_auc_score(targets, outputs[:, 1] - outputs[:, 0]))
        assert found["auc"] < 1


def test_prediction_of_the_frequent_class_alone_is_detected(tmp_path):
    outputs, targets = torch.tensor([[1.0, 0.0]] * 20), torch.tensor([0] * 19 + [1])
    found = of_classes(tmp_path, ("no", "yes")).metrics(outputs, targets)
    assert found == pytest.approx({"accuracy": 0.95, "balanced_accuracy": 0.5, "auc": 0.5})
    alone = of_classes(tmp_path, ("no", "yes")).metrics(outputs[:19], targets[:19])
    assert alone == {"accuracy": 1.0, "balanced_accuracy": 1.0}


def test_numbers_are_measured_as_scikit_learn_does(tmp_path):
    learn = pytest.importorskip("sklearn.metrics")
    (tmp_path / "s.yaml").write_text("label: y\ncolumns:\n  x: {low: 0, high: 9}\n  y: {low: 10, high: 30}\n")
    rng = np.random.default_rng(4)
    targets = rng.uniform(-1, 1, 300)
    outputs = targets + rng.normal(size=300) / 3
    found = load(schema=str(tmp_path / "s.yaml")).metrics(
        torch.tensor(outputs)[:, None], torch.tensor(targets)
    )
    numbers, predicted = 20 + 10 * targets, 20 + 10 * outputs
    assert found["mean_absolute_error"] == pytest.approx(learn.mean_absolute_error(numbers, predicted))
    assert found["r2"] == pytest.approx(learn.r2_score(numbers, predicted))
