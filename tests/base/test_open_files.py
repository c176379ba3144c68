"""Connections of strangers never take the last of a process's open files, and what it holds is in no core dump."""

import importlib
import os
import runpy
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest

from fedveil.base import open_files
from fedveil.base.refusal import Refusal
from fedveil.cli import client, server
from fedveil.deployment import prometheus
from fedveil.links.flower.tls_proxy import open_tls_proxy
from fedveil.links.grpc.event_loop import stream_loop

pytestmark = pytest.mark.usefixtures("audits_seldom_alarm")

until = runpy.run_path(str(Path(__file__).parents[1] / "faults" / "patience.py"))["until"]
HERE = Path(__file__).parents[1]
ENDS = HERE / "faults" / "link_ends.py"
FEW, STRANGERS, MANY = 160, 300, 5000
ARGV = ("task=digits", "num_rounds=3", "privacy=client_central", "privacy.allow_large_delta=true", "run=r")
ARGV = (*ARGV, "accept_vacuous=true")


@cache
def made(name: str) -> dict[str, Any]:
    return runpy.run_path(str(HERE / "faults" / f"{name}.py"))


def federation_in(folder: Path, *nodes: int) -> Any:
    return made("link_ends")["Federation"](folder, nodes)


def limited(files: int, *command: object) -> list[str]:
    return ["sh", "-c", f'ulimit -n {files} && exec "$@"', "sh", *map(str, command)]


@contextmanager
def serving(federation: Any, files: int) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """The server's end of the link as a process that may have so many files open, asking round after round."""
    folder = federation.write(federation.folder / "server", 0, rounds=10**6, size=5, stay=False)
    process = subprocess.Popen(
        limited(files, sys.executable, ENDS, "server", folder), env={**os.environ, "GRPC_VERBOSITY": "NONE"}
    )
    try:
        until(lambda: (folder / "port").exists() and (folder / "port").read_text())
        yield folder, process
    finally:
        process.kill()
        process.wait(20)


def opened(process: subprocess.Popen[bytes]) -> int:
    return len(list(Path(f"/proc/{process.pid}/fd").iterdir()))


