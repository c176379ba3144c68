"""Server of the owner's page on the loopback address: reading requests, and forms whose token and origin are its own.

It runs in a process of its own, which reads the device's files and writes decisions. Its memory contains no key and no data.
"""

from __future__ import annotations

import hmac
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager, suppress
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qs

from ...base.core_dumps import without_core_dumps
from ...base.refusal import Refusal
from ...evidence.live import (
    ANSWER_SECONDS,
    HEADERS,
    HTML,
    LOOPBACK,
    TEXT,
    LoopbackServer,
    is_local_request,
    listener,
)
from ..device.client_bundle import read_device_file
from ..device.owner_decisions import OWNER, OwnerVerdict
from ..device.owner_desk import decide, read_desk
from ..device.owner_roles import read_roles
from . import view
from .sessions import OwnerSession, OwnerSessions

FORM = "application/x-www-form-urlencoded"
MAX_FORM_BYTES, MAX_FIELDS = 8192, 8
PROGRAM = "from fedveil.deployment.owner_page.serve import main; main()"  # of the process beside an agent
END_SECONDS = 5.0  # for that process to end; then it is killed
SITES = ("same-origin", "none")  # of Sec-Fetch-Site: this page itself, or an address that its user typed
LOCKED = "too many wrong passphrases: wait a minute, then try again"
# A style by its hash and no script; forms go to this page alone. With `same-origin` a browser names the origin of a form.
POLICY = "default-src 'none'; style-src 'sha256-{style}'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"


class OwnerPage:
    """Page of one device, with its sessions."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.sessions = folder, OwnerSessions()
        self.device = read_device_file(folder)
        self.one_at_a_time = threading.Lock()
        self.headers = {
            **{name: value for name, value in HEADERS.items() if name != "Refresh"},
            "Content-Security-Policy": POLICY.format(style=view.style_hash()),
            "Referrer-Policy": "same-origin",
        }

    @property
    def state(self) -> Path:
        """State folder of the device."""
        return self.folder / self.device.state

    def address(self, port: int) -> str:
        """Return the address to open: of the sign-in where roles exist, otherwise with a session of its owner."""
        base = f"http://{LOOPBACK}:{port}/"
        if read_roles(self.state).keys:
            return base
        return f"{base}s/{self.sessions.open(OWNER, has_passphrase=False).secret}/"

    def sessions_with(self, secret: str) -> list[OwnerSession]:
        """Return the open session with a secret, alone in a list; one without a passphrase counts only without roles.

        Raises:
          Refusal: the roles cannot be read.
        """
        sessions = self.sessions.with_secret(secret)
        has_roles = bool(sessions) and bool(read_roles(self.state).keys)
        return [each for each in sessions if each.has_passphrase or not has_roles]


class OwnerServer(LoopbackServer):
    """Server of an owner's page."""

    def __init__(self, listens: socket.socket, page: OwnerPage, parent: int) -> None:
        super().__init__(listens, OwnerAnswer, parent)
        self.page = page


