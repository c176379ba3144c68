"""`fedveil` without the seconds that imports take: a process that has imported, and forks for each command.

Run with `--serve SOCKET` it is that process. Run with anything else it is the command, as a shell finds it on its path:
it hands arguments, environment, folder and open files to the process behind `FEDVEIL_FORKS`, passes signals on, and
ends as the command does.
"""

import json
import os
import signal
import socket
import sys
from types import FrameType

MOST_BYTES = 1 << 16
SCRIPT = "--script"  # before the path of a script of Python, which runs in the place of a command
IMPORTED = (
    "dp_accounting",
    "opacus",
    "matplotlib.pyplot",
    "mlxtend.data",
    "sklearn.datasets",
    "fedveil.deployment.device.agent",
    "fedveil.client.training.cohort_training",
    "fedveil.deployment.device.commands",
    "fedveil.client.dp_sgd.train",
    "fedveil.links.grpc.device_end",
    "fedveil.tasks.digits",
    "fedveil.cli.provision",
    "fedveil.cli.budget",
    "fedveil.cli.app",
    "fedveil.cli.simulate",
    "fedveil.cli.ledger",
    "fedveil.cli.plan",
    "fedveil.cli.report",
    "fedveil.cli.verify",
    "fedveil.deployment.serve",
    "fedveil.privacy.accounting.loss_distributions",
    "fedveil.questions.simulated",
    "fedveil.simulations.simulate",
    "fedveil.run.run",
)


def ask(argv: list[str]) -> int:
    """Run `fedveil *argv` in a fork of the other process, with the files of this one; return its exit code."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as link:
        link.connect(os.environ["FEDVEIL_FORKS"])
        asked = json.dumps([argv, os.getcwd(), dict(os.environ)]).encode()
        socket.send_fds(link, [asked], [0, 1, 2])
        command = int(link.recv(32))

        def pass_on(number: int, _: FrameType | None) -> None:
            os.kill(command, number)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, pass_on)
        return int(link.recv(32))


def serve(path: str) -> None:
    """Answer until ended. This process has no threads, so that its children may."""
    import gc
    import importlib
    from types import SimpleNamespace

    from composed_once import compose_usual, remember
    from seldom_alarms import seldom_alarm

    for name in IMPORTED:
        importlib.import_module(name)
    remember(SimpleNamespace(setattr=lambda place, name, value, _=True: setattr(place, name, value)))
    compose_usual()
    seldom_alarm()
    gc.freeze()  # what was imported is no garbage, and no command need look for any in it
    gc.get_freeze_count = lambda: (
        1
    )  # which a simulation asks only to compare it with zero, and which is slow to count
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()
        while True:
            link, _ = listener.accept()
            if not os.fork():
                listener.close()
                watch(link)
                os._exit(0)
            link.close()


def watch(link: socket.socket) -> None:
    """Start the command that is asked for; tell its process, and then how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    asked, files, _, _ = socket.recv_fds(link, MOST_BYTES, 3)
    command = os.fork()
    if not command:
        link.close()
        argv, folder, environment = json.loads(asked)
        become(argv, folder, environment, files)
    link.send(str(command).encode())
    link.send(str(os.waitstatus_to_exitcode(os.waitpid(command, 0)[1])).encode())


def become(argv: list[str], folder: str, environment: dict[str, str], files: list[int]) -> None:
    """Be the command, and end with its exit code."""
    import traceback

    from fedveil.__main__ import main

    for number, file in enumerate(files):
        os.dup2(file, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = [
        os.path.abspath(each) for each in environment.get("PYTHONPATH", "").split(os.pathsep) if each
    ]
    sys.argv = ["fedveil", *argv]
    code = 70
    try:
        code = run_script(argv[1]) if argv[:1] == [SCRIPT] else main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001 (whatever it was, whoever asked sees it)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_script(path: str) -> int:
    """Run a script of Python as `python -W error PATH` would."""
    import runpy
    import warnings

    warnings.simplefilter("error")
    for kind in (DeprecationWarning, FutureWarning):  # of others' packages, to others
        warnings.simplefilter("ignore", kind)
    sys.argv = [path]
    sys.path.insert(0, os.path.dirname(path))
    runpy.run_path(path, run_name="__main__")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2])
    sys.exit(ask(sys.argv[1:]))
