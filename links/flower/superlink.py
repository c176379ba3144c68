"""Flower's SuperLink as a child process that only this user can reach, behind the front that devices see.

It keeps its state in SQLite and is restarted when it dies; nodes, messages on their way and the run continue.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

from ...base.durable_files import replace_file
from ...base.refusal import Refusal
from ..grpc.event_loop import stream_loop, until_one_ends
from ..roster_watch import Admitted, Nodes, admitted_in
from .control_calls import SUPERLINK, admit, open_run
from .fleet_calls import node_fingerprint
from .grid import SuperNodeGrid, open_supernodes
from .tls_proxy import MAX_REPLY_BYTES, TlsProxy, open_tls_proxy

logger = logging.getLogger("fedveil.server")

STATE, DATABASE, LOG, SECRET = "flower", "superlink.db", "superlink.log", "executor.key"
LISTED, KEYS = "supernodes.json", "supernodes"  # SuperNodes' admission list, and folder of their public keys
SECRET_BYTES = 32
START_SECONDS = 120.0  # it needs 7 on a busy machine of two cores
STOP_SECONDS = 10.0  # from asking it to end to killing it
WATCH_SECONDS = 1.0  # between two looks at the process and the admission list
HEALTH_SECONDS = 2.0  # for an answer that it serves
# For the operator's own commands: FLWR_HOME=FOLDER/flower flwr run APP fedveil
CONNECTIONS = "config.toml"
CONNECTION = """\
[superlink]
default = "fedveil"

[superlink.fedveil]
address = "{address}"
insecure = true
"""
# Flower by itself sends telemetry, asks for updates and installs an app's dependencies.
OFF = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_LOG_LEVEL": "WARNING",
}
TCP_TABLE = Path("/proc/net/tcp")  # proc(5): addresses, state and owner of each connection's ends
OPEN = "01"  # an end that is already closed is listed as root's
CHUNK_BYTES = 1 << 18
Address = tuple[str, int]


@dataclass
class SuperLink:
    """SuperLink process; `open_superlink` starts, watches and ends it.

    Attributes:
      folder: has its database, log and secret; readable for this user alone.
      address: host and port of its proxy on the loopback address; access to it allows running code here and on SuperNodes.
      listens: path of the Unix socket that it listens on.
      admitted: returns the nodes by the fingerprints of their SuperNode keys.
      keys: folder of the public keys themselves.
    """

    folder: Path
    address: str
    listens: Path
    admitted: Admitted
    keys: Path
    _process: subprocess.Popen[bytes] | None = None
    _admitted_keys: set[bytes] = field(default_factory=set[bytes])  # as the SuperLink has them

    def secret(self) -> bytes:
        """Return the secret that identifies the executor of its tasks, this process; it is drawn and stored if missing."""
        path = self.folder / SECRET
        if not path.exists():
            replace_file(path, secrets.token_bytes(SECRET_BYTES))
        return path.read_bytes()

    def command(self) -> list[str]:
        """Return its command line."""
        self.secret()
        host, port = self.address.split(":")
        return [
            *(sys.executable, "-c", SUPERLINK, str(self.listens), str(os.getpid())),
            *("--host", host, "--port", port, "--insecure"),
            *("--isolation", "process", "--superexec-auth-secret-file", str(self.folder / SECRET)),
            *("--database", str(self.folder / DATABASE), "--log-file", str(self.folder / LOG)),
            "--disable-runtime-dependency-installation",
        ]

    def start(self) -> None:
        """Start it and wait until it serves.

        Raises:
          Refusal: it ends, or does not serve within `START_SECONDS`.
        """
        (self.folder / CONNECTIONS).write_text(CONNECTION.format(address=self.address))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FLWR_")}
        self._process = subprocess.Popen(
            self.command(),
            env={**environment, **OFF, "FLWR_HOME": str(self.folder)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # an interrupt of the terminal is ours to pass on, in order
        )
        end = time.monotonic() + START_SECONDS
        while not self._healthy():
            if self._process.poll() is not None or time.monotonic() > end:
                self.stop()
                raise Refusal("link", "flower", f"the SuperLink does not start; see {self.folder / LOG}")
            time.sleep(0.1)

    def stop(self) -> None:
        """End it: ask first, and kill it after `STOP_SECONDS`."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def admit_nodes(self) -> None:
        """Update its list of admitted keys, if it has changed."""
        keys = public_keys(self.keys, self.admitted())
        if keys != self._admitted_keys:
            admit(self.address, keys)
            self._admitted_keys = keys

    def watch(self, over: threading.Event) -> None:
        """Restart it whenever it dies, and follow the admission list, until `over` is set."""
        while not over.wait(WATCH_SECONDS):
            try:
                if self._process is not None and self._process.poll() is not None:
                    logger.warning("the SuperLink died (%s) and is started again", self._process.returncode)
                    self.start()
                self.admit_nodes()
            except (Refusal, httpx.HTTPError, OSError) as failure:
                logger.error("the SuperLink is not as it should be: %s", failure)

    def _healthy(self) -> bool:
        with suppress(httpx.HTTPError):
            return httpx.get(f"http://{self.address}/health", timeout=HEALTH_SECONDS).is_success
        return False