class OwnerAnswer(BaseHTTPRequestHandler):
    """Answer to one request, under this machine's own name."""

    timeout = ANSWER_SECONDS
    server_version, sys_version = "fedveil", ""

    @property
    def page(self) -> OwnerPage:
        """Page of the server."""
        assert isinstance(self.server, OwnerServer)
        return self.server.page

    def do_GET(self) -> None:
        """Answer a reading request."""
        if not is_local_request(self.headers):
            return self.send_error(HTTPStatus.MISDIRECTED_REQUEST)
        if self.path == "/":
            return self._send_sign_in()
        for session in self._sessions():
            return self._answering(partial(self._show, session))
        return self.send_error(HTTPStatus.NOT_FOUND)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """Answer a form: a sign-in, or a decision in a session with its token."""
        fields = self._form()
        if fields is None:
            return
        if self.path == "/sign-in":
            return self._answering(partial(self._sign_in, fields))
        for session in self._sessions():
            if not hmac.compare_digest(fields.get("csrf", "").encode(), session.csrf.encode()):
                return self.send_error(HTTPStatus.FORBIDDEN)
            return self._answering(partial(self._act, session, fields))
        return self.send_error(HTTPStatus.NOT_FOUND)

    def _sessions(self) -> list[OwnerSession]:
        """Return the session of the path, alone in a list; empty without one."""
        _, first, *rest = [*self.path.split("/"), ""]
        if first != "s" or len(rest) <= 2:
            return []
        try:
            return self.page.sessions_with(rest[0])
        except Refusal:  # nobody may decide
            return []

    def _answering(self, respond: Callable[[], None]) -> None:
        """Respond; a refusal becomes a page with its sentence."""
        try:
            respond()
        except Refusal as refusal:
            back = "/".join(self.path.split("/")[:3]) + "/"
            body = view.message_page("Not done", str(refusal), back)
            self._send(HTTPStatus.UNPROCESSABLE_ENTITY, HTML, body.encode())

    def _form(self) -> dict[str, str] | None:
        """Return the fields of a form of this page; None after an error was sent."""
        origin, host = self.headers.get_all("Origin", []), self.headers.get("Host", "")
        length = self.headers.get("Content-Length", "")
        if not is_local_request(self.headers):
            return self.send_error(HTTPStatus.MISDIRECTED_REQUEST)
        if origin != [f"http://{host}"] or self.headers.get("Sec-Fetch-Site", "none") not in SITES:
            return self.send_error(HTTPStatus.FORBIDDEN)
        if self.headers.get("Content-Type", "").partition(";")[0].strip().lower() != FORM:
            return self.send_error(HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
        if not length.isascii() or not length.isdigit() or int(length) > MAX_FORM_BYTES:
            return self.send_error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        try:
            text = self.rfile.read(int(length)).decode()
            parsed = parse_qs(text, keep_blank_values=True, strict_parsing=True, max_num_fields=MAX_FIELDS)
            return {name: value for name, (value,) in parsed.items()}
        except (OSError, ValueError):
            return self.send_error(HTTPStatus.BAD_REQUEST)

    def _show(self, session: OwnerSession) -> None:
        """Send the page of a session that the path names."""
        desk, subject = read_desk(self.page.folder), self.path.split("/")[3:]
        match subject:
            case [""]:
                self._send(HTTPStatus.OK, HTML, view.overview(desk, session.role, session.csrf).encode())
            case ["watch"]:
                body = view.overview(desk, session.role, session.csrf, watches=True)
                self._send(HTTPStatus.OK, HTML, body.encode(), {"Refresh": str(view.REFRESH_SECONDS)})
            case ["pause"]:
                self._send(HTTPStatus.OK, HTML, view.pause_page(desk, session.csrf).encode())
            case ["request", name]:
                body = view.decision_page(desk, desk.request(name), session.csrf)
                self._send(HTTPStatus.OK, HTML, body.encode())
            case _:
                self.send_error(HTTPStatus.NOT_FOUND)

    def _act(self, session: OwnerSession, fields: dict[str, str]) -> None:
        """Follow a form of a session: sign out, or decide."""
        action = self.path.split("/")[3:]
        if action == ["sign-out"]:
            self.page.sessions.close(session)
            return self._redirect("/")
        if action != ["decide"]:
            return self.send_error(HTTPStatus.NOT_FOUND)
        verdict = next((each for each in OwnerVerdict if each == fields.get("verdict")), None)
        if verdict is None:
            return self.send_error(HTTPStatus.BAD_REQUEST)
        with self.page.one_at_a_time:
            request, reason = fields.get("request", ""), fields.get("reason", "").strip()
            decide(self.page.folder, verdict, request, reason, session.role)
        return self._redirect(f"/s/{session.secret}/")

    def _sign_in(self, fields: dict[str, str]) -> None:
        """Open a session for the role with this passphrase; the address then has its secret."""
        page = self.page
        if page.sessions.locked:
            return self._send_sign_in(LOCKED, HTTPStatus.TOO_MANY_REQUESTS)
        role = fields.get("role", "")
        with page.one_at_a_time:  # each check takes memory
            opens = read_roles(page.state).opens(role, fields.get("passphrase", ""))
        if not opens:
            page.sessions.fail()
            return self._send_sign_in("this is not the passphrase of this role", HTTPStatus.FORBIDDEN)
        return self._redirect(f"/s/{page.sessions.open(role, has_passphrase=True).secret}/")

    def _send_sign_in(self, fault: str = "", code: HTTPStatus = HTTPStatus.OK) -> None:
        """Send the page of the sign-in; without roles there is none, and the terminal has the address."""
        try:
            has_roles = bool(read_roles(self.page.state).keys)
        except Refusal as refusal:
            return self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, str(refusal))
        if not has_roles:
            return self.send_error(HTTPStatus.NOT_FOUND, "open the whole address that the client has printed")
        return self._send(code, HTML, view.sign_in_page(self.page.device.name, fault).encode())

    def _redirect(self, path: str) -> None:
        self._send(HTTPStatus.SEE_OTHER, TEXT, b"", {"Location": path})

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer with an error and a sentence, as text."""
        self._send(HTTPStatus(code), TEXT, f"{message or HTTPStatus(code).phrase}\n".encode())

    def _send(self, code: HTTPStatus, kind: str, body: bytes, more: dict[str, str] | None = None) -> None:
        """Send an answer of this content type, with more headers; without its body to a request of HEAD."""
        fields = {"Content-Type": kind, "Content-Length": str(len(body)), **self.page.headers, **(more or {})}
        self.send_response(code)
        for name, value in fields.items():
            self.send_header(name, value)
        self.send_header("Connection", "close")
        self.close_connection = True
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: requests are not events, and their paths have secrets."""


