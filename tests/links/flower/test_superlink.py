"""Flower's SuperLink behind our front: how it is started, and who is let in."""

import json
import logging
import os
import runpy
import signal
import ssl
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.proto.control_pb2 import ListNodesRequest, ListRunsRequest, StartRunRequest
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient

from fedveil.base.refusal import Refusal
from fedveil.links.flower.fleet_calls import FleetNode, node_fingerprint
from fedveil.links.flower.grid import SuperNodeGrid
from fedveil.links.flower.superlink import SuperLink, open_superlink, public_keys
from fedveil.links.flower.tls_proxy import TlsProxy
from fedveil.links.roster_watch import followed_roster, nodes_of
from fedveil.links.server_bundle import read_server_bundle

free_port = runpy.run_path(str(Path(__file__).parents[2] / "faults" / "ports.py"))["free_port"]
MADE = runpy.run_path(str(Path(__file__).parents[2] / "faults" / "flower_ends.py"))
make, node_key, following, asking, until = (
    MADE[name] for name in ("make", "node_key", "following", "asking", "until")
)
NODES = (2, 3, 4)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("desk"), free_port())


# --- the process ------------------------------------------------------------------------------------------------


def link(made: Path, folder: Path) -> SuperLink:
    return SuperLink(folder, "127.0.0.1:4711", folder / "socket", dict, made / "server" / "supernodes")


