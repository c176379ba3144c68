"""Errors in the cells of an .xlsx file, such as #N/A and #DIV/0!, which calamine reads as empty cells."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from xml.parsers import expat

from ..base.refusal import Refusal

LETTERS = 26
CHUNK_BYTES = 1 << 20
SEPARATOR = " "  # between an element's namespace and its name
NAMESPACES = {  # of a worksheet, by ECMA-376 part 4 and part 1; calamine reads one without a namespace too
    "http://schemas.openxmlformats.org/spreadsheetml/2006/main",
    "http://purl.oclc.org/ooxml/spreadsheetml/main",
    "",
}
ADDRESS = re.compile(r"([A-Z]+)([0-9]+)")  # of a cell, by ECMA-376 part 1, 18.18.62


def sheet_errors(file: Path) -> dict[tuple[int, int], str]:
    """Return the error by the row and the column of its cell, both from 0, in all sheets of a file.

    Raises:
      Refusal: a formula has no value, so that the cell would seem empty.
    """
    errors = dict[tuple[int, int], str]()
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if entry.filename.lower().endswith(".xml"):
                _Sheet(file, errors).read(archive, entry)
    return errors


@dataclass
class _Sheet:
    """Part of an .xlsx file while it is parsed; one that is no worksheet, such as customXml/item1.xml, has no cells."""

    file: Path
    errors: dict[tuple[int, int], str]
    namespace: str = ""
    is_over: bool = False
    row: int = -1
    column: int = -1
    kind: str = ""  # attribute t of the cell: e is an error, str a text that a formula gives
    has_formula: bool = False
    is_value: bool = False
    value: list[str] = field(default_factory=list[str])

    def read(self, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
        """Add the errors of the part, if it is a worksheet."""
        parser = expat.ParserCreate(namespace_separator=SEPARATOR)

        def root(name: str, _attributes: Mapping[str, str]) -> None:
            self.namespace, _, kind = name.rpartition(SEPARATOR)
            self.is_over = kind != "worksheet" or self.namespace not in NAMESPACES
            if not self.is_over:
                parser.StartElementHandler, parser.EndElementHandler = self._start, self._end
                parser.CharacterDataHandler = self._text

        parser.StartElementHandler = root
        with archive.open(entry) as content:
            while not self.is_over and (chunk := content.read(CHUNK_BYTES)):
                parser.Parse(chunk)
        if not self.is_over:
            parser.Parse(b"", True)

    def _start(self, name: str, attributes: Mapping[str, str]) -> None:
        match self._local(name):
            case "row":
                self.row, self.column = self._number(attributes.get("r", str(self.row + 2))) - 1, -1
            case "c":
                self.column = _column(attributes.get("r", ""), self.column + 1)
                self.kind, self.has_formula, self.value = attributes.get("t", "n"), False, []
            case "f":
                self.has_formula = True
            case "v":
                self.is_value = True
            case _:
                pass

    def _text(self, text: str) -> None:
        if self.is_value:
            self.value.append(text)

    def _end(self, name: str) -> None:
        match self._local(name):
            case "v":
                self.is_value = False
            case "c" if self.kind == "e":
                self.errors[self.row, self.column] = "".join(self.value) or "#VALUE!"
            case "c" if self.has_formula and self.kind != "str" and not self.value:
                fault = f"has a formula without a value in row {self.row + 1}"
                remedy = f"{fault}; open the file in a spreadsheet program, which computes it, and save it"
                raise Refusal("table", str(self.file), remedy)
            case _:
                pass

    def _local(self, name: str) -> str:
        """Return the name of an element in the worksheet's own namespace; nothing for another standard's."""
        namespace, _, local = name.rpartition(SEPARATOR)
        return local if namespace == self.namespace else ""

    def _number(self, text: str) -> int:
        """Return a row's number, from 1."""
        if not text.isdecimal():
            raise Refusal("table", str(self.file), f"has {text!r} as a row's number; save it anew")
        return int(text)


def _column(address: str, following: int) -> int:
    """Return the column of a cell, from 0; the one that follows the previous cell's if it has no address."""
    if (parts := ADDRESS.fullmatch(address)) is None:
        return following
    number = 0
    for letter in parts[1]:
        number = number * LETTERS + ord(letter) - ord("A") + 1
    return number - 1
