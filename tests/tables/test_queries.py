"""Queries: results are tables under the same schema, of files by DuckDB and SQLite, and of a server's PostgreSQL."""

import os
import pwd
import shutil
import sqlite3
import subprocess
from collections.abc import Generator
from pathlib import Path
from typing import Any

import duckdb
import pytest
import torch
from shared.tables import SCHEMA

from fedveil.base.refusal import Refusal
from fedveil.deployment.device.client_bundle import TaskChoice
from fedveil.tables.queries import query_results
from fedveil.tasks.tables import load

PATIENTS = [(20, "female", "healthy", "ann"), (100, "M", "very  ill", "bea"), (None, "?", "HEALTHY", "ann")]
TABLE = "CREATE TABLE patients (age {}, sex VARCHAR(9), diagnosis VARCHAR(9), name VARCHAR(9))"
QUERY = "SELECT age, sex, diagnosis, name FROM patients"
# The newest first, as Debian installs them.
BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)


def sqlite_file(path: Path) -> str:
    with sqlite3.connect(path) as connection:
        connection.execute(TABLE.format("REAL"))
        connection.executemany("INSERT INTO patients VALUES (?, ?, ?, ?)", PATIENTS)
    connection.close()
    return str(path)


def duckdb_file(path: Path) -> str:
    connection = duckdb.connect(str(path))
    connection.execute(TABLE.format("DECIMAL(5, 1)"))
    connection.executemany("INSERT INTO patients VALUES (?, ?, ?, ?)", PATIENTS)
    connection.close()
    return str(path)


def csv_file(path: Path) -> str:
    rows = [",".join("" if cell is None else str(cell) for cell in row) for row in PATIENTS]
    path.write_text("\n".join(["age,sex,diagnosis,name", *rows]) + "\n")
    return str(path)


@pytest.fixture
def schema(tmp_path: Path) -> str:
    (tmp_path / "schema.yaml").write_text(SCHEMA)
    return str(tmp_path / "schema.yaml")


def check(database: str, schema: str, query: str = QUERY) -> None:
    """Compare the rows of a query's result with those of the test of CSV files."""
    task = load(query=query, database=database, schema=schema, person="name", groups="sex")
    examples = task.client_data(0)
    assert task.num_clients == 1 and examples.persons == ["ann", "bea", "ann"]
    assert examples.inputs.tolist() == [[-1, 1, 0], [1, 0, 1], [-0.5, 0, 0]]
    assert examples.targets.tolist() == [0, 1, 0]
    assert task.columns(0)["sex"].tolist() == ["female", "male", ""]


def refusal(**options: Any) -> str:
    with pytest.raises(Refusal) as caught:
        load(**options)
    return str(caught.value)


@pytest.mark.parametrize(("make", "name"), [(sqlite_file, "it's.db"), (duckdb_file, "wards.duckdb")])
def test_a_query_on_a_file_gives_the_rows_of_a_table(
    make: Any, name: str, tmp_path: Path, schema: str
) -> None:
    database = make(tmp_path / name)
    check(database, schema)
    check(database, schema, f"WITH old AS ({QUERY}) SELECT * FROM old;")


def test_a_query_on_a_csv_or_parquet_file_reads_its_data(tmp_path: Path, schema: str) -> None:
    database = csv_file(tmp_path / "it's.csv")
    check(database, schema, "SELECT * FROM data")
    duckdb.sql(f"SELECT * FROM read_csv('{database.replace(chr(39), chr(39) * 2)}')").write_parquet(
        str(tmp_path / "a.parquet")
    )
    check(str(tmp_path / "a.parquet"), schema, "SELECT * FROM data")


def test_each_database_of_a_folder_is_a_client(tmp_path: Path, schema: str) -> None:
    folder = tmp_path / "wards"
    folder.mkdir()
    (folder / "notes.md").touch()
    sqlite_file(folder / "a.sqlite")
    duckdb_file(folder / "b.duckdb")
    task = load(query=QUERY, database=str(folder), schema=schema)
    assert task.num_clients == 2
    assert torch.equal(task.client_data(0).inputs, task.client_data(1).inputs)
    (folder / "c.xlsx").touch()
    assert "c.xlsx': is not read by a query" in refusal(query=QUERY, database=str(folder), schema=schema)


def test_a_row_of_a_result_is_named(tmp_path: Path, schema: str) -> None:
    database = sqlite_file(tmp_path / "a.db")
    query = f"{QUERY} UNION ALL SELECT 'old', 'f', 'healthy', 'eve'"
    assert "a.db: query: column 'age', row 4='old': is not a number" in refusal(
        query=query, database=database, schema=schema
    )


@pytest.mark.parametrize(
    "query", ["DROP TABLE patients", f"{QUERY}; DROP TABLE patients", "", "SELECTED", None]
)
def test_only_one_select_is_executed(query: str | None, tmp_path: Path) -> None:
    database = sqlite_file(tmp_path / "a.db")
    with pytest.raises(Refusal, match="write one SELECT"):
        query_results(query, database)


def test_a_query_writes_nothing_and_reads_no_other_file(tmp_path: Path) -> None:
    other = csv_file(tmp_path / "other.csv")
    for database in (csv_file(tmp_path / "a.csv"), duckdb_file(tmp_path / "a.duckdb")):
        with pytest.raises(Refusal, match="file system operations are disabled"):
            query_results(f"SELECT * FROM '{other}'", database)
    database = sqlite_file(tmp_path / "a.db")
    with pytest.raises(Refusal, match="readonly database"):
        query_results("WITH a AS (SELECT 1) DELETE FROM patients", database)


