"""Spreadsheets: one sheet is a table, cells are as in a CSV file, and refusals name the sheet's own rows."""

from datetime import date, datetime
from pathlib import Path
from typing import Any

import openpyxl
import pytest
import torch
from shared.tables import NORTH, SCHEMA, refusal_of

from fedveil.tables import spreadsheet
from fedveil.tables.draft import draft_schema
from fedveil.tasks.tables import load

ROWS = [
    ["age", "sex", "diagnosis"],
    [20, "female", "healthy"],
    [100.0, "M", "very  ill"],
    [None, "?", "HEALTHY"],
]


def workbook(path: Path, *sheets: list[list[Any]], above: int = 0) -> None:
    book = openpyxl.Workbook()
    book.remove(book.active)  # pyright: ignore[reportArgumentType]
    for number, rows in enumerate(sheets):
        sheet = book.create_sheet(f"sheet {number}")
        for row, cells in enumerate(rows):
            for column, cell in enumerate(cells):
                sheet.cell(above + row + 1, column + 2).value = cell
    book.save(path)


def test_a_sheet_has_the_rows_of_a_csv_file(hospitals: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spreadsheet, "BLOCK_ROWS", 2)
    workbook(hospitals / "south.xlsx", ROWS, [], above=3)
    north, south = (load(str(hospitals)).client_data(client) for client in range(2))
    assert torch.equal(north.inputs, south.inputs) and torch.equal(north.targets, south.targets)


def test_a_row_of_a_sheet_is_named(hospitals: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spreadsheet, "BLOCK_ROWS", 2)
    workbook(hospitals / "south.xlsx", [*ROWS, ["old", "f", "healthy"]], above=3)
    assert "south.xlsx: column 'age', row 8='old': is not a number" in refusal_of(hospitals)
    workbook(hospitals / "south.xlsx", [*ROWS, [None, None, None], [30, "f", "healthy"]])
    assert "column 'diagnosis', row 5=None: is the label and missing" in refusal_of(hospitals)


def test_only_one_sheet_holds_cells(hospitals: Path) -> None:
    workbook(hospitals / "south.xlsx", ROWS, ROWS)
    assert "south.xlsx': has 2 sheets with cells (sheet 0, sheet 1); save the one" in refusal_of(hospitals)
    workbook(hospitals / "south.xlsx", [])
    assert "has 0 sheets with cells" in refusal_of(hospitals)
    (hospitals / "south.xlsx").write_text(NORTH)
    assert "south.xlsx': is no readable spreadsheet" in refusal_of(hospitals)


def test_an_oversized_spreadsheet_is_refused(hospitals: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workbook(hospitals / "south.xlsx", ROWS)
    monkeypatch.setattr(spreadsheet, "LARGEST_BYTES", 1 << 10)
    assert "which is too large; save it as CSV" in refusal_of(hospitals)


def test_dates_of_a_sheet_are_iso_texts(tmp_path: Path) -> None:
    rows = [["day", "time"], [date(2024, 2, 29), datetime(2024, 2, 29, 12, 30)]]
    workbook(tmp_path / "a.xlsx", rows)
    table = spreadsheet.open_xlsx(tmp_path / "a.xlsx", None)
    assert [each.to_pylist() for each in next(table.read([0, 1]))] == [
        ["2024-02-29"],
        ["2024-02-29 12:30:00"],
    ]


@pytest.mark.parametrize("error", ["#N/A", "#DIV/0!", "#REF!"])
def test_an_error_of_a_cell_is_no_missing_value(error: str, hospitals: Path) -> None:
    workbook(hospitals / "south.xlsx", [*ROWS, [error, "f", "healthy"]], above=3)
    message = f"south.xlsx: column 'age', row 8='{error}': is not a number; correct it, or add it to missing:"
    assert message in refusal_of(hospitals)
    workbook(hospitals / "south.xlsx", [*ROWS[:3], [30, error, "healthy"]])
    assert f"column 'sex', row 4='{error}': is not one of its categories" in refusal_of(hospitals)


def test_a_declared_error_is_a_missing_value(hospitals: Path) -> None:
    declared = SCHEMA.replace("missing: 40", 'missing: {words: ["#N/A"], value: 40}')
    (hospitals / "schema.yaml").write_text(declared)
    workbook(hospitals / "south.xlsx", [*ROWS[:3], ["#N/A", "?", "healthy"]], above=2)
    north, south = (load(str(hospitals)).client_data(client) for client in range(2))
    assert torch.equal(north.inputs, south.inputs)


def test_a_draft_proposes_errors_as_missing_words(tmp_path: Path) -> None:
    rows = [
        ["size", "ill"],
        *([number, ["no", "yes"][number % 2]] for number in range(40)),
        ["#DIV/0!", "no"],
    ]
    workbook(tmp_path / "a.xlsx", rows)
    assert draft_schema([tmp_path / "a.xlsx"]).schema.inputs[0].absent == ("#div/0!",)


def test_a_formula_that_was_not_computed_is_refused(hospitals: Path) -> None:
    workbook(hospitals / "south.xlsx", [*ROWS, ["=1+1", "f", "healthy"]])
    assert "south.xlsx': has a formula without a value in row 5; open the file" in refusal_of(hospitals)
