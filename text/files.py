"""Reader of texts: a .txt file is one record, a line of .jsonl is one record, and a file or folder is a client.

Mistakes name file and line, never the text. No text is left out silently: a file of another kind and an empty text are
refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ..base.bounded_decoding import Undecodable, read_json
from ..base.refusal import Refusal, unreadable

SHARED = ("base", "")  # key of what all devices' tasks share, the language model, and its default in a bundle
SUFFIXES = (".txt", ".jsonl")
LONGEST = 1 << 20  # bytes of a .txt file or of a line of .jsonl: 200 000 words, far beyond any context
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class TextRecord:
    """Text of a client.

    Attributes:
      text: not empty.
      person: whose it is; empty if no field names persons.
      label: its class; empty without classes.
    """

    text: str
    person: str = ""
    label: str = ""


@dataclass(frozen=True)
class Fields:
    """Names of the fields of a .jsonl record.

    Attributes:
      text: field of the text.
      person: field of its person; empty without one.
      label: field of its class; empty without one.
    """

    text: str = "text"
    person: str = ""
    label: str = ""


def clients_of(folder: Path, public: Sequence[Path] = ()) -> list[Path]:
    """Return one path per client: each file and each folder with texts in `folder`, by name; or `folder`, if a file.

    Args:
      folder: folder of all clients, or one client's file.
      public: files in it that belong to no client.

    Raises:
      Refusal: there is no text, or a file of another kind, which might hold texts.
    """
    if folder.is_file():
        return [folder]
    excluded = set(map(os.path.realpath, public))
    paths = [path for path in sorted(folder.glob("[!.]*")) if os.path.realpath(path) not in excluded]
    clients = [path for path in paths if any(_files(path))]
    if not clients:
        raise Refusal("task.folder", str(folder), f"{_fault(folder)}; name a folder of .txt or .jsonl files")
    return clients


def read_texts(path: Path, fields: Fields) -> list[TextRecord]:
    """Return the records of a client's file, or of all files in its folder, by name.

    Args:
      path: the file or the folder.
      fields: names of the fields of .jsonl records.

    Raises:
      Refusal: there is no text, a file cannot be read, or a record is invalid; the text is not in the sentence.
    """
    records = [record for file in _files(path) for record in _records(file, fields)]
    if not records:
        remedy = f"{_fault(path)}; write a .txt file, or a line of .jsonl for each text"
        raise Refusal("texts", str(path), remedy)
    return records


def _fault(path: Path) -> str:
    """Return why a path has no texts."""
    return {True: "holds no text", False: "does not exist"}[path.exists()]


def _files(path: Path) -> Iterator[Path]:
    """Yield the files of a client in order of their names; refuse one of another kind."""
    for file in [path, *sorted(path.rglob("*"))]:
        is_hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if is_hidden or file.is_dir() or not os.path.lexists(file):
            continue
        if file.suffix.lower() not in SUFFIXES or not file.is_file():
            remedy = "is no text that is read; write it as .txt or .jsonl, or move it away"
            raise Refusal("texts", str(file), remedy)
        yield file


def _records(file: Path, fields: Fields) -> Iterator[TextRecord]:
    """Yield the records of one file."""
    is_plain = file.suffix.lower() == ".txt"
    if is_plain and (fields.person or fields.label):
        remedy = "has no fields for a person or a label; write it as .jsonl"
        raise Refusal("texts", str(file), remedy)
    try:
        with file.open("rb") as stream:
            if is_plain:
                content = _decoded(stream.read(LONGEST + 1), file, 1)
                yield TextRecord(_filled(content, file, 1))
            for number, line in enumerate(iter(lambda: stream.readline(LONGEST + 1), b""), 1):
                content = _decoded(line, file, number)
                if content.strip():  # an empty line holds no record
                    yield _record(content, fields, file, number)
    except OSError as error:
        raise Refusal("texts", str(file), unreadable(error, "check its permissions")) from error


def _decoded(block: bytes, file: Path, number: int) -> str:
    """Return a line as text; refuse one that is too long or no UTF-8."""
    if len(block) > LONGEST:
        raise _mistake(file, number, f"is longer than {LONGEST} bytes; divide it into several texts")
    try:
        return block.removeprefix(BYTE_ORDER_MARK).decode()
    except UnicodeDecodeError:
        raise _mistake(file, number, "is no UTF-8; save it with that encoding") from None


def _record(line: str, fields: Fields, file: Path, number: int) -> TextRecord:
    """Return the record in a line of .jsonl."""
    try:
        content: Any = read_json(line)
    except Undecodable:
        content = ()
    if not isinstance(content, dict):
        raise _mistake(file, number, 'is no JSON object; write {"text": "..."}')
    values = cast(Mapping[str, Any], content)
    text = values.get(fields.text)
    if not isinstance(text, str):
        raise _mistake(
            file, number, f"has no text in the field {fields.text!r}; add it, or set task.text_field"
        )
    person, label = (_word(values, name, file, number) for name in (fields.person, fields.label))
    return TextRecord(_filled(text, file, number), person, label)


def _word(values: Mapping[str, Any], name: str, file: Path, number: int) -> str:
    """Return the word or number in a field, as text; empty if `name` is."""
    value = values.get(name, "")
    text = str(value).strip()
    if name and not (isinstance(value, str | int | float) and text):
        raise _mistake(file, number, f"has no word or number in the field {name!r}; add it")
    return text


def _filled(text: str, file: Path, number: int) -> str:
    """Return a text that a model can learn from; refuse an empty one, and one of half a character."""
    if not text.strip():
        raise _mistake(file, number, "holds an empty text; remove it")
    if not text.isprintable() and any("\ud800" <= character <= "\udfff" for character in text):
        raise _mistake(file, number, "holds half of a surrogate pair; write the character itself")
    return text


def _mistake(file: Path, number: int, remedy: str) -> Refusal:
    return Refusal("texts", f"{file}, line {number}", remedy)
