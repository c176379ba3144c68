"""Data sets: the heads of their ledgers."""

import os
import shutil

import pytest
from shared.ledgers import (
    opened,
    release,
)

from fedveil.base.refusal import Refusal
from fedveil.privacy.ledger import data_sets


@pytest.mark.parametrize("harm", ["deleted", "rolled back"])
def test_a_data_set_knows_the_heads_that_were_left_on_its_ledgers(tmp_path, harm):
    path, owner = data_sets.population_path(tmp_path, "wards"), data_sets.population_ledger("wards")
    with data_sets.exclusive_access(tmp_path, "wards"), opened(path, owner=owner) as ledger:
        ledger.reserve(release(1))
    earlier = path.read_bytes()
    with data_sets.exclusive_access(tmp_path, "wards"), opened(path, owner=owner) as ledger:
        ledger.reserve(release(2))
    newest, known = path.read_bytes(), (tmp_path / data_sets.FILE).read_bytes()
    path.unlink() if harm == "deleted" else path.write_bytes(earlier)
    with pytest.raises(Refusal, match=r"missing, though entry 3|known entry 3: cut short, rolled back"):
        data_sets.exclusive_access(tmp_path, "wards").__enter__()
    with data_sets.exclusive_access(tmp_path, "others"):  # another data set of the folder
        pass
    assert path.exists() == (harm != "deleted") and (tmp_path / data_sets.FILE).read_bytes() == known
    path.write_bytes(newest)
    with data_sets.exclusive_access(tmp_path, "wards"), opened(path, owner=owner) as ledger:
        ledger.reserve(release(3))
    assert data_sets.read_data_sets(tmp_path)["wards"].heads[path.name].seq == 4


@pytest.mark.parametrize("kept", ["before this run", "within this run"])
def test_ledger_replaced_within_a_run_does_not_count_afterwards(tmp_path, kept):
    path, owner = data_sets.population_path(tmp_path, "wards"), data_sets.population_ledger("wards")
    with data_sets.exclusive_access(tmp_path, "wards"), opened(path, owner=owner) as ledger:
        ledger.reserve(release(1))
    older, newest = tmp_path / "older", tmp_path / "newest"
    shutil.copy(path, older)
    with data_sets.exclusive_access(tmp_path, "wards"), opened(path, owner=owner) as ledger:
        ledger.reserve(release(2))
    with data_sets.exclusive_access(tmp_path, "wards"):
        with opened(path, owner=owner) as ledger:
            ledger.reserve(release(3))
        if kept == "within this run":
            shutil.copy(path, older)
            with opened(path, owner=owner) as ledger:
                ledger.reserve(release(4))
            data_sets.keep_head(ledger, "wards")
        shutil.copy(path, newest)
        os.replace(older, path)
    with pytest.raises(Refusal, match="rolled back"):
        data_sets.exclusive_access(tmp_path, "wards").__enter__()
    os.replace(newest, path)
    with data_sets.exclusive_access(tmp_path, "wards"):
        pass
