"""A process that has imported what fedveil's commands import and starts each in a child of its own.

It reads lines of JSON, [argv, file], with a network namespace, a cgroup, and the stage and round of its death behind
them where there are, and prints the child's process id. What the command prints goes into the file, and its exit code
into the file of that name and `.rc`; one that is killed leaves none. In a cgroup a command begins as a fresh process,
whose memory is its own, and leaves no exit code. This one has no threads and no sockets, so that its children may.
"""

import ctypes
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import deaths
from seldom_alarms import seldom_alarm

import fedveil.__main__
import fedveil.client.dp_sgd.train
import fedveil.deployment.device.agent
import fedveil.deployment.device.commands
import fedveil.deployment.serve
import fedveil.deployment.status
import fedveil.links.flower.device_end
import fedveil.links.flower.superlink
import fedveil.links.grpc.device_end
import fedveil.links.grpc.grid
import fedveil.tasks.digits

NETWORK = 0x40000000  # linux/sched.h: CLONE_NEWNET


def enter(namespace: str) -> None:
    with open(f"/run/netns/{namespace}") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), NETWORK):
            raise OSError(ctypes.get_errno(), f"the namespace {namespace} cannot be entered")


def become(argv: list[str], file: str, namespace: str = "", cgroup: str = "", *death: Any) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number in (1, 2):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    sys.argv = ["fedveil", *argv]
    if namespace:
        enter(namespace)
    if cgroup:
        Path(cgroup, "cgroup.procs").write_text(str(os.getpid()))
        os.execv(sys.executable, [sys.executable, "-m", "fedveil", *argv])
    if death:
        deaths.arrange(*death)
    code = 99
    try:
        code = fedveil.__main__.main()
    except BaseException:  # noqa: BLE001 (whatever it was, whoever reads the file sees it)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        with open(f"{file}.rc", "w") as rc:
            rc.write(str(code))
        os._exit(code)


if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    seldom_alarm()
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if not child:
            become(*asked)
        print(child, flush=True)
