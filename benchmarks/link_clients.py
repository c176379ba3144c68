"""Clients of the link that add a number, without torch: ``python -m fedveil.benchmarks.link_clients FILE``.

One client follows as a device does. Many in one process share a thread that answers for all of them, so that hundreds of
connections fit on a machine.
"""

from __future__ import annotations

import asyncio
import json
import queue
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Message, RecordDict

from ..configs.bundle_files import Credentials
from ..links.device_answers import Handle, Journal
from ..links.grpc.device_end import DeviceStream, Endpoint, Inbox, answer_one, follow
from ..links.grpc.event_loop import stream_loop
from ..messages.flower_adapter import records_of
from ..messages.wire import memory_arrays, view

ARRAYS = "arrays"


def add_one(message: Message) -> Message:
    """Return the instruction's arrays, each number plus one."""
    arrays = {
        name: np.add(view(array), 1, dtype=np.float32)
        for name, array in records_of(message.content, ArrayRecord)[ARRAYS].items()
    }
    return Message(RecordDict({ARRAYS: memory_arrays(arrays)}), reply_to=message)


def crowd(endpoints: Sequence[Endpoint], handle: Handle, folder: Path, stop: threading.Event) -> None:
    """Follow as every endpoint, one instruction at a time among them all, until `stop` is set."""
    inbox: Inbox = queue.SimpleQueue()
    lines = {
        DeviceStream(each, inbox, _unsaid): Journal(folder / f"journal-{each.node}") for each in endpoints
    }
    kept = [asyncio.run_coroutine_threadsafe(line.keep(), stream_loop()) for line in lines]
    while not stop.is_set():
        answer_one(inbox, handle, lines.__getitem__)
    for line in lines:
        line.hang_up()
    for each in kept:
        each.result()


def _unsaid(_: str) -> None:
    pass


def write_endpoints(path: Path, endpoints: Sequence[Endpoint]) -> None:
    """Write what `read_endpoints` reads."""
    told = [
        [each.server, each.node, *(pem.decode() for pem in asdict(each.credentials()).values())]
        for each in endpoints
    ]
    path.write_text(json.dumps(told))


def read_endpoints(path: Path) -> list[Endpoint]:
    """Return who is to follow where."""
    return [
        Endpoint(server, node, partial(Credentials, *(pem.encode() for pem in pems)))
        for server, node, *pems in json.loads(path.read_text())
    ]


def main(path: Path) -> None:
    """Follow until the process is ended."""
    endpoints = read_endpoints(path)
    with tempfile.TemporaryDirectory() as folder:
        if len(endpoints) == 1:
            follow(endpoints[0], add_one, Path(folder) / "journal", threading.Event(), _unsaid)
        crowd(endpoints, add_one, Path(folder), threading.Event())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
