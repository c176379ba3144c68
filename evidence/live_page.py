"""Callback that serves the page of a run on this machine while the run is in progress."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Generator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from socket import socket

from ..run.callbacks import Callback, RoundEnd, RunEnd, RunStart
from .live import LOOPBACK, listener

SERVES = "from fedveil.evidence.live import main; main()"  # program of the serving process
END_SECONDS = 5.0  # for the serving process to end; then it is killed


@dataclass
class LivePage:
    """Callback that starts the serving process once the run folder exists."""

    listens: socket  # socket on the loopback address, which the process inherits
    _process: subprocess.Popen[bytes] | None = None

    def start(self, run: RunStart) -> None:
        """Start the process, and print the page's address."""
        url = f"http://{LOOPBACK}:{self.listens.getsockname()[1]}/"
        print(f"page: {url} for the duration of the run", file=sys.stderr, flush=True)
        self._process = serving(self.listens, run.folder, os.getpid())
        self.listens.close()  # later forks of the run must not inherit it

    def round(self, round_end: RoundEnd) -> None:
        """Do nothing: the serving process reads the folder."""

    def end(self, ending: RunEnd) -> None:
        """Do nothing: the page stays until `close`."""

    def close(self) -> None:
        """End the serving process."""
        self.listens.close()
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def serving(listens: socket, folder: Path, owner: int) -> subprocess.Popen[bytes]:
    """Start a process that serves the page of a folder, with this process's package.

    Args:
      listens: on the loopback address.
      folder: of a run.
      owner: process id of the run; the server ends with it.
    """
    number = listens.fileno()
    # FEDVEIL_ variables may hold a passphrase of keys.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FEDVEIL_")}
    return subprocess.Popen(
        [sys.executable, "-P", "-c", SERVES, *map(str, (number, owner, folder.resolve()))],
        env={**environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        pass_fds=[number],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


@contextmanager
def live_page(port: int | None) -> Generator[tuple[Callback, ...]]:
    """Yield the callback that serves a page on a port, 0 for any free one, within the context; None serves no page."""
    if port is None:
        yield ()
        return
    with closing(LivePage(listener(port))) as page:
        yield (page,)