def rounds(folder: Path) -> int:
    file = folder / "replies"
    return len(file.read_text().splitlines()) if file.exists() else 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_strangers_leave_a_server_its_files(tmp_path: Path) -> None:
    stream_loop()
    federation = federation_in(tmp_path, 2)
    with serving(federation, FEW) as (folder, process), ExitStack() as strangers:
        port = int((folder / "port").read_text())
        with federation.following(federation.endpoint(2, port), made("link_ends")["moved"]):
            until(lambda: rounds(folder))
            for _ in range(STRANGERS):
                strangers.enter_context(socket.create_connection(("127.0.0.1", port), 20))
            until(lambda: opened(process) >= FEW // 2)
            before = rounds(folder)  # a file is opened in each
            until(lambda: rounds(folder) > before + 20)
            assert opened(process) <= FEW * 3 // 4 and process.poll() is None
        strangers.close()
        before = rounds(folder)
        with federation.following(federation.endpoint(2, port), made("link_ends")["moved"]):
            until(lambda: rounds(folder) > before + 20)


@pytest.mark.campaign
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_five_thousand_silent_connections_disturb_no_round(tmp_path: Path) -> None:
    open_files.raise_limit()
    stream_loop()
    federation = federation_in(tmp_path, 2, 3)
    with serving(federation, 2 * MANY) as (folder, process), ExitStack() as strangers:
        port = int((folder / "port").read_text())
        for _ in range(MANY):
            strangers.enter_context(socket.create_connection(("127.0.0.1", port), 20))
        began = time.monotonic()
        with ExitStack() as devices:
            for node in (2, 3):
                devices.enter_context(
                    federation.following(federation.endpoint(node, port), made("link_ends")["moved"])
                )
            until(lambda: rounds(folder))
            seconds = time.monotonic() - began
            print({"silent": opened(process), "seconds to the first round": round(seconds, 2)})
            assert opened(process) > MANY - 100


def test_a_federation_of_the_campaign_is_provisioned_and_begins(tmp_path: Path) -> None:
    made("served")["begins"](made("served")["make_federation"](tmp_path, link="flower"), ARGV)


@pytest.mark.campaign
@pytest.mark.skipif(sys.platform != "linux", reason="sets a limit for a process of its own")
@pytest.mark.parametrize("link", ["grpc", "flower"])
def test_whole_run_ends_well_under_more_connections_than_its_limit(tmp_path: Path, link: str) -> None:
    """`fedveil server` under `ulimit -n 320`, with 600 silent connections from before its first round on."""
    served = made("served")
    with served["serving"](served["Served"], tmp_path, link) as federation, ExitStack() as strangers:
        command = [sys.executable, "-m", "fedveil", "server", str(federation.hearts / "server"), *ARGV]
        said = tmp_path / "said"
        with said.open("wb") as file:
            process = subprocess.Popen(
                limited(2 * FEW, *command),
                stdout=file,
                stderr=file,
                env={**os.environ, "GRPC_VERBOSITY": "NONE"},
            )
        port = int((tmp_path / "federation.yaml").read_text().partition("127.0.0.1:")[2].partition('"')[0])
        here, end = 0, time.monotonic() + 240
        while process.poll() is None and time.monotonic() < end:
            if here < 2 * STRANGERS:
                try:
                    strangers.enter_context(socket.create_connection(("127.0.0.1", port), 5))
                    here += 1
                except OSError:
                    time.sleep(0.2)
            else:
                time.sleep(0.2)
        process.kill()
        assert (process.wait(), here) == (0, 2 * STRANGERS), said.read_text()


class Nobody:
    """Application that answers every call with 404."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def close(self) -> None:
        """Nothing is open."""


def test_flower_front_closes_a_file_beyond_its_connections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = federation_in(tmp_path, 2).server
    (tmp_path / "tls.pem").write_bytes(pair.certificate)
    (tmp_path / "tls.key").write_bytes(pair.key)
    front: Any = Nobody()
    with open_tls_proxy(front, "127.0.0.1:0", tmp_path / "tls.pem", tmp_path / "tls.key") as port:
        monkeypatch.setattr(open_files, "for_connections", lambda: 0)
        with pytest.raises(httpx.TransportError):
            httpx.post(f"https://127.0.0.1:{port}/", verify=False)
        monkeypatch.undo()
        assert httpx.post(f"https://127.0.0.1:{port}/", verify=False).status_code == 404


def test_prometheus_text_closes_a_file_beyond_its_connections(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    port = made("link_ends")["free_port"]()
    with prometheus.serving(port, dict):
        monkeypatch.setattr(open_files, "for_connections", lambda: 0)
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{port}/")
        monkeypatch.undo()
        assert httpx.get(f"http://127.0.0.1:{port}/").status_code == 404
        rebound = httpx.get(f"http://127.0.0.1:{port}/metrics", headers={"Host": f"evil.example:{port}"})
        assert rebound.status_code == 421


def test_an_operator_may_open_the_numbers_to_others() -> None:
    port = made("link_ends")["free_port"]()
    with prometheus.serving(port, dict, "127.0.0.2"):
        url = f"http://127.0.0.2:{port}/"
        assert httpx.get(url, headers={"Host": "server.example"}).status_code == 404
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"http://127.0.0.1:{port}/")
    with pytest.raises(Refusal, match="metrics_address"), prometheus.serving(port, dict, "192.0.2.1"):
        pass


def said_by(code: str) -> str:
    command = limited(600, "sh", "-c", 'ulimit -S -n 300 && exec "$@"', "sh", sys.executable, "-c", code)
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_a_process_takes_as_many_files_as_the_system_grants() -> None:
    code = (
        "import resource; from fedveil.base.open_files import *; before = for_connections(); raise_limit(); "
        "print(before, resource.getrlimit(resource.RLIMIT_NOFILE), for_connections())"
    )
    assert said_by(code) == "150 (600, 600) 344"


@pytest.mark.skipif(sys.platform != "linux", reason="asks prctl")
def test_process_with_keys_leaves_no_core_dump() -> None:
    code = (
        "import ctypes, resource; from fedveil.base.core_dumps import without_core_dumps; without_core_dumps(); "
        "print(resource.getrlimit(resource.RLIMIT_CORE), ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))"
    )
    assert said_by(code) == "(0, 0) 0"


class Dropped(BaseException):
    """The process that holds keys has begun to drop its core dumps."""


@pytest.mark.parametrize(
    ("module", "enter"),
    [
        ("deployment.serve", lambda serve, folder: serve.serve(folder, [])),
        ("deployment.questions", lambda asks, folder: asks.ask_clients(folder, None, None, [])),
        ("deployment.device.agent", lambda agent, folder: agent.start(folder)),
        ("deployment.provision", lambda provision, folder: provision.open_desk(folder).__enter__()),
        ("base.core_dumps", lambda _, folder: server.enrol(folder)),
        ("base.core_dumps", lambda _, folder: client.enrol("-", folder, 0.0)),
    ],
)
def test_every_process_that_holds_keys_begins_without_core_dumps(
    module: str, enter: Callable[[Any, Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it reads any: a folder without a bundle is refused later."""
    entered = importlib.import_module(f"fedveil.{module}")
    (tmp_path / "authority").mkdir()
    (tmp_path / "authority" / "register.json").touch()

    def dropped() -> None:
        raise Dropped

    monkeypatch.setattr(entered, "without_core_dumps", dropped)
    with pytest.raises(Dropped):
        enter(entered, tmp_path)
