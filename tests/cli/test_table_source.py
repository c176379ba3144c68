"""Tables that commands name: one table gives the same predictions and the same draft from every source."""

import sqlite3
import zipfile
from collections.abc import Callable
from pathlib import Path

import duckdb
import openpyxl
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
import yaml

from fedveil.__main__ import run
from fedveil.base.refusal import Refusal
from fedveil.cli.table_source import tables_at

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")

ROWS = [(n % 7, "café" if n % 3 else "thé", "yes" if n % 7 > 3 else "no") for n in range(60)]
SCHEMA = "label: ill\ncolumns:\n  x: {low: 0, high: 9}\n  drink: {categories: [café, thé]}\n  ill: {categories: ['no', 'yes']}\n"
TEXT = "x,drink,ill\n" + "".join(f"{x},{drink},{ill}\n" for x, drink, ill in ROWS)
QUERY = "SELECT x, drink, ill FROM stays"


def _duckdb(path: Path) -> None:
    connection = duckdb.connect(str(path))
    connection.execute("CREATE TABLE stays (x INTEGER, drink VARCHAR, ill VARCHAR)")
    connection.executemany("INSERT INTO stays VALUES (?, ?, ?)", ROWS)
    connection.close()


def _sqlite(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE stays (x INTEGER, drink TEXT, ill TEXT)")
        connection.executemany("INSERT INTO stays VALUES (?, ?, ?)", ROWS)
    connection.close()


def _xlsx(path: Path) -> None:
    book = openpyxl.Workbook()
    for row in [("x", "drink", "ill"), *ROWS]:
        book.worksheets[0].append(row)
    book.save(path)


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("rows.csv", TEXT)


def _parquet(path: Path) -> None:
    path.with_suffix(".txt").write_text(TEXT)
    pq.write_table(pa_csv.read_csv(path.with_suffix(".txt")), path)


Write = Callable[[Path], object]
SOURCES: dict[str, tuple[Write, list[str]]] = {
    "a.csv": (lambda path: path.write_bytes(TEXT.encode("cp1252")), ["--encoding", "cp1252"]),
    "a.zip": (_zip, []),
    "a.xlsx": (_xlsx, []),
    "a.parquet": (_parquet, []),
    "a.duckdb": (_duckdb, ["--query", QUERY]),
    "a.sqlite": (_sqlite, ["--query", QUERY]),
    "b.csv": (lambda path: path.write_text(TEXT), ["--query", "SELECT * FROM data"]),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small run, and the predictions of its rows from a plain table."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tables").mkdir()
    (folder / "tables" / "one.csv").write_text(TEXT)
    (folder / "tables" / "schema.yaml").write_text(SCHEMA)
    options = ["task=csv", f"task.folder={folder / 'tables'}", "task.simulated=true", "num_rounds=1"]
    assert run(["simulate", *options, "privacy=none", f"hydra.run.dir={folder / 'run'}", "-q"]) == 0
    table = folder / "tables" / "one.csv"
    assert run(["predict", str(folder / "run"), str(table), "--out", str(folder / "plain.csv")]) == 0
    return folder


@pytest.mark.parametrize("name", SOURCES)
def test_predictions_are_those_of_a_plain_table(name: str, trained: Path, tmp_path: Path) -> None:
    write, words = SOURCES[name]
    write(tmp_path / name)
    out = tmp_path / "out.csv"
    asked = ["predict", str(trained / "run"), str(tmp_path / name), "--out", str(out), *words]
    assert run(asked) == 0
    assert out.read_text() == (trained / "plain.csv").read_text()


@pytest.mark.parametrize("name", ["a.csv", "a.xlsx", "a.duckdb"])
def test_a_draft_is_that_of_a_plain_table(name: str, tmp_path: Path) -> None:
    write, words = SOURCES[name]
    write(tmp_path / name)
    (tmp_path / "plain.csv").write_text(TEXT)
    for draft, more in (("one", ["plain.csv"]), ("other", [name, *words])):
        more[0] = str(tmp_path / more[0])
        assert run(["new", str(tmp_path / draft), "--from", "csv", *more]) == 0
    schemas = [yaml.safe_load((tmp_path / draft / "schema.yaml").read_text()) for draft in ("one", "other")]
    assert schemas[0] == schemas[1]
    task = yaml.safe_load((tmp_path / "other" / "project.yaml").read_text())["task"]
    where = str(tmp_path / name)
    keys = {"query": {"query": QUERY, "database": where}, "encoding": {"folder": where, "encoding": "cp1252"}}
    expected = keys[words[0].strip("-")] if words else {"folder": where}
    assert {key: task[key] for key in task if key in ("query", "database", "folder", "encoding")} == expected


@pytest.mark.parametrize(
    ("data", "query", "encoding", "message"),
    [
        pytest.param("no.csv", None, None, "DATA='no.csv': does not exist", id="file"),
        pytest.param("no.csv", None, "cp1252", "DATA='no.csv': does not exist", id="encoding"),
        pytest.param("db://a/b", None, None, "is the URL of a database; say which rows by --query", id="URL"),
        pytest.param("no.db", QUERY, None, "DATA='no.db': cannot be read", id="database"),
        pytest.param("no.db", "DROP TABLE x", None, "--query='DROP TABLE x': write one SELECT", id="query"),
        pytest.param("no.db", QUERY, "cp1252", "--encoding='cp1252': is of text files", id="both"),
    ],
)
def test_data_that_cannot_be_named_are_refused(
    data: str, query: str | None, encoding: str | None, message: str
) -> None:
    with pytest.raises(Refusal) as refusal:
        tables_at(data, query, encoding)
    assert message in str(refusal.value)


def test_a_prediction_is_of_one_database(tmp_path: Path) -> None:
    for name in ("a.db", "b.db"):
        _sqlite(tmp_path / name)
    with pytest.raises(Refusal, match="holds 2 databases; name one"):
        tables_at(str(tmp_path), QUERY, None)


def test_a_refused_draft_leaves_no_folder(tmp_path: Path) -> None:
    for name in ("a.db", "b.db"):
        _sqlite(tmp_path / name)
    asked = ["new", str(tmp_path / "x"), str(tmp_path / "a.db"), str(tmp_path / "b.db"), "--query", QUERY]
    assert run([*asked[:2], "--from", "csv", *asked[2:]]) == 2
    assert run(["new", str(tmp_path / "x"), "--from", "csv", "--query", QUERY]) == 2
    assert not (tmp_path / "x").exists()