@pytest.mark.parametrize(
    ("query", "name", "message"),
    [
        ("SELECT lost FROM patients", "a.db", "no such column: lost"),
        ("SELECT lost FROM patients", "a.duckdb", "a.duckdb does not answer it: Binder Error"),
        ("SELECT age, age FROM patients", "a.db", "names two columns of the result; rename one by AS"),
        ("SELECT INTERVAL 1 DAY AS age", "a.duckdb", "has a column of a type that is no number"),
        (QUERY, "none.db", "none.db': cannot be read"),
        (QUERY, "text.db", "text.db': is no file of DuckDB or SQLite, CSV or Parquet"),
    ],
)
def test_a_query_that_fails_is_refused(query: str, name: str, message: str, tmp_path: Path) -> None:
    sqlite_file(tmp_path / "a.db")
    duckdb_file(tmp_path / "a.duckdb")
    (tmp_path / "text.db").write_text("a,b")
    with pytest.raises(Refusal) as caught:
        query_results(query, str(tmp_path / name))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("address", ["postgresql://ann:7132@db/wards", "mysql://db/wards?passwd=7132"])
def test_a_password_in_a_url_is_refused_and_not_repeated(address: str) -> None:
    with pytest.raises(Refusal, match="leave it out, and give it to the driver") as caught:
        query_results(QUERY, address)
    assert "7132" not in str(caught.value)


def test_tasks_of_one_process_share_a_result(tmp_path: Path, schema: str) -> None:
    """A device's runs go by one reading of its database, although others write to it."""
    database = sqlite_file(tmp_path / "a.db")
    first = query_results(QUERY, database)
    with sqlite3.connect(database) as connection:
        connection.execute("DELETE FROM patients")
    connection.close()
    assert query_results(QUERY, database)[0] is first[0]
    del first
    assert "has no rows" in refusal(query=QUERY, database=database, schema=schema)


def test_rows_have_one_origin(tmp_path: Path, schema: str) -> None:
    database = sqlite_file(tmp_path / "a.db")
    assert "gives the rows, and so does" in refusal(folder=".", query=QUERY, database=database, schema=schema)
    assert "name the file, the folder or the URL" in refusal(query=QUERY, schema=schema)
    assert list(TaskChoice(name="csv", client=0, query=QUERY, database="a.db").rules()) == []
    for keys, key in (
        ({"query": QUERY}, "query"),
        ({"query": QUERY, "database": "a.db", "data": "a.csv"}, "query"),
        ({}, "data"),
    ):
        assert key in dict(TaskChoice(name="csv", client=0, **keys).rules())


def test_a_device_finds_a_file_in_its_bundle_and_a_url_anywhere() -> None:
    choice = TaskChoice(name="csv", client=0, query=QUERY, database="a.db")
    assert choice.rows(Path("bundle")) == {"query": QUERY, "database": str(Path("bundle", "a.db"))}
    choice = TaskChoice(name="csv", client=0, query=QUERY, database="postgresql://db/wards")
    assert choice.rows(Path("bundle"))["database"] == "postgresql://db/wards"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[tuple[str, Path]]:
    """The user and the folder of the socket of a PostgreSQL that runs for these tests."""
    if not BINARIES:
        pytest.skip("PostgreSQL is not installed")
    user: dict[str, Any] = {"user": "postgres"} if os.getuid() == 0 else {}  # it refuses to run as root
    name = "postgres" if user else pwd.getpwuid(os.getuid()).pw_name
    folder = Path("/tmp") / f"pg{os.getpid()}"  # a socket's path is short
    folder.mkdir(mode=0o700)
    if user:
        shutil.chown(folder, name)

    def execute(program: str, *arguments: str) -> None:
        command = [BINARIES[0] / program, "-D", folder / "data", *arguments]
        subprocess.run(command, check=True, capture_output=True, cwd=folder, **user)

    try:
        execute("initdb", "--no-sync", "--auth=trust", "--encoding=UTF8", "--no-locale")
        options = f"-F -k {folder} -c listen_addresses="
        execute("pg_ctl", "-w", "-l", str(folder / "log"), "-o", options, "start")
        yield name, folder
    finally:
        execute("pg_ctl", "-w", "-m", "immediate", "stop")
        shutil.rmtree(folder)


def test_a_query_on_a_server_gives_the_rows_of_a_table(server: tuple[str, Path], schema: str) -> None:
    import psycopg

    user, folder = server
    with psycopg.connect(host=str(folder), user=user, dbname="postgres") as connection:
        connection.execute(TABLE.format("NUMERIC"))
        connection.execute("CREATE SEQUENCE numbers")
        connection.cursor().executemany("INSERT INTO patients VALUES (%s, %s, %s, %s)", PATIENTS)
    address = f"postgresql://{user}@/postgres?host={folder}"
    check(address, schema)
    check(address, schema, f"{QUERY} WHERE name LIKE '%a%' OR age % 2 = 0")
    with pytest.raises(Refusal, match="read-only transaction"):
        query_results("SELECT nextval('numbers')", address)
    with pytest.raises(
        Refusal, match='postgres at this machine: query fails: relation "wards" does not exist'
    ):
        query_results("SELECT * FROM wards", address)