@contextmanager
def open_superlink(folder: Path, listen: str, nodes: Nodes) -> Generator[SuperNodeGrid]:
    """Run a SuperLink and its front within the context, and yield the grid on them.

    Args:
      folder: holds tls.pem, tls.key, supernodes.json and the keys in supernodes/; the SuperLink keeps its state there.
      listen: address and port of the front.
      nodes: returns the roster's nodes.

    Raises:
      Refusal: the address cannot be listened on, a key is missing, or the SuperLink does not start.
    """
    (folder / STATE).mkdir(mode=0o700, exist_ok=True)
    admitted = admitted_in(folder / LISTED, nodes)
    with ExitStack() as opened:
        # Not in the folder: the path of a Unix socket has room for a hundred characters.
        listens = Path(opened.enter_context(TemporaryDirectory(prefix="fedveil-"))) / "superlink"
        address = opened.enter_context(open_proxy(listens))
        link = SuperLink(folder / STATE, address, listens, admitted, folder / KEYS)
        over = threading.Event()
        watch = threading.Thread(target=link.watch, args=(over,), name="superlink")
        run = partial(open_run, link.address, link.secret(), MAX_REPLY_BYTES)
        front = TlsProxy(f"http://{link.address}", admitted, listens)
        opened.enter_context(open_tls_proxy(front, listen, folder / "tls.pem", folder / "tls.key"))
        try:
            link.start()
            link.admit_nodes()
            watch.start()
            with open_supernodes(run, nodes, admitted, front.traffic) as grid:
                yield grid
        finally:
            over.set()
            if watch.is_alive():
                watch.join()
            link.stop()


def public_keys(folder: Path, admitted: Mapping[str, int]) -> set[bytes]:
    """Return the admitted keys, in PEM as Flower has them, from a folder of OpenSSH's .pub files.

    Raises:
      Refusal: one is missing, or a file is no key.
    """
    pems: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.pub")):
        try:
            key = load_ssh_public_key(path.read_bytes())
        except ValueError:
            raise Refusal("file", str(path), "is not a public key in OpenSSH's form") from None
        pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        pems[node_fingerprint(pem)] = pem
    missing = sorted(node for fingerprint, node in admitted.items() if fingerprint not in pems)
    if missing:
        remedy = f"the SuperNode keys of nodes {missing} are missing; provision again"
        raise Refusal("file", str(folder), remedy)
    return {pems[fingerprint] for fingerprint in admitted}


@contextmanager
def open_proxy(path: Path) -> Generator[str]:
    """Forward connections of this user's processes to the socket at `path`, and yield the proxy's loopback address.

    Flower's SuperLink has no password for its operator: access to it allows running code. It therefore listens on a
    socket in a folder that only this user may enter. Flower's own commands, which need a port, use this proxy.
    """
    loop = stream_loop()
    server = asyncio.start_server(partial(_pass_on, path), "127.0.0.1", 0)
    listening = asyncio.run_coroutine_threadsafe(server, loop).result()
    host, port = listening.sockets[0].getsockname()
    try:
        yield f"{host}:{port}"
    finally:
        loop.call_soon_threadsafe(listening.close)


async def _pass_on(path: Path, caller: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
    """Forward one connection to the socket at `path`, if a process of this user opened it."""
    theirs, ours = (back.get_extra_info(end) for end in ("peername", "sockname"))
    with suppress(OSError):  # the SuperLink does not listen yet, or one end has closed
        try:
            if (user := owner_of(theirs, ours)) != os.geteuid():
                logger.warning("a call of the operator's by user %s was turned away", user)
                return
            answers, on = await asyncio.open_unix_connection(path)
            try:
                await until_one_ends(_copy(caller, on), _copy(answers, back))
            finally:
                on.close()
        finally:
            back.close()


def owner_of(end: Address, other: Address) -> int | None:
    """Return the user who owns an end of a connection on this machine; None if that end is not open."""
    ends = [_table_address(*end), _table_address(*other), OPEN]
    for line in TCP_TABLE.read_text().splitlines()[1:]:
        fields = line.split()
        if fields[1:4] == ends:
            return int(fields[7])
    return None


def _table_address(host: str, port: int) -> str:
    """Return an address as `TCP_TABLE` writes it: hexadecimal, with the bytes of the host in the machine's order."""
    return f"{int.from_bytes(socket.inet_aton(host), sys.byteorder):08X}:{port:04X}"


async def _copy(source: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
    while data := await source.read(CHUNK_BYTES):
        to.write(data)
        await to.drain()