def serve(listens: socket.socket, folder: Path, parent: int) -> None:
    """Serve the page of a device until the process `parent` is gone, or an interrupt.

    Args:
      listens: on the loopback address.
      folder: of the device's bundle.
      parent: process id of whoever started this one.

    Raises:
      Refusal: the folder holds no client's bundle, or its roles cannot be read.
    """
    without_core_dumps()
    page = OwnerPage(folder)
    print(f"page: {page.address(listens.getsockname()[1])}", file=sys.stderr, flush=True)
    with suppress(KeyboardInterrupt):
        OwnerServer(listens, page, parent).serve_forever()


def serve_here(folder: Path, port: int) -> int:
    """Serve the page of a device in this process until an interrupt; return the exit code. Errors as of `serve`."""
    with listener(port) as listens:
        serve(listens, folder, os.getppid())
    return 0


@contextmanager
def page_beside(folder: Path, port: int | None) -> Generator[None]:
    """Serve the page of a device in another process during the block; None serves none.

    Raises:
      Refusal: the port is taken.
    """
    if port is None:
        yield
        return
    with closing(listener(port)) as listens:
        process = _process(listens, folder)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _process(listens: socket.socket, folder: Path) -> subprocess.Popen[bytes]:
    """Start the process of a page, with this process's package; it prints its address on this one's standard error."""
    number = listens.fileno()
    # FEDVEIL_ variables may hold a passphrase of keys.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FEDVEIL_")}
    return subprocess.Popen(
        [sys.executable, "-P", "-c", PROGRAM, *map(str, (number, os.getpid(), folder.resolve()))],
        env={**environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        pass_fds=[number],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )


def main() -> None:
    """Serve the page of a device beside its agent; the arguments are the socket's number, the agent's id and the folder."""
    number, parent, folder = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the agent answers it, and ends this process
    serve(socket.socket(fileno=int(number)), Path(folder), int(parent))
