"""Errors of cells: each has the row and the column of its cell, with and without addresses."""

import zipfile
from pathlib import Path

import pytest

from fedveil.tables.sheet_errors import sheet_errors


@pytest.mark.parametrize(
    ("rows", "errors"),
    [
        pytest.param('<row r="3"><c r="AB3" t="e"><v>#N/A</v></c></row>', {(2, 27): "#N/A"}, id="addresses"),
        pytest.param(
            '<row><c><v>1</v></c><c t="e"><v>#REF!</v></c></row><row><c t="e"><v/></c></row>',
            {(0, 1): "#REF!", (1, 0): "#VALUE!"},
            id="no addresses",
        ),
        pytest.param(
            '<row r="1"><c r="A1" t="e"><f>1/0</f><v>#DIV/0!</v></c></row>', {(0, 0): "#DIV/0!"}, id="formula"
        ),
        pytest.param(
            '<row r="1"><c r="A1" t="str"><f>""</f><v></v></c><c r="B1" t="s"><v>0</v></c></row>',
            {},
            id="texts",
        ),
    ],
)
def test_each_error_has_its_cell(rows: str, errors: dict[tuple[int, int], str], tmp_path: Path) -> None:
    name = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    prefixed = rows.replace("<", "<x:").replace("<x:/", "</x:")
    sheets = {
        "xl/worksheets/sheet1.xml": f'<worksheet xmlns="{name}"><sheetData>{rows}</sheetData></worksheet>',
        "xl/other/first.xml": f'<x:worksheet xmlns:x="{name}">{prefixed}</x:worksheet>',
    }
    for path, content in sheets.items():
        with zipfile.ZipFile(tmp_path / "a.xlsx", "w") as archive:
            archive.writestr(path, content)
        assert sheet_errors(tmp_path / "a.xlsx") == errors
