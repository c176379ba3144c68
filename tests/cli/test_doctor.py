"""`fedveil doctor`: what it finds on this machine, and on machines that lack something."""

import json
import os
from pathlib import Path

import pytest

from fedveil.__main__ import run
from fedveil.base import extras
from fedveil.base.durable_files import make_folder
from fedveil.cli import doctor

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")


def findings(
    capsys: pytest.CaptureFixture[str], *asked: str
) -> tuple[int, dict[str, tuple[bool | None, str]]]:
    capsys.readouterr()
    code = run(["doctor", *asked, "--json"])
    return code, {each["subject"]: (each["ok"], each["said"]) for each in json.loads(capsys.readouterr().out)}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_installed_parts_are_listed_without_a_fault(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = findings(capsys)
    assert code == 0
    named = {"python", "numpy", "cryptography", "extra simulation", "processor", "masks", "clock", "ledgers"}
    assert named <= set(found)
    assert all(ok is not False for ok, _ in found.values())
    assert run(["doctor"]) == 0
    assert capsys.readouterr().out.endswith("nothing is wrong\n")


def test_requested_parts_are_tried(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = findings(capsys, "task=digits", "engine=inprocess", "link=grpc")
    assert code == 0
    assert found["task=digits"][0] and "clients" in found["task=digits"][1]
    assert found["engine=inprocess"] == found["link=grpc"] == (True, "can run")


def test_missing_part_is_named_with_its_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = doctor.find_spec
    for module in (doctor, extras):
        monkeypatch.setattr(module, "find_spec", lambda name: None if name == "ray" else here(name))
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "scipy" else "1")
    code, found = findings(capsys, "engine=ray")
    assert code == 1
    assert found["engine=ray"] == (False, "engine=ray needs ray: pip install 'fedveil[ray]'")
    assert found["extra ray"] == (None, "lacks ray: pip install 'fedveil[ray]'")
    assert found["scipy"] == (False, "is not installed: pip install 'scipy'")


def test_ledgers_that_others_may_read_are_wrong(capsys: pytest.CaptureFixture[str], home: Path) -> None:
    folder = home / ".local" / "share" / "fedveil" / "ledgers"
    folder.mkdir(parents=True)
    (folder / "some.ledger").touch(mode=0o600)
    os.chmod(folder, 0o700)
    assert findings(capsys)[1]["ledgers"][0] is True
    os.chmod(folder, 0o755)  # as earlier releases made it: names may be listed, and no ledger read
    assert findings(capsys)[1]["ledgers"][0] is True
    for file, mode in ((0o640, 0o755), (0o600, 0o770)):
        os.chmod(folder / "some.ledger", file)
        os.chmod(folder, mode)
        code, found = findings(capsys)
        assert code == 1 and f"chmod -R go= {folder}" in found["ledgers"][1]


def test_folder_of_ledgers_is_its_owners_alone(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        make_folder("ledger.dir", tmp_path / "ledgers")
        make_folder("hydra.run.dir", tmp_path / "run")
    finally:
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("ledgers", "run")]
    assert modes == [0o700, 0o755]


def test_a_home_that_may_not_be_written_is_wrong(
    capsys: pytest.CaptureFixture[str], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedveil.cli.doctor.os.access", lambda *_: False)
    assert run(["doctor"]) == 1
    assert f"ledgers: cannot be created because {home} is not writable" in capsys.readouterr().out


def test_a_clock_that_is_behind_the_installation_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor.time, "time", lambda: 1e9)
    code, found = findings(capsys)
    assert code == 1 and found["clock"][1].startswith(
        "2001-09-09 01:46:40 UTC is before fedveil was installed"
    )


def test_cuda_without_a_gpu_is_reported_as_no_fault(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "version.py").write_text("from typing import Optional\ncuda: Optional[str] = '12.8'\n")
    here = doctor.find_spec

    class Spec:
        origin = str(tmp_path / "__init__.py")

    monkeypatch.setattr(doctor, "find_spec", lambda name: Spec if name == "torch" else here(name))
    monkeypatch.setattr(doctor, "_has_gpu", lambda: False)
    code, found = findings(capsys)
    assert code == 0 and "with CUDA 12.8, but there is no GPU" in found["torch's build"][1]
    monkeypatch.setattr(doctor, "_has_gpu", lambda: True)
    assert findings(capsys)[1]["torch's build"] == (True, "with CUDA 12.8")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("task=hart", "task='hart': choose one of census, csv, custom, digits"),
        ("privacy=record", "doctor='privacy=record': give task=..., engine=... or link=..."),
    ],
)
def test_a_word_that_is_no_option_is_refused(
    capsys: pytest.CaptureFixture[str], asked: str, said: str
) -> None:
    assert run(["doctor", asked]) == 2
    assert capsys.readouterr().err.startswith(said)
