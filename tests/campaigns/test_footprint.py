"""How much memory a device takes, of agents in a memory cgroup; figures for docs/evidence/reliability.md. Linux, as root."""

import json
import os
import re
import runpy
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedveil.messages.local_training import LocalTraining
from fedveil.messages.training_order import ORDER_KEY, ModeName, RecordTerms, TrainingOrder
from fedveil.messages.wire import instruct, memory_arrays
from fedveil.privacy.budget import Adjacency
from fedveil.privacy.mechanisms.sum_spec import SumSpec

HERE = Path(__file__).parents[1]
ENDS = runpy.run_path(str(HERE / "end_to_end/test_device.py"))
SMALL = runpy.run_path(str(HERE / "faults" / "small_devices.py"))
Limited, make_pictures = SMALL["Limited"], SMALL["make_pictures"]
ROUNDS = 3


def memory_of(pid: int) -> dict[str, int]:
    """Return MiB: resident now, its part that cannot be dropped, and the peak."""
    text = Path(f"/proc/{pid}/status").read_text()
    found = {name: int(size) // 1024 for name, size in re.findall(r"(VmHWM|VmRSS|RssAnon):\s+(\d+) kB", text)}
    return {"resident": found["VmRSS"], "anonymous": found["RssAnon"], "peak": found["VmHWM"]}


def asked(order: TrainingOrder, spec: SumSpec, number: int, arrays) -> Message:
    config = ConfigRecord({ORDER_KEY: order.to_json()})
    content = RecordDict({"arrays": memory_arrays(arrays), "config": config})
    return Message(instruct(content, spec, order.run, number), 2, "train")


@contextmanager
def lone_agent(agents, limit: int) -> Iterator[tuple[int, Any]]:
    """Start the agent of c0 in a cgroup of its own."""
    group = Limited(str(os.getpid()), limit)
    path = os.pathsep.join([str(HERE / "examples"), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        group.command(sys.executable, "-m", "fedveil", "client", "start", str(agents.clients / "c0")),
        env={**os.environ, "PYTHONPATH": path},
        stderr=subprocess.PIPE,
        text=True,
    )
    agents.processes[0] = process
    try:
        ENDS["until"](lambda: 2 in agents.server.connected or process.poll() is not None)
        assert process.poll() is None, process.communicate()
        time.sleep(2)
        yield process.pid, group
    finally:
        agents.end(0)
        ENDS["until"](lambda: group.empty)
        group.remove()


def rounds(agents, order, spec, arrays) -> None:
    for number in range(1, ROUNDS + 1):
        (reply,) = agents.server.send_and_receive([asked(order, spec, number, arrays)], timeout=300)
        assert not reply.has_error(), reply.error


@pytest.mark.campaign
@pytest.mark.skipif(
    not os.access(SMALL["CGROUP"], os.W_OK), reason="needs a memory cgroup of version 1, as root"
)
def test_memory_of_a_device(tmp_path):
    figures: dict[str, object] = {}
    with ENDS["federation"](tmp_path) as agents:
        made = ENDS["MADE"]
        central, spec = made["CENTRAL"], made["SPEC"]
        linear = {name: array.numpy() for name, array in made["content"]()["arrays"].items()}
        with lone_agent(agents, 128) as (pid, group):
            figures["linear, idle"] = memory_of(pid)
            rounds(agents, central, spec, linear)
            figures["linear, after rounds"] = {**memory_of(pid), "cgroup peak": round(group.peak)}
        make_pictures(agents.clients / "c0")
        sys.path.insert(0, str(HERE / "examples"))
        from device_cnn import Pictures

        from fedveil.tasks.arrays import read_arrays

        arrays = read_arrays(Pictures().model())
        with lone_agent(agents, 200) as (pid, group):
            figures["CNN, idle"] = {**memory_of(pid), "cgroup peak": round(group.peak)}
        with lone_agent(agents, 512) as (pid, group):
            rounds(agents, replace(central, run="summer"), spec, arrays)
            figures["CNN, SGD, after rounds"] = {**memory_of(pid), "cgroup peak": round(group.peak)}
        record = RecordTerms(8.0, 1e-4, 1.0, Adjacency.ZERO_OUT, 10)
        private = TrainingOrder("autumn", ModeName.RECORD, LocalTraining(0.1, 1, 64), record=record)
        with lone_agent(agents, 512) as (pid, group):
            rounds(agents, private, SumSpec(None), arrays)
            figures["CNN, DP-SGD, after rounds"] = {**memory_of(pid), "cgroup peak": round(group.peak)}
    print(json.dumps(figures, indent=1))
    peaks = {name: found["peak"] for name, found in figures.items() if isinstance(found, dict)}
    assert peaks["linear, after rounds"] < 128
    assert peaks["CNN, SGD, after rounds"] < 512
    assert peaks["CNN, DP-SGD, after rounds"] < 512
