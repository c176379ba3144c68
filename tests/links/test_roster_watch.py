"""What a running server takes of the files that provisioning replaces, and what it does not."""

import logging
import shutil
from pathlib import Path

import pytest

from fedveil.deployment.provision import provision, revoke, rotate
from fedveil.links.roster_watch import admitted_in, followed_credentials, followed_roster, nodes_of
from fedveil.links.server_bundle import read_server_bundle

FEDERATION = """\
federation: hearts
server: {address: "localhost:8443"}
task: {name: digits}
policy: {target_epsilon: 20.0, target_delta: 1e-5}
clients: [{name: cleveland}, {name: hungary}, {name: boston}]
"""
ROSTER = "roster.bin"


@pytest.fixture
def made(tmp_path: Path) -> Path:
    (tmp_path / "federation.yaml").write_text(FEDERATION)
    provision(tmp_path / "federation.yaml", tmp_path / "hearts", None)
    return tmp_path / "hearts"


def test_newer_roster_is_used_at_once_and_an_older_one_never(
    made: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = read_server_bundle(made / "server")
    rosters = followed_roster(server)
    first = (made / "server" / ROSTER).read_bytes()
    assert (rosters()[0].version, nodes_of(rosters)()) == (1, [2, 3, 4])
    revoke(made, ["hungary"])
    assert (rosters()[0].version, nodes_of(rosters)()) == (2, [2, 4])
    second = (made / "server" / ROSTER).read_bytes()
    assert rosters()[1] == second
    with caplog.at_level(logging.ERROR, "fedveil.server"):
        (made / "server" / ROSTER).write_bytes(first)
        assert [rosters()[0].version for _ in range(3)] == [2, 2, 2]
    assert len(caplog.records) == 1 and "is not newer than the server's version 2" in caplog.text
    (made / "server" / ROSTER).write_bytes(second)
    rotate(made, ["boston"], None)
    assert rosters()[0].version == 3


@pytest.mark.parametrize("how", ["another authority's", "of the same version", "damaged", "missing"])
def test_roster_without_a_new_number_is_not_used(
    how: str, made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rosters = followed_roster(read_server_bundle(made / "server"))
    path = made / "server" / ROSTER
    if how == "another authority's":
        other = provision(tmp_path / "federation.yaml", tmp_path / "other", None)
        revoke(other.folder, ["hungary"])
        shutil.copy(other.folder / "server" / ROSTER, path)
    elif how == "of the same version":  # a desk that was put back from its backup, and went on otherwise
        shutil.copytree(made, tmp_path / "backup")
        revoke(made, ["hungary"])
        assert rosters()[0].version == 2
        revoke(tmp_path / "backup", ["boston"])
        shutil.copy(tmp_path / "backup" / "server" / ROSTER, path)
    elif how == "damaged":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    before = rosters.value
    with caplog.at_level(logging.ERROR, "fedveil.server"):
        assert rosters() == before
    assert "going on as before" in caplog.text


def test_client_outside_the_roster_is_not_admitted_by_the_list(made: Path) -> None:
    bundle = read_server_bundle(made / "server")
    rosters = followed_roster(bundle)
    admitted = admitted_in(bundle.admitted, nodes_of(rosters))
    listed = bundle.admitted.read_bytes()
    assert sorted(admitted().values()) == [2, 3, 4]
    revoke(made, ["boston"])
    bundle.admitted.write_bytes(listed)  # only the roster has come
    assert sorted(admitted().values()) == [2, 3]


def test_servers_certificate_is_used_once_its_key_is_there(made: Path) -> None:
    bundle = read_server_bundle(made / "server")
    credentials, old = followed_credentials(bundle), (made / "server" / "tls.key").read_bytes()
    assert credentials() == bundle.credentials
    rotate(made, ["server"], None)
    fresh = (made / "server" / "tls.key").read_bytes()
    (made / "server" / "tls.key").write_bytes(old)
    assert credentials() == bundle.credentials
    (made / "server" / "tls.key").write_bytes(fresh)
    (made / "server" / "tls.key").chmod(0o644)
    assert credentials() == bundle.credentials
    (made / "server" / "tls.key").chmod(0o600)
    assert credentials() == read_server_bundle(made / "server").credentials != bundle.credentials
