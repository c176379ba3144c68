"""Parquet files: blocks of wide ones are short, and folders of Hive's layout are columns."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shared.tables import SCHEMA, refusal_of

from fedveil.tasks.table_files import open_table
from fedveil.tasks.table_schema import read_schema
from fedveil.tasks.tables import load


def test_folders_below_a_client_belong_to_it(hospitals: Path) -> None:
    (hospitals / "schema.yaml").write_text(
        SCHEMA.replace("  diagnosis: {", "  ward: {categories: [A b, c]}\n  diagnosis: {", 1)
    )
    north = hospitals / "north"
    (hospitals / "north.csv").unlink()
    for folder, ages in (
        ("ward=A%20b", [20, 100]),
        ("ward=c/month=1", [60]),
        ("ward=__HIVE_DEFAULT_PARTITION__", [20]),
    ):
        (north / folder).mkdir(parents=True)
        rows = {"age": ages, "sex": ["f"] * len(ages), "diagnosis": ["healthy"] * len(ages)}
        pq.write_table(pa.table(rows), north / folder / "part-0.parquet")
        (north / folder / "_SUCCESS").touch()
    (north / "ward=c" / "loop").symlink_to(north)
    task = load(str(hospitals))
    assert task.num_clients == 1
    wards = task.client_data(0).inputs[:, 3:]
    assert wards.tolist() == [[1, 0], [1, 0], [0, 0], [0, 1]]
    columns = task.columns(0)
    assert columns["ward"].tolist() == ["A b", "A b", "", "c"]
    (north / "ward=c" / "late.sav").touch()
    assert "late.sav': is not read; save it as Parquet or CSV" in refusal_of(hospitals)


def test_blocks_of_a_wide_parquet_file_are_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedveil.tasks.table_files.BLOCK_CELLS", 600)
    names = [f"gene{number}" for number in range(59)]
    definitions = "".join(f"  {name}: {{low: 0, high: 30}}\n" for name in names)
    (tmp_path / "s.yaml").write_text(f"label: ill\ncolumns:\n{definitions}  ill: {{categories: [a, b]}}\n")
    schema = read_schema(tmp_path / "s.yaml")
    table = {name: range(30) for name in (column.name for column in schema.inputs)}
    pq.write_table(pa.table({**table, "ill": ["a", "b"] * 15}), tmp_path / "wide.parquet")
    with open_table(tmp_path / "wide.parquet") as table:
        lengths = [len(block["ill"].values) for block in table.blocks(schema.columns, schema.missing)]
    assert lengths == [10, 10, 10]
