"""Errors of cells: each has the row and the column of its cell, with and without addresses."""

import zipfile
from pathlib import Path

import pytest

from fedveil.base.refusal import Refusal
from fedveil.tables.sheet_errors import sheet_errors

MAIN = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
STRICT = "http://purl.oclc.org/ooxml/spreadsheetml/main"


def written(file: Path, parts: dict[str, str]) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        for path, content in parts.items():
            archive.writestr(path, content)
    return file


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
    prefixed = rows.replace("<", "<x:").replace("<x:/", "</x:")
    sheets = {
        "xl/worksheets/sheet1.xml": f'<worksheet xmlns="{MAIN}"><sheetData>{rows}</sheetData></worksheet>',
        "xl/other/first.xml": f'<x:worksheet xmlns:x="{STRICT}">{prefixed}</x:worksheet>',
    }
    for path, content in sheets.items():
        assert sheet_errors(written(tmp_path / "a.xlsx", {path: content})) == errors


@pytest.mark.parametrize(
    "rows",
    ['<row/><row><c t="e"><v>oops</v></c></row>', '<row r="x1"/>', "<c><f>1</f></c>"],
    ids=["error", "number", "formula"],
)
@pytest.mark.parametrize(
    "root", ["<list>{}</list>", '<worksheet xmlns="urn:own">{}</worksheet>'], ids=["list", "namespace"]
)
def test_a_part_that_is_no_worksheet_has_no_cells(root: str, rows: str, tmp_path: Path) -> None:
    sheet = f'<worksheet xmlns="{MAIN}"><row><c t="e"><v>#N/A</v></c></row></worksheet>'
    parts = {"xl/worksheets/sheet1.xml": sheet, "customXml/item1.xml": root.format(rows)}
    assert sheet_errors(written(tmp_path / "a.xlsx", parts)) == {(0, 0): "#N/A"}


def test_elements_of_other_standards_in_a_worksheet_are_no_cells(tmp_path: Path) -> None:
    other = '<x:ext xmlns:x="urn:own"><x:row r="x1"/><x:c t="e"/></x:ext>'
    sheet = f'<worksheet xmlns="{MAIN}"><row><c t="e"><v>#N/A</v></c></row>{other}</worksheet>'
    assert sheet_errors(written(tmp_path / "a.xlsx", {"xl/sheet.xml": sheet})) == {(0, 0): "#N/A"}


def test_a_row_without_a_number_is_refused(tmp_path: Path) -> None:
    file = written(tmp_path / "a.xlsx", {"a.xml": f'<worksheet xmlns="{MAIN}"><row r="x1"/></worksheet>'})
    with pytest.raises(Refusal, match=r"has 'x1' as a row's number; save it anew"):
        sheet_errors(file)