def test_command_line_is_one_that_flower_takes(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = link(made, tmp_path).command()[5:]
    monkeypatch.setattr("sys.argv", ["flower-superlink", *arguments])
    handlers = list(logging.getLogger("flwr").handlers)
    try:
        config = import_module("flwr.superlink.cli.flower_superlink")._parse_superlink_lifespan_config()
    finally:
        for handler in set(logging.getLogger("flwr").handlers) - set(handlers):
            logging.getLogger("flwr").removeHandler(handler)
            handler.close()
    assert (config.host, config.port, config.isolation) == ("127.0.0.1", 4711, "process")
    assert (config.database, config.simulation) == (str(tmp_path / "superlink.db"), False)
    assert config.runtime_dependency_install is False
    assert config.superexec_auth_secret == (tmp_path / "executor.key").read_bytes()
    assert (tmp_path / "executor.key").stat().st_mode & 0o077 == 0


def test_the_secret_stays_the_same(made: Path, tmp_path: Path) -> None:
    assert link(made, tmp_path).secret() == link(made, tmp_path).secret()


def test_keys_are_those_of_the_admitted_and_none_may_be_missing(made: Path) -> None:
    server = made / "server"
    admitted = json.loads((server / "supernodes.json").read_text())
    found = public_keys(server / "supernodes", admitted)
    assert {node_fingerprint(pem) for pem in found} == set(admitted)
    one = dict(list(admitted.items())[:1])
    assert len(public_keys(server / "supernodes", one)) == 1
    with pytest.raises(Refusal, match=r"nodes \[9\] are missing"):
        public_keys(server / "supernodes", {**admitted, "0" * 64: 9})


def test_a_superlink_that_does_not_start_is_a_refusal(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedveil.links.flower.superlink.SUPERLINK", "raise SystemExit(1)")
    with pytest.raises(Refusal, match="does not start"):
        link(made, tmp_path).start()


# --- the real thing ---------------------------------------------------------------------------------------------


def test_link_with_a_closed_door_survives_its_superlink(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One SuperLink for all of it: it takes seconds to start."""
    MADE["hasten"]()
    monkeypatch.setattr("fedveil.links.flower.superlink.WATCH_SECONDS", 0.1)
    listed = made / "server" / "supernodes.json"
    bundle = read_server_bundle(made / "server")
    server = f"localhost:{bundle.listen.rpartition(':')[2]}"
    links, calls = list[SuperLink](), set[str]()
    caller = TlsProxy._caller

    def noting(self: TlsProxy, request: Any) -> Any:
        calls.add(request.url.path)
        return caller(self, request)

    monkeypatch.setattr(TlsProxy, "_caller", noting)
    monkeypatch.setattr(SuperLink, "start", remembering(SuperLink.start, links))
    values = np.random.default_rng(1).normal(size=100_000).astype(np.float32)

    def doubled(message: Message) -> Message:
        (array,) = message.content["arrays"].to_numpy_ndarrays()
        return Message(RecordDict({"arrays": ArrayRecord([2 * array])}), reply_to=message)

    def ask(grid: SuperNodeGrid, attempt: int, timeout: float = 60) -> list[int]:
        questions = [asking(node, attempt, arrays=ArrayRecord([values])) for node in NODES]
        answers = grid.send_and_receive(questions, timeout=timeout)
        # Flower may answer an error for a node that is gone.
        replies = [each for each in answers if each.has_content()]
        for reply in replies:
            np.testing.assert_array_equal(reply.content["arrays"].to_numpy_ndarrays()[0], 2 * values)
        return sorted(reply.metadata.src_node_id for reply in replies)

    with (
        open_superlink(bundle.folder, bundle.listen, nodes_of(followed_roster(bundle))) as grid,
        following(made, server, doubled),
    ):
        until(lambda: len(grid.connected) == 3)
        assert ask(grid, 1) == [2, 3, 4]
        (link,) = links
        assert link._process is not None
        closed_but_to_this_user(made, server, link.address, link._process.pid)
        one_key_is_one_device_and_garbage_is_named(made, server)
        os.kill(link._process.pid, signal.SIGKILL)
        until(lambda: len(links) == 2)
        until(lambda: len(grid.connected) == 3)
        assert ask(grid, 2) == [2, 3, 4]
        assert grid.counts == {"runs lost": 0}  # it goes on with the run that it had

        before = json.loads(listed.read_text())
        listed.write_text(json.dumps({key: node for key, node in before.items() if node != 3}))
        until(lambda: sorted(grid.connected) == [2, 4])
        assert ask(grid, 3, timeout=5) == [2, 4]
        listed.write_text(json.dumps(before))
        process = link._process
    devices = {call.rpartition("/")[2] for call in calls if call.startswith("/v1/fleet/")}
    assert "pull-messages" in devices and not devices & {"get-fab", "get-run"}  # no code is asked for
    assert process is not None and process.poll() is not None
    log = (made / "server" / "flower" / "superlink.log").read_text()
    assert "Traceback" not in log, log


def remembering(start: Callable[[SuperLink], None], links: list[SuperLink]) -> Callable[[SuperLink], None]:
    def started(self: SuperLink) -> None:
        start(self)
        links.append(self)

    return started


def one_key_is_one_device_and_garbage_is_named(made: Path, server: str) -> None:
    ca, key = (made / "server" / "ca.pem").read_bytes(), node_key(made, "north")
    second = FleetNode(server, ca, key, 1 << 20)
    with pytest.raises(httpx.HTTPStatusError):
        second.go_online()
    second.go_offline()
    trust = ssl.create_default_context(cadata=ca.decode())
    path = f"https://{server}/v1/fleet/pull-messages"
    headers = {**MADE["signed"](key), "content-type": "application/protobuf"}
    said = httpx.post(path, headers=headers, content=b"\xffgarbage", verify=trust)
    assert said.status_code == 400, said


def closed_but_to_this_user(made: Path, server: str, loopback: str, process: int) -> None:
    """Try what an operator may do, and what an executor may, by Flower's own clients."""
    listening = {line.split()[9] for line in Path("/proc/net/tcp").read_text().splitlines() if " 0A " in line}
    held = [os.readlink(each) for each in Path(f"/proc/{process}/fd").iterdir() if each.is_symlink()]
    assert not [each for each in held if each[len("socket:[") : -1] in listening]  # it has no port
    ca = (made / "server" / "ca.pem").read_bytes()
    tried: list[Callable[[Any], Any]] = [
        lambda control: control.ListRuns(ListRunsRequest()),
        lambda control: control.StartRun(StartRunRequest()),
        lambda control: control.ListNodes(ListNodesRequest()),
    ]
    with ControlHttpClient.from_server_address(server, False, ca, []) as control:
        for call in tried:
            with pytest.raises(httpx.HTTPStatusError, match="404"):
                call(control)
    with ControlHttpClient(f"http://{loopback}") as control:
        assert control.ListRuns(ListRunsRequest()).run_dict
        assert len(control.ListNodes(ListNodesRequest()).nodes_info) == 3
    wanted = AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
    version = [RuntimeVersionHttpInterceptor(component_name="SuperExec")]
    for address, insecure, trusted, said in ((server, False, ca, "404"), (loopback, True, None, "401")):
        executor = RuntimeHttpClient.from_server_address(address, insecure, trusted, version)
        with executor, pytest.raises(httpx.HTTPStatusError, match=said):  # on loopback: without the secret
            executor.AcquireTask(wanted)
