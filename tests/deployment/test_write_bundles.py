"""Units of systemd in the bundles."""

import shutil
import subprocess
from pathlib import Path

import pytest

from fedveil.deployment.write_bundles import CLIENT_UNIT, ENROLMENT_UNIT, SERVER_UNIT, unit_of

UNITS = {
    CLIENT_UNIT: unit_of(CLIENT_UNIT, "client cleveland", "hearts").decode(),
    SERVER_UNIT: unit_of(SERVER_UNIT, "server", "hearts").decode(),
    ENROLMENT_UNIT: unit_of(ENROLMENT_UNIT, "enrolment", "hearts").decode(),
}


def complaints(folder: Path, name: str, text: str) -> str:
    """What `systemd-analyze verify` says; it returns 0 for a key that it does not know."""
    (folder / name).write_text(text.replace("/opt/fedveil/bin/fedveil", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", name], cwd=folder, capture_output=True, text=True, check=False
    )
    return "\n".join(line for line in done.stderr.splitlines() if name in line)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("name", UNITS)
def test_systemd_knows_every_line_of_the_unit(name: str, tmp_path: Path) -> None:
    assert complaints(tmp_path, name, UNITS[name]) == ""
    assert "Unknown key" in complaints(tmp_path, name, UNITS[name].replace("Restart=", "Restrat="))


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("name", UNITS)
def test_systemd_finds_the_unit_little_exposed(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(UNITS[name])
    command = ["systemd-analyze", "security", "--offline=yes", "--threshold=15", str(tmp_path / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-200:]


def test_a_client_comes_back_for_ever_and_takes_its_children_along() -> None:
    lines = UNITS[CLIENT_UNIT].splitlines()
    for line in (
        "ExecStart=/opt/fedveil/bin/fedveil client start %S/fedveil-client",
        "After=network-online.target time-sync.target",
        "StartLimitIntervalSec=0",
        "Restart=always",
        "KillMode=control-group",
        "DynamicUser=yes",
        "ProtectSystem=strict",
        "StateDirectory=fedveil-client",
        "StateDirectoryMode=0700",
        "MemoryMax=1G",
        "LimitCORE=0",
        "LimitNOFILE=65536",
    ):
        assert line in lines


def test_port_of_enrolments_has_the_servers_user_and_folder() -> None:
    """The user of a unit with DynamicUser is named as the unit: two names would take the folder from each other."""
    lines = UNITS[ENROLMENT_UNIT].splitlines()
    assert "ExecStart=/opt/fedveil/bin/fedveil server enrol %S/fedveil-server" in lines
    assert f"User={SERVER_UNIT.removesuffix('.service')}" in lines
    shared = set(UNITS[SERVER_UNIT].splitlines()) - set(lines)
    assert not [
        line for line in shared if line.startswith(("StateDirectory", "Protect", "Restrict", "System"))
    ]
