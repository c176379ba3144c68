"""The door to a SuperLink: this user's processes get through, and nobody else on the machine does."""

import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from fedveil.links.flower import superlink as own_door
from fedveil.links.flower.superlink import open_proxy, owner_of

CALL = "exec 3<>/dev/tcp/127.0.0.1/$0; printf 'run my code' >&3; head -c 22 <&3"


class Behind(threading.Thread):
    """Answers every connection with what it said, twice."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self.heard: list[bytes] = []
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()
        self.start()

    def run(self) -> None:
        while True:
            connection, _ = self.listener.accept()
            with connection:
                while data := connection.recv(1 << 20):
                    self.heard.append(data)
                    connection.sendall(2 * data)


@pytest.fixture
def behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Behind:
    monkeypatch.chdir(tmp_path)  # a short name, whatever the folder's is
    return Behind(Path("socket"))


@pytest.fixture
def port(behind: Behind) -> Iterator[int]:
    with open_proxy(Path("socket")) as address:
        yield int(address.rpartition(":")[2])


def call(port: int, said: bytes = b"run my code", answer: int = 100) -> bytes:
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(said)
        got = b""
        while len(got) < answer and (data := connection.recv(1 << 16)):
            got += data
            if answer == 100:
                break
        return got


def test_bytes_arrive_whole_in_both_directions(port: int) -> None:
    assert call(port) == b"run my coderun my code"
    large = os.urandom(3 << 20)
    assert len(call(port, large, 2 * len(large))) == 2 * len(large)


def test_a_call_by_another_user_is_not_heard(
    port: int, behind: Behind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_door, "owner_of", lambda end, other: os.geteuid() + 1)
    refused(port, behind)
    monkeypatch.setattr(own_door, "owner_of", lambda end, other: None)
    refused(port, behind)


def refused(port: int, behind: Behind) -> None:
    refused_at(port)
    assert behind.heard == []


def refused_at(port: int) -> None:
    with suppress(ConnectionResetError):
        assert call(port) == b""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become somebody else")
def test_nobody_is_not_heard(port: int, behind: Behind) -> None:
    command = ["bash", "-c", CALL, str(port)]
    said = subprocess.run(command, capture_output=True, user=65534, cwd="/", check=False)
    assert said.stdout == b"" and behind.heard == []
    assert subprocess.run(command, capture_output=True, check=True).stdout == b"run my coderun my code"


def test_a_connection_is_its_users_as_long_as_that_one_has_it_open() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        caller = socket.create_connection(listener.getsockname())
        end, other = caller.getsockname(), caller.getpeername()
        accepted, _ = listener.accept()
        assert owner_of(end, other) == os.geteuid() and owner_of(end, ("127.0.0.1", 9)) is None
        caller.sendall(b"run my code")
        caller.close()  # what it said is still to be read, and the kernel says that it was root's
        assert owner_of(end, other) is None
        accepted.close()


def test_a_door_with_nothing_behind_it_closes(tmp_path: Path) -> None:
    with open_proxy(tmp_path / "nothing") as address:
        refused_at(int(address.rpartition(":")[2]))
