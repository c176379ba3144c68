"""Rows of an audit's file, read together where their headers are alike, and one by one where not."""

from pathlib import Path

import numpy as np
import pytest

from fedveil.base.refusal import Refusal
from fedveil.base.tensor_file import read_npy
from fedveil.privacy.audit import round_rows
from fedveil.privacy.audit.round_rows import Rows, append, chunks, cut, read
from fedveil.privacy.audit.sum_audit import empty_row

CANARIES = 3


def written(path: Path, numbers: range) -> list[Rows]:
    rows = [empty_row(number, CANARIES) for number in numbers]
    for row in rows:
        row["norm"] = float(row["round"]) / 3
        append(path, row)
    return rows


def test_rows_are_read_as_they_were_appended(tmp_path: Path) -> None:
    rows = written(tmp_path / "rows", range(1, 40))
    together = read(tmp_path / "rows", CANARIES)
    assert together.dtype == rows[0].dtype and together.tobytes() == np.stack(rows).tobytes()


@pytest.mark.parametrize("lacking", [1, 500, 3_000])
def test_a_truncated_row_is_left_out(tmp_path: Path, lacking: int) -> None:
    path = tmp_path / "rows"
    rows = written(path, range(1, 4))
    content = path.read_bytes()
    path.write_bytes(content[:-lacking])
    whole = (len(content) - lacking) // (len(content) // 3)
    assert read(path, CANARIES).tobytes() == np.stack(rows[:whole]).tobytes()


def test_rows_of_another_header_are_read_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    rows = written(path, range(1, 3))
    with path.open("ab") as file:
        np.lib.format.write_array(file, empty_row(3, CANARIES), version=(2, 0))
    assert read(path, CANARIES)["round"].tolist() == [1, 2, 3]
    with path.open("rb") as file:
        assert read_npy(file).tobytes() == rows[0].tobytes()


@pytest.mark.parametrize("canaries", [0, 2, 4, 100])
def test_a_last_row_of_other_canaries_is_refused(tmp_path: Path, canaries: int) -> None:
    path = tmp_path / "rows"
    written(path, range(1, 3))
    append(path, empty_row(3, canaries))
    with pytest.raises(Refusal, match="holds no audit of 3 canaries"):
        read(path, CANARIES)


def test_a_missing_or_empty_file_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert len(read(tmp_path / "rows", CANARIES)) == len(read(tmp_path / "empty", CANARIES)) == 0


def test_rows_without_layers_are_those_of_all_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(round_rows, "CHUNK", 4)
    rows = written(tmp_path / "rows", range(1, 12))
    assert [len(chunk) for chunk in chunks(tmp_path / "rows", CANARIES)] == [4, 4, 3]
    bare = read(tmp_path / "rows", CANARIES, layers=False)
    assert bare.itemsize < rows[0].itemsize / 3
    names = list(bare.dtype.names or ())
    assert set(rows[0].dtype.names or ()) - set(names) == {
        "layer_energies",
        "layer_means",
        "layer_dimensions",
    }
    for name in names:
        np.testing.assert_array_equal(bare[name], np.stack(rows)[name])


def test_a_cut_file_is_that_of_its_first_rounds(tmp_path: Path) -> None:
    written(tmp_path / "few", range(1, 4))
    written(tmp_path / "many", range(1, 9))
    append(tmp_path / "many", empty_row(0, CANARIES))  # of the whole run, once it ended
    cut(tmp_path / "many", CANARIES, 3)
    assert (tmp_path / "many").read_bytes() == (tmp_path / "few").read_bytes()
    for _ in range(2):  # of a file that is not there, too
        cut(tmp_path / "many", CANARIES, 0)
        assert not list(tmp_path.glob("*many*"))
