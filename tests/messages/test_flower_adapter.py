"""What we touch of Flower that Flower does not publish: each name, and what we rely on it to do.

A new Flower release breaks these first. Below: nothing but the loopback address is ever called.
"""

import pickle
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import flwr
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Error, Message, Metadata, RecordDict
from flwr.app.message.array import Array as ArrayImplementation
from flwr.supercore.inflatable.inflatable_object import get_object_type_from_object_content
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedveil.messages.flower_adapter import (
    claim_identity,
    client_context,
    delivered_message,
    name_message,
    nodes_by_partition,
)
from fedveil.messages.wire import MemoryArray, memory_arrays, view

ROOT = Path(__file__).parents[2]
VALUES = np.arange(6, dtype=np.float32).reshape(2, 3)


def test_the_release_is_the_pinned_one() -> None:
    assert flwr.__version__.startswith("1.42."), "run this file against the new release, then move the pin"


# --- identity and messages --------------------------------------------------------------------------------------


def test_messages_exist_once_the_identity_is_claimed() -> None:
    run = claim_identity(7)
    message = Message(RecordDict(), 5, "train")
    assert (run.run_id, message.metadata.run_id, message.metadata.src_node_id) == (7, 7, 1)
    assert (TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id) == (1, 7, 1)
    assert {"primary_task_id", "federation_id"} <= Run.__dataclass_fields__.keys()


def test_message_takes_its_written_id_and_its_reply_names_it() -> None:
    claim_identity(1)
    message = Message(RecordDict(), 5, "train")
    name_message(message, "42")
    assert message.metadata.message_id == "42"
    assert Message(RecordDict(), reply_to=message).metadata.reply_to_message_id == "42"
    assert Message(Error(1001, "spent"), reply_to=message).error.code == 1001


def test_a_message_arrives_with_the_metadata_it_came_with() -> None:
    metadata = Metadata(7, "42", 5, 1, "41", "3", 0.0, 60.0, "train")
    assert delivered_message(Error(1), metadata).metadata == metadata
    message = delivered_message(RecordDict(), metadata)
    assert message.metadata.reply_to_message_id == "41" and message.has_content()


def test_a_context_holds_the_partition_under_flowers_keys() -> None:
    context = client_context(1, 3, 10, {"key": "value"})
    assert isinstance(context, Context)
    assert (context.node_config["partition-id"], context.node_config["num-partitions"]) == (3, 10)


# --- arrays that are not serialised -----------------------------------------------------------------------------


def test_a_memory_array_is_read_back_by_flower_as_its_own_array() -> None:
    ours, theirs = MemoryArray(VALUES), Array(VALUES)
    assert get_object_type_from_object_content(ours.deflate()) == "Array"
    assert ours.object_id == theirs.object_id
    back = ArrayImplementation.inflate(ours.deflate(), ours.children)
    np.testing.assert_array_equal(back.numpy(), VALUES)
    assert (ours.dtype, ours.shape, ours.stype) == (theirs.dtype, theirs.shape, theirs.stype)


def test_flower_asks_an_array_for_these_fields_only() -> None:
    assert set(Array.__annotations__) == {"dtype", "shape", "stype", "data"}


def test_memory_array_keeps_its_values_through_copy_and_pickle() -> None:
    record = memory_arrays({"w": VALUES})
    assert isinstance(record, ArrayRecord)
    for each in (record["w"], record.copy()["w"], pickle.loads(pickle.dumps(record["w"]))):  # noqa: S301
        assert isinstance(each, MemoryArray)
        np.testing.assert_array_equal(view(each), VALUES)
    ours = record["w"].numpy()
    ours += 1
    np.testing.assert_array_equal(record["w"].numpy(), VALUES)


# --- the simulation runtime -------------------------------------------------------------------------------------


def test_nodes_are_listed_in_the_order_of_their_partitions() -> None:
    """The seeded draw of a simulation rests on this."""
    from flwr.proto.task_pb2 import Task
    from flwr.server.superlink.fleet.vce.vce_api import _register_nodes
    from flwr.server.superlink.linkstate import LinkStateFactory
    from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState, RunRecord
    from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID
    from flwr.supercore.object_store import ObjectStoreFactory
    from flwr.superlink.federation import NoOpFederationManager
    from flwr.superlink.grid import InMemoryGrid

    factory = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory())
    state = factory.state()
    assert isinstance(state, InMemoryLinkState)
    run = claim_identity(1)
    run.primary_task_id, run.federation_id = 1, NOOP_FEDERATION_ID
    state.task_store[1] = Task(task_id=1, run_id=run.run_id)
    state.run_ids[run.run_id] = RunRecord(run=run)
    grid = InMemoryGrid(state_factory=factory)
    grid.set_run(run)
    mapping = _register_nodes(num_nodes=50, state_factory=factory)
    nodes = nodes_by_partition(grid)
    assert [mapping[node] for node in nodes] == list(range(50))
    assert nodes != sorted(nodes)
    assert set(grid.get_node_ids()) == set(nodes)


# --- the network ------------------------------------------------------------------------------------------------

OUTSIDE = re.compile(r"connect\(.*sa_family=AF_INET6?\b(?!.*(?:\"127\.|\"::1\"|\"::ffff:127\.))")


def outside_calls(folder: Path, *command: str) -> list[str]:
    """Run a command and return its system calls that connect to another machine, those of its children too."""
    log = folder / "strace"
    trace = ["strace", "-f", "-qq", "-e", "trace=connect", "-o", str(log), *command]
    ended = subprocess.run(trace, cwd=folder, capture_output=True, text=True, timeout=240, check=False)
    if "ptrace" in ended.stderr:
        pytest.skip("strace is not permitted here")
    assert ended.returncode == 0, ended.stderr
    return [line for line in log.read_text().splitlines() if OUTSIDE.search(line)]


needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")


@needs_strace
def test_call_to_another_machine_is_detected(tmp_path: Path) -> None:
    """192.0.2.0/24 is nobody's (RFC 5737), and a datagram socket sends nothing when it connects."""
    connect = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('192.0.2.1', 9))"
    assert len(outside_calls(tmp_path, sys.executable, "-c", connect)) == 1
    assert not outside_calls(tmp_path, sys.executable, "-c", connect.replace("192.0.2.1", "127.0.0.1"))


@needs_strace
def test_no_run_calls_another_machine(tmp_path: Path) -> None:
    job = ["task=digits", "task.num_clients=10", "num_rounds=2", "engine.workers=2"]
    assert not outside_calls(tmp_path, sys.executable, "-m", "fedveil", "simulate", *job)


@needs_strace
@pytest.mark.campaign
@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed: pip install 'fedveil[ray]'")
def test_ray_asks_the_cloud_it_may_run_in_and_nobody_else(tmp_path: Path) -> None:
    """Ray's dashboard asks the link-local address for the name of the cloud, whether or not it reports usage."""
    job = ["engine=ray", "task=digits", "task.num_clients=10", "num_rounds=1"]
    calls = outside_calls(tmp_path, sys.executable, "-m", "fedveil", "simulate", *job)
    assert not [line for line in calls if "169.254.169.254" not in line and "sin_port=htons(53)" not in line]
