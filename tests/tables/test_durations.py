"""Dates as durations: since a date or another column, in days, hours or years, and refused where they are none."""

from datetime import date, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedveil.base.refusal import Refusal
from fedveil.tasks.table_files import read_columns, read_rows
from fedveil.tasks.table_schema import Schema, read_schema

HEAD = "label: ill\ncolumns:\n"
ILL = "  ill: {categories: [no, yes]}\n"


def schema_of(folder: Path, *lines: str) -> Schema:
    (folder / "schema.yaml").write_text(HEAD + "".join(f"  {line}\n" for line in lines) + ILL)
    schema = read_schema(folder / "schema.yaml")
    (folder / "schema.yaml").write_text(schema.text())
    assert read_schema(folder / "schema.yaml") == schema
    return schema


def values(folder: Path, rows: str, *lines: str) -> dict[str, list[float]]:
    (folder / "a.csv").write_text(rows)
    columns = read_columns(folder / "a.csv", schema_of(folder, *lines))
    return {name: array.tolist() for name, array in columns.items() if name != "ill"}


def test_dates_count_from_a_date_and_from_another_column(tmp_path: Path) -> None:
    rows = (
        "ill,end,birth,start\nno,2020-03-01,1990-03-01,2020-02-28 12:00\nyes,na,1960-02-29,2019-12-31T23:00\n"
    )
    found = values(
        tmp_path,
        rows,
        "end: {since: start, unit: days, low: 0, high: 9}",
        "start: {since: 2020-01-01, unit: hours, low: 0, high: 2000}",
        "birth: {since: 2020-02-29, unit: years, low: -90, high: 0}",
    )
    assert found["end"][0] == 1.5 and found["end"][1] != found["end"][1]
    assert found["start"] == [(31 + 27) * 24 + 12, -1]
    assert found["birth"] == pytest.approx([-10957 / 365.25, -21915 / 365.25])


def test_a_duration_is_scaled_as_any_number(tmp_path: Path) -> None:
    schema = schema_of(tmp_path, 'day: {since: 2020-01-01, unit: days, format: "%d.%m.%Y", low: 0, high: 10}')
    (tmp_path / "a.csv").write_text("ill;day\nno;1.1.2020\nyes;11.01.2020\nno;\nno;02.01.2021\n")
    assert read_rows(tmp_path / "a.csv", schema).inputs[:, 0].tolist() == [-1, 1, 0, 1]


def test_dates_of_parquet_are_durations(tmp_path: Path) -> None:
    schema = schema_of(tmp_path, "end: {since: start, unit: hours, low: 0, high: 48}")
    table = {
        "ill": ["no", "yes"],
        "start": pa.array([datetime(2020, 1, 1, 12), None], pa.timestamp("ns", "UTC")),
        "end": pa.array([date(2020, 1, 2), date(2020, 1, 2)]),
    }
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    assert read_rows(tmp_path / "a.parquet", schema).inputs[:, 0].tolist() == [-0.5, 0]


@pytest.mark.parametrize(
    ("cell", "line", "message"),
    [
        (
            "31.01.2020",
            "since: 2020-01-01, unit: days",
            "row 3='31.01.2020': is no date like 2020-01-31; correct it",
        ),
        ("2020-02-30", "since: 2020-01-01, unit: days", "row 3='2020-02-30': is no date"),
        ("31.02.2020", 'since: 2020-01-01, unit: days, format: "%d.%m.%Y"', "is no date like 31.01.2020"),
        ("2020-01-31", "since: begin, unit: days", "column='begin': is missing"),
        ("2020-01-31", "since: 2020-13-01, unit: days", "since is no date (month must be in 1..12)"),
        ("2020-01-31", "since: 2020-01-01", "unit must be one of hours, days, years"),
        ("2020-01-31", "since: 2020-01-01, unit: weeks", "unit must be one of hours, days, years"),
        ("2020-01-31", "unit: days", "belongs to dates; add since:"),
        ("2020-01-31", "since: [a], unit: days", "since must be a date such as 2020-01-01"),
    ],
)
def test_an_invalid_date_is_refused(cell: str, line: str, message: str, tmp_path: Path) -> None:
    first = "01.01.2020" if "format" in line else "2020-01-01"
    with pytest.raises(Refusal) as caught:
        values(tmp_path, f"ill,day\nno,{first}\nno,{cell}\n", f"day: {{{line}, low: 0, high: 100}}")
    assert message in str(caught.value)


def test_dates_belong_to_no_categories(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="since belongs to a number; remove it here"):
        schema_of(tmp_path, "day: {categories: [a, b], since: 2020-01-01}")
    (tmp_path / "b.csv").write_text("ill,day\nno,2020-01-01\n")
    with pytest.raises(Refusal, match="write a date as an age, or declare since: and unit: for the column"):
        read_rows(tmp_path / "b.csv", schema_of(tmp_path, "day: {low: 0, high: 1}"))
