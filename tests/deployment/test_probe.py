"""Probes of a server and of a device, and the statuses that they stand for."""

import json
from pathlib import Path

import pytest

from fedveil.__main__ import run
from fedveil.deployment.probe import AGENT_LOCK, SERVER_LOCK, client_is_well, server_is_well
from fedveil.privacy.ledger.hash_chain import exclusive_lock


def test_a_probe_says_whether_a_server_runs(tmp_path: Path) -> None:
    assert not server_is_well(tmp_path)
    with exclusive_lock(tmp_path / SERVER_LOCK, "server"):
        assert server_is_well(tmp_path)
    assert not server_is_well(tmp_path)


@pytest.mark.parametrize(
    ("content", "well"),
    [
        ('{"state": "completed"}', True),
        ('{"state": "exhausted"}', True),
        ('{"state": "training"}', False),
        ('{"state": "alarmed"}', False),
        ('{"state": ["completed"]}', False),
        ("{}", False),
        ("[]", False),
        ("{", False),
    ],
)
def test_a_server_may_end_once_its_run_is_over(content: str, well: bool, tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text(content)
    assert server_is_well(tmp_path) is well


@pytest.mark.parametrize(
    ("text", "state"), [("", "state"), ('state = "elsewhere"', "elsewhere")], ids=["default", "moved"]
)
def test_a_probe_says_whether_a_devices_agent_runs(text: str, state: str, tmp_path: Path) -> None:
    assert not client_is_well(tmp_path)
    (tmp_path / "client.toml").write_text(text)
    (tmp_path / state).mkdir()
    assert not client_is_well(tmp_path)
    with exclusive_lock(tmp_path / state / AGENT_LOCK, "client"):
        assert client_is_well(tmp_path)
    (tmp_path / "client.toml").write_text("state = ")
    assert not client_is_well(tmp_path)


def test_a_probe_prints_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "status.json").write_text(json.dumps({"state": "completed"}))
    assert run(["server", "status", str(tmp_path), "--probe"]) == 0
    assert run(["client", "status", str(tmp_path), "--probe"]) == 1
    assert capsys.readouterr() == ("", "")
