"""Packed tables: rows equal those of the plain file, and damaged, ambiguous and swollen archives are refused."""

import gzip
import zipfile
from pathlib import Path

import pytest
import torch
from shared.tables import NORTH, refusal_of

from fedveil.tables import packed
from fedveil.tasks.tables import load


def archive(path: Path, entries: dict[str, str]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, text in entries.items():
            file.writestr(name, text)


def test_packed_tables_have_the_rows_of_plain_ones(hospitals: Path) -> None:
    (hospitals / "east.csv.gz").write_bytes(
        gzip.compress(NORTH[:20].encode()) + gzip.compress(NORTH[20:].encode())
    )
    archive(hospitals / "south.zip", {"ward/rows.csv": NORTH.replace(",", "\t"), "__MACOSX/rows.csv": "x"})
    (hospitals / "west.TXT.GZ").write_bytes(gzip.compress(NORTH.encode("utf-16")))
    task = load(str(hospitals))
    assert task.num_clients == 4
    for client in range(1, 4):
        assert torch.equal(task.client_data(client).inputs, task.client_data(0).inputs)
        assert torch.equal(task.client_data(client).targets, task.client_data(0).targets)


def test_a_row_of_a_packed_table_is_named(hospitals: Path) -> None:
    (hospitals / "east.csv.gz").write_bytes(gzip.compress((NORTH + "old,f,healthy\n").encode()))
    assert "east.csv.gz: column 'age', row 5='old': is not a number" in refusal_of(hospitals)
    (hospitals / "east.csv.gz").unlink()
    archive(hospitals / "east.zip", {"rows.csv": NORTH + "old,f,healthy\n"})
    assert "east.zip: rows.csv: column 'age', row 5='old': is not a number" in refusal_of(hospitals)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("east.gz", b"", "holds no CSV file by its name; call it .csv.gz, or unpack it"),
        ("east.tar.gz", b"", "holds no CSV file by its name"),
        ("east.csv.gz", b"PK", "Not a gzipped file"),
        ("east.csv.gz", gzip.compress(NORTH.encode())[:-9], "it is damaged"),
        ("east.csv.gz", gzip.compress(NORTH.encode())[:-4] + b"abcd", "Incorrect length of data"),
        ("east.zip", b"PK", "is no ZIP archive"),
    ],
    ids=["no table", "an archive of files", "not packed", "cut", "wrong length", "no archive"],
)
def test_a_damaged_archive_is_refused(hospitals: Path, name: str, content: bytes, message: str) -> None:
    (hospitals / name).write_bytes(content)
    refusal = refusal_of(hospitals)
    assert message in refusal and name in refusal


def test_an_archive_holds_one_table(hospitals: Path) -> None:
    archive(hospitals / "east.zip", {"a.csv": NORTH, "b.csv": NORTH})
    assert "east.zip': holds 2 files; pack each table into an archive of its own" in refusal_of(hospitals)
    archive(hospitals / "east.zip", {"a.parquet": NORTH})
    assert "east.zip: a.parquet': is no CSV file; unpack the archive" in refusal_of(hospitals)
    archive(hospitals / "east.zip", {"a.csv": NORTH})
    packed_bytes = bytearray((hospitals / "east.zip").read_bytes())
    for signature, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):  # flags of both headers: bit 0 is encryption
        packed_bytes[packed_bytes.index(signature) + offset] |= 1
    (hospitals / "east.zip").write_bytes(packed_bytes)
    assert "east.zip: a.csv': is encrypted; unpack the archive" in refusal_of(hospitals)


def test_a_damaged_zip_entry_is_refused(hospitals: Path) -> None:
    with zipfile.ZipFile(hospitals / "east.zip", "w") as file:
        file.writestr("a.csv", NORTH)
    content = (hospitals / "east.zip").read_bytes()
    (hospitals / "east.zip").write_bytes(content.replace(b"healthy", b"hurting", 1))
    assert "it is damaged, Bad CRC-32" in refusal_of(hospitals)


def test_a_bomb_is_refused_in_little_memory(hospitals: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "LARGEST_BYTES", 1 << 20)
    (hospitals / "east.csv.gz").write_bytes(gzip.compress(NORTH.encode() + b"\n" * (4 << 20)))
    assert "it unpacks to more than 200 times its size; unpack it yourself if you trust it" in refusal_of(
        hospitals
    )
    (hospitals / "east.csv.gz").unlink()
    archive(hospitals / "east.zip", {"a.csv": NORTH + "\n" * (4 << 20)})
    assert "it unpacks to more than 200 times its size" in refusal_of(hospitals)
