"""Page of a running run, over HTTP on the loopback address: the current output of `fedveil report` for its folder.

A separate process serves it. That process has only the folder and a socket: its memory contains no update of a client
and no key, it does not use the run's threads, and forks of the run inherit no lock of it. Before the first request it
has imported little and waits.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from email.message import Message
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from ..base.refusal import Refusal
from ..run.files import ASSESSMENT, REPORT

LOOPBACK = "127.0.0.1"
LOCAL_NAME = re.compile(r"(127\.0\.0\.1|localhost)(:\d{1,5})?")  # another name may be rebound to this address
HTML, JSON, TEXT = (f"{kind}; charset=utf-8" for kind in ("text/html", "application/json", "text/plain"))
KINDS = {"/": HTML, f"/{REPORT}": JSON}  # content type by path; no other path is served
ANSWER_SECONDS = 5.0  # for which a browser's connection may be silent
LOOK_AGAIN = 10  # seconds, after which a browser that shows the page asks for it anew
# A page is kept for so many times the CPU time that it took, so that pages take a twentieth of a core; and for at most so
# many seconds, after which the rounds of a long run would be old news.
LEISURE, MAX_SECONDS = 20, 15.0
# The run's own work comes first; at 19, a page of 3 s of CPU takes minutes on a busy machine.
NICENESS = 5
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Refresh": str(LOOK_AGAIN),
}


def is_local_request(headers: Message) -> bool:
    """Return whether a request's host is this machine's own name, at any port, because a tunnel may use another.

    This stops a page of another site whose name resolves to this machine (DNS rebinding).
    """
    hosts = headers.get_all("Host", [])
    return len(hosts) == 1 and bool(LOCAL_NAME.fullmatch(hosts[0].lower()))


def listener(port: int) -> socket.socket:
    """Return a socket that listens on a port of the loopback address, 0 for any free one; refuse a taken one."""
    try:
        return socket.create_server((LOOPBACK, port))
    except OSError as error:
        remedy = f"cannot be listened on ({error.strerror}); choose another port, or none"
        raise Refusal("--page-port", port, remedy) from error


class FolderPage:
    """Page of one run and its JSON, regenerated on request if the last ones are old."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._lock = folder, threading.Lock()
        self._texts: Mapping[str, bytes] | str = {}
        self._expiry = 0.0

    def texts(self) -> Mapping[str, bytes] | str:
        """Return the served texts by path, or why there is no page: no run yet, or a file that is being written."""
        with self._lock:
            if time.monotonic() >= self._expiry:
                begin = time.thread_time()
                self._texts = self._make()
                lifetime = min(LEISURE * (time.thread_time() - begin), MAX_SECONDS)
                self._expiry = time.monotonic() + lifetime
            return self._texts

    def _make(self) -> Mapping[str, bytes] | str:
        """Return the page and the JSON of the folder as it is now, by path, or why they cannot be made."""
        try:
            from ..run.run_files import read_run
            from .commands import commands_of
            from .content import report_of, to_json
            from .forms import read_assessment
            from .page import page_of

            now = datetime.now(UTC).isoformat(timespec="seconds")
            run = read_run(self._folder, read_assessment(self._folder / ASSESSMENT))
            report = report_of(run, commands_of(run), as_of=now)
            return {"/": page_of(report).encode(), f"/{REPORT}": to_json(report).encode()}
        except Refusal as refusal:
            return f"the page is not available: {refusal}"
        except Exception as error:  # noqa: BLE001 (files that change while they are read fail in any way)
            return f"the page is not available: {type(error).__name__}"


class LoopbackServer(ThreadingHTTPServer):
    """Server on a socket of `listener`, which ends with the process `parent` that started it."""

    daemon_threads = True

    def __init__(self, listens: socket.socket, answer: type[BaseHTTPRequestHandler], parent: int) -> None:
        super().__init__(listens.getsockname(), answer, bind_and_activate=False)
        self.socket.close()
        self.socket, self._parent = listens, parent

    def service_actions(self) -> None:
        """End if the process that started this one is gone; the base class calls this twice a second."""
        if os.getppid() != self._parent:
            raise SystemExit

    def handle_error(self, request: object, client_address: object) -> None:
        """Log nothing: a closed browser is not an event."""


class PageServer(LoopbackServer):
    """Server of one page."""

    def __init__(self, listens: socket.socket, page: FolderPage, parent: int) -> None:
        super().__init__(listens, PageAnswer, parent)
        self.page = page


class PageAnswer(BaseHTTPRequestHandler):
    """Answer to one request: the page or its JSON, for reading requests under this machine's own name."""

    timeout = ANSWER_SECONDS
    server_version, sys_version = "fedveil", ""

    def do_GET(self) -> None:
        """Answer a reading request."""
        if not is_local_request(self.headers):
            self.send_error(HTTPStatus.MISDIRECTED_REQUEST)
        elif self.path not in KINDS:
            self.send_error(HTTPStatus.NOT_FOUND)
        else:
            self._send_page()

    do_HEAD = do_GET

    def _send_page(self) -> None:
        """Answer with the page or its JSON, or with why there is none."""
        assert isinstance(self.server, PageServer)
        texts = self.server.page.texts()
        if isinstance(texts, str):
            self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, texts)
        else:
            self._send(HTTPStatus.OK, KINDS[self.path], texts[self.path])

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer with an error and a sentence, as text."""
        self._send(HTTPStatus(code), TEXT, f"{message or HTTPStatus(code).phrase}\n".encode())

    def _send(self, code: HTTPStatus, kind: str, body: bytes) -> None:
        """Send an answer of this content type; without its body to a request of HEAD."""
        self.send_response(code)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **HEADERS}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: requests are not events."""


def main() -> None:
    """Serve the page of a run folder until the run's process is gone.

    The arguments of the command are the number of the socket, the process id of the run, and the folder.
    """
    number, parent, folder = sys.argv[1:]
    os.nice(NICENESS)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run answers it, and may need a while to end
    PageServer(socket.socket(fileno=int(number)), FolderPage(Path(folder)), int(parent)).serve_forever()
