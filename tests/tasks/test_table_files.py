"""Reader of tables: rows become inputs and targets, and a mistake is one sentence with file, column and row."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from shared.tables import NORTH, SCHEMA, refusal_of

from fedveil.tables.draft import draft_schema
from fedveil.tasks.table_files import Cells, read_rows
from fedveil.tasks.table_schema import read_schema
from fedveil.tasks.tables import load


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
    ("text", "message"),
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
def test_a_mismatch_is_one_sentence_that_says_where(hospitals: Path, text: str, message: str) -> None:
    (hospitals / "south.csv").write_bytes(text.encode("latin-1"))
    refusal = refusal_of(hospitals)
    assert message in refusal and "south.csv" in refusal


def test_a_row_far_below_is_named(hospitals: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedveil.tasks.table_files.BLOCK_BYTES", 1 << 10)
    rows = ["20,f,healthy"] * 5000
    rows[4321] = "20,f,lost"
    (hospitals / "south.csv").write_text("\n".join(["age,sex,diagnosis", *rows]))
    assert "column 'diagnosis', row 4323='lost'" in refusal_of(hospitals)
    rows[4321] = "20,f,healthy,more"
    (hospitals / "south.csv").write_text("\n".join(["age,sex,diagnosis", *rows]))
    assert "Row #4323: Expected 3 columns, got 4" in refusal_of(hospitals)
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
    assert "north.csv': changed while it was read" in refusal_of(hospitals)


def test_a_required_value_may_not_be_missing(hospitals: Path) -> None:
    text = SCHEMA.replace("missing: 40", "required: true")
    (hospitals / "schema.yaml").write_text(text)
    assert "column 'age', row 4=None: is missing, and the schema requires it" in refusal_of(hospitals)


def test_a_first_line_of_any_length_names_the_columns(tmp_path: Path) -> None:
    names = [f"{'gene' * 48}{number}" for number in range(700)]
    rows = [",".join(["1", "0"] * 350 + ["no"]), ",".join(["0", "1"] * 350 + ["yes"])]
    text = "\n".join([",".join([*names, "ill"]), *rows, *rows])
    assert len(text.splitlines()[0]) > 131_072
    (tmp_path / "one.csv").write_text(text + "\n")
    task = load(str(tmp_path), "ill", simulated=True, held_out_share=0.5)
    assert task.schema.width == 700
    assert len(refusal_of(tmp_path, label="unknown", simulated=True)) < 14_000
    (tmp_path / "one.csv").write_text("x" * 200_000 + ",ill\n1,no\n")
    assert "its first line has a name of 200004 characters; it must name the columns" in refusal_of(
        tmp_path, label="ill", simulated=True
    )


def test_cell_of_any_length_is_quoted_by_its_beginning(hospitals: Path) -> None:
    (hospitals / "north.csv").write_text(f"age,sex,diagnosis\n{'z' * 3_000_000},f,healthy\n30,m,healthy\n")
    message = refusal_of(hospitals)
    assert len(message) < 600 and "zzz... (3000002 characters): is not a number" in message
    (hospitals / "north.csv").write_text(f"age,sex,diagnosis\n20,{'z' * 3_000_000},healthy\n")
    assert len(refusal_of(hospitals)) < 600
    (hospitals / "north.csv").write_text(f"age,note,ill\n20,{'z' * 3_000_000},no\n30,m,yes\n20,m,no\n")
    assert draft_schema([hospitals / "north.csv"])[1] == {"note": "it holds a text of 3000000 characters"}


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("east.csv.bz2", "is packed, which is not read; unpack it, or move it away"),
        ("east.xls", "is a spreadsheet, which is not read; save it as CSV, or move it away"),
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
    assert f"{path}': {why}" in refusal_of(hospitals)
    path.rename(hospitals / inner / f".{name}")
    assert load(str(hospitals)).num_clients == 1


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


@pytest.mark.parametrize("encoding", ["utf-16", "cp1252", "utf-8-sig", "latin-1", "utf-16-le"])
def test_texts_are_read_in_their_encoding(hospitals: Path, encoding: str) -> None:
    schema = SCHEMA.replace("female: [f", "female: [weiblich é, f")
    (hospitals / "schema.yaml").write_text(schema)
    (hospitals / "north.csv").write_bytes(NORTH.replace("female", "weiblich é").encode(encoding))
    (hospitals / "south.txt").write_bytes(NORTH.encode(encoding))
    options = {} if encoding in ("utf-16", "utf-8-sig") else {"encoding": encoding}
    task = load(str(hospitals), **options)
    assert torch.equal(task.client_data(0).inputs, task.client_data(1).inputs)
    assert task.client_data(0).inputs.shape == (3, 3)


def test_an_encoding_that_does_not_fit_is_refused(hospitals: Path) -> None:
    assert "task.encoding='klingon': is no encoding that Python knows" in refusal_of(
        hospitals, encoding="klingon"
    )
    (hospitals / "north.csv").write_bytes(NORTH.replace("female", "é").encode("cp1252"))
    assert "it is not UTF-8; save it as UTF-8, or name its encoding: task.encoding=cp1252" in refusal_of(
        hospitals
    )
    assert "it is not ASCII; save it as UTF-8" in refusal_of(hospitals, encoding="ascii")


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_a_decimal_comma_is_read_between_other_separators(hospitals: Path, separator: str) -> None:
    rows = separator.join(("age", "sex", "diagnosis")), separator.join(("60,5", "f", "healthy"))
    (hospitals / "north.csv").write_text("\n".join(rows))
    assert load(str(hospitals)).client_data(0).inputs[0, 0] == pytest.approx(0.0125)
    (hospitals / "north.csv").write_text("\n".join(rows).replace("60,5", "60,125"))
    if separator == ";":
        assert load(str(hospitals)).client_data(0).inputs[0, 0] == pytest.approx(0.003125)
    else:
        assert "'60,125': is not a number; a decimal comma goes with semicolons" in refusal_of(hospitals)


def test_a_line_may_be_longer_than_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedveil.tasks.table_files.BLOCK_BYTES", 1 << 10)
    names = [f"gene{number}" for number in range(15_000)]
    (tmp_path / "s.yaml").write_text(
        "label: ill\ncolumns:\n  gene3: {low: 0, high: 9}\n  ill: {categories: [no, yes]}\n"
    )
    rows = [",".join([*("123456789"[row] for _ in names), "no"]) for row in range(5)]
    (tmp_path / "wide.csv").write_text("\n".join([",".join([*names, "ill"]), *rows]))
    inputs = read_rows(tmp_path / "wide.csv", read_schema(tmp_path / "s.yaml")).inputs
    assert inputs[:, 0].tolist() == pytest.approx([(value - 4.5) / 4.5 for value in (1, 2, 3, 4, 5)])


def _wide(folder: Path, columns: int, rows: int) -> Path:
    """Write a table of numbers with so many columns and a label, and its schema."""
    names = [f"gene{number}" for number in range(columns)]
    definitions = "".join(f"  {name}: {{low: -9, high: 9.5}}\n" for name in names)
    (folder / "s.yaml").write_text(f"label: ill\ncolumns:\n{definitions}  ill: {{categories: [a, b]}}\n")
    lines = [
        ",".join([*(f"{row}.{column % 97}" for column in range(columns)), "ab"[row % 2]])
        for row in range(rows)
    ]
    (folder / "wide.csv").write_text("\n".join([",".join([*names, "ill"]), *lines]))
    return folder / "wide.csv"


def _calls(work: Callable[[], object]) -> int:
    """Return how many functions of Python are called, and of C."""
    count = 0

    def called(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(called)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("of", ["schema", "rows", "draft"])
def test_work_grows_with_the_columns_and_not_their_square(of: str, tmp_path: Path) -> None:
    counts = list[int]()
    for columns in (50, 250, 500):
        folder = tmp_path / str(columns)
        folder.mkdir()
        file = _wide(folder, columns, 60)
        schema = read_schema(folder / "s.yaml")
        works = {
            "schema": lambda folder=folder: read_schema(folder / "s.yaml"),
            "rows": lambda file=file, schema=schema: read_rows(file, schema),
            "draft": lambda file=file: draft_schema([file]),
        }
        counts.append(_calls(works[of]))
    _, small, large = counts  # the first imports what is needed
    assert (large - small) / 250 < {"schema": 400, "rows": 140, "draft": 1200}[of]
    assert large < 2.2 * small


def test_a_schema_of_many_columns_is_read(tmp_path: Path) -> None:
    definitions = "".join(f"  g{number}: {{low: 0, high: 1}}\n" for number in range(20_000))
    (tmp_path / "s.yaml").write_text(f"label: y\ncolumns:\n{definitions}  y: {{categories: [a, b]}}\n")
    assert (
        read_schema(tmp_path / "s.yaml").width == 20_000
    )  # 100 000 values, more than a configuration may have
