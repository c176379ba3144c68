"""Flower's SuperLink behind our front: how it is started, who is let in, and the grid on which nodes have their numbers."""

import json
import logging
import os
import runpy
import signal
import ssl
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from flwr.app import ArrayRecord, Error, Message, RecordDict
from flwr.proto.control_pb2 import ListNodesRequest, ListRunsRequest, StartRunRequest
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient

from fedveil.base.refusal import Refusal
from fedveil.links.flower import control_calls as flower_runtime
from fedveil.links.flower.control_calls import AnnouncedReply
from fedveil.links.flower.fleet_calls import FleetNode, node_fingerprint
from fedveil.links.flower.grid import SuperNodeGrid, open_supernodes
from fedveil.links.flower.superlink import SuperLink, open_flower_link, public_keys
from fedveil.links.flower.tls_proxy import TlsProxy
from fedveil.links.roster_watch import followed_roster, nodes_of
from fedveil.links.server_bundle import read_server_bundle
from fedveil.messages.flower_adapter import claim_identity

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


# --- the grid, on a run that is played ------------------------------------------------------------------------------


class Played:
    """A run whose SuperNodes have the ids 1000 + node; each answers as it is told."""

    def __init__(self, here: tuple[int, ...], answer: Callable[[Message], Message | None]) -> None:
        self.run = claim_identity(7)
        self.here, self.answer, self.lost = here, answer, 0
        self.pushed: list[Message] = []

    def online_nodes(self) -> dict[str, int]:
        return {f"key {node}": 1000 + node for node in self.here}

    def push(self, messages: list[Message]) -> list[str]:
        self.pushed += messages
        return [f"id {message.metadata.dst_node_id}" for message in messages]

    def replies(self, questions: list[str]) -> list[AnnouncedReply]:
        if self.lost:
            raise httpx.ConnectError("gone")
        return [AnnouncedReply(question, self.fetch(question)) for question in questions]

    def fetch(self, question: str) -> Callable[[float], Message | None]:
        message = [m for m in self.pushed if f"id {m.metadata.dst_node_id}" == question][-1]
        return lambda seconds: self.answer(message)


@contextmanager
def grid_on(
    *runs: Played, admitted: dict[str, int] | None = None, nodes: Collection[int] = NODES
) -> Iterator[SuperNodeGrid]:
    left = list(runs)

    @contextmanager
    def open_run() -> Iterator[Any]:
        yield left.pop(0)

    keys = {f"key {node}": node for node in NODES} if admitted is None else admitted
    with open_supernodes(open_run, lambda: nodes, lambda: keys) as grid:
        yield grid


def echo(message: Message) -> Message:
    return Message(message.content, reply_to=message)


def exchange(grid: SuperNodeGrid, timeout: float = 5.0) -> list[int]:
    replies = grid.send_and_receive([asking(node) for node in NODES], timeout=timeout)
    return sorted(reply.metadata.src_node_id for reply in replies)


def test_nodes_have_the_rosters_numbers_and_flowers_ids_on_the_way() -> None:
    played = Played(NODES, echo)
    with grid_on(played) as grid:
        assert list(grid.get_node_ids()) == [2, 3, 4]
        assert exchange(grid) == [2, 3, 4]
        assert sorted(grid.connected) == [2, 3, 4]
    assert [message.metadata.dst_node_id for message in played.pushed] == [1002, 1003, 1004]
    assert played.pushed[0].metadata.ttl == pytest.approx(605)


def test_absent_and_unadmitted_nodes_get_no_message() -> None:
    played = Played((2, 4, 9), echo)
    with grid_on(played, admitted={"key 2": 2, "key 3": 3}) as grid:
        replies = grid.send_and_receive([asking(node) for node in NODES], timeout=20)
        assert next(replies).metadata.src_node_id == 2
        replies.close()
        assert [message.metadata.dst_node_id for message in played.pushed] == [1002]
        assert list(grid.get_node_ids()) == [2, 3, 4]


def test_node_within_the_timeout_gets_its_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedveil.links.flower.grid.PRESENCE_SECONDS", 0.0)
    played = Played((2, 4), echo)
    with grid_on(played) as grid:
        replies = grid.send_and_receive([asking(node) for node in NODES], timeout=20)
        assert {next(replies).metadata.src_node_id for _ in range(2)} == {2, 4}
        played.here = NODES
        assert [reply.metadata.src_node_id for reply in replies] == [3]


def test_answer_of_the_superlink_for_a_node_has_the_nodes_number() -> None:
    def gone(message: Message) -> Message:
        return Message(Error(3, "Node Unavailable"), reply_to=message)

    with grid_on(Played(NODES, gone)) as grid:
        assert exchange(grid) == [2, 3, 4]


def test_a_reply_that_never_comes_holds_up_nobody_beyond_the_timeout() -> None:
    free = threading.Event()

    def answer(message: Message) -> Message | None:
        if message.metadata.dst_node_id == 1003:
            free.wait(20)
            return None
        return echo(message)

    with grid_on(Played(NODES, answer)) as grid:
        begun = time.monotonic()
        assert exchange(grid, timeout=1.5) == [2, 4]
        assert time.monotonic() - begun < 10
        free.set()
        assert exchange(grid) == [2, 4]


def test_lost_run_ends_the_exchange_and_the_next_has_another() -> None:
    first, second = Played(NODES, echo), Played(NODES, echo)
    first.lost = 1
    with grid_on(first, second) as grid:
        assert exchange(grid) == []
        assert grid.counts == {"runs lost": 1}
        assert exchange(grid) == [2, 3, 4]


def test_leaver_of_the_roster_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedveil.links.flower.grid.PRESENCE_SECONDS", 0.0)
    nodes = [*NODES, 5]

    def answer(message: Message) -> Message | None:
        if message.metadata.dst_node_id == 1002:
            nodes[2:] = []  # 5 was never here, and 4 has its instruction
        return echo(message)

    played = Played(NODES, answer)
    given = played.replies
    played.replies = lambda questions: given([each for each in questions if each != "id 1004"])  # type: ignore[method-assign]
    with grid_on(played, nodes=nodes) as grid:
        asked = [asking(node) for node in (*NODES, 5)]
        begun = time.monotonic()
        replies = grid.send_and_receive(asked, timeout=60)
        assert sorted(reply.metadata.src_node_id for reply in replies) == [2, 3]
        assert time.monotonic() - begun < 30
        assert list(grid.get_node_ids()) == [2, 3]


def test_single_clients_cannot_be_reached() -> None:
    with grid_on(Played(NODES, echo)) as grid, pytest.raises(Refusal, match="single clients"):
        grid.push_messages([asking(2)])


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
        replies = list(grid.send_and_receive(questions, timeout=timeout))
        for reply in replies:
            np.testing.assert_array_equal(reply.content["arrays"].to_numpy_ndarrays()[0], 2 * values)
        return sorted(reply.metadata.src_node_id for reply in replies)

    with (
        open_flower_link(bundle, nodes_of(followed_roster(bundle))) as grid,
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


def test_a_run_is_no_app() -> None:
    import io
    import zipfile

    with zipfile.ZipFile(io.BytesIO(flower_runtime._app())) as app:
        assert app.namelist() == ["pyproject.toml"]
